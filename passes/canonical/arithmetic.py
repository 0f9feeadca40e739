"""Rewrites arithmetic: of values as torch.add, sub, mul or cat (a join), with constants as a `ChannelAffine`.

    %s = mul(%d, 0.5)        ->      %s = call_module[mul](%d)        ChannelAffine
    %t = %s.add(%x)          ->      %t = torch.add(%s, %x)

A constant is a number, or a tensor that broadcasts as one number a channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..graph import ops
from ..graph.graph_edit import bypass, place
from ..graph.node_facts import is_floating, shape_of, tensor_dtype, tensor_shape
from ..graph.raw_nodes import tensor_of

__all__ = ["SCALAR", "arithmetic", "concatenation", "scale_and_bias"]

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
    shape = tensor_shape(node)
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
    constants = [_constant(gm, v) for v in (left, right)]
    if isinstance(left, fx.Node) and isinstance(right, fx.Node) and constants == [None, None]:
        if name in ("div", "rsub"):
            return False
        node.op, node.target, node.kwargs = "call_function", getattr(torch, name), {}
        return True
    found = scale_and_bias(gm, node, name, 1)
    if found is None:
        return False
    value, scale, bias = found
    affine = ops.ChannelAffine(scale, bias)
    tensors = [tensor_of(gm, v) for v in (left, right)]
    affine.requires_grad_(any(t is not None and t.requires_grad for t in tensors))
    place(gm, node, affine, name, value)
    return True


def scale_and_bias(gm: fx.GraphModule, node: fx.Node, name: str, dim: int) -> tuple[fx.Node, Tensor, Tensor] | None:
    """The value, and what it is multiplied by and what is added, in arithmetic with a constant.

    Both have one number a channel or one for all; the channels are dimension `dim`.
    """
    shape = tensor_shape(node)
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1 or set(node.kwargs) - {"alpha"}:
        return None
    left, right = node.args
    constants = [_constant(gm, v) for v in (left, right)]
    if not is_floating(node) or len(shape) < 2 or all(n.op == "get_attr" for n in node.all_input_nodes):
        return None
    if constants[1] is not None and isinstance(left, fx.Node) and shape_of(left) == shape:
        operand = left
        value = _per_channel(constants[1], shape, dim)
        pair = None if value is None else SCALAR[name](value)
    elif constants[0] is not None and isinstance(right, fx.Node) and shape_of(right) == shape:
        operand = right
        value = _per_channel(constants[0], shape, dim)
        pair = {"add": (1.0, value), "mul": (value, 0.0), "sub": (-1.0, value)}.get(name)
    else:
        return None
    if pair is None or value is None:
        return None
    like = next(c for c in reversed(constants) if c is not None)
    dtype = tensor_dtype(node)
    scale, bias = (torch.as_tensor(v, dtype=dtype, device=like.device).reshape(-1) for v in pair)
    size = max(scale.numel(), bias.numel())
    return operand, scale.expand(size), bias.expand(size)


def _constant(gm: fx.GraphModule, value: Any) -> Tensor | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    tensor = tensor_of(gm, value)
    return tensor.detach() if tensor is not None and tensor.is_floating_point() else None


def _per_channel(value: Tensor, shape: tuple[int, ...], dim: int) -> Tensor | None:
    """`value` as one number a channel if it broadcasts along dimension `dim` of a value of this shape, else None."""
    if value.numel() == 1:
        return value.reshape(1)
    wanted = [1] * len(shape)
    wanted[dim] = shape[dim]
    aligned = [1] * (len(shape) - value.dim()) + list(value.shape)
    return value.reshape(-1) if aligned == wanted else None
