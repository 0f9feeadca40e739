"""Walks a graph and writes an ONNX ModelProto; what an op becomes is said in `lmfx.export.rules`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from lmfx.export.builder import Builder, UnsupportedOp, onnx_type
from lmfx.export.rules import FUNCTION_RULES, MODULE_RULES
from lmfx.export.shape_rules import MOVE_RULES

if TYPE_CHECKING:
    import onnx

__all__ = ["Emitter"]


class Emitter(Builder):
    """Walks a graph and writes down what the rules make of it."""

    def model(self) -> onnx.ModelProto:
        helper = self.onnx.helper
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        if len(placeholders) != len(self.specs):
            raise UnsupportedOp(f"the graph takes {len(placeholders)} inputs, and {len(self.specs)} were given")
        for i, (node, (shape, dtype)) in enumerate(zip(placeholders, self.specs, strict=True)):
            if not dtype.is_floating_point:
                raise UnsupportedOp(f"input {node.name} is {dtype}; the emitter only knows floating point")
            self.values[node] = f"input_{i}"
            self.graph.input.append(helper.make_tensor_value_info(f"input_{i}", onnx_type(self.onnx, dtype), shape))
        results: list[str] = []
        for node in self.gm.graph.nodes:
            if node.op == "output":
                returned = node.args[0]
                results = [self.value(n) for n in (returned if isinstance(returned, (tuple, list)) else (returned,))]
            elif node.op != "placeholder":
                first = len(self.graph.node)
                made = self.emit(node)
                if made is not None:
                    self.values[node] = made
                    self.name(node, first)
        for i, name in enumerate(results):
            self.graph.node.append(helper.make_node("Identity", [name], [f"output_{i}"]))
            self.graph.output.append(
                helper.make_tensor_value_info(f"output_{i}", onnx_type(self.onnx, self.dtype), None)
            )
        return self.proto

    def name(self, node: fx.Node, first: int) -> None:
        """Names what was made of a node, from place `first` on, by its module or by itself."""
        text = str(node.target) if node.op == "call_module" else node.name
        for made in list(self.graph.node)[first:]:
            count = self.names[text] = self.names.get(text, 0) + 1
            made.name = text if count == 1 else f"{text}:{count}"

    def emit(self, node: fx.Node) -> str | None:
        """The name of a node's value; None for a number, such as a size, of which nothing is written."""
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
        rule = MOVE_RULES.get(node.target) if rule is None else rule
        read = node.all_input_nodes
        if read and not any(n in self.values or n in self.pads for n in read):
            return None  # sizes, and what is computed of them
        if rule is not None:
            return rule(self, node, *node.args, **node.kwargs)
        if not self.has_shape(node):
            return None
        raise UnsupportedOp(f"the emitter has no rule for {node.op} {node.target} ({node.name})")
