"""Scores on demand: only the candidates on which the best plans for the asked budgets depend.

Every candidate has an optimistic value: its score once it has one, before that

    bound(c) = min( no change,  score of every scored candidate that bounds c )           see `importance.dominance`

The exact solve over optimistic values gives a plan for each budget. If all of its candidates are scored, no other plan
can be better, because every other plan's optimistic value is at least its true one. If not, something is scored:

    of the unscored candidates that bound the plan's unscored one, from the smallest to itself, the middle one

as in a bisection: a bad score there lowers the bounds of all that it bounds, and a good one leaves the smaller ones for
later or for good. Scoring the plan's own candidates instead would begin with the largest spans, which are fastest and
bound nothing, and in the end score nearly all.

"No change" is importance 0, or what the estimator's `no_change` gives: a training may do the original good as well.

Two assumptions are made: no candidate is better than no change, and none is better than one that bounds it. The result
says how often the second failed among the scored ones. With `tolerance` it stops earlier, at a plan that is proven
(under these assumptions) to lose no more than that.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
from torch import fx

from lmfx.budget import Budget
from lmfx.calibration.images import Calibration, as_calibration
from lmfx.calibration.model_checks import check_run_options, check_traced
from lmfx.environment.caller_state import entry
from lmfx.environment.progress import progress as progress_bar
from lmfx.importance import Estimator, Finetune, ImportanceTable, get_estimator
from lmfx.importance.base import weights_identity
from lmfx.importance.dominance import bounded_by, violations
from lmfx.importance.pool import ExecutorLike
from lmfx.latency import LatencyTable, Store
from lmfx.passes.errors import InfeasibleBudget, OptionError
from lmfx.passes.ir import Candidate
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.planning.frontier import Frontier, solve_spans
from lmfx.stages import spans as find_spans
from lmfx.stages import worth_scoring

__all__ = ["OnDemand", "score_on_demand"]


@dataclass(frozen=True)
class OnDemand:
    """What was scored, and for which budgets. `lmfx.solve(graph, latency, result.table)` gives the plans.

    Attributes:
        table: the scored rows.
        evaluations: how many candidates were scored, of `candidates` that a full table has, in `rounds`.
        budgets, importances, bounds: for each budget the best importance that the scored rows reach, and what no plan
            can exceed if the assumptions hold.
        pairs, broken, excess: scored pairs of which one bounds the other, in how many it was worse, by at most what.
    """

    table: ImportanceTable
    evaluations: int
    candidates: int
    rounds: int
    budgets: tuple[Budget, ...]
    importances: tuple[float, ...]
    bounds: tuple[float, ...]
    pairs: int
    broken: int
    excess: float

    def __str__(self) -> str:
        lines = [
            f"scored {self.evaluations} of {self.candidates} candidates "
            f"({self.evaluations / max(self.candidates, 1):.0%}) in {self.rounds} rounds"
        ]
        for budget, value, bound in zip(self.budgets, self.importances, self.bounds, strict=True):
            lines.append(f"budget {budget}: importance {value:.6g}, at most {bound:.6g}")
        lines.append(
            f"a candidate better than what bounds it: {self.broken} of {self.pairs} scored pairs, "
            f"by {self.excess:.3g} at most"
        )
        return "\n".join(lines)


@entry
def score_on_demand(
    graph: fx.GraphModule,
    estimator: str | Estimator,
    latency: LatencyTable,
    budgets: Sequence[Budget | float | str],
    *,
    calibration: Any = None,
    spans: SpanSet | None = None,
    tolerance: float = 0.0,
    width: int = 1,
    first: Sequence[Candidate] = (),
    cache_dir: str | os.PathLike[str] | None = None,
    executor: ExecutorLike = None,
    progress: bool = True,
    **options: Any,
) -> OnDemand:
    """Score the candidates that the best plans for `budgets` depend on, and no others, if two assumptions hold.

    Args:
        estimator: a name with its `options`, or an object; any that scores single candidates.
        budgets: as in `Frontier.at`, relative ones of the original's predicted latency.
        tolerance: stop where a budget's importance is proven to be within this share of the best; 0 finds the best.
        first: candidates that are scored in any case, before all others: for those of which the assumptions are unsure.
        width: candidates scored a round for each one that a plan lacks; more keep more workers busy and score more.

    Other arguments are those of `lmfx.score`. Raises `InfeasibleBudget` for a budget that no plan reaches, and
    `OptionError` for no budget at all.
    """
    check_traced(graph, "score_on_demand")
    check_run_options(executor, cache_dir)
    if isinstance(budgets, (str, int, float, Budget)) or not len(list(budgets)):
        raise OptionError(f"budgets={budgets!r}: pass a list of budgets, like [0.8, 0.6]")
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise OptionError(f"tolerance={tolerance!r}: use a share from 0 to 1, like 0.01")
    if not isinstance(width, int) or width < 1:
        raise OptionError(f"width={width!r}: use a whole number from 1")
    made = get_estimator(estimator, **options)
    found = spans if spans is not None else find_spans(graph)
    data = as_calibration(calibration, noted(graph).example)
    chosen = [c for c in worth_scoring(found, latency) if c.realization != "keep"]
    wanted = [Budget.parse(b) for b in budgets]
    anything = solve_spans(found, latency, ImportanceTable({c.key: 0.0 for c in chosen}, {}))
    for budget in wanted:
        anything.index_at(budget)  # said before anything is trained
    with _rows(made, cache_dir, graph) as (named, store):
        no_change = getattr(named, "no_change", None)
        best = [0.0] * len(chosen) if no_change is None else no_change(found, chosen, data, store, executor)
        search = _OnDemandSearch(found, chosen, latency, wanted, best, tolerance, width)
        search.first = [search.places[c.key] for c in first if c.key in search.places]
        return search.run(named, data, store, executor, progress)


@contextlib.contextmanager
def _rows(
    estimator: Estimator, cache_dir: str | os.PathLike[str] | None, graph: fx.GraphModule
) -> Iterator[tuple[Estimator, Store]]:
    """The store, and the estimator that uses it. One that may not keep its rows keeps them until the end, so that the
    original is not evaluated anew in each round."""
    if isinstance(estimator, Finetune) and (estimator.key is None or not weights_identity(graph).certain):
        with tempfile.TemporaryDirectory(prefix="lmfx-") as folder, Store.open(folder) as store:
            store.private = True
            yield replace(estimator, key="this run"), store
    else:
        with Store.open(cache_dir) as store:
            yield estimator, store


class _OnDemandSearch:
    def __init__(
        self,
        spans: SpanSet,
        candidates: list[Candidate],
        latency: LatencyTable,
        budgets: list[Budget],
        best: Sequence[float],
        tolerance: float,
        width: int,
    ) -> None:
        self.spans, self.candidates, self.latency = spans, candidates, latency
        self.budgets, self.tolerance, self.width = budgets, tolerance, width
        self.places = {c.key: i for i, c in enumerate(candidates)}
        self.bounded = bounded_by(spans.network, candidates)
        self.bounding: list[list[int]] = [[] for _ in candidates]
        for i, over in enumerate(self.bounded):
            for j in over.tolist():
                self.bounding[j].append(i)
        self.best = np.array(best)
        self.bound = np.zeros(len(candidates))  # of the value less `best`
        self.scores: dict[int, float] = {}  # the same; -inf without a row
        self.free = {i for i, c in enumerate(candidates) if c.exact}  # lose nothing, which needs no scoring
        self.scores.update({i: -float(self.best[i]) for i in self.free})
        self.identity: dict[str, Any] = {}
        self.first: list[int] = []

    def run(
        self, estimator: Estimator, data: Calibration, store: Store, executor: ExecutorLike, progress: bool
    ) -> OnDemand:
        rounds = 0
        with progress_bar(len(self.candidates), "scoring on demand (at most)", progress) as bar:
            while missing := self.missing():
                table = estimator.score(self.spans, [self.candidates[i] for i in missing], data, store, False, executor)
                for i in missing:
                    self.note(i, table.rows.get(self.candidates[i].key, -inf) - self.best[i])
                self.identity = dict(table.identity)
                rounds += 1
                bar.update(len(missing))
        return self.result(rounds)

    def note(self, place: int, value: float) -> None:
        """A score, and what it says of those that it bounds. One that is no number says nothing."""
        self.scores[place] = float(value)
        if value > -inf:
            above = self.bounding[place]
            self.bound[above] = np.minimum(self.bound[above], value)

    def optimistic(self) -> ImportanceTable:
        """The table of scores, and of bounds where there is none."""
        values = {i: self.scores.get(i, float(self.bound[i])) for i in range(len(self.candidates))}
        return self.named(values)

    def named(self, values: dict[int, float]) -> ImportanceTable:
        rows = {self.candidates[i].key: float(v + self.best[i]) for i, v in values.items() if v > -inf}
        unusable = tuple(self.candidates[i].key for i, v in values.items() if v == -inf)
        return ImportanceTable(rows, self.identity, unusable)

    def missing(self) -> list[int]:
        """What to score next; nothing when every budget's plan is settled."""
        if first := [i for i in self.first if i not in self.scores]:
            return first
        upper = solve_spans(self.spans, self.latency, self.optimistic())
        lower = solve_spans(self.spans, self.latency, self.named(self.scores))
        found: dict[int, None] = {}
        for budget in self.budgets:
            plan = upper.at(budget)
            lacking = [self.places[c.key] for c in plan.candidates if self.places[c.key] not in self.scores]
            best, most = self.reached(lower, budget), float(upper.importance[upper.index_at(budget)])
            if not lacking or (best > -inf and most - best <= self.tolerance * abs(best)):
                continue
            for place in lacking:
                found.update(dict.fromkeys(self.middle(place)))
        return list(found)

    def middle(self, place: int) -> list[int]:
        """Of the unscored ones from the smallest that bounds a candidate to itself, `width` at equal distances."""
        steps = [j for j in self.bounded[place].tolist() if j not in self.scores] + [place]
        return [steps[(i + 1) * len(steps) // (self.width + 1)] for i in range(min(self.width, len(steps)))]

    @staticmethod
    def reached(frontier: Frontier, budget: Budget) -> float:
        try:
            return float(frontier.importance[frontier.index_at(budget)])
        except InfeasibleBudget:
            return -inf

    def result(self, rounds: int) -> OnDemand:
        """The report."""
        upper = solve_spans(self.spans, self.latency, self.optimistic())
        table = self.named(self.scores)
        keeps = {c.key: 0.0 for c in self.spans if c.realization == "keep" and c.key in self.latency}
        table = replace(table, rows={**keeps, **table.rows})
        lower = solve_spans(self.spans, self.latency, table)
        usable = {i: v for i, v in self.scores.items() if v > -inf and i not in self.free}
        broken, pairs, excess = violations(self.bounded, usable)
        return OnDemand(
            table=table,
            evaluations=len(self.scores) - len(self.free),
            candidates=len(self.candidates) - len(self.free),
            rounds=rounds,
            budgets=tuple(self.budgets),
            importances=tuple(self.reached(lower, b) for b in self.budgets),
            bounds=tuple(self.reached(upper, b) for b in self.budgets),
            pairs=pairs,
            broken=broken,
            excess=excess,
        )
