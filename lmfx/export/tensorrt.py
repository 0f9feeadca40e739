"""TensorRT engines from ONNX files, for `tensorrt` and `tensorrt_rtx` (one Python API)."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

from lmfx.export.atomic import atomic_write
from lmfx.passes.errors import ExportError, MissingExtra, OptionError

__all__ = ["build_engine", "import_tensorrt", "serialize_engine"]


def import_tensorrt() -> Any:
    """`tensorrt`, else `tensorrt_rtx`. Raises `MissingExtra` with the pip command."""
    reasons = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{name}: {error}")
    raise MissingExtra(
        f'neither tensorrt nor tensorrt_rtx can be imported ({"; ".join(reasons)}); pip install "lmfx[trt]"'
    )


def build_engine(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    target: str | None = None,
    fp16: bool = False,
) -> Path:
    """Builds a serialized TensorRT engine from an ONNX file and returns its path; a failed build leaves no file.

    `target` is a compute capability such as "sm89": with tensorrt_rtx an engine can be built for a GPU that is not
    here. None builds for the GPU of this machine. Raises `MissingExtra`, `OptionError`, `ExportError`.
    """
    source, out = Path(onnx_path), Path(engine_path)
    if target is not None and not re.fullmatch(r"sm\d{2,3}", target):
        raise OptionError(f'target must look like "sm89", not {target!r}')
    if not source.is_file():
        raise ExportError(f"there is no ONNX file {source}; write one with lmfx.export_onnx")
    if not out.parent.is_dir():
        raise ExportError(f"can not write {out}: the folder {out.parent} does not exist; make it first")
    engine = serialize_engine(import_tensorrt(), source.read_bytes(), target, fp16)
    return atomic_write(out, engine)


def serialize_engine(trt: Any, model: bytes, target: str | None = None, fp16: bool = False) -> bytes:
    """ONNX bytes -> engine bytes. Every boolean of the API is checked, because TensorRT does not raise."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    if not builder:
        raise ExportError("TensorRT could not make a builder; is there an NVIDIA driver?")
    # networks are always explicit-batch in current versions, and there the flag is gone
    flag = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ExportError(f"TensorRT can not read the ONNX model: {reasons}")
    config = builder.create_builder_config()
    if fp16:
        if not hasattr(trt.BuilderFlag, "FP16"):
            raise OptionError(
                "this TensorRT is strongly typed; export the network in half precision, without fp16=True"
            )
        config.set_flag(trt.BuilderFlag.FP16)
    if target is not None:
        if not hasattr(config, "set_compute_capability"):
            raise OptionError("only tensorrt_rtx builds for another GPU; pip install tensorrt_rtx, or use target=None")
        capability = getattr(trt.ComputeCapability, target.upper(), None)
        if capability is None:
            known = ", ".join(n.lower() for n in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", n))
            raise OptionError(f"this TensorRT does not know the target {target!r}; it knows {known}")
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(capability, 0):
            raise ExportError(f"TensorRT refused the target {target!r}")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError("TensorRT could not build an engine; run again with its logger at INFO for the reason")
    return bytes(engine)
