"""The budget holds on what is measured, however far the sums of rows are from whole networks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

import lmfx
from lmfx.budget import Budget
from lmfx.latency.backends.roofline import RooflineBackend
from lmfx.latency.whole_networks import timing_form
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.errors import InfeasibleBudget
from lmfx.planning.frontier import Frontier
from lmfx.planning.search import ACCEPT, CLOSE, FINAL_REPEATS, REPEATS, STEPS, find_plan
from tests.toys import images, toy

X = images(1)


class Skewed(RooflineBackend):
    """Rows are the roofline's; whole networks take `factor` of it if they were merged, and jitter by `noise`."""

    def __init__(self, factor: float = 1.0, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.factor, self.noise, self.random = factor, noise, random.Random(seed)
        self.calls = 0

    def measure_interleaved(self, modules: Sequence[Any], repeats: int = 5) -> list[list[float]]:
        self.calls += 1
        times = super().measure_interleaved(modules, repeats)
        slow = [1.0 if row[0] == times[0][0] else self.factor for row in times]
        return [
            [ms * f * (1 + self.random.uniform(-self.noise, self.noise)) for ms in row]
            for f, row in zip(slow, times, strict=True)
        ]


@pytest.fixture(scope="module")
def solved() -> tuple[fx.GraphModule, Frontier]:
    torch.manual_seed(0)
    graph = lmfx.trace(toy(), X)
    latency = lmfx.profile(graph, "roofline", progress=False)
    scores = lmfx.score(graph, latency=latency, calibration=images(8), progress=False)
    return graph, lmfx.solve(graph, latency, scores)


def truth(graph: fx.GraphModule, plan: lmfx.MergePlan, factor: float) -> float:
    """The ratio that a plan's network really has."""
    roofline = RooflineBackend()
    merged, whole = timing_form(graph, plan), roofline.ms(graph, [X])
    return factor * roofline.ms(merged, [X]) / whole if plan.candidates else 1.0


@pytest.mark.parametrize("budget", [0.9, "70%", 0.5, "2x", "0.015ms"])
@pytest.mark.parametrize("factor", [0.8, 1.0, 1.1, 1.3])
def test_the_budget_holds_where_whole_networks_are_not_the_sum_of_their_rows(
    solved: tuple[fx.GraphModule, Frontier], budget: Any, factor: float
) -> None:
    graph, frontier = solved
    backend = Skewed(factor)
    wanted = Budget.parse(budget)
    found = find_plan(graph, frontier, wanted, backend, [X])
    limit = wanted.resolve(found.original)
    assert found.measured <= limit and found.ratio <= limit / found.original
    assert truth(graph, found.plan, factor) == pytest.approx(found.ratio)
    assert backend.calls <= STEPS + 3


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("budget", [0.9, 0.7, 0.5])
def test_the_plan_that_is_found_is_close_to_the_best_that_holds(
    solved: tuple[fx.GraphModule, Frontier], budget: float, factor: float
) -> None:
    graph, frontier = solved
    found = find_plan(graph, frontier, Budget.parse(budget), Skewed(factor), [X])
    within = [i for i in range(len(frontier)) if truth(graph, frontier.plan(i), factor) <= ACCEPT * budget]
    assert found.index in within
    best = truth(graph, frontier.plan(max(within)), factor)
    assert found.index == max(within) or found.ratio >= CLOSE * budget or found.ratio >= 0.95 * best


@pytest.mark.parametrize("seed", range(8))
def test_noise_neither_breaks_the_budget_nor_keeps_the_search_from_ending(
    solved: tuple[fx.GraphModule, Frontier], seed: int
) -> None:
    graph, frontier = solved
    backend = Skewed(1.1, noise=0.1, seed=seed)
    found = find_plan(graph, frontier, Budget.parse(0.6), backend, [X])
    assert found.ratio <= 0.6
    assert truth(graph, found.plan, 1.1) <= 0.6 * 1.1
    assert backend.calls <= STEPS + 3 + len(frontier).bit_length()


@pytest.mark.parametrize("seed", range(4))
def test_pure_noise_ends_with_a_plan_or_a_refusal(solved: tuple[fx.GraphModule, Frontier], seed: int) -> None:
    graph, frontier = solved
    backend = Skewed(1.0, noise=0.9, seed=seed)
    try:
        assert find_plan(graph, frontier, Budget.parse(0.5), backend, [X]).ratio <= 0.5
    except InfeasibleBudget as refusal:
        assert refusal.latency > 0
    assert backend.calls <= STEPS + 3 + len(frontier).bit_length()


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("budget", [1e-6, "1000x", "0.00001ms"])
def test_an_unreachable_budget_names_the_fastest_network_that_was_measured(
    solved: tuple[fx.GraphModule, Frontier], budget: Any, factor: float
) -> None:
    graph, frontier = solved
    with pytest.raises(InfeasibleBudget) as caught:
        find_plan(graph, frontier, Budget.parse(budget), Skewed(factor), [X])
    fastest = truth(graph, frontier.plan(0), factor) * RooflineBackend().ms(graph, [X])
    assert caught.value.latency == pytest.approx(fastest)
    assert caught.value.original == pytest.approx(RooflineBackend().ms(graph, [X]))


def test_the_fastest_plan_is_tried_before_a_budget_is_refused(solved: tuple[fx.GraphModule, Frontier]) -> None:
    graph, frontier = solved
    fastest = truth(graph, frontier.plan(0), 1.0)
    found = find_plan(graph, frontier, Budget.parse(fastest * 1.0005), Skewed(), [X])
    assert found.index == 0 and found.ratio == pytest.approx(fastest)


def test_merged_networks_that_are_slower_than_the_original_are_refused(
    solved: tuple[fx.GraphModule, Frontier],
) -> None:
    graph, frontier = solved
    with pytest.raises(InfeasibleBudget, match="no plan reaches the budget 0.9"):
        find_plan(graph, frontier, Budget.parse(0.9), Skewed(20.0), [X])


def test_a_budget_above_the_original_changes_nothing(solved: tuple[fx.GraphModule, Frontier]) -> None:
    graph, frontier = solved
    found = find_plan(graph, frontier, Budget.parse("5s"), Skewed(), [X])
    assert found.plan.candidates == () and found.ratio == 1.0


def test_the_last_word_is_a_longer_measurement(solved: tuple[fx.GraphModule, Frontier]) -> None:
    graph, frontier = solved
    taken: list[int] = []

    class Counting(Skewed):
        def measure_interleaved(self, modules: Sequence[Any], repeats: int = 5) -> list[list[float]]:
            taken.append(repeats)
            return super().measure_interleaved(modules, repeats)

    find_plan(graph, frontier, Budget.parse(0.6), Counting(), [X])
    assert taken[-1] > taken[1] and taken[-1] >= FINAL_REPEATS > REPEATS


def test_predictions_after_the_search_lie_closer_to_what_was_measured(
    solved: tuple[fx.GraphModule, Frontier],
) -> None:
    graph, frontier = solved
    found = find_plan(graph, frontier, Budget.parse(0.6), Skewed(1.3), [X])
    before = abs(float(frontier.latency[found.index]) - found.measured)
    after = abs(float(found.frontier.latency[found.index]) - found.measured)
    assert after < before


def test_what_is_timed_is_the_merged_network(solved: tuple[fx.GraphModule, Frontier]) -> None:
    graph, frontier = solved
    plan = frontier.at(0.6)
    net = timing_form(graph, plan)
    assert not any(isinstance(m, LinearSpan) for m in net.modules())
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    removed = {name for c in plan.candidates for name in c.all_convs}
    added = sum(c.conv is not None for c in plan.candidates)
    assert len(convs) == 6 - len(removed) + added


def test_a_plan_that_changes_nothing_has_the_latency_that_was_measured(
    solved: tuple[fx.GraphModule, Frontier],
) -> None:
    graph, frontier = solved
    found = find_plan(graph, frontier, Budget.parse("5s"), Skewed(), [X])
    assert found.plan.latency == pytest.approx(found.original) and found.plan.importance == 0


@pytest.mark.parametrize("shortest, repeats", [(50.0, FINAL_REPEATS), (10.0, 25)])
def test_a_backend_that_runs_short_networks_for_a_time_anyway_is_not_asked_more_often(
    solved: tuple[fx.GraphModule, Frontier], shortest: float, repeats: int
) -> None:
    graph, frontier = solved
    taken: list[int] = []

    class Long(Skewed):
        sampling = SimpleNamespace(min_ms=shortest)  # of each run

        def measure_interleaved(self, modules: Sequence[Any], repeats: int = 5) -> list[list[float]]:
            taken.append(repeats)
            return super().measure_interleaved(modules, repeats)

    find_plan(graph, frontier, Budget.parse(0.6), Long(), [X])
    assert taken[-1] == repeats
