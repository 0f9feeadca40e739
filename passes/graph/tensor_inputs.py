"""Makes a graph that takes and gives tensors only, so that a runtime can time it.

    def forward(self, sample, timestep, return_dict=True):      ->      def forward(self, sample, scale):
        (10, False and a dict with the tensor `scale` stand in the example)

Numbers and flags of the example become constants, tensors in containers inputs of their own, and the output is plain.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import Tensor, fx

from ..model.interface import Example, value_output
from .node_facts import note_like

__all__ = ["bare"]


def bare(gm: fx.GraphModule, example: Example) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph like `gm` with tensors only as inputs, and these tensors of the example. Modules and tensors are shared.

    A graph whose inputs are tensors already is returned as it is.
    """
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    args, kwargs = example
    given = {**dict(zip([_name(n) for n in nodes], args, strict=False)), **kwargs}
    values = [given.get(_name(n), n.args[0] if n.args else None) for n in nodes]
    if all(isinstance(v, Tensor) for v in values):
        return gm, [v for v in values if isinstance(v, Tensor)]
    graph: fx.Graph = copy.deepcopy(gm.graph)
    graph.set_codegen(fx.graph.CodeGen())
    tensors: list[Tensor] = []
    for node, value in zip([n for n in graph.nodes if n.op == "placeholder"], values, strict=True):
        if isinstance(value, Tensor):
            tensors.append(value)
        else:
            _unpack(graph, node, node, value, tensors)
            graph.erase_node(node)
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (value_output(output.args[0]),)
    made = fx.GraphModule(gm, graph, type(gm).__name__).train(gm.training)
    made.meta = dict(gm.meta)
    return made, tensors


def _name(node: fx.Node) -> str:
    return str(node.target).lstrip("*")


def _unpack(graph: fx.Graph, place: fx.Node, holder: fx.Node, value: Any, tensors: list[Tensor]) -> None:
    """Readers of `holder`, which stands for `value`, read its tensors (placeholders before `place`) or constants."""
    if isinstance(value, Tensor):
        with graph.inserting_before(place):
            held = graph.placeholder(f"{holder.name}_")
        note_like(held, holder)
        holder.replace_all_uses_with(held)
        tensors.append(value)
        return
    for user in list(holder.users):
        if user.target is operator.getitem and isinstance(value, (tuple, list, dict)):
            key: Any = user.args[1]
            _unpack(graph, place, user, value[key], tensors)
        elif user.target is getattr:
            _unpack(graph, place, user, getattr(value, str(user.args[1])), tensors)
        else:
            user.args = fx.node.map_arg(user.args, lambda v: value if v is holder else v)
            user.kwargs = fx.node.map_arg(user.kwargs, lambda v: value if v is holder else v)
            continue
        graph.erase_node(user)
