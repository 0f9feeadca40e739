"""Writes a canonical GraphModule as ONNX, op by op and in memory.

Hundreds of one-conv graphs are timed for one table; `torch.onnx.export` takes a second for each, this takes a
millisecond. Only the canonical form is understood: one `call_module` of a plain `torch.nn` type an op, and the joins
as `torch.add / sub / mul / cat / flatten` or their operators. Everything is emitted *as in eval mode*, whatever the
training flags say. What is not understood raises `UnsupportedOp`, and `to_onnx_bytes` then asks `torch.onnx.export`.

    ConstantPad2d(0) -> Conv2d        one Conv with the sum of both pads (left/top and right/bottom apart)
    ceil_mode                         floor mode with longer end pads, by torch's own rule for the last window
    SiLU                              x * Sigmoid(x), which ONNX Runtime runs as its QuickGelu
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from lmfx.export.builder import PROTO_LIMIT, UnsupportedOp
from lmfx.export.emitter import Emitter
from lmfx.export.onnx import quiet_export
from lmfx.export.precision import convert, convert_bytes
from lmfx.export.specs import input_specs, off_meta
from lmfx.passes.errors import ExportError

if TYPE_CHECKING:
    import onnx

__all__ = ["emit", "fallback_bytes", "to_onnx_bytes"]


def emit(
    gm: fx.GraphModule, inputs: Sequence[Any], *, fill: float | None = None, precision: str = "fp32"
) -> onnx.ModelProto:
    """The ONNX model of a canonical graph, with inputs `input_0...` and outputs `output_0...`.

    `inputs` are tensors or `(shape, dtype)` pairs. Parameters on the meta device get the constant `fill` (for timing,
    where values do not matter); without a `fill` they are refused. With the precision "fp16" or "bf16" a float32 graph
    becomes a half precision one, inputs and outputs included (`lmfx.export.precision`). Raises `UnsupportedOp`,
    `OptionError`, `MissingExtra` without onnx.
    """
    return convert(Emitter(gm, input_specs(inputs), fill).model(), precision)


def to_onnx_bytes(
    module: nn.Module, inputs: Sequence[Any], *, fill: float | None = None, precision: str = "fp32"
) -> bytes:
    """A serialized ONNX model: by `emit` if it can, else by `torch.onnx.export`, always in memory.

    `precision` as for `emit`. Raises `ExportError` if neither can, or if the model is larger than the 2 GB that one
    protobuf holds.
    """
    if isinstance(module, fx.GraphModule):
        try:
            model = emit(module, inputs, fill=fill, precision=precision)
        except UnsupportedOp:
            pass
        else:
            size = model.ByteSize()
            if size > PROTO_LIMIT:
                raise ExportError(f"the weights take {size / 1e9:.1f} GB, and one ONNX protobuf holds 2 GB; use fewer")
            return bytes(model.SerializeToString())
    return convert_bytes(fallback_bytes(module, inputs), precision)


def fallback_bytes(module: nn.Module, inputs: Sequence[Any]) -> bytes:
    """The same by `torch.onnx.export(dynamo=True)`: slow, and needs onnxscript. Meta parameters become 0.01."""
    specs = input_specs(inputs)
    module = off_meta(module)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    drawn = [torch.rand(shape, device=device).to(dtype) for shape, dtype in specs]  # integers become 0
    example = tuple(drawn)
    return bytes(quiet_export(module, example).model_proto.SerializeToString())
