"""The emitter's walk: a graph in, an ONNX ModelProto out; what an op becomes is said in `lmfx.export.rules`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from lmfx.export.emit import IR_VERSION, OPSET, InputSpec, UnsupportedOp, eval_shapes, require_onnx
from lmfx.export.rules import FUNCTION_RULES, MODULE_RULES

if TYPE_CHECKING:
    import onnx

__all__ = ["Emitter"]


class Emitter:
    """Collects the nodes and initializers of one model while it walks a graph."""

    def __init__(self, gm: fx.GraphModule, specs: tuple[InputSpec, ...], fill: float | None) -> None:
        self.onnx = require_onnx()
        self.gm, self.specs, self.fill = gm, specs, fill
        self.proto = self.onnx.ModelProto(ir_version=IR_VERSION, producer_name="lmfx")
        self.proto.opset_import.add(domain="", version=OPSET)
        self.graph = self.proto.graph
        self.graph.name = "lmfx"
        self.values: dict[fx.Node, str] = {}
        self.pads: dict[fx.Node, list[int]] = {}  # zero pads that the conv behind them takes over
        self._shapes: dict[fx.Node, tuple[int, ...]] | None = None
        self.dtype = specs[0][1] if specs else torch.float32

    # what rules call

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name."""
        name = f"v{len(self.graph.node)}"
        self.graph.node.append(self.onnx.helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def tensor(self, tensor: torch.Tensor) -> str:
        """Adds an initializer. A meta tensor is filled with `fill`."""
        kind = _onnx_type(self.onnx, tensor.dtype)
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

    # the walk

    def model(self) -> onnx.ModelProto:
        helper = self.onnx.helper
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        if len(placeholders) != len(self.specs):
            raise UnsupportedOp(f"the graph takes {len(placeholders)} inputs, and {len(self.specs)} were given")
        for i, (node, (shape, dtype)) in enumerate(zip(placeholders, self.specs, strict=True)):
            if not dtype.is_floating_point:
                raise UnsupportedOp(f"input {node.name} is {dtype}; the emitter only knows floating point")
            self.values[node] = f"input_{i}"
            self.graph.input.append(helper.make_tensor_value_info(f"input_{i}", _onnx_type(self.onnx, dtype), shape))
        results: list[str] = []
        for node in self.gm.graph.nodes:
            if node.op == "output":
                returned = node.args[0]
                results = [self.value(n) for n in (returned if isinstance(returned, (tuple, list)) else (returned,))]
            elif node.op != "placeholder":
                self.values[node] = self.emit(node)
        for i, name in enumerate(results):
            self.graph.node.append(helper.make_node("Identity", [name], [f"output_{i}"]))
            self.graph.output.append(
                helper.make_tensor_value_info(f"output_{i}", _onnx_type(self.onnx, self.dtype), None)
            )
        return self.proto

    def value(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            if argument in self.pads:  # somebody other than the conv reads the padded value
                raise UnsupportedOp(f"{argument.name} is read twice")
            return self.values[argument]
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return self.scalar(argument)
        raise UnsupportedOp(f"the emitter can not read the argument {argument!r}")

    def emit(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            owner: Any = self.gm
            for part in str(node.target).split("."):
                owner = getattr(owner, part)
            return self.tensor(owner)
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            module_rule = MODULE_RULES.get(type(module))
            if module_rule is not None and len(node.args) == 1 and not node.kwargs:
                return module_rule(self, node, module)
            raise UnsupportedOp(f"the emitter has no rule for {type(module).__name__} ({node.name})")
        rule = FUNCTION_RULES.get(node.target) if node.op == "call_function" else None
        if rule is None:
            raise UnsupportedOp(f"the emitter has no rule for {node.op} {node.target} ({node.name})")
        return rule(self, node, *node.args, **node.kwargs)


def _onnx_type(onnx: Any, dtype: torch.dtype) -> int:
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
