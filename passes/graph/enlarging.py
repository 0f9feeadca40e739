"""Describes ops that enlarge a map, in integers: transposed convs with a stride, pixel shuffles, convs around them.

A transposed conv of stride u gives its output in blocks of u pixels a dimension. Pixel r of block m reads

    y[u m + r] = sum_t W[t] x[m + (r + p - d t) / u]          (the taps t for which u divides)

so the pixels of a block are the channels of one convolution of the small map: u^n times the channels, then a pixel
shuffle, then a cut of the last pixels where the size is no multiple of u. That is a `ConvConfig` with `upscale = u`,
and a pixel shuffle alone is one whose conv is the identity. It holds for every size, padding, dilation and output
padding, and so do these rules:

    conv, then enlarge      the convs of the small map are composed; `upscale` and `cut` stay
    enlarge, then conv      output o of the conv reads s o - p + d t of the large map, which is pixel (...) mod u of
                            block (...) div u. With g = gcd(u, s) that is a conv of stride s / g of the small map, whose
                            channels are blocks of u / g pixels. One of both must be 1.

The conv's padding is part of what it reads, and a cut before it a negative padding after. What remains is written as
one transposed conv again (`window`: its taps K, dilation D, padding P) where it came from one, no stride was before it,
and nothing before it adds a constant, which would be seen by another number of taps at each pixel of a block:

    conv (k, d, p), then transposed      K: D (K - 1) + u d (k - 1)      P + u (d (k - 1) - p)
    transposed, then conv                K: D (K - 1) + d (k - 1)        P + d (k - 1) - p

else as conv and shuffle. torch wants P >= 0 and 0 <= output padding < max(u, D) for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd, prod
from typing import Any

from ..errors import OptionError
from ..ir import ConvConfig
from . import shapes

__all__ = ["compose_config", "low", "lowered", "output_padding", "reach", "shuffle_config", "transposed_config"]


def compose_config(first: ConvConfig, second: ConvConfig) -> ConvConfig:
    """The configuration of `first`, then `second`, either of which may enlarge the map.

    OptionError if they do not fit together, or are no such op together.
    """
    biased = first.biased or second.biased
    if not first.upscale and not second.upscale:
        return replace(shapes.compose_config(first, second), biased=biased)
    if first.out_channels != second.in_channels:
        return shapes.compose_config(first, second)  # which says what is wrong
    if first.upscale and second.upscale:
        raise OptionError("two ops enlarge the map, one after the other")
    if any(c.fills and (c.padding_mode != "zeros" or c.padding_value) for c in (first, second)):
        raise OptionError("beside an op that enlarges the map only zeros can be padded")
    if second.upscale:
        small = shapes.compose_config(first, low(second))
        whole = replace(small, out_channels=second.out_channels, upscale=second.upscale, cut=second.cut, biased=biased)
        plain = not first.biased and all(s == 1 for s in first.stride)
        return _written(whole, _before(first, second) if second.window and plain else ())
    conv, upscale, cut = lowered(second, first.upscale, first.cut)
    small = shapes.compose_config(low(first), conv)
    whole = replace(small, out_channels=second.out_channels, upscale=upscale, cut=cut, biased=biased)
    plain = all(s == 1 for s in second.stride)
    return _written(whole, _after(first, second) if first.window and plain else ())


def low(config: ConvConfig) -> ConvConfig:
    """The conv of the small map."""
    return replace(config, out_channels=config.conv_channels, upscale=(), cut=(), window=())


def transposed_config(module: Any) -> ConvConfig:
    """A transposed convolution of torch.nn as a conv of its small map, whose channels become pixels."""
    kernel, dilation, padding, cut = [], [], [], []
    for k, u, p, extra, d in zip(
        module.kernel_size, module.stride, module.padding, module.output_padding, module.dilation, strict=True
    ):
        shifts = [(r + p - d * t) // u for r in range(u) for t in range(k) if (r + p - d * t) % u == 0]
        first, step, count = _lattice(shifts)
        grown = d * (k - 1) + extra + 1 - 2 * p - u  # the output has u n + grown pixels
        blocks = -(-grown // u)  # and n + blocks blocks
        kernel.append(count)
        dilation.append(step)
        padding.append((-first, blocks + first + step * (count - 1)))
        cut.append(u * blocks - grown)
    ones = (1,) * len(kernel)
    config = ConvConfig(
        module.in_channels,
        module.out_channels,
        tuple(kernel),
        ones,
        tuple(padding),
        tuple(dilation),
        module.groups,
        biased=module.bias is not None,
    )
    if all(u == 1 for u in module.stride):
        return config
    window = tuple(zip(module.kernel_size, module.dilation, module.padding, strict=True))
    return replace(config, upscale=tuple(module.stride), cut=tuple(cut), window=window)


def shuffle_config(channels: int, factors: Sequence[int]) -> ConvConfig:
    """Channels that become blocks of `factors` pixels. OptionError if they are no multiple of a block."""
    blocks, ones = prod(factors), (1,) * len(factors)
    if channels % blocks:
        raise OptionError(f"{channels} channels are no blocks of {tuple(factors)} pixels")
    none, nothing = ((0, 0),) * len(factors), (0,) * len(factors)
    config = ConvConfig(channels, channels // blocks, ones, ones, none, ones, channels)
    return replace(config, upscale=tuple(factors), cut=nothing) if blocks > 1 else config


def lowered(
    conv: ConvConfig, upscale: tuple[int, ...], cut: tuple[int, ...]
) -> tuple[ConvConfig, tuple[int, ...], tuple[int, ...]]:
    """A conv of the large map as one of the small map, and the blocks and the cut of what it gives (empty: none)."""
    kernel, dilation, padding, stride, blocks, cuts = [], [], [], [], [], []
    for k, d, s, (before, after), u, c in zip(
        conv.kernel_size, conv.dilation, conv.stride, conv.padding, upscale, cut, strict=True
    ):
        common = gcd(u, s)
        left, small = u // common, s // common
        if left > 1 and small > 1:
            raise OptionError(f"a stride of {s} after an op that enlarges the map {u} times; one must divide the other")
        first, step, count = _lattice([(s * r - before + d * t) // u for r in range(left) for t in range(k)])
        more = before + after - c - d * (k - 1) - 1  # the last of u n pixels that the first tap reads is u n + more
        ends = first + step * (count - 1)
        if left > 1 or small == 1:  # the output has left n + grown pixels, and so many blocks more than n
            grown = more // s + 1
            extra = -(-grown // left)
            cuts.append(left * extra - grown)
            after = extra + ends
        else:
            cuts.append(0)
            after = more // u + 1 + ends
        kernel.append(count)
        dilation.append(step)
        padding.append((-first, after))
        stride.append(small)
        blocks.append(left)
    many, fewer = prod(upscale), prod(blocks)
    small_conv = ConvConfig(
        conv.in_channels * many,
        conv.out_channels * fewer,
        tuple(kernel),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        conv.groups * many if pointwise(conv) and conv.groups == conv.in_channels else conv.groups,
    )
    return (small_conv, tuple(blocks), tuple(cuts)) if fewer > 1 else (small_conv, (), ())


def pointwise(conv: ConvConfig) -> bool:
    """Whether a conv looks at single pixels, each alike."""
    return not conv.pads and all(k == s == 1 for k, s in zip(conv.kernel_size, conv.stride, strict=True))


def output_padding(config: ConvConfig) -> tuple[int, ...]:
    """The output padding of the transposed conv that a config with a `window` is written as; it may be none of torch's.

    It is what the output has more pixels than a transposed conv with padding P on both sides gives.
    """
    found = []
    for (k, d, p), u, c, (before, after), low_k, low_d in zip(
        config.window, config.upscale, config.cut, config.padding, config.kernel_size, config.dilation, strict=True
    ):
        size = u * (1 + before + after - low_d * (low_k - 1)) - c  # of an input of one pixel
        found.append(size - d * (k - 1) - 1 + 2 * p)
    return tuple(found)


def reach(config: ConvConfig) -> tuple[tuple[int, int], ...]:
    """The zeros that the op really reads around its input: those for pixels that are cut off count not.

    Where that is not known it is the conv's padding.
    """
    if not config.window:
        return config.padding
    extra = output_padding(config)
    found = []
    for (k, d, p), u, more in zip(config.window, config.upscale, extra, strict=True):
        last = d * (k - 1) - 2 * p + more  # the last output of an input of one pixel
        found.append((max(0, (d * (k - 1) - p) // u), max(0, (last + p) // u)))
    return tuple(found)


def _lattice(places: list[int]) -> tuple[int, int, int]:
    """(first, step, count) of the smallest row of equally spaced taps that holds these."""
    first, last = min(places), max(places)
    step = gcd(*(p - first for p in places)) or 1
    return first, step, (last - first) // step + 1


def _before(conv: ConvConfig, op: ConvConfig) -> tuple[tuple[int, int, int], ...]:
    found = []
    for (taps, dil, pad), u, k, d, (before, _) in zip(
        op.window, op.upscale, conv.kernel_size, conv.dilation, conv.padding, strict=True
    ):
        found.append(_row(taps, dil, k, u * d, pad + u * (d * (k - 1) - before)))
    return tuple(found)


def _after(op: ConvConfig, conv: ConvConfig) -> tuple[tuple[int, int, int], ...]:
    found = []
    for (taps, dil, pad), k, d, (before, _) in zip(
        op.window, conv.kernel_size, conv.dilation, conv.padding, strict=True
    ):
        found.append(_row(taps, dil, k, d, pad + d * (k - 1) - before))
    return tuple(found)


def _row(k1: int, d1: int, k2: int, d2: int, padding: int) -> tuple[int, int, int]:
    step = gcd(d1 if k1 > 1 else 0, d2 if k2 > 1 else 0) or 1
    return (d1 * (k1 - 1) + d2 * (k2 - 1)) // step + 1, step, padding


def _written(config: ConvConfig, window: tuple[tuple[int, int, int], ...]) -> ConvConfig:
    """The config with this window, if torch has a transposed conv of it."""
    whole = replace(config, window=window)
    if not window or not config.upscale:
        return replace(config, window=())
    fits = all(
        p >= 0 and 0 <= more < max(u, d)
        for (_, d, p), u, more in zip(window, config.upscale, output_padding(whole), strict=True)
    )
    return whole if fits else config
