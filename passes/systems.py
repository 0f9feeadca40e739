"""Sums of calibration features, and the least-squares systems that are solved from them (`fit` has the algebra).

With rows x of features and y of targets, n samples, and the means taken off,

    sums      X'X, X'Y, |Y|^2, n                 added up by `Gram`
    system    (X'X - n m m' + lambda I) W = X'Y - n m y'          b = y - W' m

for all features of a dense kernel at once, or for those of each channel of a depthwise one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Fit", "Sums", "System", "usual_damping"]

BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted convolution.

    `weight` is (out, in / groups, kernel...), `bias` (out,), both float64; `before` is the padding before in each
    dimension. `residual` (out,) is the mean squared error on the data that it was fitted to; `heldout` (out,) that of
    a fit with the same damping to the other images on the held-out ones, None if it was not asked for. `damping` is
    the relative one that was used. `side` (out, vectors' channels) is the matrix of the vectors, None without any.
    """

    weight: Tensor
    bias: Tensor
    residual: Tensor
    damping: float
    before: tuple[int, ...]
    heldout: Tensor | None = None
    side: Tensor | None = None


def usual_damping(unknowns: int, samples: float) -> float:
    """A relative damping that does well where none can be searched (`fit` says why)."""
    return min(1.0, 0.4 * unknowns / samples)


@dataclass
class Sums:
    """Weighted sums over samples: xx (1, D, D), xy (1, D, out), or depthwise (C, T + 1, T + 1) and (C, T + 1, 1).

    Of a large `xx` only the blocks on and above the diagonal are summed.
    """

    xx: Tensor
    xy: dict[str, Tensor]
    yy: dict[str, Tensor]
    n: float = 0.0
    images: int = 0

    @classmethod
    def zeros(cls, blocks: int, rows: int, targets: Mapping[str, int], device: torch.device) -> Sums:
        def zero(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        xy = {name: zero(blocks, rows, out // blocks) for name, out in targets.items()}
        return cls(zero(blocks, rows, rows), xy, {name: zero(out) for name, out in targets.items()})

    def add(self, rows: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Add weighted rows (blocks, n, D) and targets (n, out); float32 rows are multiplied as such."""
        left = rows.transpose(1, 2)
        width = rows.shape[2]
        for i in range(0, width, BLOCK):
            self.xx[:, i : i + BLOCK, i:] += left[:, i : i + BLOCK] @ rows[:, :, i:]
        for name, y in targets.items():
            blocks = y.reshape(len(y), rows.shape[0], -1).transpose(0, 1)
            self.xy[name] += left @ blocks
            self.yy[name] += y.double().square().sum(0)

    def plus(self, other: Sums) -> Sums:
        xy = {name: value + other.xy[name] for name, value in self.xy.items()}
        yy = {name: value + other.yy[name] for name, value in self.yy.items()}
        return Sums(self.xx + other.xx, xy, yy, self.n + other.n, self.images + other.images)


@dataclass
class System:
    """Centred sums for one kernel, in independent blocks (1 if dense, the channels if depthwise) of m rows each."""

    sums: Sums
    rows: Tensor  # (blocks, m) rows of a dense sum, or (m,) of each block of a depthwise one; those of vectors last
    from_dense: bool
    matrix: Tensor  # (blocks, m, m)
    mean: Tensor  # (blocks, m)
    scale: Tensor  # (blocks, m, 1) mean of the diagonal, never 0; of the vectors' rows apart
    least: Tensor  # (blocks, m, 1) the least lambda
    damped: Tensor  # (m, 1) the least damping
    factors: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        sums: Sums,
        channels: int,
        taps: tuple[int, ...],
        depthwise: bool,
        stored_depthwise: bool,
        rounding: float = 0.0,
        sides: int = 0,
    ) -> System:
        xx = sums.xx
        t = torch.tensor(taps, device=xx.device)
        beside = torch.arange(xx.shape[1] - 1 - sides, xx.shape[1] - 1, device=xx.device)
        if stored_depthwise:
            rows = torch.cat([t, beside])
            matrix, total = xx[:, rows[:, None], rows], xx[:, rows, -1]
        else:
            every = torch.arange(channels, device=xx.device)
            rows = every[:, None] + t * channels if depthwise else (t[:, None] * channels + every).reshape(1, -1)
            rows = torch.cat([rows, beside.expand(len(rows), -1)], 1)
            whole = rows.shape == (1, xx.shape[1] - 1)
            matrix = xx[:, :-1, :-1].clone() if whole else xx[0][rows[:, :, None], rows[:, None, :]]
            total = xx[0, :, -1][rows]
        # only blocks on and above the diagonal were summed, and a selection keeps their order
        matrix = matrix.triu() + matrix.triu(1).transpose(1, 2)
        own = matrix.shape[1] - sides

        def means() -> Tensor:
            parts = matrix.diagonal(dim1=1, dim2=2).split([own, sides], 1)
            return torch.cat([p.mean(1, keepdim=True).expand_as(p) for p in parts], 1)[:, :, None]

        least = rounding * means()
        matrix.baddbmm_(total[:, :, None], total[:, None, :], alpha=-1.0 / sums.n)
        scale = means()
        whole_scale = float(scale[:, 0].mean())
        floor = whole_scale * 1e-9 if whole_scale > 0 else 1.0  # a dead channel must not make a singular block
        damped = torch.zeros_like(scale[0])
        damped[own:] = usual_damping(sides, max(sums.images, 1))
        return cls(sums, rows, not stored_depthwise, matrix, total / sums.n, scale.clamp_min(floor), least, damped)

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
            lam = torch.maximum((self.damped.clamp_min(damping) + more) * self.scale, self.least)
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
