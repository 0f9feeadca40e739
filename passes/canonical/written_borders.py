"""Moves a pad to before a norm, where its border is overwritten with what the norm makes of zeros.

    %b = call_module[bn](%x)                                                  %p = call_module[pad](%x)
    %p = call_module[pad](%b)                                                 %b = call_module[bn](%p)
    %s = slice_scatter(%p, copy(slice(%p, 2, 0, 1), bn.bias - mean scale), 2, 0, 1)   ->
    ... the same for the other three sides

Diverse branch blocks write ``y[:, :, 0:p, :] = border`` for all sides of a padded map (`BNAndPadLayer` in the published
code), so that a pad follows the norm and the block still is one convolution. Any pixelwise affine op may stand in the
place of the norm: a scale and bias, a 1x1 convolution. What is written must be what the op makes of zeros, to rounding,
on the whole border and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..algebra.linear_op import from_batch_norm
from ..graph import ops
from ..graph.node_facts import note_like, note_shape, shape_of, tensor_shape
from ..graph.raw_nodes import op_name, tensor_of

__all__ = ["pads_before"]

_FULL = 2**31  # torch.export writes an open end as the largest integer
_VIEWS = ("expand", "expand_copy", "broadcast_to", "clone", "detach", "lift_fresh_copy", "to")


@dataclass
class _WrittenBorder:
    """The padded value, the scatters that write to it, and what they write on each (dimension, side)."""

    padded: fx.Node
    nodes: set[fx.Node] = field(default_factory=set)
    written: dict[tuple[int, int], tuple[int, Tensor]] = field(default_factory=dict)


def pads_before(gm: fx.GraphModule) -> int:
    """Rewrite `gm` (the caller's own copy), whose nodes carry shapes, in place; returns how many it moved."""
    found = 0
    for node in list(gm.graph.nodes):
        if op_name(node) != "slice_scatter" or any(op_name(user) == "slice_scatter" for user in node.users):
            continue
        border = _border(gm, node)
        found += border is not None and _move(gm, node, border)
    return found


def _border(gm: fx.GraphModule, last: fx.Node) -> _WrittenBorder | None:
    """The chain of scatters that ends at `last`, if it writes one number a channel along sides of a padded map."""
    border, node = _WrittenBorder(last), last
    while op_name(node) == "slice_scatter":
        base, value, dim, start, end, step = _arguments(node)
        shape = shape_of(node)
        if not isinstance(base, fx.Node) or shape is None or not isinstance(dim, int) or step != 1:
            return None
        content = _channels(gm, value, len(shape), shape[1])
        side = _side(start, end)
        key = dim % len(shape), 0 if side is None else side[0]
        if content is None or side is None or key in border.written:
            return None
        border.written[key] = side[1], content
        border.nodes.add(node)
        node = base
    border.padded = node
    return border


def _arguments(node: fx.Node) -> tuple[Any, Any, Any, Any, Any, Any]:
    names = ("input", "src", "dim", "start", "end", "step")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given["input"], given["src"], given.get("dim", 0), given.get("start"), given.get("end"), given.get("step", 1)


def _side(start: Any, end: Any) -> tuple[int, int] | None:
    """(0, pixels) if a slice is the first ones of a dimension, (1, pixels) if the last ones."""
    if start in (None, 0) and isinstance(end, int) and 0 < end < _FULL:
        return 0, end
    if isinstance(start, int) and start < 0 and (end is None or (isinstance(end, int) and end >= _FULL)):
        return 1, -start
    return None


def _channels(gm: fx.GraphModule, value: Any, rank: int, channels: int) -> Tensor | None:
    """What is written, as one number a channel; None if it is no constant or differs within a channel."""
    if isinstance(value, fx.Node) and op_name(value) == "copy" and len(value.args) == 2:
        value = value.args[1]
    while isinstance(value, fx.Node) and op_name(value) in _VIEWS and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    tensor = tensor_of(gm, value)
    if tensor is None or not tensor.is_floating_point() or tensor.ndim > rank:
        return None
    tensor = tensor.detach().reshape(*(1,) * (rank - tensor.ndim), *tensor.shape)
    if tensor.shape[1] not in (1, channels) or tensor.numel() == 0:
        return None
    rows = tensor.transpose(0, 1).flatten(1)
    return rows[:, 0].expand(channels).double() if bool((rows == rows[:, :1]).all()) else None


def _move(gm: fx.GraphModule, last: fx.Node, border: _WrittenBorder) -> bool:
    """Put the pad before the op that it follows, if that op makes of zeros what is written around the map."""
    pad = border.padded
    source = pad.args[0] if pad.op == "call_module" and len(pad.args) == 1 else None
    if not isinstance(source, fx.Node) or source.op != "call_module" or set(source.users) != {pad}:
        return False
    module, inner = gm.get_submodule(str(pad.target)), gm.get_submodule(str(source.target))
    if not ops.plain_in(module, ops.PADS) or not _written(module, last, border):
        return False
    calls = [n for n in gm.graph.nodes if n.op == "call_module" and n.target == pad.target]
    if len(calls) > 1 or len(source.args) != 1 or not _makes_of_zeros(inner, border, source):
        return False
    entry: Any = source.args[0]
    module.value = 0.0  # type: ignore[assignment]
    with gm.graph.inserting_before(source):
        moved = gm.graph.create_node("call_module", str(pad.target), (entry,), {}, name=f"{pad.name}_before")
    note_like(moved, pad, shape=(*tensor_shape(entry)[:2], *tensor_shape(pad)[2:]))
    source.args = (moved,)
    note_shape(source, shape_of(pad))
    last.replace_all_uses_with(source)
    return True


def _written(module: Any, last: fx.Node, border: _WrittenBorder) -> bool:
    """Whether exactly what a pad adds is written, on every side of it, and nothing but the scatters sees the pad."""
    flat = module.padding
    pads = {}
    for i in range(len(flat) // 2):
        for side in (0, 1):
            if flat[2 * i + side]:
                pads[len(flat) // 2 + 1 - i, side] = flat[2 * i + side]
    unfinished = (border.padded, *(n for n in border.nodes if n is not last))
    readers = {user for node in unfinished for user in node.users} - border.nodes
    inside = all(op_name(user) == "slice" and _only_copied(user, border) for user in readers)
    return inside and pads == {key: count for key, (count, _) in border.written.items()}


def _only_copied(part: fx.Node, border: _WrittenBorder) -> bool:
    """Whether a slice only says where a scatter copies to."""
    return all(
        op_name(copy) == "copy" and copy.args[0] is part and border.nodes >= set(copy.users) for copy in part.users
    )


def _makes_of_zeros(module: Any, border: _WrittenBorder, node: fx.Node) -> bool:
    """Whether a pixelwise affine op makes of zeros what was written, to the rounding of its numbers."""
    channels, ndim = tensor_shape(node)[1], len(tensor_shape(node)) - 2
    with torch.no_grad():
        if ops.plain_in(module, ops.BATCH_NORMS) and ops.affine_refusal(module) is None:
            made = from_batch_norm(module, ndim).bias
            shift = torch.zeros_like(made) if module.bias is None else module.bias.detach().double()
            size = made.abs() + 2 * shift.abs()
        elif isinstance(module, ops.ChannelAffine):
            made = module.bias.detach().double().expand(channels)
            size = made.abs()
        elif ops.plain_in(module, ops.CONVS) and _is_pixelwise(module):
            made = module.weight.new_zeros(channels).double() if module.bias is None else module.bias.detach().double()
            size = made.abs()
        else:
            return False
        unit = 16 * max(torch.finfo(t.dtype).eps for t in module.state_dict().values() if t.is_floating_point())
        return all(bool(((v.to(made) - made).abs() <= unit * size).all()) for _, v in border.written.values())


def _is_pixelwise(conv: Any) -> bool:
    return (
        set(conv.kernel_size) == {1} and set(conv.stride) == {1} and conv.padding in ("valid", (0,) * len(conv.stride))
    )
