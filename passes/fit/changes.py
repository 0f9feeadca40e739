"""Computes the change of a linear layer that brings its values nearest to a goal, from samples of it.

    min over D, b of  sum over samples |goal - (now + s (X D + b))|^2  +  lambda |D|^2

X: what the layer reads (`feature_rows`); now: the values at the place that is compared; s: a factor a channel from the
layer's output to there. D is added to the layer's columns, so its own weight is the prior: without samples that say
otherwise it stays. The bias is not damped. Each channel is a least-squares problem of its own, so s only turns the
error at the place into one at the layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .closed_form import fit_system, search_damping
from .normal_equations import Sums, System

__all__ = ["Change", "Rows", "fit_rows"]

FLOAT32_ROUNDING = 1e-6
GRID = tuple(10.0 ** (e / 2) for e in range(-24, 5))  # finer than from nothing: what is there already may be right


@dataclass(frozen=True)
class Rows:
    """Samples of a layer: `x` (blocks, samples, features + 1), the last of which is 1; `now` and `goal` (samples, out)
    at the place that is compared; `scale` (out,) from the layer to there. The first `held` samples judge a fit to the
    others."""

    x: Tensor
    now: Tensor
    goal: Tensor
    scale: Tensor
    held: int


@dataclass(frozen=True)
class Change:
    """What is added to a layer's columns (blocks, features, out / blocks) and bias (out,), in float64; the mean squared
    held-out error at the layer's output before, and after a fit that has not seen the held-out samples."""

    columns: Tensor
    bias: Tensor
    before: float
    after: float
    damping: float


def fit_rows(rows: Rows) -> Change | None:
    """The change of a layer; None if a fit to the others makes the held-out samples no better.

    The damping is the one that does best on the held-out samples.
    """
    scale = rows.scale.to(rows.now)
    y = torch.where(scale != 0, (rows.goal - rows.now) / torch.where(scale != 0, scale, 1.0), 0.0)
    k = rows.held
    held, rest = _sums(rows.x[:, :k], y[:k]), _sums(rows.x[:, k:], y[k:])
    rounding = 0.0 if y.dtype == torch.float64 else FLOAT32_ROUNDING

    def system(sums: Sums) -> System:
        return System.of(sums, 1, tuple(range(rows.x.shape[2] - 1)), True, True, rounding)

    judging, fitting = system(held), system(rest)
    damping = search_damping(fitting, judging, "", None, GRID)
    columns, bias, _ = fit_system(fitting, "", None, damping)
    weight = scale.double().square()
    before = float((y[:k].double().square().mean(0) * weight).sum())
    after = float((judging.error("", columns, bias) * weight).sum())
    if not after < before:
        return None
    columns, bias, _ = fit_system(system(rest.plus(held)), "", None, damping)
    return Change(columns, bias, before, after, damping)


def _sums(x: Tensor, y: Tensor) -> Sums:
    sums = Sums.zeros(len(x), x.shape[2], {"": y.shape[1]}, x.device)
    sums.add(x, {"": y})
    return replace(sums, n=float(x.shape[1]))
