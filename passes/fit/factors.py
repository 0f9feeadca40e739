"""Factors a convolution into a depthwise and a pointwise one, by what that does to the data that it reads.

    y[o] = sum over c, t of  W[o, c, t] x[c, t]                      c a channel, t a tap
         ~ sum over c, q of  P[o, c, q]  (sum over t of  D[c, q, t] x[c, t])     q one of `multiplier` filters a channel

With the centred sums G of x x' the error is  tr((W - PD) G (W - PD)'),  and each half of it is a linear system:

    P    (D G D') P' = D G W'                                         of (channels x multiplier) unknowns an output
    D    sum over c', q', t' of  Q[cq, c'q'] G[ct, c't'] D[c', q', t']  =  sum over o of  P[o, c, q] (W G)[o, c, t]
         Q = P'P                                                      of (channels x multiplier x taps) unknowns

They are solved in turn. D begins with the leading right singular vectors of each channel's part of W, so that a
convolution which is such a product is found as it is. Depthwise filters have the norm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factors", "first_factors", "improved"]

ITERATIONS = 12
LEAST_GAIN = 0.01  # of the error, below which another iteration is not worth its time
STEPS = 10  # of conjugate gradients an iteration; 5 and 20 give the same error to 1e-6
SINGULAR = 1e-12  # of the largest diagonal entry, which is added to each
LOSSLESS = 1e-20  # of the variance: the product is the convolution


@dataclass(frozen=True)
class Factors:
    """`depthwise` (in, multiplier, taps) and `pointwise` (out, in, multiplier), float64."""

    depthwise: Tensor
    pointwise: Tensor

    @property
    def first(self) -> Tensor:
        """The weight of the convolution that comes first."""
        return self.depthwise

    @property
    def product(self) -> Tensor:
        """The weight of the one convolution that they are, (out, in, taps)."""
        return torch.einsum("ocq,cqt->oct", self.pointwise, self.depthwise)


def first_factors(weight: Tensor, multiplier: int) -> Factors:
    """The factors of a weight (out, in, taps) that are nearest to it, whatever it reads."""
    weight = weight.double()
    vectors = torch.linalg.eigh(torch.einsum("oct,ocs->cts", weight, weight)).eigenvectors  # ascending
    depthwise = vectors[:, :, -multiplier:].flip(2).transpose(1, 2)
    return Factors(depthwise, torch.einsum("oct,cqt->ocq", weight, depthwise))


def improved(found: Factors, weight: Tensor, gram: Tensor, damping: float) -> Factors:
    """Factors of `weight` (out, in, taps) that are better on what it reads, from those of `found`.

    `gram` (in, taps, in, taps) is the centred mean of what it reads times itself, `damping` a fraction of its mean
    diagonal. Never worse than `found` by these two.
    """
    out, channels, taps = weight.shape
    size = channels * taps
    gram = gram.reshape(size, size).double()
    gram = gram + torch.eye(size, dtype=gram.dtype, device=gram.device) * (damping * gram.diagonal().mean())
    rows = weight.double().reshape(out, size)
    seen = rows @ gram
    scale = float((seen * rows).sum())
    if not scale > 0:
        return found

    def error(factors: Factors) -> float:
        left = rows - factors.product.reshape(out, size)
        return float(((left @ gram) * left).sum()) / scale

    best, least = found, error(found)
    depthwise = found.depthwise
    for _ in range(ITERATIONS):
        if least < LOSSLESS:
            break
        pointwise = _pointwise(depthwise, seen, gram)
        made = Factors(depthwise, pointwise)
        depthwise = _depthwise(made, seen, gram)
        norms = depthwise.norm(dim=2, keepdim=True)
        depthwise = depthwise / torch.where(norms > 0, norms, 1.0)
        made = Factors(depthwise, _pointwise(depthwise, seen, gram))
        now = error(made)
        if not now < least:
            break
        gain, best, least = 1 - now / least, made, now
        if gain < LEAST_GAIN:
            break
    return best


def _pointwise(depthwise: Tensor, seen: Tensor, gram: Tensor) -> Tensor:
    """The best P for a D; `seen` is W G."""
    channels, filters, taps = depthwise.shape
    half = torch.einsum("ncs,crs->ncr", gram.view(len(gram), channels, taps), depthwise)
    whole = torch.einsum("cqt,ctdr->cqdr", depthwise, half.view(channels, taps, channels, filters))
    target = torch.einsum("oct,cqt->cqo", seen.view(len(seen), channels, taps), depthwise)
    n = channels * filters
    return _solve(whole.reshape(n, n), target.reshape(n, -1)).T.reshape(len(seen), channels, filters)


def _depthwise(factors: Factors, seen: Tensor, gram: Tensor) -> Tensor:
    """A better D for a P: some steps of conjugate gradients from the one there is, which the next iteration goes on
    from; each channel's own part is solved exactly (the preconditioner)."""
    channels, filters, taps = factors.depthwise.shape
    p = factors.pointwise
    inner = torch.einsum("ocq,odr->cqdr", p, p)
    blocks = gram.view(channels, 1, taps, channels, 1, taps)
    part = filters * taps
    matrix = (inner[:, :, None, :, :, None] * blocks).reshape(channels * part, channels * part)
    target = torch.einsum("ocq,oct->cqt", p, seen.view(len(seen), channels, taps)).flatten()
    own = matrix.view(channels, part, channels, part).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    tiny = SINGULAR * own.diagonal(dim1=1, dim2=2).amax().clamp(min=torch.finfo(own.dtype).tiny)
    factor, info = torch.linalg.cholesky_ex(own + tiny * torch.eye(part, dtype=own.dtype, device=own.device))
    if bool(info.any()):  # rounding made it indefinite: no better D is to be had
        return factors.depthwise

    def alone(residual: Tensor) -> Tensor:
        return torch.cholesky_solve(residual.view(channels, part, 1), factor).flatten()

    found = factors.depthwise.flatten()
    residual = target - matrix @ found
    step = direction = alone(residual)
    size = residual @ step
    for _ in range(STEPS):
        ahead = matrix @ direction
        curved = direction @ ahead
        if not (size > 0 and curved > 0):
            break
        found = found + size / curved * direction
        residual = residual - size / curved * ahead
        step = alone(residual)
        size, before = residual @ step, size
        direction = step + size / before * direction
    return found.reshape(channels, filters, taps)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right of a matrix that has no negative eigenvalues, but may have some that are none."""
    tiny = torch.finfo(matrix.dtype).eps * len(matrix) * matrix.diagonal().amax().clamp(min=1e-300)
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(6):
        factor, info = torch.linalg.cholesky_ex(matrix + tiny * eye)
        if int(info) == 0:
            return torch.cholesky_solve(right, factor)
        tiny = tiny * 100
    return torch.linalg.pinv(matrix, hermitian=True) @ right
