"""Composes and sums shapes as the `linear` algebra does, in integers only, so that thousands can be enumerated.

In each dimension, tap ``t`` of output pixel ``o`` reads input pixel ``s o - p + d t``, so the window of a convolution
is ``[s o - p, s o - p + K]`` with the extent ``K = d (k - 1)``.

**compose**, second after first, all padding before both:

    s = s1 s2       p = p1 + s1 p2       K = K1 + s1 K2       groups = gcd(g1, g2)

**Dilation.** The taps ``d1 t + s1 d2 j`` lie on a lattice of step ``u = gcd(d1 if k1 > 1, s1 d2 if k2 > 1)``; the
result has dilation ``u`` and ``k = K / u + 1``. So dilation survives next to 1 x 1 ops and equal dilations, and mixed
dilations become dense (with ``d1 = d2 = 1``, ``k1 > 1`` this is the usual ``k = k1 + s1 (k2 - 1)``).

All padding is filled as the first op that pads fills its own. A padding may be negative: then pixels are dropped, which
is exact after any op (``p = p1 - s1 c`` drops what the second does not read). Two things are refused: a pad after a
crop, where the merged op would read what was cropped, and a filling that is taken from the map itself where some of the
same padding crops, because it cannot be told from the map any more.

**add, cat** (branches of equal stride). Windows are aligned: ``p = max p_i``, branch ``i`` starts ``p - p_i`` pixels
into the common window, ``K = max(p - p_i + K_i)``. A branch has ``floor((n - 1 + e_i) / s) + 1`` output pixels, with
``e_i = before_i + after_i - K_i``. If the branches agree for the size ``n`` at hand, then floor, being monotone, gives
the same for every ``e`` between the smallest and the largest ``e_i``; we take the one in that range that makes the
padding most symmetric. They can agree only if all ``e_i`` lie less than ``s`` apart. A sum has ``gcd(g_i)`` groups. A
concatenation of two or more branches is dense: the last outputs of the first branch read the last input block and the
first outputs of the next one the first block again, an order that no structure of two or more groups has.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

from ..errors import OptionError
from ..ir import ConvConfig, PaddingMode

__all__ = [
    "Pads",
    "add_configs",
    "branch_crops",
    "cat_configs",
    "check_crops",
    "compose_config",
    "conv_pads",
    "extent",
    "per_dimension",
]

Pads = tuple[tuple[int, int], ...]
Crops = tuple[tuple[int, int], ...]


def per_dimension(value: Any, ndim: int) -> tuple[int, ...]:
    """An argument of a torch op, one number or one for each spatial dimension, as the latter."""
    return tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else (int(value),) * ndim


def conv_pads(conv: Any) -> Pads:
    """What a torch.nn convolution pads: (before, after) for each spatial dimension, the odd pixel of "same" after."""
    if conv.padding == "same":
        extents = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return tuple((e // 2, e - e // 2) for e in extents)
    padding = (0,) * len(conv.kernel_size) if conv.padding == "valid" else conv.padding
    return tuple((int(p), int(p)) for p in padding)


def check_crops(first: ConvConfig, second: ConvConfig) -> None:
    """OptionError if the second op pads where the first crops: merged they would read what was cropped."""
    for step, cropped, pads in zip(first.stride, first.padding, second.padding, strict=True):
        if any(pad > 0 and -crop >= step for crop, pad in zip(cropped, pads, strict=True)):
            raise OptionError(f"the second pads by {pads} where the first crops by {cropped}: it would read that")


def compose_config(first: ConvConfig, second: ConvConfig) -> ConvConfig:
    """The configuration of `compose` for two ops of these configurations. OptionError if they do not fit together."""
    if first.out_channels != second.in_channels or len(first.stride) != len(second.stride):
        raise OptionError(f"cannot compose: the first gives {_io(first)[1]}, the second takes {_io(second)[0]}")
    kernel, dilation, padding = [], [], []
    for k1, d1, s1, p1, k2, d2, p2 in zip(
        first.kernel_size, first.dilation, first.stride, first.padding,
        second.kernel_size, second.dilation, second.padding, strict=True,
    ):  # fmt: skip
        step = gcd(d1 if k1 > 1 else 0, s1 * d2 if k2 > 1 else 0) or 1
        kernel.append((d1 * (k1 - 1) + s1 * d2 * (k2 - 1)) // step + 1)
        dilation.append(step)
        padding.append((p1[0] + s1 * p2[0], p1[1] + s1 * p2[1]))
    filled = first if first.fills else second
    fill = _fill(padding, filled.padding_mode, filled.padding_value)
    return ConvConfig(
        first.in_channels,
        second.out_channels,
        tuple(kernel),
        tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        tuple(padding),
        tuple(dilation),
        gcd(first.groups, second.groups),
        *fill,
    )


def _fill(pads: Sequence[tuple[int, int]], mode: PaddingMode, value: float) -> tuple[PaddingMode, float]:
    """How padding is filled, which says nothing if all it does is to crop. OptionError as the module docstring says."""
    signs = {p > 0 for pair in pads for p in pair if p}
    if True not in signs:
        return "zeros", 0.0
    if False in signs and mode != "zeros":
        raise OptionError(f"padding {tuple(pads)} crops, and fills the rest from the map itself ({mode})")
    return mode, value


def add_configs(configs: Sequence[ConvConfig]) -> ConvConfig:
    """The configuration of `add`. OptionError if the branches differ in channels, stride, or always in output size."""
    if len({c.out_channels for c in configs}) > 1:
        raise OptionError(f"cannot add branches of {[c.out_channels for c in configs]} output channels")
    kernel, padding, dilation = _common_window(configs)
    first = configs[0]
    groups = gcd(*(c.groups for c in configs))
    fill = _fill(padding, *_common_fill(configs))
    return ConvConfig(first.in_channels, first.out_channels, kernel, first.stride, padding, dilation, groups, *fill)


def cat_configs(configs: Sequence[ConvConfig]) -> ConvConfig:
    """The configuration of `cat` along the channels. OptionError as in `add_configs`."""
    kernel, padding, dilation = _common_window(configs)
    first = configs[0]
    groups = first.groups if len(configs) == 1 else 1
    out = sum(c.out_channels for c in configs)
    fill = _fill(padding, *_common_fill(configs))
    return ConvConfig(first.in_channels, out, kernel, first.stride, padding, dilation, groups, *fill)


def _common_fill(configs: Sequence[ConvConfig]) -> tuple[PaddingMode, float]:
    """How the branches that pad do it. OptionError if they differ."""
    found = {(c.padding_mode, c.padding_value) for c in configs if c.fills}
    if len(found) > 1:
        seen = " and ".join(sorted(mode if mode != "zeros" else f"{value:g}" for mode, value in found))
        raise OptionError(f"the branches pad in different ways: {seen}")
    return next(iter(found), ("zeros", 0.0))


def branch_crops(configs: Sequence[ConvConfig]) -> tuple[Crops, ...]:
    """What each branch drops, (before, after), of an input with the common padding, to run there without its own.

    With `whole = add_configs(configs)` and an input padded by `whole.padding`, branch i without padding on the cropped
    input gives exactly its share of the sum, for every input size.
    """
    _common_window(configs)  # raises if the branches do not fit together
    starts = [max(pads) for pads in zip(*([lo for lo, _ in c.padding] for c in configs), strict=True)]
    befores = [[p - lo for p, (lo, _) in zip(starts, c.padding, strict=True)] for c in configs]
    ends = [[b + e for b, e in zip(bs, extent(c), strict=True)] for bs, c in zip(befores, configs, strict=True)]
    last = [max(dim) for dim in zip(*ends, strict=True)]
    return tuple(
        tuple((b, whole - end) for b, end, whole in zip(bs, es, last, strict=True))
        for bs, es in zip(befores, ends, strict=True)
    )


def _common_window(configs: Sequence[ConvConfig]) -> tuple[tuple[int, ...], Pads, tuple[int, ...]]:
    """(kernel_size, padding, dilation) of the smallest window that holds those of all branches."""
    if not configs:
        raise OptionError("no branches; a join needs at least one")
    first = configs[0]
    if any(c.upscale for c in configs):
        raise OptionError("a branch enlarges the map")
    if any(c.stride != first.stride or c.in_channels != first.in_channels for c in configs):
        seen = [(c.in_channels, c.stride) for c in configs]
        raise OptionError(f"branches need equal input channels and strides, not {seen} (channels, stride)")
    kernel, padding, dilation = [], [], []
    for i, stride in enumerate(first.stride):
        pads = [c.padding[i] for c in configs]
        extents = [c.dilation[i] * (c.kernel_size[i] - 1) for c in configs]
        before = max(lo for lo, _ in pads)
        reach = max(before - lo + e for (lo, _), e in zip(pads, extents, strict=True))
        excess = [lo + hi - e for (lo, hi), e in zip(pads, extents, strict=True)]
        if max(excess) - min(excess) >= stride:
            raise OptionError(
                f"branches with kernels {[c.kernel_size for c in configs]} and paddings {[c.padding for c in configs]} "
                f"at stride {first.stride} never have the same output size"
            )
        after = min(max(before, min(excess) + reach - before), max(excess) + reach - before)
        steps = [c.dilation[i] for c in configs if c.kernel_size[i] > 1]
        step = gcd(*steps, *(before - lo for lo, _ in pads)) or 1
        kernel.append(reach // step + 1)
        padding.append((before, after))
        dilation.append(step)
    return tuple(kernel), tuple(padding), tuple(dilation)


def extent(config: ConvConfig) -> tuple[int, ...]:
    """Pixels from the first tap to the last, in each dimension."""
    return tuple(d * (k - 1) for d, k in zip(config.dilation, config.kernel_size, strict=True))


def _io(config: ConvConfig) -> tuple[str, str]:
    ndim = len(config.stride)
    return f"{config.in_channels} channels in {ndim}d", f"{config.out_channels} channels in {ndim}d"
