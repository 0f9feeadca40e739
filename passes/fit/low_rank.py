"""Makes a convolution of fewer channels and a pointwise one of it, by what its outputs are on data.

    y = W x + b           ~          U (V x) + b'           V (rank, in, taps), U (out, rank)

The mean square error of y is least for U the leading eigenvectors of the centred covariance of y and V = U'W: what is
cut off are the directions in which the outputs vary least (their principal components). So the covariance of what the
convolution gives is all that is needed, whatever its kernel, and it serves every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["LowRank", "low_rank", "principal"]


TIE = 1e-6  # of the variance, that the weight's own directions count


@dataclass(frozen=True)
class LowRank:
    """`first` (rank, in, taps) and `pointwise` (out, rank), float64."""

    first: Tensor
    pointwise: Tensor

    @cached_property
    def product(self) -> Tensor:
        """The weight of the one convolution that they are, (out, in, taps)."""
        return torch.einsum("or,rct->oct", self.pointwise, self.first)


def principal(covariance: Tensor, weight: Tensor | None = None) -> Tensor:
    """The eigenvectors of a covariance (out, out) as columns, those of largest eigenvalue first, in float64.

    Where it says nothing, as that of few samples does of most directions, those in which a `weight` is largest.
    """
    covariance = covariance.double()
    if weight is not None:
        rows = weight.double().flatten(1)
        own = rows @ rows.T
        size = covariance.diagonal().sum()
        share = TIE * size if float(size) > 0 else 1.0
        covariance = covariance + own * (share / own.diagonal().sum().clamp(min=torch.finfo(own.dtype).tiny))
    return torch.linalg.eigh(covariance).eigenvectors.flip(1)


def low_rank(weight: Tensor, rank: int, directions: Tensor | None = None) -> LowRank:
    """A weight (out, in, taps) through `rank` channels: the first of some orthonormal `directions` (out, out).

    Without directions those in which the weight itself is largest.
    """
    weight = weight.double()
    if directions is None:
        rows = weight.flatten(1)
        directions = principal(rows @ rows.T)
    kept = directions[:, :rank]
    return LowRank(torch.einsum("or,oct->rct", kept, weight), kept.contiguous())
