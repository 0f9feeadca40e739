"""Latency: backends that measure workloads, the table of their results, and the store on disk."""

from __future__ import annotations

from typing import Any

from lmfx.latency.backend import Backend, Measurement, Prune, Whole
from lmfx.latency.table import Calibration, LatencyTable, calibrate
from lmfx.latency.workload import Workload, signature
from lmfx.passes.errors import OptionError
from lmfx.store.rows import Store, default_cache_dir

__all__ = [
    "BACKENDS",
    "Backend",
    "Calibration",
    "LatencyTable",
    "Measurement",
    "Prune",
    "Store",
    "Whole",
    "Workload",
    "calibrate",
    "default_cache_dir",
    "get_backend",
    "signature",
]

BACKENDS = ("onnxruntime", "torch", "roofline", "tensorrt")


def get_backend(backend: str | Backend = "onnxruntime", **options: Any) -> Backend:
    """A backend by its name, with its options (`threads`, `device`, ...); a backend object is returned as it is.

    Raises `OptionError` for an unknown name or option, `MissingExtra` if its package is not installed, `DeviceError` if
    its device is not there.
    """
    if isinstance(backend, type):
        raise OptionError(f"the backend is the class {backend.__name__}: pass an object, {backend.__name__}()")
    if not isinstance(backend, str):
        if not isinstance(backend, Backend):
            raise OptionError(
                f"a latency backend is one of {', '.join(BACKENDS)}, or an object with name, identity, measure and "
                f"measure_interleaved; a {type(backend).__name__} is not"
            )
        if options:
            raise OptionError(f"the options {', '.join(options)} go with a backend's name, not with a backend object")
        return backend
    kind: Any
    if backend == "onnxruntime":
        from lmfx.latency.backends.onnxruntime import OnnxRuntimeBackend as kind
    elif backend == "torch":
        from lmfx.latency.backends.torch_backend import TorchBackend as kind
    elif backend == "roofline":
        from lmfx.latency.backends.roofline import RooflineBackend as kind
    elif backend == "tensorrt":
        from lmfx.latency.backends.tensorrt import TensorRTBackend as kind
    else:
        raise OptionError(f"unknown latency backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    import inspect

    known = [p for p in inspect.signature(kind).parameters]
    if unknown := [o for o in options if o not in known]:
        raise OptionError(f"the backend {backend!r} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    made: Backend = kind(**options)
    return made
