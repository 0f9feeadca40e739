"""Canonical GraphModule -> ONNX, op by op and in memory.

Hundreds of one-conv graphs are timed for one table; `torch.onnx.export` takes a second for each, this takes a
millisecond. Only the canonical form is understood: one `call_module` of a plain `torch.nn` type an op, and the joins
as `torch.add / sub / mul / cat / flatten` or their operators. Everything is emitted *as in eval mode*, whatever the
training flags say. What is not understood raises `UnsupportedOp`, and `to_onnx_bytes` then asks `torch.onnx.export`.

    ConstantPad2d(0) -> Conv2d        one Conv with the sum of both pads (left/top and right/bottom apart)
    ceil_mode                         floor mode with longer end pads, by torch's own rule for the last window
    SiLU                              x * Sigmoid(x), which ONNX Runtime runs as its QuickGelu
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from lmfx.passes.errors import ExportError, MissingExtra

if TYPE_CHECKING:
    import onnx

__all__ = ["InputSpec", "UnsupportedOp", "emit", "fallback_bytes", "input_specs", "to_onnx_bytes"]

InputSpec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one graph input."""

OPSET = 20  # the first with Gelu
IR_VERSION = 10  # what every ONNX Runtime since 1.18 reads
PROTO_LIMIT = 2**31 - 1


class UnsupportedOp(ExportError):
    """The emitter has no rule for an op; `torch.onnx.export` may have one."""


def emit(gm: fx.GraphModule, inputs: Sequence[Any], *, fill: float | None = None) -> onnx.ModelProto:
    """The ONNX model of a canonical graph, with inputs `input_0...` and outputs `output_0...`.

    `inputs` are tensors or `(shape, dtype)` pairs. Parameters on the meta device get the constant `fill` (for timing,
    where values do not matter); without a `fill` they are refused. Raises `UnsupportedOp`, or `MissingExtra` without onnx.
    """
    from lmfx.export.rules import Emitter

    return Emitter(gm, input_specs(inputs), fill).model()


def to_onnx_bytes(module: nn.Module, inputs: Sequence[Any], *, fill: float | None = None) -> bytes:
    """A serialized ONNX model: by `emit` if it can, else by `torch.onnx.export`, always in memory.

    Raises `ExportError` if neither can, or if the model is larger than the 2 GB that one protobuf holds.
    """
    if isinstance(module, fx.GraphModule):
        try:
            model = emit(module, inputs, fill=fill)
        except UnsupportedOp:
            pass
        else:
            size = sum(len(t.raw_data) for t in model.graph.initializer)
            if size > PROTO_LIMIT:
                raise ExportError(f"the weights take {size / 1e9:.1f} GB, and one ONNX protobuf holds 2 GB; use fewer")
            return bytes(model.SerializeToString())
    return fallback_bytes(module, inputs)


def fallback_bytes(module: nn.Module, inputs: Sequence[Any]) -> bytes:
    """The same by `torch.onnx.export(dynamo=True)`: slow, and needs onnxscript. Parameters on the meta device become 0.01."""
    from lmfx.export.onnx import quiet_export

    specs = input_specs(inputs)
    module = _off_meta(module)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    example = tuple(torch.rand(shape, dtype=dtype, device=device) for shape, dtype in specs)
    buffer = io.BytesIO()
    quiet_export(module, example).save(buffer)
    return buffer.getvalue()


def input_specs(inputs: Sequence[Any]) -> tuple[InputSpec, ...]:
    """Tensors or `(shape, dtype)` pairs as `(shape, dtype)` pairs."""
    return tuple(
        (tuple(i.shape), i.dtype) if isinstance(i, torch.Tensor) else (tuple(int(n) for n in i[0]), i[1])
        for i in inputs
    )


def require_onnx() -> Any:
    """The onnx package, or `MissingExtra` with the pip command."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra(
            f'writing ONNX needs the package onnx, which can not be imported ({error}); pip install "lmfx[onnx]"'
        ) from error
    return onnx


def _off_meta(module: nn.Module) -> nn.Module:
    if not any(p.is_meta for p in module.parameters()) and not any(b.is_meta for b in module.buffers()):
        return module
    import copy

    module = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    return module


