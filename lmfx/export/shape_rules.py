"""Says what becomes of ops that only move numbers: at the shapes that are written, each is a Reshape or a Transpose.

A shape that a graph asks for (`x.size(0)`, `x.shape[2] // 2`) is known where a graph is written for one shape, so such
nodes become nothing, and the ops that read them take the shape that their value has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lmfx.export.builder import Builder, UnsupportedOp

__all__ = ["MOVE_RULES"]

Rule = Callable[..., str]


def _reshape(e: Builder, node: fx.Node, x: fx.Node, *shape: Any, **options: Any) -> str:
    if any(isinstance(a, torch.dtype) for a in (*shape, *options.values())):
        raise UnsupportedOp(f"{node.name} reads the same bytes as another dtype")
    if e.shape(x) == e.shape(node):
        return e.value(x)
    return e.node("Reshape", e.value(x), e.ints(e.shape(node)))


def _permute(e: Builder, node: fx.Node, x: fx.Node, *dims: Any, **options: Any) -> str:
    order = options.get("dims", dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims)
    return _transposed(e, x, list(order))


def _transpose(e: Builder, node: fx.Node, x: fx.Node, dim0: Any, dim1: Any) -> str:
    order = list(range(len(e.shape(x))))
    if not isinstance(dim0, int) or not isinstance(dim1, int):
        raise UnsupportedOp(f"the dimensions of {node.name} are computed")
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _transposed(e, x, order)


def _transposed(e: Builder, x: fx.Node, order: list[Any]) -> str:
    rank = len(e.shape(x))
    if not all(isinstance(d, int) for d in order):
        raise UnsupportedOp("an order of dimensions that is computed")
    return e.node("Transpose", e.value(x), perm=[d % rank for d in order])


def _same(e: Builder, node: fx.Node, x: fx.Node, *args: Any, **options: Any) -> str:
    return e.value(x)


def _mean(e: Builder, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: Any = False, **options: Any) -> str:
    dims = [dim] if isinstance(dim, int) else dim
    if options or not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) for d in dims):
        raise UnsupportedOp(f"the emitter has no rule for this mean ({node.name})")
    return e.node("ReduceMean", e.value(x), e.ints(dims), keepdims=int(bool(keepdim)))


_MOVES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    "permute": _permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("contiguous", "clone", "detach"), _same),
    "mean": _mean,
}
# By the name of a method, and by the function of torch that has it.
MOVE_RULES: dict[Any, Rule] = {**_MOVES, **{getattr(torch, n): rule for n, rule in _MOVES.items() if hasattr(torch, n)}}
