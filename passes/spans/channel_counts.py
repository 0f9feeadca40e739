"""Finds where a graph works with how many channels a value has, which would be another number if there were fewer.

    b, c, h, w = x.shape
    y.view(b, c, 1, 1)          the size of its own second dimension: right as long as y loses the same channels as x
    y.reshape(b, -1, c), y / c  anything else: only right with the channels that there are

`x.shape`, `x.size()`, `x.size(1)`, their parts and slices are followed; what reads other sizes only is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..graph.node_facts import shape_of
from ..graph.raw_nodes import argument, op_name

__all__ = ["CountUse", "count_uses", "reshape_sizes"]


@dataclass(frozen=True)
class CountUse:
    """A node that works with a value's number of channels; `own` if it is a reshape that has it as the size of its
    second dimension and nowhere else."""

    value: fx.Node
    node: fx.Node
    own: bool


def count_uses(gm: fx.GraphModule) -> list[CountUse]:
    """All of them, in the order of the graph."""
    seen: dict[fx.Node, tuple[fx.Node, tuple[int, ...]]] = {}  # x.shape[...] -> (x, which of its dimensions)
    found = []
    for node in gm.graph.nodes:
        read = _read(node, seen)
        if read is not None:
            seen[node] = read
            continue
        for size in node.all_input_nodes:
            value, dims = seen.get(size, (size, ()))
            if 1 in dims:
                sizes = reshape_sizes(node) or []
                second = [i for i, given in enumerate(sizes) if given is size] == [1]
                found.append(CountUse(value, node, dims == (1,) and second))
    return found


def reshape_sizes(node: fx.Node) -> list[Any] | None:
    """The sizes that `x.view(...)` and `x.reshape(...)` are given; None for other nodes and other spellings."""
    if op_name(node) not in ("view", "reshape") or node.kwargs or len(node.args) < 2:
        return None
    given = node.args[1]
    return list(given) if isinstance(given, (list, tuple)) else list(node.args[1:])


def _read(node: fx.Node, seen: dict[fx.Node, tuple[fx.Node, tuple[int, ...]]]) -> Any:
    """(value, dimensions) if a node is sizes of a value."""
    name, source = op_name(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if name == "getitem" and source in seen:
        value, dims = seen[source]
        part = dims[node.args[1]] if isinstance(node.args[1], (int, slice)) else dims
        return value, part if isinstance(part, tuple) else (part,)
    shape = shape_of(source)
    if shape is None or not (name in ("size", "sym_size") or (name == "getattr" and node.args[1] == "shape")):
        return None
    dim = argument(node, 1, "dim") if name != "getattr" else None
    return source, (dim % len(shape),) if isinstance(dim, int) else tuple(range(len(shape)))
