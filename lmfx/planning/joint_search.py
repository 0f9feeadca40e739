"""Finds plans of least joint loss within a latency: the solver proposes, the joint loss chooses.

The solver is exact for a sum of importances, and the loss of a plan is none (`lmfx.importance.joint`). So it is asked
several times, each answer is judged by its joint loss, and only candidates of its answers are ever run:

    truth       the importances, those that were run replaced by what they lose alone, until a plan has no other
    draws       the same with every one multiplied by a random factor
    descent     the importances as they are seen from the best plan so far, until they propose nothing better
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lmfx.importance import ImportanceTable
from lmfx.importance.joint import JointLoss
from lmfx.latency import LatencyTable
from lmfx.passes.ir import MergePlan, Surrogate
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.planning.frontier import solve_spans

__all__ = ["Proposal", "propose"]

DRAWS, SPREAD = 12, 0.6  # random factors are exp(SPREAD * normal)
TRUTH, DESCENT = 10, 8  # rounds at most


@dataclass(frozen=True)
class Proposal:
    """A plan, the sum of its latency rows in ms, and its predicted loss."""

    plan: MergePlan
    sum: float
    loss: float


class _JointSearch:
    def __init__(
        self,
        spans: SpanSet,
        table: LatencyTable,
        joint: JointLoss,
        limit: float,
        surrogate: Surrogate,
    ) -> None:
        self.spans, self.table, self.joint, self.limit, self.surrogate = spans, table, joint, limit, surrogate
        self.importances: Mapping[str, float] = {}  # as they were scored
        self.found: dict[tuple[str, ...], Proposal] = {}

    def rows(self, scores: ImportanceTable) -> dict[str, float]:
        """The importances, by what they lose alone where that is known."""
        return {k: -self.joint.alone(k) if k in self.joint.changes else v for k, v in scores.rows.items()}

    def ask(self, rows: Mapping[str, float]) -> Proposal | None:
        """The plan that the solver gives for these importances within the limit, with its joint loss."""
        frontier = solve_spans(self.spans, self.table, ImportanceTable(rows, {}), surrogate=self.surrogate)
        index = int(np.searchsorted(frontier.raw.latency, self.limit * (1 + 1e-12), side="right")) - 1
        if index < 0:
            return None
        plan = frontier.plan(index)
        if all(c.exact or c.key in self.importances for c in plan.candidates):
            known = sum(0.0 if c.exact else self.importances[c.key] for c in plan.candidates)
            plan = replace(plan, importance=known)
        key = tuple(c.key for c in plan.candidates)
        if key not in self.found:
            self.found[key] = Proposal(plan, float(frontier.raw.latency[index]), self.joint.loss(plan.candidates))
        return self.found[key]


def propose(
    spans: SpanSet,
    table: LatencyTable,
    scores: ImportanceTable,
    joint: JointLoss,
    limit: float,
    surrogate: Surrogate = "affine",
    draws: int = DRAWS,
) -> list[Proposal]:
    """Plans whose rows add up to at most `limit` ms, the one of least joint loss first; none if there is none."""
    search = _JointSearch(spans, table, joint, limit, surrogate)
    search.importances = scores.rows
    random = np.random.default_rng(0)
    keys = sorted(scores.rows)
    if search.ask(search.rows(scores)) is None:
        return []
    for _ in range(TRUTH):
        known = len(joint.changes)
        search.ask(search.rows(scores))
        if len(joint.changes) == known:
            break
    for _ in range(draws):
        rows = search.rows(scores)
        factors = np.exp(SPREAD * random.standard_normal(len(keys)))
        search.ask({k: rows[k] * float(f) for k, f in zip(keys, factors, strict=True)})
    best = min(search.found.values(), key=lambda p: p.loss)
    for _ in range(DESCENT):
        seen, rows = joint.seen_from(best.plan.candidates), search.rows(scores)
        mixed = {k: 0.5 * v + 0.5 * rows[k] for k, v in seen.items() if k in rows}
        asked = [search.ask(seen), search.ask(mixed), search.ask({**rows, **seen})]
        better = min((p for p in asked if p is not None), key=lambda p: p.loss, default=best)
        if better.loss >= best.loss:
            break
        best = better
    return sorted(search.found.values(), key=lambda p: (p.loss, p.sum))
