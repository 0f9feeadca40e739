"""Lets each op of an exported program read sizes off its own operands.

    b = size(x, 0)                                          b = size(x, 0)
    y = view(x, b, 3, -1)                                   y = view(x, b, 3, -1)
    z = view(conv(y), b, -1)            ->                  z = view(conv(y), size(conv(y), 0), -1)
    cat(expand(token, b, -1, -1), z)                        cat(expand(token, size(z, 0), -1, -1), z)

torch.export reads a free size once, where it enters the program. As edges of the graph, such reads tie the input to ops
everywhere, so that no part between them is a block of its own. Which dimensions have the same size is in the symbolic
shapes that torch.export noted: equal expressions are equal numbers at every size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["localize_sizes"]


def localize_sizes(graph: fx.Graph) -> None:
    """Change the sizes that nodes of a program with symbolic shapes are given, where an operand has the same."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "call_function" and _is_tensor(node) and any(_is_size(n) for n in node.all_input_nodes):
            operands = [n for n in node.all_input_nodes if _symbols(n)]
            if not operands and node.users:
                first = min(node.users, key=order.__getitem__)
                operands = [n for n in first.all_input_nodes if n is not node and _symbols(n)]
                if operands:
                    first.prepend(node)  # what it makes is of a size of what it meets there
            _localize(graph, node, operands)
    graph.eliminate_dead_code(lambda n: not _is_size(n))


def _localize(graph: fx.Graph, node: fx.Node, operands: list[fx.Node]) -> None:
    places: dict[Any, tuple[fx.Node, int]] = {}
    for operand in operands:
        for dim, expression in _symbols(operand):
            places.setdefault(expression, (operand, dim))
    made: dict[fx.Node, fx.Node] = {}

    def local(size: fx.Node) -> fx.Node:
        if not _is_size(size) or not size.meta["val"].node.expr.free_symbols:
            return size
        if size not in made:
            expression = size.meta["val"].node.expr
            if expression in places:
                made[size] = graph.call_function(torch.ops.aten.sym_size.int, places[expression])
            elif any(_is_tensor(n) for n in size.all_input_nodes):
                return size
            else:  # arithmetic: with the sizes that it works with
                made[size] = graph.node_copy(size, local)
            made[size].meta = dict(size.meta)
        return made[size]

    with graph.inserting_before(node):
        node.args = fx.map_arg(node.args, local)
        node.kwargs = fx.map_arg(node.kwargs, local)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _symbols(node: fx.Node) -> list[tuple[int, Any]]:
    """(dimension, expression) of the sizes of a tensor that are not numbers."""
    if not _is_tensor(node):
        return []
    return [(d, n.node.expr) for d, n in enumerate(node.meta["val"].shape) if isinstance(n, torch.SymInt)]
