"""Makes the rows of a linear layer's own least-squares system: what each output pixel reads, and its weight as columns.

    y[o, c] = sum over j of  X[b, o, j] W[b, j, c']  +  bias[c]          c the c'-th output channel of block b

X is (blocks, samples, features), W (blocks, features, out / blocks): one block for a dense layer, the groups of a
grouped one. A feature is a tap and a channel of the block, taps first. All padding modes, strides and dilations are in
what is gathered; for nn.Linear a pixel is an entry of the dimensions between the first and the last.

A transposed convolution of stride s is a convolution of the map with s - 1 zeros between its pixels, with the kernel
turned round: tap t of the one is tap K - 1 - t of the other, and p before becomes d (K - 1) - p.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph import ops
from ..graph.shapes import conv_pads

__all__ = ["blocks_of", "columns_of", "features", "pixels_of", "takes", "unknowns_of", "values_at", "weight_of"]


def blocks_of(layer: Any) -> int:
    """The number of independent systems: the groups of a convolution."""
    return 1 if isinstance(layer, nn.Linear) else int(layer.groups)


def unknowns_of(layer: Any) -> int:
    """The number of features that an output channel reads."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return prod(layer.kernel_size) * (layer.in_channels // layer.groups)


def takes(layer: Any, x: Tensor) -> bool:
    """Whether `x` is a batch of what the layer takes, with the images along its first dimension."""
    return x.dim() >= 2 if isinstance(layer, nn.Linear) else x.dim() == len(layer.kernel_size) + 2


def features(layer: Any, x: Tensor, positions: Tensor) -> Tensor:
    """What the output pixels at `positions` (images, count), flat indices, read of `x`: (blocks, samples, features)."""
    image = torch.arange(len(positions), device=x.device)[:, None].expand_as(positions).flatten()
    at = positions.flatten()
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])[image, at][None]
    padded, stride = _padded(layer, x)
    size = padded.shape[2:]
    steps = [prod(size[i + 1 :]) for i in range(len(size))]
    taps = [
        sum(t * d * step for t, d, step in zip(tap, layer.dilation, steps, strict=True))
        for tap in product(*map(range, layer.kernel_size))
    ]
    corner, rest = torch.zeros_like(at), at
    for n, k, d, s, step in reversed(
        list(zip(size, layer.kernel_size, layer.dilation, stride, steps, strict=True))
    ):  # from the last dimension on
        out = (n - d * (k - 1) - 1) // s + 1
        corner += rest % out * s * step
        rest = rest // out
    index = corner[:, None] + torch.tensor(taps, device=x.device)
    flat = padded.flatten(2)
    if index.numel() * 4 > len(flat) * flat.shape[2]:
        found = flat.transpose(1, 2).contiguous()[image[:, None], index]
    else:
        found = flat[image[:, None], :, index]
    groups = int(layer.groups)  # (samples, taps, channels)
    return found.unflatten(2, (groups, -1)).permute(2, 0, 1, 3).flatten(2)


def values_at(layer: Any, y: Tensor, positions: Tensor) -> Tensor:
    """The values at `positions` of what has the shape of the layer's output, (samples, channels)."""
    flat = y.reshape(len(y), -1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.flatten(2).transpose(1, 2)
    image = torch.arange(len(positions), device=y.device)[:, None].expand_as(positions)
    return flat[image.flatten(), positions.flatten()]


def pixels_of(layer: Any, shape: Sequence[int]) -> int:
    """How many pixels an output of this shape has an image."""
    return prod(shape[1:-1]) if isinstance(layer, nn.Linear) else prod(shape[2:])


def columns_of(layer: Any, weight: Tensor | None = None) -> Tensor:
    """A weight, by default the layer's own, as columns (blocks, features, out / blocks), in float64."""
    weight = (layer.weight if weight is None else weight).detach().double()
    if isinstance(layer, nn.Linear):
        return weight.T[None]
    groups, ndim = layer.groups, weight.dim() - 2
    if isinstance(layer, ops.TRANSPOSED):
        split = weight.unflatten(0, (groups, -1)).flip(tuple(range(3, 3 + ndim)))  # groups, in, out, taps
        return split.permute(0, *range(3, 3 + ndim), 1, 2).flatten(1, 1 + ndim)
    split = weight.unflatten(0, (groups, -1))  # groups, out, in, taps
    return split.permute(0, *range(3, 3 + ndim), 2, 1).flatten(1, 1 + ndim)


def weight_of(layer: Any, columns: Tensor) -> Tensor:
    """The weight that has these columns."""
    if isinstance(layer, nn.Linear):
        return columns[0].T
    ndim = len(layer.kernel_size)
    split = columns.unflatten(1, (*layer.kernel_size, -1))  # groups, taps, in, out
    order = (0, ndim + 2, ndim + 1, *range(1, ndim + 1))
    if isinstance(layer, ops.TRANSPOSED):
        order = (0, ndim + 1, ndim + 2, *range(1, ndim + 1))
        return split.permute(order).flatten(0, 1).flip(tuple(range(2, ndim + 2)))
    return split.permute(order).flatten(0, 1)


def _padded(layer: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The padded map of which the layer is a convolution without padding, and the stride of that."""
    ndim = len(layer.kernel_size)
    transposed: bool = isinstance(layer, ops.TRANSPOSED)
    if transposed:
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)))
        places: Any = (..., *(slice(None, None, s) for s in layer.stride))
        spread[places] = x
        pads = [
            (d * (k - 1) - p, d * (k - 1) - p + extra)
            for d, k, p, extra in zip(
                layer.dilation, layer.kernel_size, layer.padding, layer.output_padding, strict=True
            )
        ]
        return F.pad(spread, [p for pair in reversed(pads) for p in pair]), (1,) * ndim
    flat = [p for pair in reversed(conv_pads(layer)) for p in pair]
    if not any(flat):
        return x, tuple(layer.stride)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, flat, mode=mode), tuple(layer.stride)
