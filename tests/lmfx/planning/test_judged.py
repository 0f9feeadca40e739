"""Plans are chosen by the networks that they give, whatever the importances say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import lmfx
from lmfx.budget import Budget
from lmfx.calibration.images import as_calibration
from lmfx.importance import ImportanceTable, Reconstruction
from lmfx.latency.backends.roofline import RooflineBackend
from lmfx.latency.carried_table import predict_plan
from lmfx.passes.trace.tracing import fingerprint
from lmfx.planning import finals
from lmfx.planning import judged as judged_plans
from lmfx.planning.finals import best_measured
from lmfx.planning.frontier import solve_spans
from lmfx.planning.judged import Finalist, Judged
from lmfx.planning.search import Found, find_plan
from tests.lmfx.planning.test_context_search import Branches, judged
from tests.lmfx.test_quality_of_results import IMAGES, MODEL

BUDGET = 0.6
EXAMPLE = IMAGES[:1]
FRESH = torch.randn(48, 3, 12, 10, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Case:
    """A graph, what is chosen among, and the plan that misleading importances choose."""

    graph: fx.GraphModule
    judged: Judged
    found: Found

    def better(self, backend: Any = None) -> Found:
        return best_measured(self.judged, self.found, backend or RooflineBackend(), EXAMPLE, BUDGET)[0]

    def truth(self, plan: lmfx.MergePlan) -> float:
        """The loss of a plan's network, fitted as the chosen one is, on images that nothing saw."""
        student = lmfx.rewrite(self.graph, plan, calibration=IMAGES, progress=False)
        return lmfx.compare(student, self.graph, FRESH).loss()


@pytest.fixture(scope="module", params=["inverted", "alike"])
def case(request: pytest.FixtureRequest) -> Case:
    return misled_by(request.param)


def misled_by(kind: str, images: Tensor = IMAGES) -> Case:
    graph = lmfx.trace(MODEL, EXAMPLE)
    spans = lmfx.spans(graph)
    table = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    data = as_calibration(images, EXAMPLE)
    wanted = [c for c in lmfx.stages.worth_scoring(spans, table) if c.realization != "keep"]
    session = Reconstruction().session(spans, wanted, data)
    rows = session.score(spans, wanted, data).rows
    # The more a candidate loses, the better it is said to be; or one is said to be as good as another.
    misled = {k: -1.0 if kind == "alike" else -1 / (1e-3 - v) for k, v in rows.items()}
    scores = ImportanceTable(misled, {})
    frontier = lmfx.solve(graph, table, scores, spans=spans)
    found = find_plan(graph, frontier, Budget.parse(BUDGET), RooflineBackend(), EXAMPLE)
    return Case(graph, Judged(spans, table, scores, session, data, "auto", "affine"), found)


def test_misleading_importances_do_not_choose_the_plan(case: Case) -> None:
    better = case.better()
    assert better.ratio <= BUDGET
    assert case.judged.loss(better.plan) < 0.5 * case.judged.loss(case.found.plan)
    assert case.truth(better.plan) < 0.5 * case.truth(case.found.plan)


@pytest.mark.parametrize("realization", ["compose", "fit"])
def test_plans_are_judged_on_the_images_that_choose_and_made_from_those_that_fit(realization: str) -> None:
    losses = []
    for places in (slice(0, 0), slice(7, None, 8), slice(3, None, 8), slice(0, None, 4)):
        changed = IMAGES.clone()
        changed[places] = 5 + 3 * changed[places].flip(-1)
        judged = misled_by("alike", changed).judged
        spans = lmfx.spans(judged.analysis.graph)
        some = [c for c in spans if c.realization == realization and len(c.all_convs) == 2]
        plan = lmfx.MergePlan(tuple(some[:1]), fingerprint(judged.analysis.graph), surrogate="affine")
        losses.append(judged.loss(plan))
    plain, judging, choosing, fitting = losses
    assert judging == pytest.approx(plain, rel=1e-5)
    assert choosing != pytest.approx(plain, rel=1e-2) and fitting != pytest.approx(plain, rel=3e-4)


def test_finalists_come_by_what_their_networks_lose(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    also = finals._proposal(case.judged, case.found)
    proposed = case.judged.proposals  # in an order that says nothing
    monkeypatch.setattr(case.judged, "proposals", lambda limit: proposed(limit)[::-1])
    found = case.judged.finalists(0.7 * case.found.frontier.original_sum, [also])
    losses = [f.loss for f in found]
    assert len(found) > 1 and losses == sorted(losses) and losses[0] < 0.5 * losses[-1]
    assert [case.judged.loss(f.proposal.plan) for f in found] == losses
    assert also.plan.candidates in [f.proposal.plan.candidates for f in found], "what is there already is judged, too"


class Slower(RooflineBackend):
    """Measures that every network but the original takes more than the budget."""

    def measure_interleaved(self, modules: Sequence[Any], repeats: int = 5) -> list[list[float]]:
        first, *others = super().measure_interleaved(modules, repeats)
        return [first, *([1.01 * BUDGET * first[0]] * len(row) for row in others)]


def test_a_better_plan_that_measures_over_the_budget_is_not_taken(case: Case) -> None:
    assert case.better(Slower()).plan == case.found.plan


class Dearer(RooflineBackend):
    """Measures that every network but the original takes half as much again as its rows promise."""

    def measure_interleaved(self, modules: Sequence[Any], repeats: int = 5) -> list[list[float]]:
        first, *others = super().measure_interleaved(modules, repeats)
        return [first, *([1.5 * t for t in row] for row in others)]


def test_where_the_best_plans_measure_over_the_budget_faster_ones_are_looked_for(case: Case) -> None:
    """Half as much again is more than any plan of the first round has to spare."""
    found = case.better(Dearer())
    assert found.ratio <= BUDGET
    assert found.plan != case.found.plan
    assert case.judged.loss(found.plan) < 0.95 * case.judged.loss(case.found.plan)


class Cheaper(RooflineBackend):
    """Measures that every network but the original takes a good deal less than its rows promise."""

    def measure_interleaved(self, modules: Sequence[Any], repeats: int = 5) -> list[list[float]]:
        first, *others = super().measure_interleaved(modules, repeats)
        return [first, *([0.8 * t for t in row] for row in others)]


def test_where_the_best_plans_measure_well_below_the_budget_slower_ones_are_looked_for() -> None:
    case = misled_by("inverted")  # whose best plans are not the one that is measured already
    found = case.better(Cheaper())
    plain = case.better()
    assert found.ratio <= BUDGET
    assert case.judged.table.total(found.plan) > case.judged.table.total(plain.plan)
    assert case.judged.loss(found.plan) < case.judged.loss(plain.plan)


def test_with_a_table_of_elsewhere_what_is_predicted_over_the_budget_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = misled_by("inverted")
    frontier = case.found.frontier
    known = predict_plan(frontier, Budget.parse(BUDGET))
    limit = BUDGET * frontier.original
    best = finals.best_predicted(case.judged, known, limit)
    assert all(p.predicted <= limit for p in best)
    own = finals._proposal(case.judged, known)
    over = replace(own, plan=frontier.plan(len(frontier) - 1), sum=frontier.original_sum)
    finalists = [Finalist(over, 0.0), Finalist(own, 1.0)]
    monkeypatch.setattr(case.judged, "finalists", lambda limit, also: finalists)
    assert finals.best_predicted(case.judged, known, limit) == [known]


def test_the_best_of_widths_alone_and_of_layers_alone_are_finalists() -> None:
    torch.manual_seed(3)
    both = judged(Branches(), 5)
    least = [float(solve_spans(s, both.table, both.scores).raw.latency[0]) for s in both.parts.values()]
    found = both.finalists(1.001 * max(least))
    assert {f.search for f in found} >= {"all", "widths", "layers"} - _same_as_all(both, found)
    for finalist in found:
        lossy = [c for c in finalist.proposal.plan.candidates if not c.exact]
        assert finalist.search != "widths" or all(c.cuts for c in lossy)
        assert finalist.search != "layers" or not any(c.cuts for c in lossy)
    only = misled_by("alike").judged
    assert only.parts == {}, "where there is one kind there are no parts"


def _same_as_all(both: Judged, found: list[Finalist]) -> set[str]:
    """The parts whose best plan was proposed among all candidates."""
    kinds = [{bool(c.cuts) for c in f.proposal.plan.candidates if not c.exact} for f in found if f.search == "all"]
    return {name for name, cuts in (("widths", True), ("layers", False)) if {cuts} in kinds}


@pytest.mark.parametrize("macs, count", [(1.0, 128), (5e9, 30), (1e12, 16)])
def test_large_networks_are_compared_on_fewer_images(monkeypatch: pytest.MonkeyPatch, macs: float, count: int) -> None:
    monkeypatch.setattr(judged_plans, "multiply_accumulates", lambda network: macs)
    spans = lmfx.spans(lmfx.trace(MODEL, EXAMPLE))
    assert judged_plans.compared(spans.network) == count
    assert judged_plans.compared(spans.network, 20) == min(count, 20)
    roles = as_calibration(torch.arange(1024.0)[:, None], torch.zeros(1, 1)).roles()
    assert len(roles.choose) == 128
    choosing = {*roles.choose.tensors[0].flatten().tolist()}
    chosen = roles.comparing(count).tensors[0].flatten().tolist()
    assert len(chosen) == count and {*chosen} <= choosing and max(chosen) - min(chosen) > 700
