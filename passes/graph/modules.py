"""Modules that torch.nn does not have, for what a canonical graph says about the channels of a map.

    ChannelAffine     y[:, c] = scale[c] x[:, c] + bias[c]
    ChannelSelect     y[:, k] = x[:, index[k]]                 a part of the channels, or all in another order
    ChannelLayerNorm  nn.LayerNorm over dimension 1
    PixelSlice        y[:, :, i] = x[:, :, start + step i]     a crop, a stride, or both
    SpaceToDepth      nn.PixelUnshuffle in any number of dimensions, with a factor for each
    DepthToSpace      nn.PixelShuffle in any number of dimensions, with a factor for each

A selection runs as cheaply as what it was written as: a range is a view of its input, and anything else a gather, which
for a shuffle is faster than to transpose a view (`benchmarks/runtimes/layouts.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError

__all__ = ["ChannelAffine", "ChannelLayerNorm", "ChannelSelect", "DepthToSpace", "PixelSlice", "SpaceToDepth"]


class ChannelAffine(nn.Module):
    """y = scale * x + bias with one pair a channel; `scale` and `bias` have shape (channels,) or (1,) for all alike."""

    def __init__(self, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        tail = (1,) * (x.dim() - 2)
        return x * self.scale.view(-1, *tail) + self.bias.view(-1, *tail)

    def extra_repr(self) -> str:
        return str(self.scale.numel())


class ChannelLayerNorm(nn.LayerNorm):
    """Each pixel's channels, normalised: `nn.LayerNorm(channels)` for maps of shape (batch, channels, \\*size)."""

    def forward(self, x: Tensor) -> Tensor:
        last = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return last.movedim(-1, 1)


class ChannelSelect(nn.Module):
    """Output channel `k` is input channel `index[k]`, for maps of shape (batch, channels, \\*size).

    `index` holds one input channel, counted from 0, for each output channel. `span` is (start, stop, step) if that is a
    range, else None. OptionError if the index is empty or negative.
    """

    def __init__(self, index: Sequence[int], device: torch.device | str | None = None) -> None:
        super().__init__()
        self.index = tuple(int(i) for i in index)
        if not self.index or min(self.index) < 0:
            raise OptionError(f"a selection needs one input channel or more, counted from 0, not {list(self.index)}")
        self.span = _range(self.index)
        gather = None if self.span else torch.tensor(self.index, device=device)
        self.register_buffer("gather", gather, persistent=False)  # follows the network to its device, never saved
        self.gather: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if self.span is not None:
            start, stop, step = self.span
            return x[:, start:stop:step]
        assert self.gather is not None
        return x.index_select(1, self.gather)

    def extra_repr(self) -> str:
        if self.span is not None:
            return "{}:{}:{}".format(*self.span)
        groups = _shuffle(self.index)
        return f"{len(self.index)}, groups={groups}" if groups is not None else str(list(self.index))


class PixelSlice(nn.Module):
    """Of each spatial dimension every `step`-th pixel, without the first `before` and the last `after` ones.

    `amounts` is (before, after) and `steps` one number for each spatial dimension: ``x[:, :, before:-after:step]``.
    """

    def __init__(self, amounts: Sequence[tuple[int, int]], steps: Sequence[int]) -> None:
        super().__init__()
        self.amounts = tuple((int(lo), int(hi)) for lo, hi in amounts)
        self.steps = tuple(int(s) for s in steps)
        least = min((n for pair in self.amounts for n in pair), default=0)
        if len(self.amounts) != len(self.steps) or least < 0 or min(self.steps, default=1) < 1:
            raise OptionError(
                f"a slice needs a crop of 0 or more and a step of 1 or more in each dimension, not {self.amounts} and "
                f"{self.steps}"
            )

    def forward(self, x: Tensor) -> Tensor:
        cut = (slice(lo, -hi if hi else None, step) for (lo, hi), step in zip(self.amounts, self.steps, strict=True))
        return x[(slice(None), slice(None), *cut)]

    def extra_repr(self) -> str:
        return ", ".join(f"{lo}:{-hi if hi else ''}:{s}" for (lo, hi), s in zip(self.amounts, self.steps, strict=True))


class _Blocks(nn.Module):
    """What has a block size, `factors`, one for each dimension."""

    def __init__(self, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = tuple(int(f) for f in factors)
        if min(self.factors, default=0) < 1:
            raise OptionError(f"blocks need a size of 1 or more in each dimension, not {self.factors}")

    def extra_repr(self) -> str:
        return "x".join(map(str, self.factors))


class SpaceToDepth(_Blocks):
    """The pixels of each block of `factors` pixels become channels, those of one channel next to each other.

    Like a convolution of this stride it leaves out what is no whole block.
    """

    def forward(self, x: Tensor) -> Tensor:
        blocks: list[int] = []
        for i, factor in enumerate(self.factors):
            count = x.shape[i + 2] // factor
            x = x.narrow(i + 2, 0, count * factor)
            blocks += [count, factor]
        n = len(self.factors)
        split = x.reshape(x.shape[0], x.shape[1], *blocks)
        moved = split.permute(0, 1, *range(3, 2 * n + 2, 2), *range(2, 2 * n + 2, 2))
        return moved.flatten(1, n + 1)


class DepthToSpace(_Blocks):
    """Channels next to each other become the pixels of a block of `factors` pixels."""

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.factors)
        split = x.reshape(x.shape[0], -1, *self.factors, *x.shape[2:])
        order = [axis for i in range(n) for axis in (n + 2 + i, 2 + i)]
        size = [m * f for m, f in zip(x.shape[2:], self.factors, strict=True)]
        return split.permute(0, 1, *order).reshape(x.shape[0], split.shape[1], *size)


def _range(index: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(start, stop, step) with a step of 1 or more, or None."""
    step = index[1] - index[0] if len(index) > 1 else 1
    if step < 1 or index != tuple(range(index[0], index[0] + step * len(index), step)):
        return None
    return index[0], index[-1] + 1, step


def _shuffle(index: tuple[int, ...]) -> int | None:
    """g if the index transposes the channels as a matrix of g rows, or None."""
    width = index.index(1) if 1 in index else 0  # the second channel opens the second row of the transposed matrix
    rows = width
    if not rows or len(index) % rows:
        return None
    columns = len(index) // rows
    return rows if index == tuple(i * columns + j for j in range(columns) for i in range(rows)) else None
