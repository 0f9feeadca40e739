"""What the source of every random network starts from: torch's names, and layers that networks write themselves."""

from __future__ import annotations

import operator
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "GRN",
    "SE",
    "Any",
    "Clamp",
    "ConvSame",
    "DropPath",
    "F",
    "LayerNorm2d",
    "NamedTuple",
    "NormAct",
    "OrderedDict",
    "Output",
    "Pair",
    "Scale",
    "Shuffle",
    "StdConv",
    "Swish",
    "Tensor",
    "linear_op",
    "nn",
    "operator",
    "torch",
    "weight_norm",
]

_CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Pair(NamedTuple):
    """Two outputs with names."""

    first: Tensor
    second: Any


@dataclass
class Output:
    """Outputs as a dataclass."""

    sample: Tensor
    extra: Any = None


class DropPath(nn.Module):
    """Stochastic depth: the identity in eval mode."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class Clamp(nn.Module):
    """An activation of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-1.0, 2.0)


class Swish(nn.Module):
    """x sigmoid(x), in place where one can."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid())


class Scale(nn.Module):
    """One parameter a channel, and a flag that changes nothing."""

    def __init__(self, channels: int, ndim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels, *(1,) * ndim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class NormAct(nn.BatchNorm2d):
    """A norm and its activation in one module that is a BatchNorm by inheritance."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of an NCHW map."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class GRN(nn.Module):
    """Global response normalisation with a residual."""

    def __init__(self, channels: int, ndim: int) -> None:
        super().__init__()
        self.dims = tuple(range(2, ndim + 2))
        self.gamma = nn.Parameter(torch.randn(1, channels, *(1,) * ndim))

    def forward(self, x: Tensor) -> Tensor:
        g = x.abs().sum(self.dims, keepdim=True)
        return x + self.gamma * (x * (g / (g.mean(1, keepdim=True) + 1e-3)))


class SE(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, ndim: int, hard: bool = False) -> None:
        super().__init__()
        self.dims = tuple(range(2, ndim + 2))
        self.reduce = _CONVS[ndim - 1](channels, max(1, channels // 2), 1)
        self.expand = _CONVS[ndim - 1](max(1, channels // 2), channels, 1)
        self.act = nn.ReLU(inplace=True)
        self.gate = nn.Hardsigmoid() if hard else nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean(self.dims, keepdim=True)))))


class StdConv(nn.Conv2d):
    """A conv whose weight is standardised in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvSame(nn.Conv2d):
    """A conv that pads as TensorFlow does, by the size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for n, k, s, d in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1]):  # noqa: B905
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Shuffle(nn.Module):
    """Channel shuffle: view, transpose, view."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, *size = x.shape
        return x.view(n, self.groups, c // self.groups, *size).transpose(1, 2).reshape(n, c, *size)


def linear_op(x: Tensor) -> Tensor:
    """A helper function in the forward's path."""
    return x * 0.5 + 1


def weight_norm(conv: nn.Module, kind: int) -> nn.Module:
    """A parametrized conv, in one of torch's ways."""
    if kind == 0:
        return torch.nn.utils.parametrizations.weight_norm(conv)
    if kind == 1:
        return torch.nn.utils.parametrizations.spectral_norm(conv)
    return torch.nn.utils.spectral_norm(conv)
