"""Rewrites slices along the pixels of a map as `PixelSlice` modules: crops, strides, and parts of space-to-depth.

    %s = getitem(%x, (:, :, 1:-1, ::2))               ->      %s = call_module[slice](%x)     PixelSlice 1:-1:1, 0::2
    %n = sub(getitem(getattr(%x, shape), 2), 1)
    %c = narrow(%x, 2, 0, %n)                         ->      %c = call_module[slice](%x)     PixelSlice 0:-1:1, 0::1

What is dropped before and after must be a number of pixels that is the same at every size of the map: ``x[:, :, :30]``
drops as much as the example has more, ``x[:, :, -3:]`` leaves three, so both stay what they are. An end that is the
size of that map minus a constant is a number of pixels. Channels taken in the same subscript are taken afterwards.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ..graph import ops
from ..graph.graph_edit import place
from ..graph.map_shapes import spatial_maps
from ..graph.node_facts import note_like, note_shape, shape_of, tensor_shape
from ..graph.raw_nodes import NotConstant, argument, constant, op_name

__all__ = ["slice_pixels"]

_FULL = 2**31  # torch.export writes an open end as the largest integer


class _Stays(Exception):
    """A slice whose number of pixels dropped depends on the size, or that is none of pixels."""


def slice_pixels(gm: fx.GraphModule) -> int:
    """Rewrite in place of `gm` (the caller's own copy) with the shapes of its nodes; returns how many it made."""
    found = 0
    while made := _slices(gm, spatial_maps(gm)):  # what reads a slice may be known as a map only now
        found += made
    return found


def _slices(gm: fx.GraphModule, maps: frozenset[str]) -> int:
    known, found = set(maps), 0
    for node in list(gm.graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not node.op.startswith("call_") or node.op == "call_module":
            continue
        if {source.name, node.name}.isdisjoint(known) or not _same_rank(source, node):
            continue
        try:
            parts, channels = _parts(gm, node, source)
        except (_Stays, NotConstant, TypeError, ValueError):
            continue
        if all(part == (0, 0, 1) for part in parts):
            continue
        module = ops.PixelSlice([(lo, hi) for lo, hi, _ in parts], [step for _, _, step in parts])
        if not _agrees(module, source, node, channels is not None):
            continue
        placed = place(gm, node, module, "slice", source)
        known.add(placed.name)
        if channels is not None:
            _take(gm, placed, source, channels)
        found += 1
    return found


def _same_rank(source: fx.Node, node: fx.Node) -> bool:
    before, after = shape_of(source), shape_of(node)
    return before is not None and after is not None and len(before) == len(after) and 3 <= len(before) <= 5


def _agrees(module: ops.PixelSlice, source: fx.Node, node: fx.Node, channels: bool) -> bool:
    before, after = tensor_shape(source), tensor_shape(node)
    size = [
        len(range(lo, n - hi, step)) for n, (lo, hi), step in zip(before[2:], module.amounts, module.steps, strict=True)
    ]
    return before[0] == after[0] and tuple(size) == tuple(after[2:]) and (channels or before[1] == after[1])


def _take(gm: fx.GraphModule, placed: fx.Node, source: fx.Node, channels: Any) -> None:
    """The channels of a subscript, after its pixels; a later pass makes a selection of them."""
    with gm.graph.inserting_after(placed):
        part = gm.graph.call_function(operator.getitem, (placed, (slice(None), channels)))
    placed.replace_all_uses_with(part, delete_user_cb=lambda user: user is not part)
    note_like(part, placed)
    note_shape(placed, (*tensor_shape(source)[:2], *tensor_shape(placed)[2:]))


def _parts(gm: fx.GraphModule, node: fx.Node, source: fx.Node) -> tuple[list[tuple[int, int, int]], Any]:
    """(before, after, step) for each spatial dimension, and the subscript of the channels or None."""
    rank, name = len(tensor_shape(source)), op_name(node)
    if name == "getitem":
        items = _subscript(node.args[1], rank)
        channels = None if _everything(items[1]) else constant(gm, items[1])
        if channels is not None and not isinstance(channels, (slice, list)):
            raise _Stays
        if not _everything(items[0]):
            raise _Stays
        return [_part(i.start, i.stop, i.step, source, d) for d, i in enumerate(items[2:], 2)], channels
    whole = [(0, 0, 1)] * (rank - 2)
    if name == "slice":
        dim, start, stop, step = (
            argument(node, i, key, default)
            for i, key, default in ((1, "dim", 0), (2, "start", None), (3, "end", None), (4, "step", 1))
        )
    elif name in ("narrow", "narrow_copy"):
        dim, start, length = (argument(node, i, key, None) for i, key in ((1, "dim"), (2, "start"), (3, "length")))
        if not isinstance(dim, int) or not isinstance(start, int) or start < 0:
            raise _Stays
        left = _from_the_end(length, source, dim % rank)
        if left is None or left < start:
            raise _Stays
        stop, step = start - left or None, 1
    else:
        raise _Stays
    if not isinstance(dim, int) or dim % rank < 2:
        raise _Stays
    whole[dim % rank - 2] = _part(start, stop, step, source, dim % rank)
    return whole, None


def _subscript(index: Any, rank: int) -> list[Any]:
    items = list(index) if isinstance(index, tuple) else [index]
    dots = [k for k, i in enumerate(items) if i is Ellipsis]
    if len(dots) == 1:
        items[dots[0] : dots[0] + 1] = [slice(None)] * (rank - len(items) + 1)
    items += [slice(None)] * (rank - len(items))
    if len(items) != rank or not all(isinstance(i, slice) for i in (items[0], *items[2:])):
        raise _Stays
    return items


def _everything(item: Any) -> bool:
    return isinstance(item, slice) and item.start in (None, 0) and item.stop is None and item.step in (None, 1)


def _part(start: Any, stop: Any, step: Any, source: fx.Node, dim: int) -> tuple[int, int, int]:
    """A slice of one dimension as what it drops before and after, and its step."""
    start, step = start or 0, 1 if step is None else step
    if not isinstance(start, int) or start < 0 or not isinstance(step, int) or step < 1:
        raise _Stays
    if isinstance(stop, int) and stop >= _FULL:
        stop = None
    if stop is None:
        return start, 0, step
    if isinstance(stop, int) and stop < 0:
        return start, -stop, step
    left = _from_the_end(stop, source, dim)
    if left is None or left < 0:
        raise _Stays
    return start, left, step


def _from_the_end(value: Any, source: fx.Node, dim: int) -> int | None:
    """k if a value is the size of `source` in dimension `dim`, minus k; None if it is not known to be."""
    if not isinstance(value, fx.Node):
        return None
    name = op_name(value)
    args: Any = value.args
    if name in ("sub", "add") and len(args) == 2 and not value.kwargs:
        number = args[1] if isinstance(args[1], int) else args[0] if name == "add" else None
        other = args[0] if number is args[1] else args[1]
        left = _from_the_end(other, source, dim)
        if left is None or not isinstance(number, int):
            return None
        return left + number if name == "sub" else left - number
    if name in ("size", "sym_size") and len(args) == 2:
        owner, at = args
    elif name == "getitem" and isinstance(args[0], fx.Node):
        shape, at = args
        is_shape = (op_name(shape) == "getattr" and shape.args[1] == "shape") or (
            op_name(shape) == "size" and len(shape.args) == 1
        )
        owner = shape.args[0] if is_shape else None
    else:
        return None
    same = owner is source and isinstance(at, int) and at % len(tensor_shape(source)) == dim
    return 0 if same else None
