"""Follows what views, permutes, slices and shuffles do to the positions of a map's numbers.

    x (1, 4, 1, 2)                       0 1 | 2 3 | 4 5 | 6 7           the positions of x itself
    v = view(x, 1, 2, 2, 1, 2)           ...                             the same positions in another shape
    t = transpose(v, 1, 2)               0 1 | 4 5 | 2 3 | 6 7           channels 0, 2, 1, 3 of x, whole
    s = reshape(t, 1, 4, 1, 2)

The ops themselves are run, on `0, 1, 2, ...` in the shape of the map where the chain begins (`moved_by`). What comes
out says which channels of the map a value consists of (`Moved.channels`), or which module makes channels of its blocks
of pixels, or the other way (`Moved.blocks`). Why that holds at all sizes is said in `selections`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph import ops
from ..graph.node_facts import dtype_of, is_floating, shape_of, tensor_shape
from ..graph.raw_nodes import NotConstant, argument, constant, op_name

__all__ = ["Moved", "moved_by"]

_RESHAPES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as", "squeeze", "unsqueeze"}
)
_ORDERS = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"})
_SHUFFLES = frozenset({"channel_shuffle", "native_channel_shuffle"})
_PARTS = {  # where an op keeps its dimension, and what it is by default
    "chunk": (2, 0),
    "unsafe_chunk": (2, 0),
    "split": (2, 0),
    "unsafe_split": (2, 0),
    "split_with_sizes": (2, 0),
    "unsafe_split_with_sizes": (2, 0),
    "tensor_split": (2, 0),
    "unbind": (1, 0),
    "narrow": (1, None),
    "narrow_copy": (1, None),
    "select": (1, None),
    "index_select": (1, None),
    "slice": (1, 0),
}
_COPIES = frozenset({"contiguous", "clone"})
_SUBSCRIPTS = frozenset({"getitem", "index"})  # x[:, 1:3], and torch.export's form of x[:, [1, 2]]
_KNOWN = frozenset({*_RESHAPES, *_ORDERS, *_SHUFFLES, *_PARTS, *_COPIES, *_SUBSCRIPTS})
_MODULES = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle)
_FULL = 2**31  # torch.export writes an open end as the largest integer


class _NotMoved(Exception):
    """A node does something other than moving numbers, or moves them in a way that may differ at other sizes."""


class Moved:
    """The positions in `source` of the numbers of a value (or of several, for a chunk or a split)."""

    def __init__(self, source: fx.Node, value: Any, parts_only: bool) -> None:
        self.source, self.value, self.parts_only = source, value, parts_only

    def channels(self, node: fx.Node) -> tuple[int, ...] | None:
        """The channels of the source that the value consists of, or None if it is no map of whole channels."""
        batch, channels, *size = tensor_shape(self.source)
        if not isinstance(self.value, Tensor) or self.value.dim() != len(size) + 2 or not self.value.numel():
            return None
        if [self.value.shape[0], *self.value.shape[2:]] != [batch, *size] or self.value.shape != shape_of(node):
            return None
        positions = self.value.reshape(batch, -1, prod(size))
        index = positions[0, :, 0] // prod(size)
        if int(index.max()) >= channels:
            return None
        expected = _positions((batch, channels, prod(size)))[:, index.long()]
        return tuple(index.tolist()) if torch.equal(expected, positions) else None

    def blocks(self, node: fx.Node) -> tuple[nn.Module, tuple[int, ...]] | None:
        """The module that makes channels of blocks of pixels or the other way, and the order of the channels then.

        For `nn.PixelShuffle` it is the order before it. None where the value is neither.
        """
        batch, channels, *size = tensor_shape(self.source)
        if not isinstance(self.value, Tensor) or self.value.dim() != len(size) + 2 or self.parts_only:
            return None
        if self.value.numel() != batch * channels * prod(size) or self.value.shape != shape_of(node):
            return None
        small = list(self.value.shape[2:])
        if small == size or self.value.shape[0] != batch:
            return None
        if all(n % m == 0 for n, m in zip(size, small, strict=True)):
            factors = [n // m for n, m in zip(size, small, strict=True)]
            if any(f > 1 and m < 2 for f, m in zip(factors, small, strict=True)):
                return None  # of one block a side too much looks alike
            whole = ops.SpaceToDepth(factors)(_positions((batch, channels, *size)))
            order = _order_of(whole, self.value)
            plain = len(size) == 2 and factors[0] == factors[1]
            module = nn.PixelUnshuffle(factors[0]) if plain else ops.SpaceToDepth(factors)
            return None if order is None else (module, order)
        if len(size) != 2 or any(n % m for n, m in zip(small, size, strict=True)):
            return None
        factor = small[0] // size[0]
        if small != [factor * n for n in size] or min(size) < 2 or channels % factor**2:
            return None
        # The blocks of the result as channels are the channels of the source, in some order.
        order = _order_of(_positions((batch, channels, *size)), ops.SpaceToDepth((factor, factor))(self.value))
        return None if order is None else (nn.PixelShuffle(factor), order)


def _order_of(whole: Tensor, value: Tensor) -> tuple[int, ...] | None:
    """The channels of `whole` that those of `value` are, each once."""
    first = {int(p): i for i, p in enumerate(whole[0].flatten(1)[:, 0])}
    order = tuple(first.get(int(p), -1) for p in value[0].flatten(1)[:, 0])
    if sorted(order) != list(range(len(first))) or not torch.equal(whole[:, list(order)], value):
        return None
    return order


def moved_by(gm: fx.GraphModule, node: fx.Node, moved: dict[fx.Node, Moved]) -> Moved | None:
    """What `node` gives as moved numbers of a map, None if it does something else; `moved` are values before it."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return None
    try:
        return _step(gm, node, moved)
    except (_NotMoved, NotConstant, RuntimeError, TypeError, ValueError, IndexError):
        return None  # also whatever torch refuses to do with the positions


def _step(gm: fx.GraphModule, node: fx.Node, moved: dict[fx.Node, Moved]) -> Moved:
    """What `node` moves, seen from the map where its chain of moves begins."""
    name = op_name(node)
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is not None and (type(module) not in _MODULES or ops.has_hooks(module)):
        raise _NotMoved
    if module is None and name not in _KNOWN:
        raise _NotMoved
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if isinstance(first, fx.Node) and first in moved:
        before = moved[first]
    elif isinstance(first, fx.Node) and _is_map(first):
        before = Moved(first, _positions(tensor_shape(first)), True)
    else:
        raise _NotMoved
    at, source = before.value, before.source
    if isinstance(at, (tuple, list)):
        if name != "getitem":
            raise _NotMoved
        return Moved(source, at[constant(gm, node.args[1])], before.parts_only)
    if name in _COPIES:
        return Moved(source, at, before.parts_only)
    if name in _SHUFFLES or isinstance(module, nn.ChannelShuffle):
        groups = module.groups if isinstance(module, nn.ChannelShuffle) else _argument(gm, node, 1, "groups")
        return Moved(source, torch.channel_shuffle(at, groups), False)
    if name in _RESHAPES or module is not None:
        return Moved(source, _reshape(node, at, source), False)
    if name in _ORDERS:
        return Moved(source, _order(gm, node, at), False)
    if name in _SUBSCRIPTS:
        return Moved(source, at[_subscript(constant(gm, node.args[1]), at.dim(), name)], before.parts_only)
    return Moved(source, _part(gm, node, name, at), before.parts_only)


def _positions(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(prod(shape), dtype=torch.int32).view(shape)


def _is_map(value: Any) -> bool:
    shape = shape_of(value) if isinstance(value, fx.Node) and value.op != "get_attr" else None
    return shape is not None and len(shape) >= 3 and is_floating(value) and prod(shape) > 0


def _reshape(node: fx.Node, at: Tensor, source: fx.Node) -> Tensor:
    shape, whole = shape_of(node), tensor_shape(source)
    if shape is None or not shape or shape[0] != whole[0] or dtype_of(node) != dtype_of(source):
        raise _NotMoved
    if 1 in whole[2:] and tuple(shape[2 - len(whole) :]) != tuple(whole[2:]):
        raise _NotMoved
    return at.reshape(shape)


def _order(gm: fx.GraphModule, node: fx.Node, at: Tensor) -> Tensor:
    """A permutation of dimensions, none of which moves if its size is 1."""
    result: Tensor = _call(gm, node, at)
    named: Tensor = _call(gm, node, torch.empty(tuple(range(2, at.dim() + 2))))  # sizes that name the dimensions
    for i, name in enumerate(named.shape):
        if name != i + 2 and 1 in (at.shape[i], result.shape[i]):
            raise _NotMoved
    return result


def _part(gm: fx.GraphModule, node: fx.Node, name: str, at: Tensor) -> Any:
    where, default = _PARTS[name]
    dim = _argument(gm, node, where, "dim", default)
    if name == "slice" and _is_everything(gm, node):
        return at
    if dim % at.dim() != 1:
        raise _NotMoved
    return _call(gm, node, at)


def _is_everything(gm: fx.GraphModule, node: fx.Node) -> bool:
    start, stop, step = (_argument(gm, node, 2 + i, name) for i, name in enumerate(("start", "end", "step")))
    return start in (None, 0) and (stop is None or stop >= _FULL) and step in (None, 1)


def _subscript(index: Any, rank: int, name: str) -> tuple[Any, ...]:
    """A subscript that takes a part along dimension 1 alone."""
    items = list(index) if isinstance(index, tuple) or name == "index" else [index]
    if name == "index":
        items = [slice(None) if i is None else i for i in items]
    if any(i is None or isinstance(i, bool) for i in items):
        raise _NotMoved
    dots = [k for k, i in enumerate(items) if i is Ellipsis]
    if dots:
        items[dots[0] : dots[0] + 1] = [slice(None)] * (rank - len(items) + 1)
    for k, item in enumerate(items):
        whole = isinstance(item, slice) and item.start in (None, 0) and item.stop is None and item.step in (None, 1)
        if k != 1 and not whole:
            raise _NotMoved
    return tuple(list(i) if isinstance(i, list) else i for i in items)


def _call(gm: fx.GraphModule, node: fx.Node, value: Tensor) -> Any:
    """What the node's own function or method does to `value` in place of its operand."""
    args = tuple(constant(gm, a) for a in node.args[1:])
    kwargs = {k: constant(gm, v) for k, v in node.kwargs.items() if k not in ("input", "self")}
    target: Any = node.target
    return getattr(value, target)(*args, **kwargs) if isinstance(target, str) else target(value, *args, **kwargs)


def _argument(gm: fx.GraphModule, node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return constant(gm, argument(node, position, name, default))
