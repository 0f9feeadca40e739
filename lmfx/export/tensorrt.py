"""Builds TensorRT engines from ONNX, for `tensorrt` (10 and 11) and `tensorrt_rtx` (1.x), whose Python API is shared.

    tensorrt        builds for the GPU of this machine, and times kernels while it builds
    tensorrt_rtx    builds ahead of time, without a GPU, for one or several compute capabilities; what is special
                    to a GPU is compiled when the engine is first run there

Networks are strongly typed: every tensor has the precision of the ONNX model (`lmfx.export.precision` changes it).
What a version can do is asked with `hasattr`, and every boolean of the API is checked, because TensorRT does not raise.
"""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmfx.environment.atomic_files import atomic_write
from lmfx.environment.caller_state import entry
from lmfx.export.precision import convert_bytes
from lmfx.passes.errors import ExportError, MissingExtra, OptionError

__all__ = ["PACKAGES", "build_engine", "import_tensorrt", "network_layers", "serialize_engine"]

PACKAGES = ("tensorrt", "tensorrt_rtx")
OLDEST = {"tensorrt": "10.0", "tensorrt_rtx": "1.0"}
EXTRA = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}
TARGET = re.compile(r"sm\d{2,3}")


def import_tensorrt(package: str | None = None, ahead_of_time: bool = False) -> Any:
    """The Python module `package`; with None the first of `tensorrt` and `tensorrt_rtx` that can be imported, in the
    other order if it is to build `ahead_of_time`.

    Raises `OptionError` for another name, and `MissingExtra` if it is not installed, cannot be loaded or is too old.
    """
    if package is not None and package not in PACKAGES:
        raise OptionError(f"the TensorRT package is one of {', '.join(PACKAGES)}, not {package!r}")
    names = (package,) if package else PACKAGES[::-1] if ahead_of_time else PACKAGES
    reasons = []
    for name in names:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            absent = error.name == name
            reasons.append((absent, f"{name} is not installed" if absent else _broken(name, error)))
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append((False, _broken(name, error)))
        else:
            if not _is_new_enough(module):
                version = getattr(module, "__version__", "of an unknown version")
                reasons.append((False, f"{name} {version} is too old, {OLDEST[name]} is the oldest that works"))
                continue
            return module
    told = [text for absent, text in reasons if not absent] or [" and ".join(text for _, text in reasons)]
    fix = " or ".join(f'pip install --upgrade --force-reinstall "lmfx[{EXTRA[n]}]"' for n in names)
    if all(absent for absent, _ in reasons):
        fix = " or ".join(f'pip install "lmfx[{EXTRA[n]}]"' for n in names)
    raise MissingExtra(f"TensorRT cannot be used: {'; '.join(told)}; {fix}")


@entry
def build_engine(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    target: str | Sequence[str] | None = None,
    *,
    precision: str | None = None,
    package: str | None = None,
) -> Path:
    """Builds a serialized TensorRT engine from an ONNX file and returns its path; a failed build leaves no file.

    `target` is a compute capability such as "sm89", or several of them: tensorrt_rtx builds for GPUs that are not here.
    None builds for the GPU of this machine (tensorrt), or for all that the version knows (tensorrt_rtx). `precision` is
    that of the ONNX file, or "fp16" or "bf16" to convert it; inputs and outputs stay as they are. `package` is
    "tensorrt" or "tensorrt_rtx"; None takes what is installed. Raises `MissingExtra`, `OptionError`, `ExportError`.
    """
    source, out = Path(onnx_path), Path(engine_path)
    targets = (target,) if isinstance(target, str) else tuple(target or ())
    for one in targets:
        if not isinstance(one, str) or not TARGET.fullmatch(one):
            raise OptionError(f'target must look like "sm89", not {one!r}')
    if not source.is_file():
        raise ExportError(f"there is no ONNX file {source}; write one with lmfx.export_onnx")
    if not out.parent.is_dir():
        raise ExportError(f"cannot write {out}: the folder {out.parent} does not exist; make it first")
    trt = import_tensorrt(package, ahead_of_time=bool(targets))
    model = source.read_bytes()
    if precision is not None:
        model = convert_bytes(model, precision, keep_io=True)
    return atomic_write(out, serialize_engine(trt, model, targets))


def serialize_engine(
    trt: Any, model: bytes, targets: Sequence[str] = (), configure: Callable[[Any], None] | None = None
) -> bytes:
    """ONNX bytes -> engine bytes. `configure` gets the builder's config, to set a timing cache for example."""
    parsed = _Parsed(trt, model)
    config = parsed.builder.create_builder_config()
    if targets:
        _set_targets(trt, config, targets)
    if configure is not None:
        configure(config)
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    if engine is None:
        raise ExportError(f"{trt.__name__} could not build an engine: {parsed.reasons()}")
    return bytes(engine)


def network_layers(trt: Any, model: bytes) -> Counter[str]:
    """How many layers of each kind TensorRT reads from ONNX bytes; the engine itself only tells that on a GPU."""
    parsed = _Parsed(trt, model)
    return Counter(parsed.network.get_layer(i).type.name for i in range(parsed.network.num_layers))


class _Parsed:
    """A network, and all that must live as long as it."""

    def __init__(self, trt: Any, model: bytes) -> None:
        self.errors: list[str] = []
        errors = self.errors

        class Log(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # pybind11 insists on this call, and takes no super()

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    errors.append(" ".join(message.split()))

        self.logger = Log()
        try:
            self.builder = trt.Builder(self.logger)
        except TypeError as error:  # what pybind11 raises where the C++ function gave no builder
            raise ExportError(self._no_builder(trt)) from error
        if not self.builder:
            raise ExportError(self._no_builder(trt))
        # networks have an explicit batch in all these versions; where the flag is gone it is not needed
        flags = trt.NetworkDefinitionCreationFlag
        wanted = [getattr(flags, n) for n in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, n)]
        self.network = self.builder.create_network(sum(1 << int(flag) for flag in wanted))
        self.parser = trt.OnnxParser(self.network, self.logger)
        if not self.parser.parse(model):
            told = [str(self.parser.get_error(i)) for i in range(self.parser.num_errors)]
            raise ExportError(f"{trt.__name__} cannot read the ONNX model: {'; '.join(told) or self.reasons()}")

    def reasons(self) -> str:
        return "; ".join(dict.fromkeys(self.errors)) or "it gave no reason"

    def _no_builder(self, trt: Any) -> str:
        return (
            f"{trt.__name__} {trt.__version__} could not make a builder ({self.reasons()}); it needs an NVIDIA driver "
            'and a GPU. Without them, pip install "lmfx[trt-rtx]" and give a target such as "sm89"'
        )


def _set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    if not hasattr(config, "set_compute_capability"):
        raise OptionError(
            f'{trt.__name__} only builds for the GPU of this machine; pip install "lmfx[trt-rtx]", or use target=None'
        )
    known = {n.lower(): c for n, c in _capabilities(trt).items()}
    for target in targets:
        if target not in known:
            raise OptionError(
                f"{trt.__name__} {trt.__version__} does not know the target {target!r}; it knows {', '.join(known)}"
            )
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        if not config.set_compute_capability(known[target], i):
            raise ExportError(
                f"{trt.__name__} refused the target {target!r}, number {i + 1} of {', '.join(targets)}: leave it out"
            )


def _capabilities(trt: Any) -> dict[str, Any]:
    names = [n for n in dir(trt.ComputeCapability) if TARGET.fullmatch(n.lower())]
    return {n: getattr(trt.ComputeCapability, n) for n in sorted(names, key=lambda n: int(n[2:]))}


def _is_new_enough(module: Any) -> bool:
    found = re.match(r"\d+", str(getattr(module, "__version__", "")))
    oldest = int(OLDEST[module.__name__].split(".")[0])
    flags = getattr(module, "NetworkDefinitionCreationFlag", None)
    return (
        (found is None or int(found[0]) >= oldest)
        and hasattr(flags, "STRONGLY_TYPED")
        and hasattr(module, "ILogger")
        and hasattr(module, "OnnxParser")
    )


def _broken(name: str, error: Exception) -> str:
    return f"{name} is installed and cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())})"
