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

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from lmfx.passes.errors import ExportError, MissingExtra
from lmfx.passes.observed import fake_shapes

if TYPE_CHECKING:
    import onnx

__all__ = [
    "InputSpec",
    "UnsupportedOp",
    "emit",
    "eval_mode",
    "eval_shapes",
    "fallback_bytes",
    "input_specs",
    "off_meta",
    "require_onnx",
    "to_onnx_bytes",
]

InputSpec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one graph input."""

OPSET = 20  # the first with Gelu
IR_VERSION = 10  # what every ONNX Runtime since 1.18 reads
PROTO_LIMIT = 2**31 - 1


class UnsupportedOp(ExportError):
    """The emitter has no rule for an op; `torch.onnx.export` may have one."""


def emit(
    gm: fx.GraphModule, inputs: Sequence[Any], *, fill: float | None = None, precision: str = "fp32"
) -> onnx.ModelProto:
    """The ONNX model of a canonical graph, with inputs `input_0...` and outputs `output_0...`.

    `inputs` are tensors or `(shape, dtype)` pairs. Parameters on the meta device get the constant `fill` (for timing,
    where values do not matter); without a `fill` they are refused. With the precision "fp16" or "bf16" a float32 graph
    becomes a half precision one, inputs and outputs included (`lmfx.export.precision`). Raises `UnsupportedOp`,
    `OptionError`, `MissingExtra` without onnx.
    """
    from lmfx.export.emitter import Emitter
    from lmfx.export.precision import convert

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
    from lmfx.export.precision import convert_bytes

    return convert_bytes(fallback_bytes(module, inputs), precision)


def fallback_bytes(module: nn.Module, inputs: Sequence[Any]) -> bytes:
    """The same by `torch.onnx.export(dynamo=True)`: slow, and needs onnxscript. Meta parameters become 0.01."""
    from lmfx.export.onnx import quiet_export

    specs = input_specs(inputs)
    module = off_meta(module)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    drawn = [torch.rand(shape, device=device).to(dtype) for shape, dtype in specs]  # integers become 0
    example = tuple(drawn)
    return bytes(quiet_export(module, example).model_proto.SerializeToString())


def input_specs(inputs: Sequence[Any]) -> tuple[InputSpec, ...]:
    """Tensors or `(shape, dtype)` pairs as `(shape, dtype)` pairs."""
    return tuple(
        (tuple(i.shape), i.dtype) if isinstance(i, torch.Tensor) else (tuple(int(n) for n in i[0]), i[1])
        for i in inputs
    )


def eval_shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every tensor in a graph in eval mode, without computing anything."""
    with eval_mode(gm):
        return fake_shapes(gm, input_specs(inputs))


@contextlib.contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """`net` in eval mode, and every module back in its own mode at the end."""
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def off_meta(module: nn.Module, fill: float = 0.01) -> nn.Module:
    """A copy of the module whose meta parameters have the constant value `fill`; the module itself if it has none."""
    if not any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return module
    module = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(fill if tensor.is_floating_point() else 0)
    return module


def require_onnx() -> Any:
    """The onnx package, or `MissingExtra` with the pip command."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra(
            f'writing ONNX needs the package onnx, which can not be imported ({error}); pip install "lmfx[onnx]"'
        ) from error
    return onnx
