"""Rewrites how a value is made to fit another one: a dimension is added by `unsqueeze`, and nothing is repeated that a
sum or a product repeats by itself.

    %g = getitem(%s, (:, :, None, None))                      %u = unsqueeze(%s, 2)
    %g = unflatten(%s, 1, (-1, 1, 1))               ->        %g = unsqueeze(%u, 3)
    %g = reshape(%s, (size(%s, 0), 24, 1, 1))
    %s = slice(%x, 0, 0, 9223372036854775807)       ->        %x            as `x[:]`
    %f = reshape(%x, (size(%x, 0), 24, 63))         ->        %f = flatten(%x, 2)

    %e = expand_as(%g, %x)
    %e = expand(%g, (size(%x, 0), -1, size(%x, 2), size(%x, 3)))
    %y = mul(%x, %e)                                ->        %y = mul(%x, %g)

An expansion goes where every dimension of it is one of the other operand, or stays what it was: by what is written, and
not by the numbers of the example, which agree by chance where the batch is one image.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from ..graph.graph_edit import bypass
from ..graph.node_facts import note_like, shape_of, tensor_shape
from ..graph.raw_nodes import argument, op_name, reshape_sizes, sizes_of

__all__ = ["plain_broadcasts"]

_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "maximum", "minimum"})


def plain_broadcasts(gm: fx.GraphModule) -> int:
    """Rewrite in place of `gm` (the caller's own copy) with the shapes of its nodes; returns how many it changed."""
    found = 0
    for node in list(gm.graph.nodes):
        source = node.args[0] if node.args else None
        if node.op not in ("call_function", "call_method") or shape_of(node) is None:
            continue
        if not isinstance(source, fx.Node) or source.op == "get_attr" or shape_of(source) is None:
            continue
        name = op_name(node)
        if name in ("view", "reshape") and _in_a_row(node, source):
            node.op, node.target, node.args = "call_function", torch.flatten, (source, 2)
            found += 1
        elif name in ("getitem", "slice") and _takes_all(node, name):
            found += bypass(node)
        elif name in _ADDING:
            found += _unsqueezed(node, source, _ADDING[name](node, source))
        elif name in ("expand", "expand_as", "broadcast_to"):
            found += _not_expanded(node, source, name)
    return found


def _takes_all(node: fx.Node, name: str) -> bool:
    """Whether `x[...]`, `x[:, :]` or a slice as torch.export writes it takes everything."""
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(item is Ellipsis or item == slice(None) for item in index)
    start, stop, step = (argument(node, i, key) for i, key in ((2, "start"), (3, "end"), (4, "step")))
    return start in (None, 0) and stop in (None, sys.maxsize) and step in (None, 1)


def _in_a_row(node: fx.Node, source: fx.Node) -> bool:
    """Whether a reshape lays all pixels of each channel side by side, whatever their number is called."""
    sizes = reshape_sizes(node) or []
    return len(sizes) == 3 < len(tensor_shape(source)) and all(
        size != -1 and _is_size(size, dim, source) for dim, size in enumerate(sizes[:2])
    )


# Each gives the dimensions of the node's value that are new and of size 1, none if the node does anything else.


def _by_subscript(node: fx.Node, source: fx.Node) -> list[int]:
    index = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    missing = len(tensor_shape(source)) - sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * missing
    known = all(item is None or item == slice(None) for item in items)
    return [i for i, item in enumerate(items) if item is None] if known else []


def _by_unflatten(node: fx.Node, source: fx.Node) -> list[int]:
    dim, sizes = argument(node, 1, "dim"), argument(node, 2, "sizes")
    if not isinstance(dim, int) or not isinstance(sizes, (list, tuple)):
        return []
    first = dim % len(tensor_shape(source))
    added = [first + i for i, n in enumerate(sizes) if _is_one(n)]
    return added if len(added) == len(sizes) - 1 else []


def _by_reshape(node: fx.Node, source: fx.Node) -> list[int]:
    """All sizes but one are known to be the operand's, and that one follows."""
    sizes = reshape_sizes(node) or []
    kept = [n for n in sizes if not _is_one(n)]
    if len(kept) != len(tensor_shape(source)) or len(kept) == len(sizes):
        return []
    unknown = sum(size == -1 or not _is_size(size, dim, source) for dim, size in enumerate(kept))
    return [i for i, n in enumerate(sizes) if _is_one(n)] if unknown <= 1 else []


_ADDING = {"getitem": _by_subscript, "unflatten": _by_unflatten, "reshape": _by_reshape, "view": _by_reshape}


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _unsqueezed(node: fx.Node, source: fx.Node, dims: list[int]) -> bool:
    shape = list(tensor_shape(source))
    for dim in dims:
        shape.insert(dim, 1)
        with node.graph.inserting_before(node):
            new = node.graph.call_function(torch.unsqueeze, (source, dim))
        note_like(new, node, shape=tuple(shape))
        source = new
    if dims:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
    return bool(dims)


def _not_expanded(node: fx.Node, source: fx.Node, name: str) -> bool:
    """Whether the node's readers, all of which were sums and products with what it is expanded to, read its source."""
    if len(tensor_shape(source)) != len(tensor_shape(node)) or not node.users:
        return False
    if not all(_expands(user, node, source, name) for user in node.users):
        return False
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    return True


def _expands(user: fx.Node, node: fx.Node, source: fx.Node, name: str) -> bool:
    """Whether a sum or product of the node and another value would expand the node's source to the same."""
    if op_name(user) not in _ELEMENTWISE or len(user.args) != 2 or node not in user.args:
        return False
    other = user.args[1 - user.args.index(node)]
    if not isinstance(other, fx.Node) or shape_of(other) != shape_of(node):
        return False
    rank = len(tensor_shape(node))
    if name == "expand_as":
        return argument(node, 1, "other") is other
    given: Any = node.args[1:]
    if len(given) == 1 and isinstance(given[0], fx.Node) and sizes_of(given[0]) == (other, tuple(range(rank))):
        return True  # expand(x.shape)
    given = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    return len(given) == rank and all(
        any(_is_size(size, dim, value) for value in (source, other)) for dim, size in enumerate(given)
    )


def _is_size(size: Any, dim: int, value: fx.Node) -> bool:
    """Whether a size that is asked for is one of a value: read from it, or a number that it must have to be added. A
    batch of one image has the size of anything that is repeated, so numbers say nothing there."""
    if isinstance(size, fx.Node):
        return sizes_of(size) == (value, dim)
    return size == -1 or (dim > 0 and 1 < size == tensor_shape(value)[dim])
