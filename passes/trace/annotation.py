"""Runs the example through a graph and notes what every node gives; describes the example's arguments.

What is noted (`node_facts`): shape, dtype and device of a tensor, whether the value is the node's first operand itself,
and the path of the module that it came from. An op that still writes into a value which is read again afterwards is
refused, because a graph of fx does not know of it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import TraceError
from ..graph.node_facts import note_value
from ..model.interface import Example
from .hidden import HiddenOps

__all__ = ["Annotator", "annotate", "cloned", "example_values", "spec_of"]


def annotate(gm: fx.GraphModule, example: Example) -> Any:
    """Run the example through the graph, note every node's shape, dtype and module path, and return the output."""
    return Annotator(gm).run(*example_values(gm, example))


def example_values(gm: fx.GraphModule, example: Example) -> list[Any]:
    """The placeholders' values for an example, in tensors of their own."""
    args, kwargs = example
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [cloned(given.get(name)) for name in names]


def cloned(value: Any) -> Any:
    """The same with tensors of its own."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


class Annotator(fx.Interpreter):
    """Runs a graph and notes what its nodes give; counts the ops that run inside `opaque` modules in `hidden`."""

    def __init__(self, gm: fx.GraphModule, opaque: frozenset[str] = frozenset()) -> None:
        super().__init__(gm)
        self.opaque = opaque
        self.hidden = HiddenOps()
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        versions = {s: v._version for s in n.all_input_nodes if isinstance(v := self.env.get(s), Tensor)}
        with self.hidden if n.op == "call_module" and n.target in self.opaque else contextlib.nullcontext():
            value = super().run_node(n)
        for source, version in versions.items():
            self._check_mutation(n, source, version)
        first = n.args[0] if n.args else None
        note_value(n, value, same=isinstance(first, fx.Node) and self.env.get(first) is value)
        return value

    def _check_mutation(self, n: fx.Node, source: fx.Node, version: int) -> None:
        """Refuse an op that still writes into a value (an opaque module, say) which is read again afterwards."""
        mutated = self.env[source]
        if mutated._version == version:
            return
        for node, value in self.env.items():
            shared = isinstance(value, Tensor) and value._version == mutated._version and _same_memory(value, mutated)
            if shared and any(self.order[user] > self.order[n] for user in node.users):
                raise TraceError(f"{n.name} mutates {source.name} in place, and {node.name} is read afterwards")


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def spec_of(value: Any) -> Any:
    """What a saved network needs to know of an input: a tensor's shape and type, a constant as it is.

    Containers say what they are, so that no dict is taken for a tensor and no tuple for a list.
    """
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": {str(k): spec_of(v) for k, v in value.items()}}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [spec_of(v) for v in value]}
    return value
