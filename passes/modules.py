"""Modules that torch.nn does not have, for what a canonical graph says about the channels of a map.

    ChannelAffine     y[:, c] = scale[c] x[:, c] + bias[c]
    ChannelSelect     y[:, k] = x[:, index[k]]                 a part of the channels, or all in another order
    ChannelLayerNorm  nn.LayerNorm over dimension 1

A selection runs as cheaply as what it was written as: a range is a view of its input, and anything else a gather, which
for a shuffle is faster than to transpose a view (`benchmarks/layouts.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import OptionError

__all__ = ["ChannelAffine", "ChannelLayerNorm", "ChannelSelect"]


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
