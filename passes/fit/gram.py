"""Sums calibration features up, so that convolutions can be fitted from the sums (`closed_form` has the algebra).

A patch ``x_o`` is a row: taps, then channels within a tap, then a constant 1 that stands for the bias. `Gram` adds up
``X'X``, ``X'Y`` and ``|Y|^2`` in float64 at the largest kernel, from sampled output pixels only, and gives the centred
sums of any kernel inside of it:

    tap t of the largest kernel, padding P before, reads pixel   s o - P + t
    tap j of a smaller one, padding p, dilation d, reads         s o - p + d j         so   t = P - p + d j

(and where the largest one is dilated by D, its tap t reads ``s o - P + D t``, so ``t = (P - p + d j) / D``).

Channels of vectors from the side (`side_vectors`) are features as well: between the taps and the 1, the same under all
pixels of an image. So there are only as many samples of them as images, and they have a damping of their own.

A depthwise kernel needs the diagonal blocks only. Every fourth image is summed apart, to judge a fit on images that it
has not seen; whole images, because the pixels of one image are much alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, OptionError
from ..ir import ConvConfig
from .normal_equations import ROUNDING, Sums, System

__all__ = ["Gram", "Part", "sample_positions"]

MAX_UNKNOWNS = 6500  # an input channel and tap each; a sum of this size takes 0.34 GB
CACHE_BYTES = 1 << 30
CHUNK_BYTES = 1 << 27
HOLD_OUT_EVERY = 4  # images
FLOAT32_ROUNDING = 1e-6  # of a mean square: what sums of products in float32 may be off by
FLOAT32_NOISE = 16 * FLOAT32_ROUNDING  # of a mean square: what chunks of sums in float32 may be off by, in any order
Part = Literal["rest", "held", "total"]
PARTS: dict[Part, bool] = {"rest": False, "held": True}  # whether the images of a part are held out


def sample_positions(
    output_size: Sequence[int], batch: int, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """`count` different output pixels (all, if there are fewer) of each image, as flat indices (batch, count)."""
    pixels = prod(output_size)
    if pixels < 1 or batch < 1 or count < 1:
        raise OptionError(f"no pixels to sample: output size {tuple(output_size)}, batch {batch}, count {count}")
    if count >= pixels:
        return torch.arange(pixels).expand(batch, -1)
    device = "cpu" if generator is None else generator.device
    return torch.rand(batch, pixels, generator=generator, device=device).topk(count).indices


class Gram:
    """Sums over sampled output pixels of one input, from which convolutions to many targets are fitted.

    `kernel_size`, `stride`, `padding` ((before, after) in each dimension) and `dilation` are the largest kernel's;
    `targets` maps names to output channels. With `depthwise`, only what depthwise kernels need is kept, which is far
    less. `holdout=False` saves the second sum, and with it half of the memory. `dtype=torch.float32` multiplies
    chunks of samples in single precision, at twice the speed, where damping drowns the rounding.

    `rounding` bounds lambda from below, relative to the mean square of a feature. A feature that varies far less than
    it is large would get a large weight, and the bias would cancel what that makes of its mean: in float32 such sums
    lose all digits. 1e-6 means variations of a thousandth, and is the least for sums in float32.

    `sides` is the number of channels of the vectors that are features as well, one an image.

    Raises OptionError if there would be more than `limit` unknowns an output channel: use `fit_cg` there.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        targets: Mapping[str, int],
        *,
        depthwise: bool = False,
        holdout: bool = True,
        dtype: torch.dtype = torch.float64,
        limit: int = MAX_UNKNOWNS,
        rounding: float = 0.0,
        sides: int = 0,
        dilation: Sequence[int] | None = None,
    ) -> None:
        self.in_channels, self.kernel_size, self.stride = in_channels, tuple(kernel_size), tuple(stride)
        self.dilation = (1,) * len(self.stride) if dilation is None else tuple(dilation)
        self.padding = tuple((lo, hi) for lo, hi in padding)
        self.targets, self.depthwise = dict(targets), depthwise
        lengths = {len(t) for t in (self.kernel_size, self.stride, self.padding, self.dilation)}
        if len(lengths) > 1 or not 1 <= len(self.stride) <= 3:
            raise OptionError(
                f"kernel {self.kernel_size}, stride {self.stride}, padding {self.padding} and dilation {self.dilation} "
                "need one entry a dimension, of which there are 1 to 3"
            )
        if (
            min(*self.kernel_size, *self.stride, *self.dilation, in_channels) < 1
            or min(p for pair in self.padding for p in pair) < 0
        ):
            raise OptionError(
                f"{in_channels} channels, kernel {self.kernel_size}, stride {self.stride} and padding {self.padding} "
                "make no convolution; sizes are at least 1, padding at least 0"
            )
        if depthwise and any(out != in_channels for out in self.targets.values()):
            raise OptionError(f"a depthwise fit keeps the {in_channels} channels, the targets have {self.targets}")
        self.taps = list(product(*map(range, self.kernel_size)))
        rows = len(self.taps) * (1 if depthwise else in_channels) + sides + 1
        if rows - 1 - sides > limit:
            raise OptionError(f"{rows - 1 - sides} unknowns an output channel are more than {limit}; use fit_cg")
        self._shape = (in_channels if depthwise else 1, rows)
        self.sides = sides
        self._holdout = holdout
        self._rounding = max(rounding, FLOAT32_ROUNDING) if dtype == torch.float32 else rounding
        self._dtype = dtype
        self._images = 0
        self._sums: dict[Part, Sums] = {}  # "rest" and "held" are summed, "total" is made from them when it is read
        self._systems: OrderedDict[object, System] = OrderedDict()

    @property
    def samples(self) -> float:
        """The number of output pixels seen (the sum of their weights)."""
        return sum(sums.n for part, sums in self._sums.items() if part != "total")

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        targets: Mapping[str, Tensor],
        positions: Tensor | None = None,
        weights: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> None:
        """Add images: `x` (batch, in, size...), targets (batch, out, output size...).

        `positions` (batch, count) are flat output pixels, default all; `weights` (batch, count) their weights, default
        1; `vectors` (batch, sides) what comes from the side. InputError if shapes do not fit or values are not finite.
        """
        out_size = self._check(x, targets)
        if vectors is None:
            vectors = x.new_zeros(len(x), 0)
        if vectors.shape != (len(x), self.sides):
            raise InputError(f"vectors {tuple(vectors.shape)}, expected {(len(x), self.sides)}")
        pixels = prod(out_size)
        if positions is None:
            positions = torch.arange(pixels).expand(len(x), -1)
        positions = positions.to(x.device)
        if positions.ndim != 2 or len(positions) != len(x) or positions.min() < 0 or positions.max() >= pixels:
            raise InputError(
                f"positions {tuple(positions.shape)} for a batch of {len(x)} and {pixels} output pixels; they are flat "
                "indices (batch, count), see sample_positions"
            )
        if weights is not None and (weights.shape != positions.shape or bool((weights < 0).any())):
            raise InputError(f"weights {tuple(weights.shape)} need the shape of positions and no negative entry")
        self._systems.clear()
        self._sums.pop("total", None)
        images = torch.arange(len(x), device=x.device)
        held = (images + self._images) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 if self._holdout else images < 0
        for part, mask in PARTS.items():
            chosen = images[held == mask]
            if len(chosen):
                if part not in self._sums:
                    self._sums[part] = Sums.zeros(*self._shape, self.targets, x.device)
                every = len(chosen) == len(x)

                def of(t: Tensor, chosen: Tensor = chosen, every: bool = every) -> Tensor:
                    return t if every else t[chosen]

                ys = {name: of(targets[name]) for name in self.targets}
                w = None if weights is None else of(weights.to(x.device))
                self._accumulate(self._sums[part], of(x), ys, out_size, of(positions), w, of(vectors))
                self._sums[part].images += len(chosen)
        self._images += len(x)

    def _check(self, x: Tensor, targets: Mapping[str, Tensor]) -> tuple[int, ...]:
        ndim = len(self.stride)
        if x.ndim != ndim + 2 or x.shape[1] != self.in_channels or not len(x):
            raise InputError(f"x is {tuple(x.shape)}, expected (batch, {self.in_channels}) and {ndim} sizes")
        config = ConvConfig(self.in_channels, 1, self.kernel_size, self.stride, self.padding, self.dilation)
        size = config.output_size(tuple(x.shape[2:]))
        for name, channels in self.targets.items():
            if name not in targets:
                raise InputError(f"no value for target {name!r}; seen: {sorted(targets)}")
            seen, expected = tuple(targets[name].shape), (len(x), channels, *size)
            if seen != expected:
                raise InputError(
                    f"target {name!r} is {seen}, expected {expected} for x {tuple(x.shape)}, kernel "
                    f"{self.kernel_size}, stride {self.stride}, padding {self.padding}"
                )
        return size

    def _accumulate(
        self,
        sums: Sums,
        x: Tensor,
        ys: Mapping[str, Tensor],
        out_size: tuple[int, ...],
        positions: Tensor,
        weights: Tensor | None,
        vectors: Tensor,
    ) -> None:
        padded = F.pad(x, [p for pair in reversed(self.padding) for p in pair])
        size = padded.shape[2:]
        pixels = padded.flatten(2).transpose(1, 2).contiguous()  # (batch, pixel, channel): a tap is one short copy
        # flat offsets of the taps from the window's first pixel, and the first pixel of every sampled window
        strides = [prod(size[i + 1 :]) for i in range(len(size))]
        steps = [d * s for d, s in zip(self.dilation, strides, strict=True)]
        taps = torch.tensor([sum(a * b for a, b in zip(t, steps, strict=True)) for t in self.taps], device=x.device)
        corner, rest = torch.zeros_like(positions), positions
        for size_out, stride, step in reversed(list(zip(out_size, self.stride, strides, strict=True))):
            corner += rest % size_out * stride * step
            rest = rest // size_out
        image = torch.arange(len(x), device=x.device)[:, None].expand_as(positions).flatten()
        corner, where = corner.flatten(), positions.flatten()
        flat_ys = {name: y.flatten(2) for name, y in ys.items()}
        root = None if weights is None else weights.flatten().to(self._dtype).sqrt()
        blocks, rows = self._shape
        chunk = max(256, CHUNK_BYTES // (8 * blocks * rows))
        for i in range(0, len(where), chunk):
            part = slice(i, i + chunk)
            patches = pixels[image[part, None], corner[part, None] + taps].to(self._dtype)  # (n, taps, channels)
            features = patches.permute(2, 0, 1) if self.depthwise else patches.flatten(1)[None]
            if self.sides:
                beside = vectors[image[part]].to(self._dtype)
                features = torch.cat([features, beside.expand(len(features), -1, -1)], 2)
            features = F.pad(features, (0, 1), value=1.0)
            values = {name: y[image[part], :, where[part]].to(self._dtype) for name, y in flat_ys.items()}
            if not all(bool(t.abs().amax().isfinite()) for t in (features, *values.values())):  # a sum may overflow
                raise InputError("calibration features have NaN or infinite values; check the model and its input")
            n = float(features.shape[1])
            if root is not None:
                features = features * root[part, None]
                values = {name: y * root[part, None] for name, y in values.items()}
                n = float(root[part].square().sum())
            sums.add(features, values)
            sums.n += n

    def _part(self, part: Part) -> Sums:
        """The sums of one part of the images; `total` is their sum and stays until the next update."""
        if not self.samples:
            raise OptionError("nothing to fit: call update with calibration features (of positive weight) first")
        if part == "total" and part not in self._sums:
            held = self._sums.get("held")
            self._sums[part] = self._sums["rest"].plus(held) if held else self._sums["rest"]
        return self._sums[part]

    def can_hold_out(self) -> bool:
        """Whether there are held-out images and others."""
        return all(part in self._sums and self._sums[part].n > 0 for part in PARTS)

    def padding_of(self, kernel_size: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The (before, after) padding with which a smaller kernel, centred in the largest, has the same output size."""
        pads = []
        for big, k, (lo, hi), d in zip(self.kernel_size, kernel_size, self.padding, self.dilation, strict=True):
            before = max(lo - (big - k) // 2 * d, lo % d)
            after = lo + hi - (big - k) * d - before
            if after < 0:
                raise OptionError(f"kernel {tuple(kernel_size)} would need padding {(before, after)}: it crops")
            pads.append((before, after))
        return tuple(pads)

    def sub(
        self, kernel_size: Sequence[int], before: Sequence[int] | None = None, dilation: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """Which taps of the largest kernel a smaller one with this padding before (default: `padding_of`) has."""
        if len(kernel_size) != len(self.kernel_size):
            raise OptionError(f"kernel {tuple(kernel_size)} for sums over kernel {self.kernel_size}: other dimensions")
        if before is None:
            before = [lo for lo, _ in self.padding_of(kernel_size)]
        steps = self.dilation if dilation is None else dilation
        axes = []
        of = zip(kernel_size, before, steps, self.kernel_size, self.padding, self.dilation, strict=True)
        for k, p, d, big, (lo, _), own in of:
            pixels = [lo - p + d * t for t in range(k)]
            axis = [pixel // own for pixel in pixels]
            if min(axis) < 0 or max(axis) >= big or any(pixel % own for pixel in pixels):
                raise OptionError(
                    f"kernel {tuple(kernel_size)}, padding before {tuple(before)}, dilation {tuple(steps)} reaches "
                    f"outside of kernel {self.kernel_size}, padding {self.padding}, dilation {self.dilation}, or "
                    "between its taps"
                )
            axes.append(axis)
        index = {tap: i for i, tap in enumerate(self.taps)}
        return tuple(index[tap] for tap in product(*axes))

    def system(self, part: Part, taps: tuple[int, ...], depthwise: bool) -> System:
        """The centred sums of some taps, kept with their factorisations while there is room."""
        key = (part, taps, depthwise)
        if key not in self._systems:
            self._systems[key] = System.of(
                self._part(part),
                self.in_channels,
                taps,
                depthwise,
                self.depthwise,
                self._rounding,
                self.sides,
                FLOAT32_NOISE if self._dtype == torch.float32 else ROUNDING,
            )
        self._systems.move_to_end(key)
        while len(self._systems) > 1 and sum(s.bytes() for s in self._systems.values()) > CACHE_BYTES:
            self._systems.popitem(last=False)
        return self._systems[key]
