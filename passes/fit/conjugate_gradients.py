"""Fits one convolution by conjugate gradients (cf. `closed_form`), for kernels whose sums would not fit in memory.

The centred normal equations ``(G + lambda I) D = R`` are seen only through a convolution and its weight gradient:

    G W = X'(X W) - n x (W x)'        X'U = the weight gradient of the convolution at output gradient U

so nothing of the size of G is ever made. Every output channel is a system of its own with the same matrix; all are
iterated side by side, each with its own steps, preconditioned by the diagonal. Groups and dilations come for free.

What a refusal would not give: with the default bound of 5,000 unknowns no fit comes here. Who raises it, for 3 x 3 on
1,024 channels (9,216 unknowns, sums of 0.7 GB) or 5 x 5 on 512 (12,800, 1.3 GB), gets a fit in place of an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from ..errors import InputError, OptionError
from ..ir import ConvConfig
from .normal_equations import DEAD, ROUNDING, Fit, power_of_two, usual_damping

__all__ = ["fit_cg"]

FLOAT32_ROUNDING = 1e-6  # of a mean square: what sums of products in float32 may be off by


def fit_cg(
    x_batches: Sequence[Tensor],
    y_batches: Sequence[Tensor],
    config: ConvConfig,
    prior: tuple[Tensor, Tensor] | None = None,
    damping: float | None = None,
    iterations: int = 50,
    tolerance: float = 1e-6,
) -> Fit:
    """`solve` by conjugate gradients on all output pixels, for kernels whose sums would not fit; any groups.

    Convolves in the dtype of `x_batches`, keeps its state in float64. `damping` is relative as in `solve`, default
    `usual_damping`. Stops after `iterations`, or when no output channel's gradient is above `tolerance` of its first.
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
    if damping is not None and not 0 <= damping < float("inf"):
        raise OptionError(f"damping {damping!r}; give a number of at least 0, or None")
    with torch.no_grad():
        # In units (powers of two, so exact) in which nothing that is convolved overflows or vanishes.
        x_unit, y_unit = _unit(x_batches), _unit(y_batches)
        xs, ys = [x / x_unit for x in x_batches], [y / y_unit for y in y_batches]
        ratio = y_unit / x_unit
        begin = None if prior is None else prior[0].detach().double() / ratio
        found = _ConjugateGradients(xs, ys, config).solve(begin, damping, iterations, tolerance)
        weight, bias, residual = found.weight * ratio, found.bias * y_unit, found.residual * y_unit**2
        if not all(bool(t.isfinite().all()) for t in (weight, bias)):
            raise InputError(
                f"a fit of values around {y_unit:.0e} to values around {x_unit:.0e} has no finite weights: scale the "
                "activations of the network"
            )
        return replace(found, weight=weight, bias=bias, residual=residual)


def _unit(batches: Sequence[Tensor]) -> float:
    """The largest power of two that is at most the largest value, 1 if all are 0."""
    return float(power_of_two(torch.stack([b.abs().amax().double() for b in batches]).amax()))


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
        # What varies by no more than the rounding of its sums is damped as if it varied by that.
        self.least = (ROUNDING if xs[0].dtype == torch.float64 else FLOAT32_ROUNDING) * squares
        self.least = self.least.clamp_min(DEAD * float(squares.amax()))
        self.variances = torch.maximum(squares - self.total.square() / self.n, self.least)
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

    def solve(self, prior: Tensor | None, damping: float | None, iterations: int, tolerance: float) -> Fit:
        """Jacobi-preconditioned conjugate gradients from the prior."""
        weight = torch.zeros(self.shape, dtype=torch.float64, device=self.xs[0].device)
        if prior is not None:
            if tuple(prior.shape) != self.shape:
                raise OptionError(f"prior weight {tuple(prior.shape)}, expected {self.shape}")
            weight = prior
        if damping is None:
            damping = usual_damping(prod(self.shape[1:]), self.n)
        scale, least = (self._column(v.flatten(1).mean(1)) for v in (self.variances, self.least))
        lam = torch.maximum(damping * scale, least)
        lam = torch.where(lam > 0, lam, 1.0)  # all features are 0
        inverse = 1.0 / (self.variances + lam)
        delta, residual = torch.zeros_like(weight), self.right(weight)
        direction = inverse * residual
        power = self._dot(residual, direction)
        goal = tolerance**2 * power
        sound = torch.ones_like(power, dtype=torch.bool)
        for _ in range(iterations):
            active = sound & (power > goal)
            if not bool(active.any()):
                break
            image = self.times(direction) + lam * direction
            curvature = self._dot(direction, image)
            # lambda alone bends it by so much; less is rounding, and an output channel that has come there is done
            sound = sound & (curvature > 0.5 * lam * self._dot(direction, direction))
            active = active & sound
            step = torch.where(active, power / torch.where(active, curvature, 1.0), 0.0)
            delta += step * direction
            residual -= step * image
            scaled = inverse * residual
            power, before = self._dot(residual, scaled), power
            direction = scaled + torch.where(active, power / torch.where(active, before, 1.0), 0.0) * direction
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
