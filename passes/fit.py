"""Closed-form fit of one convolution to the input and output of a span.

    min over W, b of   sum_o |y_o - (W x_o + b)|^2  +  lambda |W - W0|^2

``x_o`` is the patch of the span's input under output pixel ``o``, ``y_o`` the value that is wanted there, ``W0`` a prior
(the composed kernel, or 0). The bias is not damped, so it can be eliminated: with centred sums ``G = X'X - n x x'`` and
``R = X'Y - n x y' - G W0`` (x, y: means)

    (G + lambda I) D = R        W = W0 + D        b = y - W x        lambda = damping * mean(diag G)

and the residual needs no data either: ``|Y|^2 - 2 W.X'Y + W.G W`` in centred sums, with ``G D = R - lambda D``.

**One accumulation for many fits.** A `Gram` holds the sums at the largest kernel for one input, stride and window. Every
smaller kernel whose taps lie in that window is a selection of rows and columns, a depthwise kernel is the diagonal
blocks, and every target (span stop) adds only its ``X'Y``. One factorisation serves all targets of a kernel.

**Damping.** With 64 images there can be fewer pixels than unknowns, and then the data fit is no measure of anything. So
every fourth image is also counted apart. ``damping="auto"`` fits on the others, walks over powers of ten to the smallest
error on these held-out images (all on one sketch of random combinations of output channels, so it costs a few
factorisations and nothing else), and then fits on everything. Pixels of one image are much alike; that is why whole
images are held out, and why generalised cross-validation, which takes samples for independent, would damp too little.

Where the sums would not fit in memory, `fit_cg` solves the same system by conjugate gradients, through a convolution and
its weight gradient.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from .errors import InputError, OptionError
from .ir import ConvConfig
from .linear import LinearOp, densify

__all__ = ["Fit", "Gram", "evaluate", "fit_cg", "sample_positions", "solve"]

MAX_UNKNOWNS = 6500  # an input channel and tap each; two sums of this size take 0.7 GB
AUTO_UNKNOWNS = 2500  # above it a factorisation takes seconds, and damping is not searched
DEFAULT_DAMPING = 1e-2
GRID = tuple(10.0**e for e in range(-7, 3))
SKETCH = 32  # random combinations of output channels that damping is chosen on
CACHE_BYTES = 1 << 30
CHUNK_BYTES = 1 << 27
BLOCK = 1024
HOLD_OUT_EVERY = 4  # images
Part = Literal["rest", "held", "total"]
PARTS: dict[Part, bool] = {"rest": False, "held": True}  # whether the images of a part are held out


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted convolution.

    `weight` is (out, in / groups, kernel...), `bias` (out,), both float64; `before` is the padding before in each
    dimension. `residual` (out,) is the mean squared error on the data that it was fitted to; `heldout` (out,) that of
    a fit with the same damping to the other images on the held-out ones, None if it was not asked for. `damping` is
    the relative one that was used.
    """

    weight: Tensor
    bias: Tensor
    residual: Tensor
    damping: float
    before: tuple[int, ...]
    heldout: Tensor | None = None


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


@dataclass
class _Sums:
    """Weighted sums over samples. Dense: xx (1, D, D), xy (1, D, out). Depthwise: xx (C, T + 1, T + 1), xy (C, T + 1, 1).

    Rows are taps, then channels within a tap, then the constant of the bias. Of a large `xx` only the blocks on and
    above the diagonal are summed.
    """

    xx: Tensor
    xy: dict[str, Tensor]
    yy: dict[str, Tensor]
    n: float = 0.0
    images: int = 0

    @classmethod
    def zeros(cls, blocks: int, rows: int, targets: Mapping[str, int], device: torch.device) -> _Sums:
        def zero(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        xy = {name: zero(blocks, rows, out // blocks) for name, out in targets.items()}
        return cls(zero(blocks, rows, rows), xy, {name: zero(out) for name, out in targets.items()})

    def add(self, rows: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Add weighted rows (blocks, n, D) and targets (n, out)."""
        left = rows.transpose(1, 2)
        width = rows.shape[2]
        for i in range(0, width, BLOCK):
            self.xx[:, i : i + BLOCK, i:].baddbmm_(left[:, i : i + BLOCK], rows[:, :, i:])
        for name, y in targets.items():
            blocks = y.reshape(len(y), rows.shape[0], -1).transpose(0, 1)
            self.xy[name].baddbmm_(left, blocks)
            self.yy[name] += y.square().sum(0)

    def plus(self, other: _Sums) -> _Sums:
        xy = {name: value + other.xy[name] for name, value in self.xy.items()}
        yy = {name: value + other.yy[name] for name, value in self.yy.items()}
        return _Sums(self.xx + other.xx, xy, yy, self.n + other.n, self.images + other.images)


class Gram:
    """Sums over sampled output pixels of one input, from which convolutions to many targets are fitted.

    `kernel_size`, `stride` and `padding` ((before, after) in each dimension) are those of the largest kernel;
    `targets` maps names to output channels. With `depthwise`, only what depthwise kernels need is kept, which is far
    less. `holdout=False` saves the second sum, and with it half of the memory.

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
        limit: int = MAX_UNKNOWNS,
    ) -> None:
        self.in_channels, self.kernel_size, self.stride = in_channels, tuple(kernel_size), tuple(stride)
        self.padding = tuple((lo, hi) for lo, hi in padding)
        self.targets, self.depthwise = dict(targets), depthwise
        if not len(self.kernel_size) == len(self.stride) == len(self.padding) or not 1 <= len(self.stride) <= 3:
            raise OptionError(
                f"kernel {self.kernel_size}, stride {self.stride} and padding {self.padding} need one entry a "
                "dimension, of which there are 1 to 3"
            )
        if min(*self.kernel_size, *self.stride, in_channels) < 1 or min(p for pair in self.padding for p in pair) < 0:
            raise OptionError(
                f"{in_channels} channels, kernel {self.kernel_size}, stride {self.stride} and padding {self.padding} "
                "make no convolution; sizes are at least 1, padding at least 0"
            )
        if depthwise and any(out != in_channels for out in self.targets.values()):
            raise OptionError(f"a depthwise fit keeps the {in_channels} channels, the targets have {self.targets}")
        self.taps = list(product(*map(range, self.kernel_size)))
        rows = len(self.taps) * (1 if depthwise else in_channels) + 1
        if rows - 1 > limit:
            raise OptionError(f"{rows - 1} unknowns an output channel are more than {limit}; use fit_cg")
        self._shape = (in_channels if depthwise else 1, rows)
        self._holdout = holdout
        self._images = 0
        self._sums: dict[Part, _Sums] = {}  # "rest" and "held" are summed, "total" is made from them when it is read
        self._systems: OrderedDict[object, _System] = OrderedDict()

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
    ) -> None:
        """Add images: `x` (batch, in, size...), targets (batch, out, output size...).

        `positions` (batch, count) are flat output pixels, default all; `weights` (batch, count) their weights, default
        1. InputError if shapes do not fit or values are not finite.
        """
        out_size = self._check(x, targets)
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
                    self._sums[part] = _Sums.zeros(*self._shape, self.targets, x.device)
                ys = {name: targets[name][chosen] for name in self.targets}
                w = None if weights is None else weights.to(x.device)[chosen]
                self._accumulate(self._sums[part], x[chosen], ys, out_size, positions[chosen], w)
        self._images += len(x)

    def _check(self, x: Tensor, targets: Mapping[str, Tensor]) -> tuple[int, ...]:
        ndim = len(self.stride)
        if x.ndim != ndim + 2 or x.shape[1] != self.in_channels or not len(x):
            raise InputError(f"x is {tuple(x.shape)}, expected (batch, {self.in_channels}) and {ndim} sizes")
        config = ConvConfig(
            self.in_channels, 1, self.kernel_size, self.stride, self.padding, (1,) * ndim
        )  # fmt: skip
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
        sums: _Sums,
        x: Tensor,
        ys: Mapping[str, Tensor],
        out_size: tuple[int, ...],
        positions: Tensor,
        weights: Tensor | None,
    ) -> None:
        padded = F.pad(x, [p for pair in reversed(self.padding) for p in pair])
        size = padded.shape[2:]
        pixels = padded.flatten(2).transpose(1, 2).contiguous()  # (batch, pixel, channel): a tap is one short copy
        # flat offsets of the taps from the window's first pixel, and the first pixel of every sampled window
        strides = [prod(size[i + 1 :]) for i in range(len(size))]
        taps = torch.tensor([sum(a * b for a, b in zip(t, strides, strict=True)) for t in self.taps], device=x.device)
        corner = torch.zeros_like(positions)
        rest = positions
        for n, s, step in reversed(list(zip(out_size, self.stride, strides, strict=True))):
            corner += rest % n * s * step
            rest = rest // n
        image = torch.arange(len(x), device=x.device)[:, None].expand_as(positions).flatten()
        corner, where = corner.flatten(), positions.flatten()
        flat_ys = {name: y.flatten(2) for name, y in ys.items()}
        root = None if weights is None else weights.flatten().double().sqrt()
        blocks, rows = self._shape
        chunk = max(256, CHUNK_BYTES // (8 * blocks * rows))
        for i in range(0, len(where), chunk):
            part = slice(i, i + chunk)
            patches = pixels[image[part, None], corner[part, None] + taps].double()  # (n, taps, channels)
            if self.depthwise:
                features = F.pad(patches.permute(2, 0, 1), (0, 1), value=1.0)
            else:
                features = F.pad(patches.flatten(1), (0, 1), value=1.0)[None]
            values = {name: y[image[part], :, where[part]].double() for name, y in flat_ys.items()}
            if not all(bool(t.isfinite().all()) for t in (features, *values.values())):
                raise InputError("calibration features have NaN or infinite values; check the model and its input")
            n = float(features.shape[1])
            if root is not None:
                features = features * root[part, None]
                values = {name: y * root[part, None] for name, y in values.items()}
                n = float(root[part].square().sum())
            sums.add(features, values)
            sums.n += n

    def _part(self, part: Part) -> _Sums:
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
        for big, k, (lo, hi) in zip(self.kernel_size, kernel_size, self.padding, strict=True):
            before = max(lo - (big - k) // 2, 0)
            after = lo + hi - (big - k) - before
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
        steps = [1] * len(kernel_size) if dilation is None else dilation
        axes = []
        for k, p, d, big, (lo, _) in zip(kernel_size, before, steps, self.kernel_size, self.padding, strict=True):
            axis = [lo - p + d * t for t in range(k)]
            if min(axis) < 0 or max(axis) >= big:
                raise OptionError(
                    f"kernel {tuple(kernel_size)}, padding before {tuple(before)}, dilation {tuple(steps)} reaches "
                    f"outside of kernel {self.kernel_size}, padding {self.padding}"
                )
            axes.append(axis)
        index = {tap: i for i, tap in enumerate(self.taps)}
        return tuple(index[tap] for tap in product(*axes))

    def system(self, part: Part, taps: tuple[int, ...], depthwise: bool) -> _System:
        """The centred sums of some taps, kept with their factorisations while there is room."""
        key = (part, taps, depthwise)
        if key not in self._systems:
            self._systems[key] = _System.of(self._part(part), self.in_channels, taps, depthwise, self.depthwise)
        self._systems.move_to_end(key)
        while len(self._systems) > 1 and sum(s.bytes() for s in self._systems.values()) > CACHE_BYTES:
            self._systems.popitem(last=False)
        return self._systems[key]


@dataclass
class _System:
    """Centred sums for one kernel, in `blocks` independent parts (1 if dense, the channels if depthwise), m rows each."""

    sums: _Sums
    rows: Tensor  # (blocks, m) rows of a dense sum, or (m,) of each block of a depthwise one
    from_dense: bool
    matrix: Tensor  # (blocks, m, m)
    mean: Tensor  # (blocks, m)
    scale: Tensor  # (blocks, 1, 1) mean of the diagonal, never 0
    factors: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, sums: _Sums, channels: int, taps: tuple[int, ...], depthwise: bool, stored_depthwise: bool) -> _System:
        xx = sums.xx
        t = torch.tensor(taps, device=xx.device)
        if stored_depthwise:
            rows = t
            matrix, total = xx[:, t[:, None], t], xx[:, t, -1]
        else:
            every = torch.arange(channels, device=xx.device)
            rows = every[:, None] + t * channels if depthwise else (t[:, None] * channels + every).reshape(1, -1)
            whole = rows.shape == (1, xx.shape[1] - 1)
            matrix = xx[:, :-1, :-1].clone() if whole else xx[0][rows[:, :, None], rows[:, None, :]]
            total = xx[0, :, -1][rows]
        # only blocks on and above the diagonal were summed, and a selection keeps their order
        matrix = matrix.triu() + matrix.triu(1).transpose(1, 2)
        matrix.baddbmm_(total[:, :, None], total[:, None, :], alpha=-1.0 / sums.n)
        scale = matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        whole_scale = float(scale.mean())
        floor = whole_scale * 1e-9 if whole_scale > 0 else 1.0  # a dead channel must not make a singular block
        return cls(sums, rows, not stored_depthwise, matrix, total / sums.n, scale.clamp_min(floor))

    def bytes(self) -> int:
        return 8 * self.matrix.numel() * (1 + len(self.factors))

    def target(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Centred X'Y (blocks, m, out / blocks) and Y'Y (out,), and the mean (blocks, 1, out / blocks) of a target."""
        xy = self.sums.xy[name]
        mean = xy[:, -1:] / self.sums.n
        if self.from_dense and len(self.rows) > 1:  # depthwise out of a dense sum
            every = torch.arange(len(self.rows), device=xy.device)[:, None]
            xy, mean = xy[0][self.rows, every][:, :, None], mean[0].T[:, :, None]
        else:
            xy = xy[:, self.rows.flatten()]
        centred = xy - self.sums.n * self.mean[:, :, None] * mean
        return centred, self.sums.yy[name] - self.sums.n * mean.flatten().square(), mean

    def solve(self, damping: float, right: Tensor) -> tuple[Tensor, Tensor]:
        """(matrix + lambda I)^-1 right, and lambda; more damping than asked for if the matrix is singular without."""
        if damping not in self.factors:
            self.factors[damping] = self._factor(damping)
        factor, lam = self.factors[damping]
        return torch.cholesky_solve(right, factor), lam

    def _factor(self, damping: float) -> tuple[Tensor, Tensor]:
        more = 0.0
        while True:
            lam = (damping + more) * self.scale
            damped = self.matrix.clone()
            damped.diagonal(dim1=1, dim2=2).add_(lam[:, :, 0])
            factor, info = torch.linalg.cholesky_ex(damped)
            pivots = factor.diagonal(dim1=1, dim2=2)
            small = pivots.amin(1) ** 2 <= 2e-16 * pivots.shape[1] * pivots.amax(1) ** 2
            if not bool((info != 0).any() | small.any()):
                return factor, lam
            more = max(1e-12, 100 * more)

    def error(self, name: str, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean squared error (out,) of a packed weight (blocks, m, out / blocks) and its bias (out,)."""
        xy, yy, mean = self.target(name)
        squares = (weight * (self.matrix @ weight - 2 * xy)).sum(1).flatten() + yy
        shift = (mean - self.mean[:, None] @ weight).flatten() - bias
        return (squares / self.sums.n + shift.square()).clamp_min(0.0)


def solve(
    gram: Gram,
    target: str,
    kernel_size: Sequence[int],
    depthwise: bool = False,
    prior: tuple[Tensor, Tensor] | None = None,
    damping: float | Literal["auto"] = "auto",
    *,
    before: Sequence[int] | None = None,
    heldout: bool = True,
) -> Fit:
    """The best convolution of this kernel size to a target.

    `prior` is (weight, bias) of that kernel (its bias is not used: the best bias for the weight is). `damping` is
    relative to the mean variance of a feature; "auto" picks it on held-out images where that is cheap. `before` places
    the kernel (`Gram.sub`). With `heldout`, a second fit without the held-out images estimates the error on new ones.
    """
    depthwise = depthwise or gram.depthwise
    _known(gram, target)
    if depthwise and gram.targets[target] != gram.in_channels:
        raise OptionError(
            f"a depthwise kernel keeps the {gram.in_channels} channels, target {target!r} has {gram.targets[target]}"
        )
    if before is None:
        before = tuple(lo for lo, _ in gram.padding_of(kernel_size))
    taps = gram.sub(kernel_size, before)
    shape = (gram.targets[target], 1 if depthwise else gram.in_channels, *kernel_size)
    start = None if prior is None else _pack(prior[0].detach(), shape, depthwise)
    total = gram.system("total", taps, depthwise)
    if damping == "auto":
        cheap = total.matrix.shape[1] <= AUTO_UNKNOWNS and gram.can_hold_out()
        damping = _choose(gram, target, taps, depthwise, start) if cheap else DEFAULT_DAMPING
    elif isinstance(damping, str) or not 0 <= damping < float("inf"):
        raise OptionError(f"damping {damping!r}; give 'auto' or a number of at least 0")
    weight, bias, residual = _fit(total, target, start, damping)
    unseen = None
    if heldout and gram.can_hold_out():
        w, b, _ = _fit(gram.system("rest", taps, depthwise), target, start, damping)
        unseen = gram.system("held", taps, depthwise).error(target, w, b)
    return Fit(_unpack(weight, shape), bias, residual, damping, tuple(before), unseen)


def evaluate(
    gram: Gram,
    target: str,
    weight: Tensor,
    bias: Tensor,
    *,
    before: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    part: Part = "total",
) -> Tensor:
    """Mean squared error (out,) of any convolution whose taps lie in the Gram's window, on one part of the images.

    `weight` is (out, in / groups, kernel...); groups are seen from its shape.
    """
    _known(gram, target)
    out, channels = gram.targets[target], gram.in_channels
    kernel = tuple(weight.shape[2:])
    if len(weight) != out or not weight.shape[1] or channels % weight.shape[1] or bias.shape != (out,):
        raise OptionError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not map {channels} channels to {out}"
        )
    taps = gram.sub(kernel, before, dilation)
    depthwise = weight.shape[1] == 1 and out == channels
    if gram.depthwise and not depthwise:
        raise OptionError(f"sums of a depthwise fit can not judge a weight {tuple(weight.shape)}")
    if not depthwise and weight.shape[1] != channels:
        ndim = len(kernel)
        grouped = LinearOp(
            weight, bias, (1,) * ndim, ((0, 0),) * ndim, (1,) * ndim, channels // weight.shape[1]
        )  # fmt: skip
        weight = densify(grouped).weight
    packed = _pack(weight.detach(), tuple(weight.shape), depthwise)
    return gram.system(part, taps, depthwise).error(target, packed, bias.detach().double())


def _fit(system: _System, target: str, start: Tensor | None, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weight, bias (out,) and mean squared error (out,) on the same samples."""
    xy, yy, mean = system.target(target)
    right = xy if start is None else xy - system.matrix @ start
    delta, lam = system.solve(damping, right)
    squares = yy - (delta * (right + lam * delta)).sum(1).flatten()
    weight = delta
    if start is not None:
        squares = squares - (start * (xy + right)).sum(1).flatten()
        weight = start + delta
    bias = (mean - system.mean[:, None] @ weight).flatten()
    return weight, bias, (squares / system.sums.n).clamp_min(0.0)


def _choose(gram: Gram, target: str, taps: tuple[int, ...], depthwise: bool, start: Tensor | None) -> float:
    """The damping of GRID with the smallest held-out error, walking downhill from DEFAULT_DAMPING."""
    rest, held = (gram.system(part, taps, depthwise) for part in PARTS)
    (xy, _, mean), (xy_held, _, mean_held) = rest.target(target), held.target(target)
    sketch = None
    if xy.shape[2] > SKETCH:
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(xy.shape[2], SKETCH, dtype=torch.float64, generator=generator).to(xy.device)
        xy, xy_held, mean, mean_held = (t @ sketch for t in (xy, xy_held, mean, mean_held))
    # the bias comes from the other images, so held-out sums are taken about their means
    shift = (held.mean - rest.mean)[:, :, None]

    def about(weight: Tensor) -> Tensor:
        return held.matrix @ weight + held.sums.n * shift * (shift.transpose(1, 2) @ weight)

    right, right_held = xy, xy_held + held.sums.n * shift * (mean_held - mean)
    if start is not None:
        begin = start if sketch is None else start @ sketch
        right, right_held = right - rest.matrix @ begin, right_held - about(begin)
    seen: dict[int, float] = {}

    def error(i: int) -> float:  # but for a constant
        if i not in seen:
            delta, _ = rest.solve(GRID[i], right)
            seen[i] = float((delta * (about(delta) - 2 * right_held)).sum())
        return seen[i]

    best = GRID.index(DEFAULT_DAMPING)
    while True:
        near = [i for i in (best - 1, best, best + 1) if 0 <= i < len(GRID)]
        lowest = min(near, key=error)
        if lowest == best:
            return GRID[best]
        best = lowest


def _known(gram: Gram, target: str) -> None:
    if target not in gram.targets:
        raise OptionError(f"no target {target!r}; the sums have {sorted(gram.targets)}")


def _pack(weight: Tensor, shape: tuple[int, ...], depthwise: bool) -> Tensor:
    """(out, in, kernel...) as (1, taps x in, out), or (channels, 1, kernel...) as (channels, taps, 1)."""
    if tuple(weight.shape) != shape:
        raise OptionError(f"weight {tuple(weight.shape)}, expected {shape}")
    flat = weight.double().flatten(2)
    return flat.transpose(1, 2) if depthwise else flat.permute(2, 1, 0).reshape(1, -1, shape[0])


def _unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(packed) > 1 or shape[1] == 1:
        return packed.reshape(packed.shape[0], packed.shape[1], -1).permute(0, 2, 1).reshape(shape)
    return packed.reshape(-1, shape[1], shape[0]).permute(2, 1, 0).reshape(shape)


def fit_cg(
    x_batches: Sequence[Tensor],
    y_batches: Sequence[Tensor],
    config: ConvConfig,
    prior: tuple[Tensor, Tensor] | None = None,
    damping: float = DEFAULT_DAMPING,
    iterations: int = 50,
    tolerance: float = 1e-6,
) -> Fit:
    """`solve` by conjugate gradients on all output pixels, for kernels whose sums would not fit; any groups.

    Convolves in the dtype of `x_batches`, keeps its state in float64. All output channels are solved side by side, each
    with its own steps. Stops after `iterations`, or when no channel's gradient is above `tolerance` of its first.
    """
    if not len(x_batches) or len(x_batches) != len(y_batches):
        raise InputError(
            f"{len(x_batches)} input batches and {len(y_batches)} output batches; give as many, at least 1"
        )
    for x, y in zip(x_batches, y_batches, strict=True):
        expected = (len(x), config.out_channels, *config.output_size(tuple(x.shape[2:])))
        if x.shape[1] != config.in_channels or tuple(y.shape) != expected:
            raise InputError(f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit {config}; y should be {expected}")
        if not (bool(x.isfinite().all()) and bool(y.isfinite().all())):
            raise InputError("calibration features have NaN or infinite values; check the model and its input")
    if not 0 <= damping < float("inf"):
        raise OptionError(f"damping {damping!r}; give a number of at least 0")
    with torch.no_grad():
        return _ConjugateGradients(x_batches, y_batches, config).solve(prior, damping, iterations, tolerance)


class _ConjugateGradients:
    """The centred normal equations, seen only through a convolution and its weight gradient."""

    def __init__(self, xs: Sequence[Tensor], ys: Sequence[Tensor], config: ConvConfig) -> None:
        self.xs, self.ys, self.config = xs, ys, config
        self.shape = (config.out_channels, config.in_channels // config.groups, *config.kernel_size)
        self.n = sum(len(y) * prod(y.shape[2:]) for y in ys)
        one = torch.ones((), dtype=xs[0].dtype, device=xs[0].device)
        # sums of features and of their squares: the weight gradient of an output of ones
        self.total = self._sum(lambda x, y: self._gradient(x, one.expand_as(y)))
        squares = self._sum(lambda x, y: self._gradient(x.square(), one.expand_as(y)))
        self.variances = squares - self.total.square() / self.n
        self.y_mean = self._sum(lambda x, y: y.double().transpose(0, 1).flatten(1).sum(1)) / self.n

    def _sum(self, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        terms = (term(self._pad(x), y).double() for x, y in zip(self.xs, self.ys, strict=True))
        return sum(terms, start=torch.zeros((), dtype=torch.float64, device=self.xs[0].device))

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, [p for pair in reversed(self.config.padding) for p in pair])

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        c, ndim = self.config, len(self.config.stride)
        run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]
        return run(x, weight.to(x.dtype), None, c.stride, 0, c.dilation, c.groups)

    def _gradient(self, x: Tensor, output: Tensor) -> Tensor:
        c, ndim = self.config, len(self.config.stride)
        of_weight = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}[ndim]
        return of_weight(x, self.shape, output.contiguous(), c.stride, 0, c.dilation, c.groups)

    def _column(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (len(self.shape) - 1))

    def right(self, weight: Tensor) -> Tensor:
        """X'(Y - X W), centred."""
        out = self._column(self.y_mean - self.means(weight))
        part = self._sum(lambda x, y: self._gradient(x, y - self._conv(x, weight)))
        return part - out * self.total

    def means(self, weight: Tensor) -> Tensor:
        return (weight * self.total).flatten(1).sum(1) / self.n

    def times(self, weight: Tensor) -> Tensor:
        """G W."""
        part = self._sum(lambda x, y: self._gradient(x, self._conv(x, weight)))
        return part - self._column(self.means(weight)) * self.total

    def solve(self, prior: tuple[Tensor, Tensor] | None, damping: float, iterations: int, tolerance: float) -> Fit:
        """Jacobi-preconditioned conjugate gradients from the prior."""
        weight = torch.zeros(self.shape, dtype=torch.float64, device=self.xs[0].device)
        if prior is not None:
            if tuple(prior[0].shape) != self.shape:
                raise OptionError(f"prior weight {tuple(prior[0].shape)}, expected {self.shape}")
            weight = prior[0].detach().double()
        scale = self._column(self.variances.flatten(1).mean(1))
        lam = damping * scale
        inverse = 1.0 / (self.variances + lam).clamp_min(1e-12 * float(scale.mean()) or 1.0)
        delta, residual = torch.zeros_like(weight), self.right(weight)
        direction = inverse * residual
        power = self._dot(residual, direction)
        goal = tolerance**2 * power
        for _ in range(iterations):
            active = power > goal
            if not bool(active.any()):
                break
            image = self.times(direction) + lam * direction
            step = torch.where(active, power / self._dot(direction, image).clamp_min(1e-300), 0.0)
            delta += step * direction
            residual -= step * image
            scaled = inverse * residual
            power, before = self._dot(residual, scaled), power
            direction = scaled + torch.where(active, power / before.clamp_min(1e-300), 0.0) * direction
        weight = weight + delta
        bias = self.y_mean - self.means(weight)
        errors = self._sum(
            lambda x, y: (
                (y - self._conv(x, weight))
                .double()
                .sub(self._column(bias)[None, :, 0])
                .square()
                .transpose(0, 1)
                .flatten(1)
                .sum(1)
            )
        )
        return Fit(weight, bias, errors / self.n, damping, tuple(lo for lo, _ in self.config.padding))

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        return self._column((a * b).flatten(1).sum(1))
