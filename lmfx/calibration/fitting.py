"""Closed-form fits of candidates on calibration data, many at once.

A `FitGroup` is all fit candidates that share the value they read, their stride and output size: one Gram matrix at the
union of their windows serves them all. `plan_fits` sets a chosen plan's convs with it.

Vectors that enter a span from the side are fitted with it (`FittedOp.sides`), by their principal components: there are
only as many samples of them as images, and several vectors are often made of one. With m, U: mean and components of all
of a span's vectors together,

    V v + b = Z U'(v - m) + b'        V = Z U'        b = b' - V m
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lmfx.passes.algebra.linear import LinearOp
from lmfx.passes.algebra.side_vectors import side_conv
from lmfx.passes.errors import InputError, OptionError
from lmfx.passes.fit import closed_form as fit
from lmfx.passes.fit.closed_form import Gram, fit_cg, sample_positions
from lmfx.passes.fit.gram import MAX_UNKNOWNS
from lmfx.passes.fit.normal_equations import power_of_two, usual_damping
from lmfx.passes.ir import Candidate, ConvConfig
from lmfx.passes.rewrite.span_modules import span_sides
from lmfx.passes.spans.layers import Network

__all__ = ["FitGroup", "FittedOp", "fit_groups"]

LEAST_SAMPLES = 4096
LEAST_IMAGES = {True: 24, False: 96}  # quick or not; pixels of one image are much alike
MOST_SAMPLES = {True: 8000, False: 20000}  # quick or not
FLOAT32_ROUNDING = 1e-6  # see `Gram`
SAMPLES_AN_UNKNOWN = {True: 2, False: 4}
COMPONENTS, IMAGES_A_COMPONENT = 48, 4  # of vectors from the side, at most
CG_ITERATIONS, CG_IMAGES = {True: 6, False: 20}, {True: 16, False: 64}


@dataclass(frozen=True)
class FittedOp(LinearOp):
    """A fitted convolution, and for each vector from the side the matrix (out, channels) by which it is added."""

    sides: tuple[Tensor, ...] = ()

    @property
    def bytes(self) -> int:
        """The bytes of its weights."""
        return sum(t.numel() * t.element_size() for t in (self.weight, *self.sides))

    def side_convs(self, names: Sequence[str], like: Tensor) -> dict[str, nn.Module]:
        """The 1 x 1 convolution of each vector, by the name of its node, in the dtype and on the device of `like`."""
        return {name: side_conv(v, self.ndim, like) for name, v in zip(names, self.sides, strict=True)}


@dataclass(frozen=True)
class FitGroup:
    """Fit candidates that can share one Gram matrix: one entry, stride, output size, the same vectors from the side
    (`sides`, the names of their nodes), and dense or depthwise alike."""

    entry: str
    depthwise: bool
    candidates: tuple[Candidate, ...]
    sides: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()  # the nodes that enter at the other calls of the candidates, which all have the same

    @property
    def names(self) -> set[str]:
        """The nodes whose values the fit needs."""
        return {self.entry, *self.calls, *self.sides, *(s.output for c in self.candidates for s in c.spans)}

    def images(self, network: Network, quick: bool, total: int) -> int:
        """How many of `total` images give as many samples as its fits are made from."""
        if self.sides:
            return total  # a vector from the side has one sample an image
        size = network.shape(self.candidates[0].span.output)[2:]
        return min(total, max(LEAST_IMAGES[quick], math.ceil(self.samples(quick) / max(math.prod(size), 1))))

    def samples(self, quick: bool) -> int:
        """The number of output pixels that its fits are made from, if there are as many."""
        narrow = [n for n in map(_unknowns, self.candidates) if n <= MAX_UNKNOWNS]
        return _samples(max(narrow, default=MAX_UNKNOWNS), quick)

    def fit(
        self, x: Tensor, ys: dict[str, Tensor], quick: bool = False, others: Sequence[Tensor] = ()
    ) -> dict[str, FittedOp]:
        """The fitted op of each candidate, by its key.

        `x` (images, in, size...), `ys` the value at each output node, and of each vector (images, channels, 1...).
        `quick` takes fewer samples and a rule's damping instead of the best on held-out images. `others` are what
        enters at the other calls: one op is fitted to the samples of all.
        """
        if x.dim() == 2:
            return self.fit_vectors(x, ys, quick, others)
        xs = [x, *others]
        beside = _Vectors.of([ys[n] for n in self.sides], x)
        narrow = [c for c in self.candidates if _unknowns(c) <= MAX_UNKNOWNS]
        wide = [c for c in self.candidates if c not in narrow]
        found = {c.key: _fit_wide(c, xs, [ys[s.output] for s in c.spans], beside, quick) for c in wide}
        # The largest kernel decides the cost of all, so kernels that would make it too large are left out in turn.
        while narrow and _union(narrow).unknowns(self.depthwise) > MAX_UNKNOWNS:
            largest = max(narrow, key=_unknowns)
            narrow.remove(largest)
            found.update(replace(self, candidates=(largest,)).fit(x, ys, quick, others))
        if not narrow:
            return found
        window = _union(narrow)
        targets = {c.span.output: ys[c.span.output].shape[1] for c in narrow}
        gram = Gram(
            x.shape[1],
            window.kernel,
            window.stride,
            window.padding,
            targets,
            depthwise=self.depthwise,
            holdout=not quick,
            dtype=torch.float32 if quick else torch.float64,
            rounding=0.0 if x.dtype == torch.float64 else FLOAT32_ROUNDING,
            sides=beside.values.shape[1],
            dilation=window.dilation,
        )
        want = _samples(window.unknowns(self.depthwise), quick)
        images = sum(map(len, xs))
        generator = torch.Generator().manual_seed(0)
        for i, entering in enumerate(xs):
            size = ys[narrow[0].spans[i].output].shape[2:]
            positions = sample_positions(tuple(size), len(entering), -(-want // images), generator)
            values = {c.span.output: ys[c.spans[i].output] for c in narrow}
            vectors = beside.values if self.sides else entering.new_zeros(len(entering), 0)
            gram.update(entering, values, positions, vectors=vectors)
        for c in narrow:
            assert c.conv is not None
            before = tuple(lo for lo, _ in c.conv.padding)
            solved = fit.solve(
                gram,
                c.span.output,
                c.conv.kernel_size,
                self.depthwise,
                damping=min(1.0, 0.4 * _unknowns(c) / gram.samples) if quick else "auto",
                before=before,
                heldout=False,
            )
            found[c.key] = beside.op(c.conv, solved.weight, solved.bias, solved.side)
        return found

    def fit_vectors(
        self, x: Tensor, ys: dict[str, Tensor], quick: bool, others: Sequence[Tensor] = ()
    ) -> dict[str, FittedOp]:
        """The same for vectors, as maps of one pixel."""
        group = FitGroup(self.entry, self.depthwise, tuple(replace(c, conv=_one_pixel(c)) for c in self.candidates))
        values = {name: y[..., None] for name, y in ys.items()}
        found = group.fit(x[..., None], values, quick, [o[..., None] for o in others])
        ops = [found[c.key] for c in group.candidates]
        return {
            c.key: FittedOp(op.weight[..., 0], op.bias, (), (), ()) for c, op in zip(self.candidates, ops, strict=True)
        }


def _samples(unknowns: int, quick: bool) -> int:
    return min(max(SAMPLES_AN_UNKNOWN[quick] * unknowns, LEAST_SAMPLES), MOST_SAMPLES[quick])


def _one_pixel(candidate: Candidate) -> ConvConfig:
    assert candidate.conv is not None
    return ConvConfig(candidate.conv.in_channels, candidate.conv.out_channels, (1,), (1,), ((0, 0),), (1,))


@dataclass(frozen=True)
class _Vectors:
    """The vectors of a fit by their principal components: `values` (images, components) = (v - mean) basis."""

    values: Tensor
    mean: Tensor  # (channels of all vectors,)
    basis: Tensor  # (channels, components)
    widths: tuple[int, ...]  # channels of each vector

    @classmethod
    def of(cls, vectors: Sequence[Tensor], x: Tensor) -> _Vectors:
        images = len(x)
        if not vectors:
            return cls(x.new_zeros(images, 0), x.new_zeros(0), x.new_zeros(0, 0), ())
        # Rows for other than all images are those of a vector that no input changes.
        rows = [(v if len(v) == images else v[:1]).flatten(1).double().expand(images, -1) for v in vectors]
        whole = torch.cat(rows, 1)
        if not bool(whole.isfinite().all()):
            raise InputError("vectors from the side have NaN or infinite values; check the model and its input")
        mean = whole.mean(0)
        # Each vector in its own unit: a small one next to a large one is told as well. What differs from its mean by no
        # more than rounding is no variation.
        unit = torch.cat([power_of_two(r.abs().amax()).expand(r.shape[1]) for r in rows])
        centred = (whole - mean) / unit
        precise = max(torch.finfo(v.dtype).eps for v in vectors if v.is_floating_point())
        varies = centred.abs().amax(0) > precise * (mean / unit).abs()
        centred = torch.where(varies, centred, 0.0)
        _, sizes, right = torch.linalg.svd(centred, full_matrices=False)
        count = int((sizes > precise * sizes.amax()).sum()) if len(sizes) else 0
        kept = right[: min(COMPONENTS, images // IMAGES_A_COMPONENT, count)]
        basis = torch.where(varies, kept / unit, 0.0).T
        return cls((whole - mean) @ basis, mean, basis, tuple(r.shape[1] for r in rows))

    def op(self, config: ConvConfig, weight: Tensor, bias: Tensor, side: Tensor | None) -> FittedOp:
        """The fitted op on the vectors themselves; `side` (out, components)."""
        matrices: tuple[Tensor, ...] = ()
        if self.widths:
            whole = (bias.new_zeros(len(bias), self.basis.shape[1]) if side is None else side) @ self.basis.T
            bias = bias - whole @ self.mean
            matrices = whole.split(self.widths, 1)
        return FittedOp(weight, bias, config.stride, config.padding, config.dilation, config.groups, sides=matrices)


def _unknowns(candidate: Candidate) -> int:
    assert candidate.conv is not None
    return _Window.of(candidate.conv).unknowns(candidate.conv.groups > 1)


@dataclass(frozen=True)
class _Window:
    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, c: ConvConfig) -> _Window:
        return cls(c.in_channels, c.kernel_size, c.stride, c.padding, c.dilation)

    def unknowns(self, depthwise: bool) -> int:
        taps = 1
        for k in self.kernel:
            taps *= k
        return taps * (1 if depthwise else self.channels)


def _union(candidates: Sequence[Candidate]) -> _Window:
    """The smallest window that holds those of all candidates, with a padding that gives the same output size.

    Dilated candidates of one group have one window.
    """
    configs = [c.conv for c in candidates if c.conv is not None]
    if any(d > 1 for d in configs[0].dilation):
        return _Window.of(configs[0])
    kernel, padding = [], []
    for i in range(len(configs[0].kernel_size)):
        before = max(c.padding[i][0] for c in configs)
        after = max(c.kernel_size[i] - 1 - c.padding[i][0] for c in configs)
        excess = sum(configs[0].padding[i]) - (configs[0].kernel_size[i] - 1)
        kernel.append(before + after + 1)
        padding.append((before, max(excess + after, 0)))
    first = configs[0]
    return _Window(first.in_channels, tuple(kernel), first.stride, tuple(padding), first.dilation)


def fit_groups(network: Network, candidates: Sequence[Candidate]) -> list[FitGroup]:
    """The fit candidates in groups, in the order in which their entries appear in the graph."""
    found: dict[tuple[Any, ...], list[Candidate]] = {}
    order = {name: i for i, name in enumerate(network.nodes)}
    for c in candidates:
        if c.conv is None:
            raise OptionError(f"candidate {c.key} has no conv to fit")
        excess = tuple(sum(p) - k for p, k in zip(c.conv.padding, c.conv.kernel_size, strict=True))
        dilated = (c.conv.dilation, c.conv.padding) if any(d > 1 for d in c.conv.dilation) else ()
        sides = span_sides(network, c)
        size, calls = network.shape(c.span.output)[2:], tuple(s.entry for s in c.calls)
        key = (c.span.entry, c.conv.groups > 1, sides, c.conv.stride, excess, size, calls, dilated)
        found.setdefault(key, []).append(c)
    return [
        FitGroup(key[0], key[1], tuple(group), key[2], key[6])
        for key, group in sorted(found.items(), key=lambda kv: order[kv[0][0]])
    ]


def _fit_wide(
    candidate: Candidate, xs: Sequence[Tensor], ys: Sequence[Tensor], beside: _Vectors, quick: bool
) -> FittedOp:
    """Conjugate gradients, where the Gram matrix would not fit; vectors are fitted to what that leaves."""
    config = candidate.conv
    assert config is not None
    images = -(-CG_IMAGES[quick] // len(xs))
    solved = fit_cg([x[:images] for x in xs], [y[:images] for y in ys], config, iterations=CG_ITERATIONS[quick])
    x, y = xs[0], ys[0]  # vectors enter no span that has several calls
    op = _Vectors.of((), x).op(config, solved.weight, solved.bias, None)
    if not beside.widths:
        return op
    images = min(images, len(x))
    left = (y[:images] - op.like(x)(x[:images])).double().flatten(2).mean(2)
    sums = Gram(beside.values.shape[1], (1,), (1,), ((0, 0),), {"": left.shape[1]}, holdout=False)
    sums.update(beside.values[:images, :, None], {"": left[:, :, None]})
    found = fit.solve(sums, "", (1,), damping=usual_damping(beside.values.shape[1], images), heldout=False)
    return beside.op(config, op.weight, op.bias + found.bias, found.weight[:, :, 0])
