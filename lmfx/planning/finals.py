"""Finds the plans of best quality that hold the budget, of those that were judged; they are refitted afterwards.

What a network loses before its refit does not say for sure what it loses after it (widths are mended best), so the best
of each search is handed on: of all that was proposed, of widths alone, of layers alone, and of what steps led to.

Nothing depends on the clock but what is within the budget: with the same rows of latency the same plans are judged, and
of two plans of equal quality the faster one is taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmfx.latency import Backend
from lmfx.latency.carried_table import Predicted
from lmfx.planning.joint_search import Proposal
from lmfx.planning.judged import Judged, Search
from lmfx.planning.search import ACCEPT, Found, measure_plan

__all__ = ["best_measured", "best_predicted"]

ROUNDS = 3  # of proposals, where the best of them measure over the budget, or well below it
MENDED = 2.5  # times the loss of the plan that is there, from which on no refit is tried
WELL_BELOW = 0.98  # of what rows promise


def best_measured(judged: Judged, found: Found, backend: Backend, example_input: Any, fraction: float) -> list[Found]:
    """Plans of good quality that measure within the budget, `fraction` of the original; `found` does. The best first.

    Where plans measure over the budget, it looks again among those of so much less latency, and where the best ones are
    well below it, among those of so much more: rows of narrowed layers and of merged ones are off in different ways.
    """
    limit = max(_sum_at(found, ACCEPT * fraction), _sum(found))
    own, own_loss = _proposal(judged, found), judged.loss(found.plan)
    taken: dict[Search, tuple[float, Found]] = {}
    measured: dict[tuple[str, ...], float] = {judged.key(found.plan): found.ratio}
    for _ in range(ROUNDS):
        over, under = 1.0, 0.0  # the most that plans measured of what their rows promise: those over, those within
        for finalist in judged.finalists(limit, [own]):
            plan, predicted = finalist.proposal.plan, found.frontier.line(finalist.proposal.sum)
            least = own_loss if finalist.search == "all" else MENDED * own_loss
            if finalist.loss >= (taken[finalist.search][0] if finalist.search in taken else least):
                continue
            if (key := judged.key(plan)) not in measured:
                measured[key] = measure_plan(judged.analysis, plan, backend, example_input, found.original)
            ratio = measured[key]
            off = ratio * found.original / predicted
            if ratio <= fraction:
                whole = replace(plan, latency=predicted)
                better = replace(found, plan=whole, predicted=predicted, measured=ratio * found.original, ratio=ratio)
                taken[finalist.search] = finalist.loss, better
                under = max(under, off)
            else:
                over = max(over, off)
        if over == 1 and not 0 < under < WELL_BELOW:
            break
        limit = _sum_at(found, ACCEPT * fraction / (over if over > 1 else under))
        if limit < float(found.frontier.raw.latency[0]):
            break
    taken.setdefault("all", (own_loss, found))
    return [plan for _, plan in sorted(taken.values(), key=lambda t: t[0])]


def best_predicted(judged: Judged, found: Predicted, limit_ms: float) -> list[Predicted]:
    """The same with a table that was measured elsewhere: what is predicted within the budget of `limit_ms`."""
    line = found.frontier.line
    taken: dict[Search, Predicted] = {}
    for finalist in judged.finalists((limit_ms - line.a) / line.b, [_proposal(judged, found)]):
        plan, predicted = finalist.proposal.plan, line(finalist.proposal.sum)
        if finalist.search in taken or predicted > limit_ms:
            continue
        same = plan.candidates == found.plan.candidates
        taken[finalist.search] = (
            found if same else replace(found, plan=replace(plan, latency=predicted), predicted=predicted)
        )
    return list(taken.values()) or [found]


def _proposal(judged: Judged, found: Found | Predicted) -> Proposal:
    return Proposal(found.plan, _sum(found), judged.joint.loss(found.plan.candidates))


def _sum(found: Found | Predicted) -> float:
    return float(found.frontier.raw.latency[found.index])


def _sum_at(found: Found, ratio: float) -> float:
    """The sum of rows at which a whole network is predicted to take `ratio` of the original."""
    line = found.frontier.line
    return (ratio * found.original - line.a) / line.b
