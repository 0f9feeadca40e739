"""Export of compressed networks: our own ONNX emitter for small graphs, checked ONNX files, TensorRT engines."""

from lmfx.export.builder import UnsupportedOp
from lmfx.export.emit import emit, to_onnx_bytes
from lmfx.export.onnx import export_onnx
from lmfx.export.program import export_program
from lmfx.export.tensorrt import build_engine

__all__ = ["UnsupportedOp", "build_engine", "emit", "export_onnx", "export_program", "to_onnx_bytes"]
