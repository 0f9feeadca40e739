"""Describes a conv, a pool, a pad or a selection as one convolution, in integers only."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from ..ir import ConvConfig, PaddingMode
from . import ops
from .enlarging import shuffle_config, transposed_config
from .shapes import conv_pads, per_dimension

__all__ = ["follows_rule", "identity_config", "is_identity_config", "module_config", "pool_config", "same_size"]


def identity_config(channels: int, ndim: int) -> ConvConfig:
    """1 x 1, stride 1, no padding, one group a channel."""
    ones = (1,) * ndim
    return ConvConfig(channels, channels, ones, ones, ((0, 0),) * ndim, ones, channels)


def is_identity_config(config: ConvConfig) -> bool:
    """Whether nothing but a diagonal is left: 1 x 1, stride 1, no padding, one group a channel."""
    return config == identity_config(config.in_channels, len(config.kernel_size))


def same_size(config: ConvConfig) -> bool:
    """Whether output size equals input size for every input."""
    return all(
        lo + hi == d * (k - 1)
        for (lo, hi), d, k in zip(config.padding, config.dilation, config.kernel_size, strict=True)
    )


def pool_config(pool: Any, channels: int, ndim: int) -> ConvConfig:
    """The window of a max or average pool; its size rule is a conv's where `follows_rule`."""
    kernel, stride = per_dimension(pool.kernel_size, ndim), per_dimension(pool.stride or pool.kernel_size, ndim)
    before = per_dimension(pool.padding, ndim)
    # ceil_mode rounds the output size up, which is s - 1 more pixels to read after the last.
    extra = [s - 1 if pool.ceil_mode else 0 for s in stride]
    pads = tuple((p, p + e) for p, e in zip(before, extra, strict=True))
    dilation = per_dimension(getattr(pool, "dilation", 1), ndim)
    return ConvConfig(channels, channels, kernel, stride, pads, dilation, channels)


def follows_rule(pool: Any, ndim: int) -> bool:
    """Whether the output size is a conv's for every input size.

    torch leaves out a last window that a ceil_mode pool would begin after the end of its input, which can only happen
    where a stride reaches past the rest of the window.
    """
    config = pool_config(pool, 1, ndim)
    reach = zip(config.stride, config.padding, config.dilation, config.kernel_size, strict=True)
    return not pool.ceil_mode or all(s + before <= d * (k - 1) + 1 for s, (before, _), d, k in reach)


def module_config(module: nn.Module, channels: int, ndim: int) -> ConvConfig:
    """The configuration of one affine module on a map of `channels` channels in `ndim` spatial dimensions."""
    any_module: Any = module
    if isinstance(module, nn.Linear):
        return ConvConfig(module.in_features, module.out_features, (), (), (), (), biased=module.bias is not None)
    if isinstance(module, ops.CONVS):
        return _conv_config(any_module)
    if isinstance(module, ops.TRANSPOSED):
        return transposed_config(module)
    if ops.plain_in(module, ops.AVG_POOLS):
        return pool_config(module, channels, ndim)
    if ops.plain_in(module, (*ops.PADS, *ops.MIRRORS)):
        flat = any_module.padding  # last dimension first, before and after
        pads = tuple((flat[2 * i], flat[2 * i + 1]) for i in reversed(range(ndim)))
        fill = _fill(pads, ops.mirror_mode(module), float(getattr(module, "value", 0.0)))
        return ConvConfig(channels, channels, (1,) * ndim, (1,) * ndim, pads, (1,) * ndim, channels, *fill)
    config = identity_config(channels, ndim)
    if isinstance(module, ops.PixelSlice):
        crops = tuple((-lo, -hi) for lo, hi in module.amounts)
        return replace(config, stride=module.steps, padding=crops)
    if isinstance(module, (*ops.BATCH_NORMS, ops.ChannelAffine)):
        return replace(config, biased=True)
    if (factors := ops.shuffled_blocks(module)) is not None:
        return shuffle_config(channels, factors)
    if (blocks := ops.blocks_of(module, ndim)) is not None:
        return replace(config, out_channels=channels * prod(blocks), kernel_size=blocks, stride=blocks)
    if isinstance(module, ops.ChannelSelect) and module.index != tuple(range(channels)):
        return replace(config, out_channels=len(module.index), groups=1)
    return config


def _conv_config(conv: Any) -> ConvConfig:
    kernel, dilation, pads = tuple(conv.kernel_size), tuple(conv.dilation), conv_pads(conv)
    fill = _fill(pads, conv.padding_mode)
    inner, outer = conv.in_channels, conv.out_channels
    biased = conv.bias is not None
    return ConvConfig(inner, outer, kernel, tuple(conv.stride), pads, dilation, conv.groups, *fill, biased=biased)


def _fill(pads: tuple[tuple[int, int], ...], mode: PaddingMode, value: float = 0.0) -> tuple[PaddingMode, float]:
    """How a config says what its padding is filled with; one that does not pad says nothing."""
    return (mode, value) if any(p > 0 for pair in pads for p in pair) else ("zeros", 0.0)
