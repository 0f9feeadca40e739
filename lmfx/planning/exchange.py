"""Improves a plan by exchanges: one place takes more away, another one less, within the same latency.

The solver decides all places at once, each as it is seen from the plan before, and so steps too far where many small
choices reinforce each other: the widths of narrowed spans. Here one or two places move at a time, with what their
changes of the outputs do to each other:

    move        put a candidate in the place of those of the plan that it overlaps, or take one of the plan back
    V           the sum of the vectors that come less those that go        U: that of the plan (`lmfx.importance.joint`)
    gain        U.V + 1/2 |V|^2, of two moves with V = V1 + V2

All pairs of moves that hold the latency are compared by this; the best few by the loss itself. Candidates whose change
is not known take part once they are neighbours of the plan: a step narrower or wider, or the first step of a span that
is kept. So few networks are run, and the search goes on from where it got.

Among thousands of pairs some are better on a few dozen images by chance. So a step must gain more than the standard
error of its gain over the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmfx.importance.joint import JointLoss, overlap
from lmfx.latency import LatencyTable
from lmfx.passes.ir import Candidate

__all__ = ["exchanged", "neighbours"]

STEPS = 40  # exchanges at most
TRIED = 6  # pairs whose loss is computed in one step
LEAST_GAIN = 1e-3  # of the loss, for which a step is made
SURE = 1.0  # standard errors


@dataclass(frozen=True)
class _Move:
    comes: tuple[int, ...]
    goes: tuple[int, ...]


def neighbours(plan: Sequence[Candidate], candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Of some narrowed candidates those that are a step from the plan: of a span that the plan narrows the next wider
    and narrower ones, of one that it keeps the widest."""
    spans: dict[tuple[object, ...], list[Candidate]] = {}
    for c in candidates:
        if c.cuts:
            spans.setdefault((c.span, tuple(cut.reader for cut in c.cuts)), []).append(c)
    chosen = {c.key for c in plan}
    for listed in spans.values():
        ordered = sorted(listed, key=lambda c: [cut.width for cut in c.cuts])
        at = [i for i, c in enumerate(ordered) if c.key in chosen]
        if at:
            near = [c for c in ordered if _near(c, ordered[at[0]], ordered)]
        else:
            near = [] if any(overlap(ordered[-1], d) for d in plan if not d.cuts) else ordered[-1:]
        yield from near


def _near(c: Candidate, d: Candidate, listed: Sequence[Candidate]) -> bool:
    """Whether no width of any cut lies between those of two candidates."""
    for i, (a, b) in enumerate(zip(c.cuts, d.cuts, strict=True)):
        low, high = sorted((a.width, b.width))
        if any(low < other.cuts[i].width < high for other in listed):
            return False
    return True


def exchanged(
    plan: Sequence[Candidate], joint: JointLoss, table: LatencyTable, limit: float
) -> tuple[list[Candidate], float]:
    """A plan of no more loss whose rows add up to at most `limit` ms, of candidates whose change is known; its loss."""
    search = _Exchange(plan, joint, table, limit)
    while search.steps < STEPS and search.step():
        search.steps += 1
    return search.plan, search.loss


class _Exchange:
    def __init__(self, plan: Sequence[Candidate], joint: JointLoss, table: LatencyTable, limit: float) -> None:
        self.plan, self.joint, self.limit = list(plan), joint, limit
        self.losses = joint.losses(self.plan)
        self.loss = float(self.losses.mean())
        self.known = [c for key, c in joint.candidates.items() if key in table]
        self.place = {c.key: i for i, c in enumerate(self.known)}
        us = torch.stack([joint.vectors[c.key] for c in self.known]).double()
        self.inner: NDArray[np.float64] = (us @ us.T).cpu().numpy()
        self.saves = np.array([table.ms(c.key) - table.kept(c) for c in self.known])
        self.base = table.total()
        n = len(self.known)
        self.overlap = np.zeros((n, n), dtype=bool)
        for i, c in enumerate(self.known):
            for j in range(i + 1):
                self.overlap[i, j] = self.overlap[j, i] = i == j or overlap(c, self.known[j])
        self.steps = 0

    def moves(self, chosen: list[int]) -> list[_Move]:
        """What may come and go."""
        found = [_Move((), (i,)) for i in chosen]
        for i in range(len(self.known)):
            if i not in chosen:
                found.append(_Move((i,), tuple(j for j in chosen if self.overlap[i, j])))
        return found

    def step(self) -> bool:
        """Make the best exchange; whether there was one."""
        chosen = [self.place[c.key] for c in self.plan]
        moves = self.moves(chosen)
        signs = np.zeros((len(moves), len(self.known)))
        for m, move in enumerate(moves):
            signs[m, list(move.comes)] += 1
            signs[m, list(move.goes)] -= 1
        seen = signs @ self.inner
        pairs = seen @ signs.T
        gain = seen[:, chosen].sum(1) + 0.5 * np.diag(pairs)
        saved = signs @ self.saves
        room = self.limit * (1 + 1e-12) - (self.base + float(self.saves[chosen].sum()))
        both = gain[:, None] + gain[None, :] + pairs
        both[self._apart(moves)] = np.inf
        both[saved[:, None] + saved[None, :] > room] = np.inf
        single = np.where(saved <= room, gain, np.inf)
        np.fill_diagonal(both, single)
        order = np.argsort(both, axis=None)[: 2 * TRIED]
        tried: set[tuple[int, ...]] = set()
        best: tuple[float, list[Candidate]] | None = None
        for flat in order.tolist():
            a, b = divmod(flat, len(moves))
            if not both[a, b] < 0:
                break
            goes = {*moves[a].goes, *moves[b].goes}
            now = tuple(sorted({*chosen, *moves[a].comes, *moves[b].comes} - goes))
            if now in tried:
                continue
            tried.add(now)
            plan = [self.known[i] for i in now]
            losses = self.joint.losses(plan)
            loss = float(losses.mean())
            if self._surely(losses) and (best is None or loss < best[0]):
                best = loss, plan
        if best is None:
            return False
        self.loss, self.plan = best
        self.losses = self.joint.losses(self.plan)
        return True

    def _surely(self, losses: Tensor) -> bool:
        """Whether losses on the images are less than the plan's by more than chance."""
        gain = self.losses - losses
        error = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
        return float(gain.mean()) > max(LEAST_GAIN * self.loss, SURE * error)

    def _apart(self, moves: list[_Move]) -> NDArray[np.bool_]:
        """Which pairs of moves cannot be made together: they put what overlaps, or take the same away."""
        n = len(self.known)
        comes, goes = np.zeros((len(moves), n)), np.zeros((len(moves), n))
        for m, move in enumerate(moves):
            comes[m, list(move.comes)] = goes[m, list(move.goes)] = 1
        clash = comes @ self.overlap.astype(float) @ comes.T + goes @ goes.T
        return np.asarray(clash > 0)
