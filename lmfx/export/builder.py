"""Collects the nodes and initializers of one ONNX model, and the values so far, for the rules of the emitter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lmfx.export.specs import InputSpec, eval_shapes
from lmfx.passes.errors import ExportError, MissingExtra

__all__ = ["PROTO_LIMIT", "Builder", "UnsupportedOp", "onnx_type", "require_onnx"]

OPSET = 20  # the first with Gelu
IR_VERSION = 10  # what every ONNX Runtime since 1.18 reads
PROTO_LIMIT = 2**31 - 1


class UnsupportedOp(ExportError):
    """The emitter has no rule for an op; `torch.onnx.export` may have one."""


class Builder:
    """Collects the nodes and initializers of the model of one graph."""

    def __init__(self, gm: fx.GraphModule, specs: tuple[InputSpec, ...], fill: float | None) -> None:
        self.onnx = require_onnx()
        self.gm, self.specs, self.fill = gm, specs, fill
        self.proto = self.onnx.ModelProto(ir_version=IR_VERSION, producer_name="lmfx")
        self.proto.opset_import.add(domain="", version=OPSET)
        self.graph = self.proto.graph
        self.graph.name = "lmfx"
        self.values: dict[fx.Node, str] = {}
        self.names: dict[str, int] = {}  # of nodes, and how often each was given
        self.pads: dict[fx.Node, list[int]] = {}  # zero pads that the conv after them takes over
        self._shapes: dict[fx.Node, tuple[int, ...]] | None = None
        self.dtype = specs[0][1] if specs else torch.float32

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name."""
        name = f"v{len(self.graph.node)}"
        self.graph.node.append(self.onnx.helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def tensor(self, tensor: torch.Tensor) -> str:
        """Adds an initializer. A meta tensor is filled with `fill`."""
        kind = onnx_type(self.onnx, tensor.dtype)
        if tensor.is_meta:
            if self.fill is None:
                raise UnsupportedOp("a parameter is on the meta device and has no values; give `fill`, or load weights")
            tensor = torch.full(tensor.shape, self.fill, dtype=tensor.dtype)
        tensor = tensor.detach().cpu().contiguous()
        raw = tensor.view(torch.uint8 if tensor.dim() else tensor.dtype).numpy().tobytes()
        # straight into the graph: helper.make_graph would copy the weights twice more
        initializer = self.graph.initializer.add(name=f"c{len(self.graph.initializer)}", data_type=kind, raw_data=raw)
        initializer.dims.extend(tensor.shape)
        return str(initializer.name)

    def scalar(self, value: float) -> str:
        return self.tensor(torch.tensor(value, dtype=self.dtype))

    def ints(self, values: Sequence[int]) -> str:
        return self.tensor(torch.tensor(list(values), dtype=torch.int64))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node's value."""
        if self._shapes is None:
            self._shapes = eval_shapes(self.gm, self.specs)
        return self._shapes[node]

    def has_shape(self, node: fx.Node) -> bool:
        """Whether a node's value is a tensor."""
        if self._shapes is None:
            self._shapes = eval_shapes(self.gm, self.specs)
        return node in self._shapes

    def stand_in(self, node: fx.Node, like: fx.Node, name: str) -> None:
        """Let `node` of another graph stand for a value of the shape of `like` that is called `name`."""
        self.shape(like)
        assert self._shapes is not None
        self.values[node], self._shapes[node] = name, self._shapes[like]

    def value(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            if argument in self.pads:  # somebody other than the conv reads the padded value
                raise UnsupportedOp(f"{argument.name} is read twice")
            if argument not in self.values:
                raise UnsupportedOp(f"the emitter cannot read {argument.name}, which is no tensor")
            return self.values[argument]
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return self.scalar(argument)
        raise UnsupportedOp(f"the emitter cannot read the argument {argument!r}")


def onnx_type(onnx: Any, dtype: torch.dtype) -> int:
    """ONNX's number of a dtype. Raises `UnsupportedOp` for those that the emitter does not write."""
    kinds = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.float64: onnx.TensorProto.DOUBLE,
        torch.bfloat16: onnx.TensorProto.BFLOAT16,
        torch.int64: onnx.TensorProto.INT64,
    }
    if dtype not in kinds:
        raise UnsupportedOp(f"the emitter has no ONNX type for {dtype}")
    return int(kinds[dtype])


def require_onnx() -> Any:
    """The onnx package, or `MissingExtra` with the pip command."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra(
            f'writing ONNX needs the package onnx, which cannot be imported ({error}); pip install "lmfx[onnx]"'
        ) from error
    return onnx
