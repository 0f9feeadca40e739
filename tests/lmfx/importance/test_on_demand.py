"""Scoring on demand finds the full table's plans with part of its rows, where its assumptions hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmfx
from lmfx.calibration.images import Calibration
from lmfx.importance import Finetune, ImportanceTable, Reconstruction
from lmfx.importance.dominance import bounded_by, violations
from lmfx.importance.jobs import PackedNetwork, isolated
from lmfx.importance.on_demand import OnDemand
from lmfx.importance.reconstruction import ReconstructionSession
from lmfx.latency import Store
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.stages import worth_scoring
from tests import finetune_toys
from tests.helpers import one_thread as one_thread
from tests.toys import images, toy

DATA = images(24)
BUDGETS = [0.9, 0.7, 0.5]
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Known:
    """An estimator whose whole table is known, and which counts what it is asked."""

    values: dict[str, float]
    asked: list[list[str]] = field(default_factory=list)
    name: str = "known"

    def score(self, spans: SpanSet, candidates: Sequence[Candidate], *others: Any) -> ImportanceTable:
        self.asked.append([c.key for c in candidates])
        values = {c.key: self.values[c.key] for c in candidates}
        return ImportanceTable({k: v for k, v in values.items() if math.isfinite(v)}, {"estimator": "known"})


@dataclass(frozen=True)
class Made:
    graph: Any
    spans: SpanSet
    latency: lmfx.LatencyTable
    candidates: list[Candidate]

    def solve(self, values: dict[str, float]) -> lmfx.Frontier:
        return lmfx.solve(self.graph, self.latency, ImportanceTable(values, {}), spans=self.spans)

    def on_demand(self, estimator: Any, budgets: Any = BUDGETS, **options: Any) -> OnDemand:
        options = {"spans": self.spans, "progress": False, **options}
        return lmfx.score_on_demand(self.graph, estimator, self.latency, budgets, **options)


@pytest.fixture(scope="module")
def made() -> Made:
    graph = lmfx.trace(toy(), DATA[:1])
    spans = lmfx.spans(graph)
    latency = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    return Made(graph, spans, latency, [c for c in worth_scoring(spans, latency) if c.realization != "keep"])


def monotone(made: Made, seed: int) -> dict[str, float]:
    """Random scores that keep both assumptions: each is worse than all that bound it, by a random factor."""
    draw = np.random.default_rng(seed)
    bounded = bounded_by(made.spans.network, made.candidates)
    values: dict[int, float] = {}

    def value(i: int) -> float:
        if i not in values:
            worst = min((value(j) for j in bounded[i].tolist()), default=0.0)
            values[i] = worst * draw.uniform(1, 1.5) - draw.exponential(0.01) * len(made.candidates[i].convs)
        return values[i]

    return {c.key: value(i) for i, c in enumerate(made.candidates)}


# --- what bounds what -------------------------------------------------------------------------------------------------


def bounds(made: Made, wanted: Callable[[Candidate, Candidate], bool]) -> set[bool]:
    """For all pairs that are wanted (c, d inside it), whether d bounds c."""
    bounded = bounded_by(made.spans.network, made.candidates)
    pairs = [
        (i, j)
        for i, c in enumerate(made.candidates)
        for j, d in enumerate(made.candidates)
        if i != j and c.span.series == d.span.series and c.span.start <= d.span.start and d.span.stop <= c.span.stop
        and wanted(c, d)
    ]  # fmt: skip
    assert pairs
    return {j in bounded[i] for i, j in pairs}


def kernel(c: Candidate) -> int:
    return c.conv.kernel_size[0] if c.conv else 0


def dense(c: Candidate) -> bool:
    return c.conv is not None and c.conv.groups == 1


def test_a_smaller_window_over_more_is_bounded_and_a_larger_one_is_not(made: Made) -> None:
    def both(c: Candidate, d: Candidate) -> bool:
        return c.realization == d.realization == "fit" and dense(c) and dense(d) and c.span.entry == d.span.entry

    assert bounds(made, lambda c, d: both(c, d) and kernel(c) <= kernel(d)) == {True}
    assert bounds(made, lambda c, d: both(c, d) and kernel(c) > kernel(d)) == {False}


def test_the_window_is_counted_where_the_outer_span_begins() -> None:
    from torch import nn

    net = nn.Sequential(
        nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, 1, 1)
    ).eval()
    spans = lmfx.spans(lmfx.trace(net, DATA[:1]), max_kernel_size=7)
    every = [c for c in spans if c.realization == "fit"]
    bounded = bounded_by(spans.network, every)
    wanted = (1, 3, 3)
    (inner,) = (j for j, d in enumerate(every) if (d.span.start, d.span.stop, kernel(d)) == wanted and dense(d))
    outer = {kernel(c): i for i, c in enumerate(every) if (c.span.start, c.span.stop) == (0, 3) and dense(c)}
    assert {k: inner in bounded[i] for k, i in outer.items()} == {1: True, 3: True, 5: True, 7: False}


def test_what_is_free_is_not_bounded_by_what_is_not(made: Made) -> None:
    groups: Any = lambda c: c.conv.groups if c.conv else 0  # noqa: E731
    assert bounds(made, lambda c, d: d.realization == "drop") == {False}
    assert bounds(made, lambda c, d: c.realization == "drop" and d.realization == "fit") == {True}
    assert bounds(made, lambda c, d: c.realization == "fit" and groups(c) == 1 and groups(d) > 1) == {False}
    assert True in bounds(made, lambda c, d: c.realization == "fit" and groups(c) > 1 and groups(d) == 1)


def test_a_composed_conv_is_bounded_by_one_that_keeps_what_it_keeps() -> None:
    spans = lmfx.spans(lmfx.trace(toy(), DATA[:1]), realize=("compose",))
    every = [c for c in spans if c.realization == "compose"]
    bounded = bounded_by(spans.network, every)
    pairs = [(every[i], every[j]) for i in range(len(every)) for j in bounded[i].tolist()]
    assert pairs and all(set(c.kept) & set(d.all_convs) <= set(d.kept) for c, d in pairs)
    assert any(len(d.kept) < len(d.all_convs) for _, d in pairs)


def test_a_branch_bounds_the_block_around_it_and_not_the_next_block(made: Made) -> None:
    bounded = bounded_by(made.spans.network, made.candidates)
    series = [c.span.series for c in made.candidates]
    found = {(series[i], series[j]) for i in range(len(bounded)) for j in bounded[i].tolist()}
    assert ("0", "0/1.0") in found and ("0", "0/2.0") in found and ("0/1.0", "0/2.0") not in found
    for i, c in enumerate(made.candidates):
        for j in bounded[i].tolist():
            assert set(made.candidates[j].all_convs) <= set(c.all_convs)


def test_nothing_bounds_itself_in_a_circle(made: Made) -> None:
    bounded = [set(b.tolist()) for b in bounded_by(made.spans.network, made.candidates)]
    assert sum(map(len, bounded)) > len(bounded) / 2
    assert all(i not in b and all(i not in bounded[j] for j in b) for i, b in enumerate(bounded))


def test_violations_are_counted() -> None:
    bounded = [np.array([], dtype=np.intp), np.array([0]), np.array([0, 1])]
    assert violations(bounded, {0: -1.0, 1: -2.0, 2: -1.5}) == (1, 3, 0.5)
    assert violations(bounded, {0: -1.0, 2: -0.25}) == (1, 1, 0.75)
    assert violations(bounded, {1: -1.0}) == (0, 0, 0.0)


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("width", [1, 3])
def test_with_valid_bounds_it_finds_the_full_tables_importance_with_part_of_it(
    made: Made, seed: int, width: int
) -> None:
    values = monotone(made, seed)
    estimator = Known(values)
    found = made.on_demand(estimator, width=width)
    full = made.solve(values)
    for budget, value, bound in zip(BUDGETS, found.importances, found.bounds, strict=True):
        best = full.importance[full.index_at(budget)]
        assert value == pytest.approx(best, abs=1e-12) and bound == pytest.approx(best, abs=1e-12)
        assert lmfx.solve(made.graph, made.latency, found.table, spans=made.spans).at(budget).importance == value
    asked = [k for keys in estimator.asked for k in keys]
    assert len(asked) == len(set(asked)) == found.evaluations < 0.75 * len(made.candidates) == 0.75 * found.candidates
    assert len(estimator.asked) == found.rounds and found.broken == 0
    assert {k: v for k, v in found.table.rows.items() if k in values} == {k: values[k] for k in asked}


def test_a_wrong_assumption_costs_the_optimum_and_is_reported(made: Made) -> None:
    broken = 0
    for seed in range(4):
        draw = np.random.default_rng(seed)
        values = {c.key: -float(draw.exponential()) for c in made.candidates}
        found = made.on_demand(Known(values))
        full = made.solve(values)
        assert all(
            v <= full.importance[full.index_at(b)] + 1e-12 for b, v in zip(BUDGETS, found.importances, strict=True)
        )
        broken += found.broken > 0 and found.excess > 0
    assert broken == 4


def test_a_tolerance_saves_rows_and_is_kept(made: Made) -> None:
    saved = 0
    for seed in range(8):
        values = monotone(made, seed)
        exact, near = made.on_demand(Known(values)), made.on_demand(Known(values), tolerance=0.3)
        for best, value, bound in zip(exact.importances, near.importances, near.bounds, strict=True):
            assert best <= bound + 1e-12 and bound - value <= 0.3 * abs(value) + 1e-12
        saved += exact.evaluations - near.evaluations
    assert saved > 0


def test_the_papers_objective_is_bounded_by_its_own_no_change(made: Made) -> None:
    """Scores of exp(change) less the layers replaced: merging more is worse by about 1 a layer, whatever it does."""
    changes = {k: -0.1 * v / min(monotone(made, 3).values()) for k, v in monotone(made, 3).items()}
    paper = {c.key: math.exp(changes[c.key]) - max(len(c.convs), 1) for c in made.candidates}

    class Paper(Known):
        def no_change(self, spans: Any, candidates: Sequence[Candidate], *others: Any) -> list[float]:
            return [1.0 - max(len(c.convs), 1) for c in candidates]

    estimator = Paper(paper)
    found, full = made.on_demand(estimator), made.solve(paper)
    for budget, value in zip(BUDGETS, found.importances, strict=True):
        assert value == pytest.approx(full.importance[full.index_at(budget)], abs=1e-12)
    assert found.evaluations < len(made.candidates) and found.broken == 0


def test_a_candidate_without_a_row_is_not_chosen_and_not_asked_again(made: Made) -> None:
    values = monotone(made, 0)
    chosen = {c.key for b in BUDGETS for c in made.solve(values).at(b).candidates}
    estimator = Known({k: math.nan if k in chosen else v for k, v in values.items()})
    found = made.on_demand(estimator)
    asked = [k for keys in estimator.asked for k in keys]
    assert len(asked) == len(set(asked)) and set(found.table.unusable) == chosen & set(asked)
    frontier = lmfx.solve(made.graph, made.latency, found.table, spans=made.spans)
    assert not chosen & {c.key for b in BUDGETS for c in frontier.at(b).candidates}


def test_only_the_budgets_that_are_asked_for_are_paid_for(made: Made) -> None:
    values = monotone(made, 1)
    one, three = made.on_demand(Known(values), [0.9]), made.on_demand(Known(values))
    assert one.evaluations < three.evaluations
    assert made.on_demand(Known(values), [1.0]).evaluations <= one.evaluations


def test_what_is_to_be_scored_in_any_case_is_scored_first(made: Made) -> None:
    values = monotone(made, 2)
    plain = Known(values)
    made.on_demand(plain)
    asked = {k for keys in plain.asked for k in keys}
    wanted = [c for c in made.candidates if c.key not in asked][:5]  # what no plan depends on
    estimator = Known(values)
    found = made.on_demand(estimator, first=wanted)
    assert len(wanted) == 5 and set(estimator.asked[0]) == {c.key for c in wanted} <= set(found.table)


def test_compress_scores_each_drop_of_a_large_network(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit from few pixels may be worse than the identity that it could be, so its score says nothing of a drop."""
    monkeypatch.setattr("lmfx.importance.reconstruction.EXACT_MACS", 1.0)
    scored: list[str] = []
    plain = ReconstructionSession.score

    def score(self: Any, spans: Any, candidates: Sequence[Candidate], *others: Any, **more: Any) -> ImportanceTable:
        scored.extend(c.key for c in candidates)
        return plain(self, spans, candidates, *others, **more)

    monkeypatch.setattr(ReconstructionSession, "score", score)
    options: dict[str, Any] = {"latency": "roofline", "calibration": DATA, "progress": False, "refit": False}
    lmfx.compress(toy(), DATA[:1], 0.8, **options)
    drops = {c.key for c in made.candidates if c.realization == "drop"}
    assert len(drops) > 5 and drops <= set(scored) and len(set(scored)) < len(made.candidates)


def test_reconstruction_is_decided_once_for_the_whole_table(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmfx.importance.reconstruction.EXACT_MACS", 1.0)
    found = made.on_demand("reconstruction", [0.8], calibration=DATA, images=8)
    assert found.table.identity["exact"] is False
    found = made.on_demand(Reconstruction(exact=True), [0.8], calibration=DATA)
    assert found.table.identity["exact"] is True and 0 < found.evaluations < found.candidates


def test_finetune_evaluates_the_original_once_and_keeps_rows_under_a_key(made: Made, tmp_path: Path) -> None:
    small = replace(made, spans=lmfx.spans(made.graph, realize=("compose",), max_span_convs=2))
    evaluated = 0

    def evaluate(model: Any) -> float:
        nonlocal evaluated
        evaluated += 1
        return finetune_toys.accuracy(model)

    options: dict[str, Any] = {"train": finetune_toys.train, "evaluate": evaluate, "calibration": DATA}
    found = small.on_demand("finetune", [0.9, 0.7, 0.6, 0.5], cache_dir=tmp_path, **options)
    assert found.rounds > 1 and evaluated == found.evaluations + 2  # the original, as it is and trained
    with Store.open(tmp_path) as store:
        assert store.count() == 0
    kept = small.on_demand("finetune", [0.9, 0.7, 0.6, 0.5], cache_dir=tmp_path, key="a", **options)
    again = small.on_demand("finetune", [0.9, 0.7, 0.6, 0.5], cache_dir=tmp_path, key="a", **options)
    assert dict(again.table) == dict(kept.table) == dict(found.table)
    assert evaluated == 2 * (found.evaluations + 2)


@pytest.mark.parametrize("options", [{}, {"objective": "paper"}, {"baseline": "trained"}, {"keep": "retrained"}])
def test_no_change_is_what_the_same_training_makes_of_the_original(made: Made, options: Any) -> None:
    chosen = [c for c in made.candidates if len(c.convs) == 2][:2]
    finetune = Finetune(finetune_toys.train, finetune_toys.accuracy, **options)
    rows = finetune.no_change(made.spans, chosen, Calibration((DATA,)))
    with isolated(0, 1):
        net = PackedNetwork.of(made.graph).unpack().requires_grad_(True).train()
        finetune_toys.train(net)
    change = finetune_toys.accuracy(net.eval()) - finetune_toys.accuracy(made.graph)
    assert change != 0
    expected = {"objective": math.exp(change) - 2, "baseline": 0.0}.get(next(iter(options), ""), change)
    if "keep" in options:  # less what the training makes of each layer alone
        table = finetune.score(made.spans, chosen, Calibration((DATA,)))
        plain = replace(finetune, keep="unchanged").score(made.spans, chosen, Calibration((DATA,)))
        assert rows == pytest.approx([change + table[c.key] - plain[c.key] for c in chosen], abs=1e-12)
        assert rows[0] != pytest.approx(change)
    else:
        assert rows == pytest.approx([expected] * 2, abs=1e-12)


def _never(model: Any) -> float:
    pytest.fail("called")


def test_compress_takes_a_table_that_was_scored_on_demand(made: Made) -> None:
    found = made.on_demand(Known(monotone(made, 2)), [0.6])
    options: dict[str, Any] = {"latency": "roofline", "calibration": DATA, "progress": False}
    net = lmfx.compress(toy(), DATA[:1], 0.9, importance=found.table, **options)
    plan = lmfx.result_of(net).plan
    assert plan.candidates and {c.key for c in plan.candidates} <= set(found.table)
    with pytest.raises(lmfx.TableError, match="made for another graph"):
        other = replace(found.table, identity={"graph": "another"})
        lmfx.compress(toy(), DATA[:1], 0.9, importance=other, **options)


def test_the_report_says_what_was_saved(made: Made) -> None:
    found = made.on_demand(Known(monotone(made, 0)), ["60%", "2x"])
    assert json.loads(json.dumps(asdict(replace(found, table=None))))["broken"] == found.broken  # type: ignore[arg-type]
    text = str(found)
    assert f"scored {found.evaluations} of {len(made.candidates)} candidates" in text
    assert text.count("budget ") == 2 and "scored pairs" in text


def test_bad_input_is_refused(made: Made) -> None:
    known = Known(monotone(made, 0))
    for budgets in ([], 0.5, "2x"):
        with pytest.raises(lmfx.OptionError, match="budgets"):
            made.on_demand(known, budgets)
    for option in ({"tolerance": 1.0}, {"tolerance": -0.1}, {"width": 0}):
        with pytest.raises(lmfx.OptionError, match=next(iter(option))):
            made.on_demand(known, **option)
    with pytest.raises(lmfx.InfeasibleBudget):  # before anything is trained
        made.on_demand(Finetune(_never, _never), [0.5, 0.0001], calibration=DATA)
    with pytest.raises(lmfx.InputError, match="score_on_demand needs a graph"):
        lmfx.score_on_demand(toy(), known, made.latency, [0.5])  # type: ignore[arg-type]
    assert known.asked == []
