"""Rounds the weights of a linear layer to a grid so that its *output* on the calibration images changes least.

A layer's output is ``W' x + b``. Rounded to Q it is off by ``E' x`` with ``E = Q - W``; the bias takes the mean of that
(`bias_change`), and what is left is, over the samples,

    |E' (x - mean)|^2  =  sum over the output channels c of   e_c' G e_c          G = sum (x - mean)(x - mean)'

the *Gram's norm* of the error (`gram_error`). Nearest rounding makes every entry of e small; G is far from the identity
where channels are much alike, and then errors that cancel are what matters. Rounded one after the other, the error of
one weight can be made up for by those that are not rounded yet (Hassibi, Stork 1993; GPTQ: Frantar et al. 2023):

    min over e with e_i = q - w_i given:     e_rest = (G^-1)_rest,i / (G^-1)_ii  e_i

All of these together are one Cholesky factor: with ``(G + lambda I)^-1 = U' U``, U upper triangular, row i of U has
what is left of the inverse once 0 .. i - 1 are fixed, and the update is  ``w_j += U_ij / U_ii  e_i`` for j > i.
The largest diagonals are rounded first, while many weights are left to make up for them. It is greedy, so of it (with
several lambda) and nearest rounding every output channel takes the one of least error: never worse than nearest.

A grouped layer is as many independent systems as it has groups, of one shape, done side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError

__all__ = ["DAMPINGS", "bias_change", "gram_error", "nearest", "round_by_gram", "scales_of"]

DAMPINGS = (1e-4, 1e-2)  # of the mean diagonal
BLOCK = 64  # rows whose errors are given to the later ones in one product
LEVELS = 127


def scales_of(columns: Tensor, per_channel: bool = True, levels: int = LEVELS) -> Tensor:
    """The step of a symmetric grid for columns (blocks, features, out): (blocks, 1, out); 1 for a column of zeros."""
    size = columns.abs().amax(1, keepdim=True)
    if not per_channel:
        size = size.amax().expand_as(size)
    return torch.where(size > 0, size / levels, torch.ones_like(size))


def nearest(columns: Tensor, scales: Tensor, levels: int = LEVELS) -> Tensor:
    """Whole numbers q, at most `levels` in size, with the nearest q * scale."""
    return (columns / scales).round().clamp(-levels, levels)


def gram_error(gram: Tensor, error: Tensor) -> Tensor:
    """e' G e of every output channel: (blocks, out)."""
    return (error * (gram @ error)).sum(1).clamp_min(0.0)


def bias_change(mean: Tensor, error: Tensor) -> Tensor:
    """What the bias (blocks, out) gets so that an error (blocks, features, out) has no mean on the samples."""
    return -(mean[:, None] @ error)[:, 0]


def round_by_gram(
    columns: Tensor, gram: Tensor, scales: Tensor, levels: int = LEVELS, dampings: Sequence[float] = DAMPINGS
) -> Tensor:
    """Whole numbers q (blocks, features, out): `columns` on the grid of `scales`, by their `gram` (blocks, features,
    features), in float64. No output channel is further off in the Gram's norm than by `nearest`."""
    blocks, features, _ = columns.shape
    if gram.shape != (blocks, features, features):
        raise OptionError(f"a Gram of {tuple(gram.shape)} for columns {tuple(columns.shape)}: give one a block")
    columns, gram, scales = columns.double(), gram.double(), scales.double()
    best = nearest(columns, scales, levels)
    least = gram_error(gram, best * scales - columns)
    size = gram.diagonal(dim1=1, dim2=2).mean(1)
    if not bool(((size > 0) & size.isfinite()).any()) or not bool((least > 0).any()):
        return best  # nothing was seen, or all lies on the grid
    for damping in dampings:
        found = _one_by_one(columns, gram, scales, levels, damping)
        if found is None:
            continue
        error = gram_error(gram, found * scales - columns)
        better = error < least
        best = torch.where(better[:, None], found, best)
        least = torch.where(better, error, least)
    return best


def _one_by_one(columns: Tensor, gram: Tensor, scales: Tensor, levels: int, damping: float) -> Tensor | None:
    """Rounded in the order of the diagonal; None where the damped Gram cannot be factorised."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(1, descending=True)
    across = order[:, :, None]
    left = columns.gather(1, across.expand_as(columns)).clone()
    damped = gram.gather(1, across.expand_as(gram)).gather(2, order[:, None].expand_as(gram))
    added = damping * diagonal.mean(1, keepdim=True)
    damped.diagonal(dim1=1, dim2=2).add_(torch.where(added > 0, added, torch.ones_like(added)))
    factor, info = torch.linalg.cholesky_ex(damped)
    if bool((info != 0).any()):
        return None
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if bool((info != 0).any()):
        return None
    rounded = torch.empty_like(left)
    features = left.shape[1]
    for start in range(0, features, BLOCK):
        stop = min(start + BLOCK, features)
        errors = torch.empty_like(left[:, start:stop])
        for i in range(start, stop):
            q = (left[:, i] / scales[:, 0]).round().clamp(-levels, levels)
            rounded[:, i] = q
            error = (q * scales[:, 0] - left[:, i]) / upper[:, i, i, None]
            errors[:, i - start] = error
            left[:, i:stop] += upper[:, i, i:stop, None] * error[:, None]
        left[:, stop:] += upper[:, start:stop, stop:].transpose(1, 2) @ errors
    return torch.empty_like(rounded).scatter_(1, across.expand_as(rounded), rounded)
