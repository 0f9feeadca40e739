"""Joins are torch.add, sub, mul and cat over values; arithmetic with constants is a `ChannelAffine`.

    %s = mul(%d, 0.5)        ->      %s = call_module[mul](%d)        ChannelAffine
    %t = %s.add(%x)          ->      %t = torch.add(%s, %x)

A constant is a number, or a tensor that broadcasts as one number a channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from . import ops
from .nodes import tensor_of
from .placing import bypass, place

__all__ = ["SCALAR", "arithmetic", "concatenation"]

SCALAR = {
    "add": lambda c: (1.0, c),
    "sub": lambda c: (1.0, -c),
    "mul": lambda c: (c, 0.0),
    "div": lambda c: (1 / c, 0.0),
    "rsub": lambda c: (-1.0, c),
}


def concatenation(node: fx.Node) -> bool:
    """Make a concatenation `torch.cat([...], dim)`, with its dimension counted from the front."""
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    shape = node.meta["shape"]
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int):
        return False
    if len(tensors) == 1 and isinstance(tensors[0], fx.Node):
        return bypass(node)
    node.target, node.op = torch.cat, "call_function"
    node.args, node.kwargs = (list(tensors), dim % len(shape)), {}
    return True


def arithmetic(gm: fx.GraphModule, node: fx.Node, name: str) -> bool:
    """Make arithmetic of two values a join, and that of a map and a constant a `ChannelAffine`."""
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1 or set(node.kwargs) - {"alpha"}:
        return False
    left, right = node.args
    constant = [_constant(gm, v) for v in (left, right)]
    shape = node.meta["shape"]
    if isinstance(left, fx.Node) and isinstance(right, fx.Node) and constant == [None, None]:
        if name in ("div", "rsub"):
            return False
        node.op, node.target, node.kwargs = "call_function", getattr(torch, name), {}
        return True
    if not node.meta["floating"] or len(shape) < 2 or all(n.op == "get_attr" for n in node.all_input_nodes):
        return False
    if constant[1] is not None and isinstance(left, fx.Node) and left.meta.get("shape") == shape:
        value = _per_channel(constant[1], shape)
        pair = None if value is None else SCALAR[name](value)
    elif constant[0] is not None and isinstance(right, fx.Node) and right.meta.get("shape") == shape:
        value = _per_channel(constant[0], shape)
        pair = {"add": (1.0, value), "mul": (value, 0.0), "sub": (-1.0, value)}.get(name)
        if value is None or pair is None:
            return False
        node.args = (right, left)
    else:
        return False
    if pair is None:
        return False
    like = next(c for c in reversed(constant) if c is not None)
    dtype = node.meta["dtype"]
    scale, bias = (torch.as_tensor(v, dtype=dtype, device=like.device).reshape(-1) for v in pair)
    size = max(scale.numel(), bias.numel())
    place(gm, node, ops.ChannelAffine(scale.expand(size), bias.expand(size)), name)
    return True


def _constant(gm: fx.GraphModule, value: Any) -> Tensor | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    tensor = tensor_of(gm, value)
    return tensor.detach() if tensor is not None and tensor.is_floating_point() else None


def _per_channel(value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """`value` as one number a channel if it broadcasts that way over a map of this shape, else None."""
    if value.numel() == 1:
        return value.reshape(1)
    tail = len(shape) - 2
    aligned = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    if len(aligned) == len(shape) and aligned == (1, shape[1]) + (1,) * tail:
        return value.reshape(-1)
    return None
