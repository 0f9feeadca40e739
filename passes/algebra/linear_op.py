"""`LinearOp`: one convolution with its values, and how torch.nn modules become one and come back from one.

A `LinearOp` is ``y = conv(pad(x, p), W, stride s, dilation d, groups g) + b`` in up to 3 spatial dimensions, with the
zeros before (left, top) and after (right, bottom) kept apart. A vector is a map without spatial dimensions, so
nn.Linear is an op with an empty kernel. `linear` has the algebra. An op that makes its map larger is a convolution
too, whose channels become blocks of pixels (`enlarging`): `weight` and `bias` are those of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from ..errors import ModelError, OptionError
from ..graph.modules import DepthToSpace
from ..graph.shapes import Pads, conv_pads, per_dimension
from ..ir import ConvConfig

__all__ = [
    "LinearOp",
    "densify",
    "diagonal",
    "from_avg_pool",
    "from_batch_norm",
    "from_conv",
    "from_linear",
    "from_pad",
    "from_slice",
    "from_space_to_depth",
    "identity",
    "taps",
    "to_conv",
]

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_FN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_PAD: dict[int, Any] = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}


@dataclass(frozen=True, eq=False)
class LinearOp:
    """One convolution with its values.

    `weight` is (out, in / groups, kernel...), `bias` (out,); the tuples have one entry a spatial dimension, that of
    `padding` is (before, after). OptionError if the shapes disagree.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    padding: Pads
    dilation: tuple[int, ...]
    groups: int = 1
    upscale: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()
    window: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        n = self.weight.ndim - 2
        if n not in _CONV and n != 0:
            raise OptionError(f"a LinearOp has at most 3 spatial dimensions; the weight is {tuple(self.weight.shape)}")
        if not len(self.stride) == len(self.padding) == len(self.dilation) == n:
            raise OptionError(
                f"stride {self.stride}, padding {self.padding} and dilation {self.dilation} need {n} entries each, "
                f"one for a spatial dimension of the weight {tuple(self.weight.shape)}"
            )
        rows = self.weight.shape[0]
        if self.bias.shape != (rows,) or rows % self.groups or rows % prod(self.upscale):
            raise OptionError(
                f"weight {tuple(self.weight.shape)}, bias {tuple(self.bias.shape)} and groups {self.groups} disagree; "
                "the bias has one entry an output channel and groups divide the channels"
            )

    @property
    def ndim(self) -> int:
        """The number of spatial dimensions."""
        return self.weight.ndim - 2

    @property
    def in_channels(self) -> int:
        """Input channels of all groups together."""
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Output channels."""
        return self.weight.shape[0] // prod(self.upscale)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Taps in each spatial dimension."""
        return tuple(self.weight.shape[2:])

    def like(self, x: Tensor) -> LinearOp:
        """The same op with its values on the device and in the dtype of `x`."""
        return replace(self, weight=self.weight.to(x.device, x.dtype), bias=self.bias.to(x.device, x.dtype))

    @property
    def config(self) -> ConvConfig:
        """Everything but the values."""
        return ConvConfig(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            upscale=self.upscale,
            cut=self.cut,
            window=self.window,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Pad and convolve `x` (batch, in, \\*size) in the dtype of the weight."""
        if self.ndim == 0:
            return F.linear(x.to(self.weight.dtype), densify(self).weight, self.bias)
        x = F.pad(x.to(self.weight.dtype), _torch_pads(self.padding))
        y: Tensor = _CONV_FN[self.ndim](x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        if not self.upscale:
            return y
        y = DepthToSpace(self.upscale)(y)
        for i, c in enumerate(self.cut):
            y = y.narrow(i + 2, 0, y.shape[i + 2] - c)
        return y

    def response(self) -> Tensor:
        """The sum over taps, (out, in): how a constant input reaches the output, away from the edges."""
        return taps(densify(self)).sum(2)


def densify(op: LinearOp, groups: int = 1) -> LinearOp:
    """The same op with fewer groups; `groups` divides `op.groups`."""
    if groups < 1 or op.groups % groups:
        raise OptionError(f"{op.groups} groups cannot be seen as {groups}; give a divisor")
    ratio = op.groups // groups
    if ratio == 1:
        return op
    out, inner = op.out_channels // op.groups, op.in_channels // op.groups
    blocks = op.weight.reshape(groups, ratio, out, inner, -1)
    weight = blocks.new_zeros(groups, ratio, out, ratio, inner, blocks.shape[-1])
    i = torch.arange(ratio, device=blocks.device)
    weight[:, i, :, i] = blocks.transpose(0, 1)  # the index pair comes first
    weight = weight.reshape(op.out_channels, ratio * inner, *op.kernel_size)
    return LinearOp(weight, op.bias, op.stride, op.padding, op.dilation, groups)


def taps(op: LinearOp) -> Tensor:
    """The weight as (out, in / groups, taps)."""
    return op.weight.reshape(*op.weight.shape[:2], -1)


# --- from and to modules ---------------------------------------------------------------------------------------------


def from_conv(conv: nn.Module) -> LinearOp:
    """A torch.nn convolution in float64.

    Raises ModelError for a transposed one, for padding that is not zeros, and for complex weights.
    """
    if isinstance(conv, _ConvTransposeNd) or not isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise ModelError(f"{type(conv).__name__} is not a plain convolution; only nn.Conv1d, Conv2d and Conv3d are")
    if conv.weight.is_complex():
        raise ModelError("a convolution with complex weights cannot be merged; split it into real ones")
    pads = conv_pads(conv)
    if conv.padding_mode != "zeros" and any(map(any, pads)):
        raise ModelError(f"padding mode {conv.padding_mode!r} is not affine in zeros; only 'zeros' can be merged")
    weight = conv.weight.double()
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.double()
    return LinearOp(weight, bias, tuple(conv.stride), pads, tuple(conv.dilation), conv.groups)


def from_linear(module: nn.Module) -> LinearOp:
    """An nn.Linear on vectors, as a 1 x 1 convolution of a map without spatial dimensions, in float64."""
    if not isinstance(module, nn.Linear) or module.weight.is_complex():
        raise ModelError(f"{type(module).__name__} is not an nn.Linear with real weights")
    weight = module.weight.double()
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.double()
    return LinearOp(weight, bias, (), (), ())


def from_batch_norm(bn: nn.Module, ndim: int) -> LinearOp:
    """A BatchNorm with its running (eval) statistics, in float64; ModelError if it has none."""
    if not isinstance(bn, _BatchNorm):
        raise ModelError(f"{type(bn).__name__} is not a BatchNorm")
    if bn.running_mean is None or bn.running_var is None:
        raise ModelError(
            "a BatchNorm without running statistics (track_running_stats=False) depends on its batch; "
            "set them from training data to make it affine"
        )
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    bias = -bn.running_mean.double() * scale
    return diagonal(scale, bias if bn.bias is None else bias + bn.bias.double(), ndim)


def diagonal(scale: Tensor, bias: Tensor | None, ndim: int) -> LinearOp:
    """Each channel times `scale` (channels,) plus `bias` (channels,), in float64."""
    if scale.ndim != 1 or (bias is not None and bias.shape != scale.shape):
        shapes = tuple(scale.shape), None if bias is None else tuple(bias.shape)
        raise OptionError(f"scale and bias need one entry a channel, not shapes {shapes}")
    weight = scale.double().reshape(-1, 1, *[1] * ndim)
    shift = torch.zeros_like(weight[:, 0].flatten()) if bias is None else bias.double()
    return LinearOp(weight, shift, (1,) * ndim, ((0, 0),) * ndim, (1,) * ndim, len(scale))


def identity(channels: int, ndim: int, device: torch.device | str | None = None) -> LinearOp:
    """The Dirac: output equals input."""
    return diagonal(torch.ones(channels, dtype=torch.float64, device=device), None, ndim)


def from_avg_pool(pool: nn.Module, channels: int, device: torch.device | str | None = None) -> LinearOp:
    """An average pool as a constant depthwise convolution.

    Raises ModelError for `ceil_mode`, and for padding that does not count: their divisor changes at the edge.
    """
    if not isinstance(pool, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        raise ModelError(f"{type(pool).__name__} is not nn.AvgPool1d, AvgPool2d or AvgPool3d")
    ndim = 1 if isinstance(pool, nn.AvgPool1d) else 2 if isinstance(pool, nn.AvgPool2d) else 3
    kernel = per_dimension(pool.kernel_size, ndim)
    before = per_dimension(pool.padding, ndim)
    if pool.ceil_mode:
        raise ModelError("an average pool with ceil_mode=True divides by fewer pixels at the edge; use ceil_mode=False")
    divisor = getattr(pool, "divisor_override", None)
    if any(before) and not pool.count_include_pad and not divisor:
        raise ModelError(
            f"an average pool with padding {before} and count_include_pad=False divides by fewer pixels at the edge; "
            "only count_include_pad=True, or no padding, is one convolution"
        )
    weight = torch.full((channels, 1, *kernel), 1.0 / (divisor or prod(kernel)), dtype=torch.float64, device=device)
    stride = kernel if pool.stride is None else per_dimension(pool.stride, ndim)
    return LinearOp(weight, weight.new_zeros(channels), stride, tuple((p, p) for p in before), (1,) * ndim, channels)


def from_pad(padding: Sequence[tuple[int, int]], channels: int, device: torch.device | str | None = None) -> LinearOp:
    """Zeros around: `padding` is (before, after) for each dimension, first dimension first. What is negative crops."""
    pads = tuple((int(lo), int(hi)) for lo, hi in padding)
    op = identity(channels, len(pads), device)
    return LinearOp(op.weight, op.bias, op.stride, pads, op.dilation, op.groups)


def from_slice(
    amounts: Sequence[tuple[int, int]], steps: Sequence[int], channels: int, device: torch.device | str | None = None
) -> LinearOp:
    """Every `steps`-th pixel of each dimension, without `amounts` (before, after): one tap, a stride, a crop."""
    op = from_pad([(-lo, -hi) for lo, hi in amounts], channels, device)
    return LinearOp(op.weight, op.bias, tuple(steps), op.padding, op.dilation, op.groups)


def from_space_to_depth(factors: Sequence[int], channels: int, device: torch.device | str | None = None) -> LinearOp:
    """Blocks of pixels as channels: a convolution whose kernel and stride are the block, each output one tap."""
    blocks, ndim = prod(factors), len(factors)
    weight = torch.eye(blocks, dtype=torch.float64, device=device).repeat(channels, 1)
    weight = weight.reshape(channels * blocks, 1, *factors)
    none = ((0, 0),) * ndim
    return LinearOp(weight, weight.new_zeros(len(weight)), tuple(factors), none, (1,) * ndim, channels)


def to_conv(op: LinearOp, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> nn.Module:
    """The torch.nn module of an op: a convolution, after a pad where before and after differ or crop, or nn.Linear."""
    if op.ndim == 0:
        layer = nn.Linear(op.in_channels, op.out_channels, device="meta")
        layer.weight = nn.Parameter(densify(op).weight.detach().to(device, dtype, copy=True).contiguous())
        layer.bias = nn.Parameter(op.bias.detach().to(device, dtype, copy=True).contiguous())
        return layer
    symmetric = op.config.even
    conv = _CONV[op.ndim](
        op.in_channels,
        op.out_channels,
        op.kernel_size,
        op.stride,
        tuple(lo for lo, _ in op.padding) if symmetric else 0,
        op.dilation,
        op.groups,
        device="meta",  # the values are set below; do not draw random ones
    )
    conv.weight = nn.Parameter(op.weight.detach().to(device, dtype, copy=True).contiguous())
    conv.bias = nn.Parameter(op.bias.detach().to(device, dtype, copy=True).contiguous())
    return conv if symmetric else nn.Sequential(_PAD[op.ndim](tuple(_torch_pads(op.padding)), 0.0), conv)


def _torch_pads(padding: Pads) -> list[int]:
    """F.pad counts from the last dimension."""
    return [p for pair in reversed(padding) for p in pair]
