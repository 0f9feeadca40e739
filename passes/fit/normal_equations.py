"""Solves least-squares systems from sums of calibration features (`closed_form` has the algebra).

With rows x of features and y of targets, n samples, and the means taken off,

    sums      X'X, X'Y, |Y|^2, n                 added up by `Gram`
    system    (X'X - n m m' + lambda I) W = X'Y - n m y'          b = y - W' m

for all features of a dense kernel at once, or for those of each channel of a depthwise one.

**Scales.** Nothing here knows how large activations are: features and targets times any factors give W times their
ratio. Pixels and vectors from the side are parts with scales of their own, and lambda is relative to that of the part.
A system is factorised in the units U of its parts (powers of two, so exact), in which both have variances about 1:

    U^-1 (X'X - n m m' + lambda I) U^-1 = L L'

so that more damping, where rounding has made it singular, always comes to an end. What is added is relative to the
rounding of each part, so that a part that is sound is not damped for one that is not: the rounding of constant pixels,
in float32 and in another order on each machine, does not hide a vector. A feature that varies by no more than
the rounding of its sums (`ROUNDING` of its mean square) is constant, and gets no weight. Nor does a channel of a
depthwise kernel that is `DEAD` beside the others: what a gate has closed is 1e-38, and weights of 1e38 overflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Fit", "Sums", "System", "power_of_two", "usual_damping"]

BLOCK = 1024
SAFE = 2.0**30  # sums of products of float32 numbers up to this are far from overflow, down to its inverse from 0
ROUNDING = 1e-12  # of a mean square: what sums in float64 may be off by
DEAD = 1e-24  # of the largest mean square of all channels: less is no signal
MORE = (0.0, *(10.0**e for e in range(2, 21, 2)))  # times the rounding on top, until a factorisation is sound


def power_of_two(size: Tensor) -> Tensor:
    """The largest power of two (float64) that is at most each of these sizes; 1 for 0, NaN and infinity."""
    sound = size.isfinite() & (size > 0)
    mantissa, exponent = torch.frexp(torch.where(sound, size.double(), torch.ones_like(size, dtype=torch.float64)))
    return torch.ldexp(torch.full_like(mantissa, 0.5), exponent)


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
    """A relative damping that does well where none can be searched (`closed_form` says why)."""
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
        """Add weighted rows (blocks, n, D) and targets (n, out); float32 rows are multiplied as such.

        Each feature and target in a unit of its own, so that no product of float32 numbers overflows or vanishes.
        """
        width = rows.shape[2]
        rows, units = _in_units(rows)
        left = rows.transpose(1, 2)
        for i in range(0, width, BLOCK):
            product = left[:, i : i + BLOCK] @ rows[:, :, i:]
            if units is not None:
                product = units[:, 0, i : i + BLOCK, None] * product * units[:, :, i:]
            self.xx[:, i : i + BLOCK, i:] += product
        for name, y in targets.items():
            blocks, scales = _in_units(y.reshape(len(y), rows.shape[0], -1).transpose(0, 1))
            product = left @ blocks
            product = product if units is None else units.transpose(1, 2) * product
            self.xy[name] += product if scales is None else product * scales
            self.yy[name] += y.double().square().sum(0)

    def plus(self, other: Sums) -> Sums:
        xy = {name: value + other.xy[name] for name, value in self.xy.items()}
        yy = {name: value + other.yy[name] for name, value in self.yy.items()}
        return Sums(self.xx + other.xx, xy, yy, self.n + other.n, self.images + other.images)


def _in_units(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Values (blocks, n, D) over a power of two for each column, and those (blocks, 1, D) in float64.

    None for powers that are all 1: in float64 (which has room for all that a float32 network computes), and where the
    values are neither very large nor very small.
    """
    if values.dtype == torch.float64:
        return values, None
    sizes = values.abs().amax(1, keepdim=True)
    if bool((((sizes > 1 / SAFE) & (sizes < SAFE)) | (sizes == 0)).all()):
        return values, None
    units = power_of_two(sizes)
    return values / units.to(values.dtype), units


@dataclass
class System:
    """Centred sums for one kernel, in independent blocks (1 if dense, the channels if depthwise) of m rows each."""

    sums: Sums
    rows: Tensor  # (blocks, m) rows of a dense sum, or (m,) of each block of a depthwise one; those of vectors last
    from_dense: bool
    matrix: Tensor  # (blocks, m, m)
    mean: Tensor  # (blocks, m)
    varies: Tensor  # (blocks, m) bool: by more than rounding; what does not has no variance here, and no weight
    scale: Tensor  # (blocks, m, 1) mean of the diagonal, positive; of the vectors' rows apart
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
        noise: float = ROUNDING,
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
        if not bool(matrix.isfinite().all()):
            raise InputError(
                f"sums over calibration features of up to {float(xx.diagonal(dim1=1, dim2=2).amax()) ** 0.5:.3g} are "
                "not finite even in float64: scale the activations of the network down"
            )
        own = matrix.shape[1] - sides

        def means() -> Tensor:
            parts = matrix.diagonal(dim1=1, dim2=2).split([own, sides], 1)
            return torch.cat([p.mean(1, keepdim=True).expand_as(p) for p in parts], 1)[:, :, None]

        squares = means()
        single = matrix.diagonal(dim1=1, dim2=2).clone()
        matrix.baddbmm_(total[:, :, None], total[:, None, :], alpha=-1.0 / sums.n)
        varies = matrix.diagonal(dim1=1, dim2=2) > noise * single
        if not bool(varies.all()):
            matrix = torch.where(varies[:, :, None] & varies[:, None, :], matrix, 0.0)
        least = torch.maximum(max(rounding, ROUNDING) * squares, DEAD * squares.amax(0, keepdim=True))
        scale = torch.maximum(means(), least)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # all zero: a dead channel
        damped = torch.zeros_like(scale[0])
        damped[own:] = usual_damping(sides, max(sums.images, 1))
        return cls(sums, rows, not stored_depthwise, matrix, total / sums.n, varies, scale, least, damped)

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
        centred = torch.where(self.varies[:, :, None], xy - self.sums.n * self.mean[:, :, None] * mean, 0.0)
        return centred, self.sums.yy[name] - self.sums.n * mean.flatten().square(), mean

    def solve(self, damping: float, right: Tensor) -> tuple[Tensor, Tensor]:
        """(matrix + lambda I)^-1 right, and lambda; more damping than asked for if the matrix is singular without."""
        if damping not in self.factors:
            self.factors[damping] = self._factor(damping)
        factor, lam = self.factors[damping]
        return torch.cholesky_solve(right / self.units, factor) / self.units, lam

    @property
    def units(self) -> Tensor:
        """(blocks, m, 1) powers of two near the standard deviations of the parts."""
        return power_of_two(self.scale.sqrt())

    def _factor(self, damping: float) -> tuple[Tensor, Tensor]:
        """The Cholesky factor in the units of the parts, and lambda. InputError where no damping makes it sound."""
        units = self.units
        rounding = torch.maximum(self.least, ROUNDING * self.scale)
        for more in MORE:
            lam = torch.maximum(self.damped.clamp_min(damping) * self.scale + more * rounding, self.least)
            damped = self.matrix / units / units.transpose(1, 2)
            damped.diagonal(dim1=1, dim2=2).add_((lam / units.square())[:, :, 0])
            factor, info = torch.linalg.cholesky_ex(damped)
            pivots = factor.diagonal(dim1=1, dim2=2)
            sound = pivots.amin(1) ** 2 > 2e-16 * pivots.shape[1] * pivots.amax(1) ** 2
            if bool((info == 0).all() & sound.all()):
                return factor, lam
        raise InputError(
            f"the sums over calibration features cannot be factorised with a damping of {damping:g}, nor with "
            f"{MORE[-1]:g} times their rounding on top: look for calibration features that are not finite"
        )

    def error(self, name: str, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean squared error (out,) of a packed weight (blocks, m, out / blocks) and its bias (out,)."""
        xy, yy, mean = self.target(name)
        squares = (weight * (self.matrix @ weight - 2 * xy)).sum(1).flatten() + yy
        shift = (mean - self.mean[:, None] @ weight).flatten() - bias
        return (squares / self.sums.n + shift.square()).clamp_min(0.0)
