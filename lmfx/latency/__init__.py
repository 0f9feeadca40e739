"""Latency: backends that measure workloads, the table of their results, and the store on disk."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from lmfx.latency.backend import Backend, Measurement, Prune, Whole
from lmfx.latency.table import CalibrationLine, LatencyTable, calibrate
from lmfx.latency.workload import Workload, signature
from lmfx.passes.errors import OptionError
from lmfx.store.rows import Store, default_cache_dir

__all__ = [
    "BACKENDS",
    "Backend",
    "CalibrationLine",
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

BACKENDS = {
    "onnxruntime": "onnxruntime.OnnxRuntimeBackend",
    "torch": "torch_backend.TorchBackend",
    "aotinductor": "aot_inductor.AotInductorBackend",
    "roofline": "roofline.RooflineBackend",
    "tensorrt": "tensorrt.TensorRTBackend",
}
"""Name -> module of `lmfx.latency.backends` and its class, imported when the backend is asked for."""


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
    if backend not in BACKENDS:
        raise OptionError(f"unknown latency backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    module, _, name = BACKENDS[backend].partition(".")
    kind = getattr(importlib.import_module(f"lmfx.latency.backends.{module}"), name)
    known = [p for p in inspect.signature(kind).parameters]
    if unknown := [o for o in options if o not in known]:
        raise OptionError(f"the backend {backend!r} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    made: Backend = kind(**options)
    return made
