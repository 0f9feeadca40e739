"""Reads nodes of a raw graph: an op's plain name, its arguments by name, the tensors that it owns, the sizes it uses.

Where a graph works with how many channels a value has (`count_uses`), fewer channels would make another number:

    b, c, h, w = x.shape
    y.view(b, c, 1, 1)          the size of its own second dimension: right as long as y loses the same channels as x
    y.reshape(b, -1, c), y / c  anything else: only right with the channels that there are

`x.shape`, `x.size()`, `x.size(1)`, their parts and slices are followed; what reads other sizes only is left out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from . import ops
from .node_facts import shape_of

__all__ = [
    "NotConstant",
    "argument",
    "bind",
    "constant",
    "count_uses",
    "dependents",
    "op_name",
    "reads_sizes",
    "reshape_sizes",
    "sizes_of",
    "tensor_of",
]

_ALIASES = {"truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub"}

_ARITHMETIC = (operator.floordiv, operator.mul, operator.add, operator.sub, operator.neg, operator.mod, int)


class NotConstant(Exception):
    """An argument depends on more than constants and numbers of channels."""


def op_name(node: fx.Node) -> str:
    """The plain name of a function or method node: `relu` for F.relu, torch.relu, x.relu() and aten.relu.default."""
    name = ops.function_name(node)
    return _ALIASES.get(name, name)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """The argument that stands at a position or has a name, as it is in the graph."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def bind(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The arguments after the first by name, or None if there are some that we do not know."""
    rest = list(node.args[1:])
    # x.flatten(1), F.pad(x, (1, 1)), x.clamp(0, 6) all bind in order.
    if len(rest) > len(names):
        return None
    bound = dict(zip(names, rest, strict=False))
    for key, value in node.kwargs.items():
        if key in ("input", "inplace", "self"):
            continue
        if key not in names or key in bound:
            return None
        bound[key] = value
    return bound


def dependents(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Some nodes, and all that depend on them."""
    queue = list(nodes)
    found = set(queue)
    while queue:
        for user in queue.pop().users:
            if user not in found:
                found.add(user)
                queue.append(user)
    return found


def tensor_of(gm: fx.GraphModule, value: Any) -> Tensor | None:
    """The parameter or buffer that a get_attr node reads."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    item: Any = gm
    for atom in str(value.target).split("."):
        item = getattr(item, atom, None)
    return item if isinstance(item, Tensor) else None


def constant(gm: fx.GraphModule, value: Any) -> Any:
    """An argument with its numbers of channels and its constant integer tensors filled in; `NotConstant` if not all."""

    def fill(item: fx.Node) -> Any:
        while op_name(item) in ("clone", "lift_fresh_copy", "detach") and isinstance(item.args[0], fx.Node):
            item = item.args[0]  # torch.export copies the constants that it lifts
        tensor = tensor_of(gm, item)
        if tensor is None:
            return _number(item)
        if tensor.is_floating_point():
            raise NotConstant
        return tensor.detach().cpu()

    return fx.map_arg(value, fill)


def _number(value: Any) -> int:
    """A whole number that is computed from constants and numbers of channels alone."""
    if isinstance(value, int):
        return value
    if not isinstance(value, fx.Node):
        raise NotConstant
    if value.target in _ARITHMETIC and not value.kwargs:
        numbers = [_number(a) for a in value.args]
        return int(value.target(*numbers))
    found = sizes_of(value)
    shape = None if found is None else shape_of(found[0])
    if found is None or shape is None or found[1] != 1 or len(shape) < 3:
        raise NotConstant
    return shape[1]


# --- sizes that a graph reads -----------------------------------------------------------------------------------------


def reads_sizes(node: fx.Node) -> bool:
    """Whether a node is `x.shape`, `x.size()` or `x.size(1)`, in any spelling."""
    name = op_name(node)
    return name in ("size", "sym_size") or (name == "getattr" and node.args[1:] == ("shape",))


def sizes_of(node: fx.Node) -> tuple[fx.Node, int | tuple[int, ...]] | None:
    """(x, dimension) of a node that is a size of x; (x, dimensions) of one that is several, as `x.shape[2:]` is."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if op_name(node) == "getitem":
        found = sizes_of(source)
        if found is None or not isinstance(found[1], tuple):
            return None
        key: Any = node.args[1]
        parts = (key.start, key.stop, key.step) if isinstance(key, slice) else (key,)
        known = all(part is None or isinstance(part, int) for part in parts)
        return (found[0], found[1][key]) if known else found
    shape = shape_of(source)
    if shape is None or not reads_sizes(node):
        return None
    dim = argument(node, 1, "dim") if op_name(node) != "getattr" else None
    return source, dim % len(shape) if isinstance(dim, int) else tuple(range(len(shape)))


def count_uses(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """(value, node) for all nodes that work with a value's number of channels, in the order of the graph."""
    found = []
    for node in gm.graph.nodes:
        for size in node.all_input_nodes if sizes_of(node) is None else ():
            read = sizes_of(size)
            if read is not None and (read[1] == 1 or (isinstance(read[1], tuple) and 1 in read[1])):
                found.append((read[0], node))
    return found


def reshape_sizes(node: fx.Node) -> list[Any] | None:
    """The sizes that `x.view(...)` and `x.reshape(...)` are given; None for other nodes and other spellings."""
    if op_name(node) not in ("view", "reshape") or node.kwargs or len(node.args) < 2:
        return None
    given = node.args[1]
    return list(given) if isinstance(given, (list, tuple)) else list(node.args[1:])
