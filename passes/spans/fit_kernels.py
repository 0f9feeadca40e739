"""Says which kernels are tried for a fitted convolution of a span, and where in the span's window each lies.

small    odd sizes up to `SMALL`, the same in each dimension
large    where the span holds one convolution, and that has more taps in some dimension: sizes between `SMALL` and its
         own, each about 1.4 times the one before
dilated  the whole reach of such a convolution with every second, third or fourth of its taps

Where a span does not see as many pixels in one dimension as in another, as after a convolution of 64 x 1 or 1 x 7, no
kernel is larger in a dimension than what the span sees there: each dimension for itself. A kernel lies on the centre of
the span's window or half a pixel after it; half a pixel before it where it would crop otherwise.
"""

from __future__ import annotations

from ..ir import ConvConfig

__all__ = ["SMALL", "centred", "fit_kernels"]

SMALL = 7
GROWTH = 1.4
DILATIONS = (2, 3, 4)

Kernel = tuple[tuple[int, ...], tuple[int, ...]]  # taps and dilation in each dimension


def fit_kernels(geometry: ConvConfig, conv: ConvConfig | None, most: int | None) -> list[Kernel]:
    """The kernels that are tried for a span of this `geometry`, smaller ones first; `conv` is its only convolution.

    `most` (None: `SMALL`) bounds the small ones; where it is less than `SMALL` there are no others.
    """
    ndim = len(geometry.stride)
    if not ndim:
        return [((), ())]
    bound = SMALL if most is None else min(most, SMALL)
    window = _extents(geometry)
    uneven = len(set(window)) > 1
    large = conv is not None and bound == SMALL and len(conv.kernel_size) == ndim
    reach = tuple(map(min, _extents(conv), window)) if conv is not None and large else (1,) * ndim
    ones = (1,) * ndim
    found: list[Kernel] = []
    for size in range(1, bound + 1, 2):
        found.append((tuple(min(size, w) for w in window) if uneven else (size,) * ndim, ones))
    size = SMALL
    while (size := _next(size)) < max(reach):
        found.append((tuple(min(size, r) for r in reach), ones))
    for step in DILATIONS if max(reach) > SMALL else ():
        dilation = tuple(step if r > SMALL else 1 for r in reach)
        found.append((tuple((r - 1) // d + 1 for r, d in zip(reach, dilation, strict=True)), dilation))
    return list(dict.fromkeys(found))


def centred(
    geometry: ConvConfig, kernel: tuple[int, ...], dilation: tuple[int, ...], in_channels: int, out_channels: int
) -> ConvConfig | None:
    """A dense kernel on the centre of the geometry's window, with its size rule; None if it would crop."""
    pads = []
    extents = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    for (lo, hi), window, extent in zip(geometry.padding, _extents(geometry), extents, strict=True):
        both = lo + hi - (window - 1) + extent
        before = lo - (window - extent) // 2
        if before == -1 and (window - extent) % 2 == 0:
            before = 0  # half a pixel before the centre, where half a pixel after it would crop
        if before < 0 or both - before < 0:
            return None
        pads.append((before, both - before))
    return ConvConfig(in_channels, out_channels, kernel, geometry.stride, tuple(pads), dilation, 1)


def _extents(config: ConvConfig) -> tuple[int, ...]:
    return tuple(d * (k - 1) + 1 for k, d in zip(config.kernel_size, config.dilation, strict=True))


def _next(size: int) -> int:
    """The odd size that is about `GROWTH` times as large."""
    return 2 * round(size * GROWTH / 2) + 1
