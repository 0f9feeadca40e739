"""Writes transposed convs, pixel shuffles and convs of an enlarged map as convs of the small map (`enlarging`).

Channel c of the large map at pixel r of a block is channel c U + r of the small map, with U pixels a block, counted row
by row, as nn.PixelShuffle has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..graph.enlarging import low, lowered, output_padding, pointwise, shuffle_config, transposed_config
from ..graph.modules import DepthToSpace, PixelSlice
from ..ir import ConvConfig
from .linear_op import LinearOp, taps

__all__ = ["blank", "from_shuffle", "from_transposed", "lowered_op", "raised", "small_op", "to_modules"]

_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_PAD: dict[int, Any] = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}


def from_transposed(module: Any) -> LinearOp:
    """A transposed convolution of torch.nn, in float64."""
    config = transposed_config(module)
    source = module.weight.double()
    bias = source.new_zeros(module.out_channels) if module.bias is None else module.bias.double()
    if not config.upscale:  # of stride 1, and so with pixels cropped or added
        window = tuple(zip(module.kernel_size, module.dilation, module.padding, strict=True))
        config = replace(config, upscale=(1,) * len(window), cut=(0,) * len(window), window=window)
    whole, inner = prod(config.upscale), config.in_channels // config.groups
    blocks = source.reshape(config.groups, inner, config.out_channels // config.groups, -1).transpose(1, 2)
    weight = source.new_zeros(*blocks.shape[:2], whole, inner, prod(config.kernel_size))
    for tap, pixel, place in _pairs(config):
        weight[:, :, pixel, :, place] = blocks[..., tap]
    weight = weight.reshape(config.conv_channels, inner, *config.kernel_size)
    op = _op(weight, bias.repeat_interleave(whole), low(config))
    return op if all(u == 1 for u in module.stride) else raised(op, config)


def from_shuffle(factors: Sequence[int], channels: int, device: torch.device | str | None = None) -> LinearOp:
    """A pixel shuffle, which makes blocks of pixels of channels, in float64."""
    config = shuffle_config(channels, factors)
    weight = torch.ones(channels, 1, *config.kernel_size, dtype=torch.float64, device=device)
    return raised(_op(weight, weight.new_zeros(channels), low(config)), config)


def small_op(op: LinearOp) -> LinearOp:
    """The conv of the small map alone, without the shuffle and the cut after it."""
    return replace(op, upscale=(), cut=(), window=())


def raised(op: LinearOp, config: ConvConfig) -> LinearOp:
    """The conv of the small map followed by the shuffle and the cut of a config."""
    return replace(op, upscale=config.upscale, cut=config.cut, window=config.window)


def lowered_op(op: LinearOp, upscale: tuple[int, ...], cut: tuple[int, ...]) -> LinearOp:
    """A conv of the large map as a conv of the small one (`enlarging.lowered`)."""
    config, blocks, _ = lowered(op.config, upscale, cut)
    many, fewer = prod(upscale), prod(blocks)
    if pointwise(op.config) and op.groups == op.in_channels:
        return _op(op.weight.repeat_interleave(many, 0), op.bias.repeat_interleave(many), config)
    inner = op.weight.shape[1]
    weight = op.weight.new_zeros(op.out_channels, fewer, inner, many, prod(config.kernel_size))
    old = taps(op)
    left = blocks or (1,) * op.ndim
    for r, pixel in enumerate(product(*map(range, left))):
        for t, tap in enumerate(product(*map(range, op.kernel_size))):
            at = [
                s * i - lo + d * j
                for s, i, (lo, _), d, j in zip(op.stride, pixel, op.padding, op.dilation, tap, strict=True)
            ]
            phase = _row_by_row([z % u for z, u in zip(at, upscale, strict=True)], upscale)
            place = [
                (z // u + before) // d
                for z, u, (before, _), d in zip(at, upscale, config.padding, config.dilation, strict=True)
            ]
            weight[:, r, :, phase, _row_by_row(place, config.kernel_size)] = old[..., t]
    weight = weight.reshape(op.out_channels * fewer, inner * many, *config.kernel_size)
    return _op(weight, op.bias.repeat_interleave(fewer), config)


# --- to modules -------------------------------------------------------------------------------------------------------


def blank(
    config: ConvConfig, dtype: torch.dtype | None = None, device: torch.device | str | None = "meta"
) -> list[nn.Module]:
    """The modules of a config that enlarges its map, without values: a pad, the conv, a shuffle, a slice, as needed."""
    ndim = len(config.kernel_size)
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    if config.window:
        kernel, dilation, padding = (tuple(column) for column in zip(*config.window, strict=True))
        made = _TRANSPOSED[ndim](
            config.in_channels,
            config.out_channels,
            kernel,
            config.upscale,
            padding,
            output_padding(config),
            config.groups,
            dilation=dilation,
            **like,
        )
        return [made]
    even = config.even
    conv = _CONV[ndim](
        config.in_channels,
        config.conv_channels,
        config.kernel_size,
        config.stride,
        tuple(lo for lo, _ in config.padding) if even else 0,
        config.dilation,
        config.groups,
        **like,
    )
    modules: list[nn.Module] = [conv]
    if not even:
        flat = tuple(p for pair in reversed(config.padding) for p in pair)
        modules.insert(0, _PAD[ndim](flat, 0.0))
    square = ndim == 2 and config.upscale[0] == config.upscale[1]
    modules.append(nn.PixelShuffle(config.upscale[0]) if square else DepthToSpace(config.upscale))
    if any(config.cut):
        modules.append(PixelSlice([(0, c) for c in config.cut], (1,) * ndim))
    return modules


def to_modules(
    op: LinearOp, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> list[nn.Module]:
    """The modules of an op that enlarges its map. OptionError if a `window` cannot say its biases."""
    config = op.config
    modules = blank(config)
    main: Any = next(m for m in modules if hasattr(m, "weight"))
    weight, bias = op.weight, op.bias
    if config.window:
        inner, whole = weight.shape[1], prod(config.upscale)
        rows = bias.reshape(-1, whole)
        bias = rows.mean(1)
        differ = float((rows - bias[:, None]).detach().abs().max())
        if not differ <= 1e-9 * float(rows.detach().abs().max()):
            raise OptionError("the pixels of a block have biases of their own, which a transposed conv has not")
        blocks = weight.reshape(config.groups, -1, whole, inner, prod(config.kernel_size))
        turned = weight.new_zeros(config.groups, inner, blocks.shape[1], prod(config.written))
        for tap, pixel, place in _pairs(config):
            turned[..., tap] = blocks[:, :, pixel, :, place].transpose(1, 2)
        weight = turned.reshape(config.in_channels, -1, *config.written)
    main.weight = nn.Parameter(weight.detach().to(device, dtype, copy=True).contiguous())
    main.bias = nn.Parameter(bias.detach().to(device, dtype, copy=True).contiguous())
    return modules


def _pairs(config: ConvConfig) -> Iterator[tuple[int, int, int]]:
    """(tap of the transposed conv, pixel of a block, tap of the small map's conv), each once, in all dimensions."""
    rows = []
    for (count, d, p), u, (before, _), step in zip(
        config.window, config.upscale, config.padding, config.dilation, strict=True
    ):
        pixels = [(d * t - p) % u for t in range(count)]
        rows.append([(t, r, ((r + p - d * t) // u + before) // step) for t, r in enumerate(pixels)])
    for found in product(*rows):
        tap, pixel, place = (
            _row_by_row(row, size)
            for row, size in zip(
                zip(*found, strict=True), (config.written, config.upscale, config.kernel_size), strict=True
            )
        )
        yield tap, pixel, place


def _row_by_row(place: Sequence[int], size: Sequence[int]) -> int:
    index = 0
    for i, n in zip(place, size, strict=True):
        index = index * n + i
    return index


def _op(weight: Tensor, bias: Tensor, config: ConvConfig) -> LinearOp:
    return LinearOp(weight, bias, config.stride, config.padding, config.dilation, config.groups)
