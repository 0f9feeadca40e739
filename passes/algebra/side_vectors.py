"""Passes vectors that are added to a map through a span: `h + v[:, :, None, None]`, one number a channel.

Inside a `LinearSpan` nothing pads, so such a vector is added to every pixel that a later kernel sees, and what reaches
the output is the sum over the taps of all that follows (section 6 of the design):

    conv2(conv1(x) + v) = (conv2 . conv1)(x) + V v        V = sum over taps of conv2        (out, channels of v)

So the merged form is the merged conv plus a 1 x 1 convolution of the vector, which is a map of one pixel (a fitted conv
has one too, whose matrix is fitted with it: `SideConv`):

    x ─ conv1 ─ add ─ conv2 ─        ->        x ─ merged ─ add ─
    v ───────────┘                             v ─ V ────────┘
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..graph import ops
from ..graph.node_facts import shape_of, tensor_shape
from ..graph.reduction import join_of, operands_of
from . import linear

__all__ = ["SideAdd", "SideConv", "merge_maps", "side_conv", "side_vector", "through"]

Maps = dict[int, Tensor]  # side input -> the matrix (channels here, channels of the vector) by which it is seen


class SideAdd(nn.Module):
    """x + sign v for the side input number `index` of the span that this is in; the identity in the span's algebra."""

    def __init__(self, index: int, channels: int, sign: float) -> None:
        super().__init__()
        self.index, self.channels, self.sign = index, channels, sign

    def forward(self, x: Tensor, *sides: Tensor) -> Tensor:
        v = sides[self.index]
        return x + v if self.sign > 0 else x - v

    def maps(self, device: torch.device | None) -> Maps:
        """The matrix from the vector to the map: the identity, with the sign."""
        return {self.index: self.sign * torch.eye(self.channels, dtype=torch.float64, device=device)}

    def extra_repr(self) -> str:
        return f"side={self.index}, {self.channels}, sign={self.sign}"


class SideConv(nn.Module):
    """x + V v for the side input number `index` of the span that this is in; the identity in the span's algebra.

    `weight` is V, (out, channels of the vector).
    """

    def __init__(self, index: int, channels: int, out_channels: int, like: Tensor) -> None:
        super().__init__()
        self.index = index
        self.weight = nn.Parameter(torch.zeros(out_channels, channels, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor, *sides: Tensor) -> Tensor:
        v = sides[self.index].flatten(1)
        return x + F.linear(v, self.weight).reshape(len(v), -1, *[1] * (x.dim() - 2))

    def maps(self, device: torch.device | None) -> Maps:
        """The matrix from the vector to the map."""
        return {self.index: self.weight.to(device, torch.float64)}

    def extra_repr(self) -> str:
        return f"side={self.index}, {self.weight.shape[1]}, {self.weight.shape[0]}"


def side_vector(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The vector and its sign, if `node` adds one number a channel from elsewhere to a map, or subtracts it."""
    join = join_of(node)
    operands = operands_of(node)
    if join not in ("add", "sub") or len(operands) != 2:
        return None
    shape = tensor_shape(node)
    whole = [v for v in operands if shape_of(v) == shape]
    if len(whole) != 1 or (join == "sub" and whole[0] is not operands[0]):
        return None
    vector = operands[1] if whole[0] is operands[0] else operands[0]
    seen = tensor_shape(vector)
    fits = len(seen) == len(shape) > 2 and seen[1] == shape[1] and all(n == 1 for n in seen[2:])
    return (vector, -1.0 if join == "sub" else 1.0) if fits and seen[0] in (1, shape[0]) else None


def through(maps: Maps, op: linear.LinearOp) -> Maps:
    """The matrices from side vectors to the output of `op`, given those to its input."""
    if not maps:
        return maps
    response = op.response()
    return {i: response @ m for i, m in maps.items()}


def merge_maps(parts: list[Maps], widths: list[int], join: str, signs: tuple[float, ...]) -> Maps:
    """The matrices from side vectors to the output of a join, given those of its branches (`widths` channels)."""
    found: Maps = {}
    at = 0
    for maps, width, sign in zip(parts, widths, signs, strict=True):
        for i, m in maps.items():
            if join == "cat":
                placed = m.new_zeros(sum(widths), m.shape[1])
                placed[at : at + width] = m
            else:
                placed = sign * m
            found[i] = found[i] + placed if i in found else placed
        at += width
    return found


def side_conv(matrix: Tensor, ndim: int, like: Tensor | None) -> nn.Module:
    """The 1 x 1 convolution without bias that multiplies a vector, seen as a map of one pixel, by `matrix`."""
    out, channels = matrix.shape
    conv = ops.conv_class(ndim)(channels, out, (1,) * ndim, bias=False, device="meta")  # type: ignore[arg-type]
    values = matrix.detach().reshape(out, channels, *(1,) * ndim)
    conv.weight = nn.Parameter(values if like is None else values.to(like.device, like.dtype))
    return conv
