"""Chooses which units of a layer's input go, one after the other, each with what the rest can make up for it.

G is the centred Gram of what the layer reads (plus lambda I), W its weight as columns, a unit a few rows of both (the
taps of one channel, or a group of channels). Without unit j the best W of the rest loses

    cost_j = tr( W_j' (P_jj)^-1 W_j )        P = G^-1              and is        W - P_:j (P_jj)^-1 W_j

and P becomes P - P_:j (P_jj)^-1 P_j: (optimal brain surgeon, for all outputs at once). So the cheapest unit goes, both
are updated, and one G gives every width, nested in each other. The W that is left is what least squares with this
lambda and the layer's own weight as its prior give:

    W_S = W[S] + (G_SS)^-1 G_SD W[D]                         D: what went

A unit is two passes over P. Where P is large, several go before the rest is updated: those among the `lookahead`
cheapest, whose own blocks stay exact, as long as none outside of them was cheaper.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Left", "compensated", "eliminate"]

LARGE = 600  # rows from which on units go several at a time
ROUNDING = 1e-12  # of the mean variance, by which a singular Gram is made regular
MORE = tuple(10.0**e for e in range(0, 14, 2))


@dataclass(frozen=True)
class Left:
    """What is left at one width: the units that stay, ascending, their rows of the weight (float64), and what all that
    went has cost: the sum over samples and outputs of the squared change, with the damping's share."""

    units: tuple[int, ...]
    columns: Tensor
    cost: float


def eliminate(
    gram: Tensor,
    columns: Tensor,
    labels: Tensor,
    counts: Sequence[int],
    damping: float = 0.0,
    stay: Collection[int] = (),
) -> list[Left]:
    """What is left at each of some numbers of units, in the order of `counts`.

    `gram` (rows, rows) is centred, `columns` (rows, out), `labels` (rows,) the unit of each row, counted from 0.
    `damping` is relative to the mean variance. The units `stay` never go, and no count is below their number. All in
    float64; nothing of what is given is changed. Raises `InputError` where the Gram is not finite.
    """
    units = int(labels.max()) + 1
    left: dict[int, Left] = {}
    if units in counts:
        left[units] = Left(tuple(range(units)), columns.clone(), 0.0)
    wanted = sorted((c for c in set(counts) if c < units), reverse=True)
    if wanted:
        state = _State(_inverse(gram, damping), columns.clone(), labels.clone(), frozenset(stay))
        for count in wanted:
            state.reduce(count)
            left[count] = state.left()
    return [left[c] for c in counts]


def compensated(gram: Tensor, columns: Tensor, rows: Tensor, damping: float) -> Tensor:
    """W_S for the rows S that stay (bool): least squares with the layer's own weight as its prior."""
    if bool(rows.all()):
        return columns.clone()
    damped = gram + _lambda(gram, damping) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = _cholesky(damped[rows][:, rows], float(gram.diagonal().mean()))
    return columns[rows] + torch.cholesky_solve(damped[rows][:, ~rows] @ columns[~rows], factor)


class _State:
    def __init__(self, inverse: Tensor, columns: Tensor, labels: Tensor, stay: frozenset[int]) -> None:
        self.p, self.w, self.labels, self.stay = inverse, columns, labels, stay
        self.units = list(range(int(labels.max()) + 1))  # that are left
        self.cost = 0.0
        self._index()

    def _index(self) -> None:
        order = {unit: i for i, unit in enumerate(self.units)}
        place = torch.tensor([order[int(u)] for u in self.labels])
        sizes = torch.bincount(place, minlength=len(self.units))
        self.size = int(sizes.max())
        if int(sizes.min()) != self.size:
            raise InputError(f"units of {int(sizes.min())} to {self.size} rows cannot be compared")
        self.rows = place.argsort(stable=True).reshape(len(self.units), self.size).to(self.p.device)
        self.alive = torch.ones(len(self.units), dtype=torch.bool)
        self.fixed = torch.tensor([u in self.stay for u in self.units], device=self.p.device)

    def costs(self) -> Tensor:
        """What each unit would cost; infinite for those that are gone."""
        found = torch.full((len(self.alive),), torch.inf, dtype=self.w.dtype, device=self.w.device)
        alive = self.alive.to(found.device)
        rows = self.rows[alive]
        if self.size == 1:
            found[alive] = self.w[rows[:, 0]].square().sum(1) / self.p.diagonal()[rows[:, 0]]
        else:
            blocks, w = self.p[rows[:, :, None], rows[:, None, :]], self.w[rows]
            found[alive] = (w * torch.linalg.solve(blocks, w)).flatten(1).sum(1)
        found[self.fixed] = torch.inf
        return found

    def reduce(self, count: int) -> None:
        while (over := int(self.alive.sum()) - count) > 0:
            costs = self.costs()
            many = 1 if len(self.p) < LARGE else max(1, int(self.alive.sum()) // 32)
            self._remove(costs, min(over, many))
        self._compact()

    def _remove(self, costs: Tensor, most: int) -> None:
        """Up to `most` of the cheapest units, one after the other."""
        near = costs.argsort()[: min(4 * most, int(self.alive.sum()))] if most > 1 else costs.argmin()[None]
        outside = torch.inf
        if most > 1 and len(near) < int(self.alive.sum()):
            outside = float(costs[costs.argsort()[len(near)]])
        rows = self.rows[near].flatten()
        small, w = self.p[rows][:, rows].clone(), self.w[rows].clone()
        b = self.size
        gone: list[int] = []
        free = costs[near].isfinite()
        for _ in range(most):
            blocks = small.reshape(len(near), b, len(near), b).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            wb = w.reshape(len(near), b, -1)
            safe = torch.where(free[:, None, None], blocks, torch.eye(b, dtype=w.dtype, device=w.device))
            own = (
                (wb * torch.linalg.solve(safe, wb)).flatten(1).sum(1)
                if b > 1
                else (wb.square().sum((1, 2)) / safe[:, 0, 0])
            )
            own = torch.where(free, own, torch.inf)
            j = int(own.argmin())
            if gone and (float(own[j]) > outside or not bool(free.any())):
                break
            at = slice(j * b, (j + 1) * b)
            pivot = torch.linalg.inv(small[at, at])
            self.cost += max(float(own[j]), 0.0)
            w -= small[:, at] @ (pivot @ w[at])
            small -= small[:, at] @ (pivot @ small[at])
            free[j] = False
            gone.append(j)
        out = self.rows[near[torch.tensor(gone, device=near.device)]]
        index = out.flatten()
        pivot = torch.linalg.inv(self.p[index][:, index])
        side = self.p[:, index] @ pivot
        self.w -= side @ self.w[index]
        self.p -= side @ self.p[index]
        self.alive[near[torch.tensor(gone, device=near.device)].cpu()] = False

    def _compact(self) -> None:
        """Take out the rows that are gone."""
        if bool(self.alive.all()):
            return
        stays = torch.zeros(len(self.p), dtype=torch.bool, device=self.p.device)
        stays[self.rows[self.alive.to(self.rows.device)].flatten()] = True
        self.p, self.w = self.p[stays][:, stays], self.w[stays]
        self.labels = self.labels.to(stays.device)[stays]
        self.units = [u for u, alive in zip(self.units, self.alive.tolist(), strict=True) if alive]
        self._index()

    def left(self) -> Left:
        return Left(tuple(self.units), self.w.clone(), self.cost)


def _lambda(gram: Tensor, damping: float) -> float:
    return max(damping, ROUNDING) * (float(gram.diagonal().mean()) or 1.0)


def _inverse(gram: Tensor, damping: float) -> Tensor:
    damped = gram.clone()
    damped.diagonal().add_(_lambda(gram, damping))
    return torch.cholesky_inverse(_cholesky(damped, float(gram.diagonal().mean())))


def _cholesky(matrix: Tensor, scale: float) -> Tensor:
    """The factor, with more on the diagonal where rounding has made the matrix singular."""
    for more in (0.0, *MORE):
        raised = matrix.clone()
        raised.diagonal().add_(more * ROUNDING * (scale or 1.0))
        factor, info = torch.linalg.cholesky_ex(raised)
        if not int(info):
            return factor
    if bool(matrix.isfinite().all()):  # nothing but rounding, which may have any sign
        values, vectors = torch.linalg.eigh(matrix)
        raised = vectors * values.abs().clamp_min(float(values.abs().max()) * ROUNDING or 1.0) @ vectors.T
        factor, info = torch.linalg.cholesky_ex((raised + raised.T) / 2)
        if not int(info):
            return factor
    raise InputError("the sums over calibration features cannot be factorised: look for values that are not finite")
