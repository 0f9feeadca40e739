"""Searches the plan that holds the budget: move along the frontier until the *measured* network is within the budget.

Predictions only say where to look first. Each step builds the network of one plan (weights do not matter for its
time), measures it side by side with the original, and corrects the line that maps sums of rows to whole networks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from statistics import median
from typing import Any

import numpy as np
from torch import fx

from lmfx.budget import Budget
from lmfx.environment.progress import progress as progress_bar
from lmfx.latency import Backend, CalibrationLine, calibrate
from lmfx.latency.backend import Whole
from lmfx.latency.whole_networks import timing_form
from lmfx.latency.whole_times import time_wholes
from lmfx.passes.errors import InfeasibleBudget
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.passes.trace.tracing import example_arguments
from lmfx.planning.frontier import Frontier

__all__ = ["ACCEPT", "Found", "find_loss_free", "find_plan", "measure_pair", "measure_plan"]

MARGIN = 0.98  # aim this far below the budget, and accept what is measured up to ACCEPT of it
ACCEPT = 0.99
STEPS, TRIES = 12, 5  # of the search, and of stepping back from a plan that was over the budget when looked at closely
REPEATS, FINAL_REPEATS = 5, 11
LEAST_MS, LONGEST = 250.0, 12  # of each network a measurement, at most this many times the repeats
DROPPED_BYTES = 2**28  # of networks that were measured and are not needed any more
CLOSE = 0.965  # within this of the budget a plan is good enough


@dataclass(frozen=True)
class Found:
    """The plan that holds, with what was predicted and measured: whole networks, ms; `ratio` to the original."""

    index: int
    plan: MergePlan
    frontier: Frontier
    predicted: float
    measured: float
    original: float
    ratio: float
    seen: tuple[tuple[float, float], ...] = ()  # (sum of rows, whole) of the networks that were measured


def find_plan(
    graph: fx.GraphModule,
    frontier: Frontier,
    budget: Budget,
    backend: Backend,
    example_input: Any,
    progress: bool = False,
) -> Found:
    """The best plan whose measured latency is within `budget`. Raises `InfeasibleBudget` with the fastest measured."""
    search = _BudgetSearch(graph, frontier, budget, backend, example_input)
    with progress_bar(STEPS, "searching the budget", progress) as bar:
        found = search.run(lambda: bar.update(1))
        bar.update(max(0, STEPS - search.steps))
    return found


def find_loss_free(
    graph: fx.GraphModule, frontier: Frontier, budget: Budget, backend: Backend, example_input: Any
) -> Found | None:
    """The fastest plan of a frontier of plans that all lose nothing, if its measured latency is within `budget`."""
    if not frontier.plan(0).candidates:
        return None  # nothing that loses nothing is faster
    return _BudgetSearch(graph, frontier, budget, backend, example_input).fastest()


def measure_plan(analysis: Analysis, plan: MergePlan, backend: Backend, example_input: Any, original: float) -> float:
    """The measured latency of a plan's network over that of the original (about `original` ms), both taken in turn."""
    example = example_arguments(example_input)
    return measure_pair(backend, bare(analysis.graph, example), bare(timing_form(analysis, plan), example), original)


def measure_pair(backend: Backend, first: Whole, second: Whole, ms: float) -> float:
    """What the second network takes of the first one's latency (about `ms`), both taken in turn."""
    times = time_wholes(backend, [first, second], _repeats(FINAL_REPEATS, max(ms, _least(backend))))
    return median(b / a for a, b in zip(*times, strict=True))


def _least(backend: Backend) -> float:
    return float(getattr(getattr(backend, "sampling", None), "min_ms", 1.0))


def _repeats(repeats: int, ms: float) -> int:
    """A short network is run more often: a median of five runs of 2 ms is off by several percent."""
    return max(repeats, min(LONGEST * repeats, ceil(LEAST_MS / ms)))


class _BudgetSearch:
    def __init__(
        self, graph: fx.GraphModule, frontier: Frontier, budget: Budget, backend: Backend, example_input: Any
    ) -> None:
        self.graph, self.frontier, self.budget = graph, frontier, budget
        self.analysis = Analysis.of(frontier.spans.network)
        self.backend, self.example = backend, example_arguments(example_input)
        self.sums: list[float] = []
        self.wholes: list[float] = []
        self.ratios: dict[int, float] = {}
        self.original = 0.0
        self.least = _least(backend)
        self.steps = 0
        self.dropped = 0

    def measure(self, index: int, repeats: int = REPEATS) -> float:
        """The measured ratio of one plan to the original, both taken in turn."""
        net = timing_form(self.analysis, self.frontier.plan(index))
        repeats = _repeats(repeats, max(self.original, self.least))
        times = time_wholes(self.backend, [bare(self.graph, self.example), bare(net, self.example)], repeats)
        self.dropped += sum(p.numel() * p.element_size() for p in net.parameters())
        del net
        if self.dropped > DROPPED_BYTES:  # graphs hold themselves in cycles, and a large network's copies would pile up
            gc.collect()
            self.dropped = 0
        ratio = median(b / a for a, b in zip(*times, strict=True))
        # The machine's speed drifts, so all wholes are expressed in the first measurement's milliseconds.
        self.sums.append(float(self.frontier.raw.latency[index]))
        self.wholes.append(ratio * self.original)
        self.ratios[index] = ratio
        self.steps += 1
        return ratio

    def line(self) -> CalibrationLine:
        useful = [(s, w) for s, w in zip(self.sums, self.wholes, strict=True) if s > 0 and w > 0]
        if len(useful) < 2:
            return CalibrationLine(self.wholes[0] - self.sums[0], 1.0, 0.0, float("nan"), float("nan"))
        return calibrate([s for s, _ in useful], [w for _, w in useful])

    def seen(self) -> tuple[tuple[float, float], ...]:
        """(sum of rows, measured whole) of all networks, the original first."""
        return tuple(zip(self.sums, self.wholes, strict=True))

    def begin(self) -> float:
        """Measures the original; the budget as a fraction of it."""
        times = time_wholes(self.backend, [bare(self.graph, self.example)], REPEATS)
        self.original = median(times[0])
        self.sums, self.wholes = [self.frontier.original_sum], [self.original]
        return self.budget.resolve(self.original) / self.original

    def fastest(self) -> Found | None:
        """The first plan, if it is within the budget."""
        fraction = self.begin()
        ratio = self.measure(0, FINAL_REPEATS)
        if ratio > fraction:
            return None
        frontier = self.frontier.calibrated(self.line())
        plan = frontier.plan(0)
        predicted = float(frontier.latency[0])
        return Found(0, plan, frontier, predicted, ratio * self.original, self.original, ratio, self.seen())

    def run(self, tick: Callable[[], None]) -> Found:
        fraction = self.begin()
        if fraction >= 1:  # nothing to do: the original is within the budget
            frontier = self.frontier.calibrated(self.line())
            plan = MergePlan((), frontier.plan(0).fingerprint, self.original, 0.0)
            return Found(
                len(frontier) - 1, plan, frontier, self.original, self.original, self.original, 1.0, self.seen()
            )
        low, high = -1, len(self.frontier)  # measured within, measured over
        first: dict[int, float] = {}
        while self.steps < STEPS and high - low > 1:
            index = self.guess(fraction, low, high)
            first[index] = float(self.line()(float(self.frontier.raw.latency[index])))
            ratio = self.measure(index)
            tick()
            if ratio <= ACCEPT * fraction:
                low = index
                if ratio >= CLOSE * fraction:
                    break
            else:
                high = index
        if low < 0 and self.ratio(0) <= fraction:
            low = 0
        if low < 0:
            self.refuse(fraction)
        tries = 0
        while (ratio := self.measure(low, FINAL_REPEATS)) > ACCEPT * fraction and low > 0:
            tick()
            tries += 1
            low = self.step_back(low, ratio, fraction, tries)
        tick()
        if ratio > fraction:
            self.refuse(fraction)
        line = self.line()
        frontier = self.frontier.calibrated(line)
        predicted = first.get(low, float(line(float(self.frontier.raw.latency[low]))))
        plan = replace(frontier.plan(low), latency=predicted)
        return Found(low, plan, frontier, predicted, ratio * self.original, self.original, ratio, self.seen())

    def ratio(self, index: int) -> float:
        """The last measured ratio of a plan."""
        return self.ratios[index] if index in self.ratios else self.measure(index, FINAL_REPEATS)

    def guess(self, fraction: float, low: int, high: int) -> int:
        """The plan at which the line through the bracket's measured ends meets the budget, strictly inside it."""
        sums = self.frontier.raw.latency
        target = MARGIN * fraction * self.original
        upper = (self.sums[0], self.wholes[0]) if high == len(sums) else self.point(high)
        slope = self.line().b
        if low >= 0:
            under = self.point(low)
            if upper[0] > under[0] and upper[1] > under[1]:
                slope = (upper[1] - under[1]) / (upper[0] - under[0])
        index = int(np.searchsorted(sums, upper[0] - (upper[1] - target) / slope, side="right")) - 1
        if self.steps >= 5:
            index = (low + high) // 2  # noise, or a line that bends: halve the bracket
        return min(max(index, low + 1), high - 1)

    def step_back(self, index: int, ratio: float, fraction: float, tries: int) -> int:
        """A faster plan than one that turned out to be over the budget: by as much as it was over, and a bit more."""
        if tries > TRIES:
            return index // 2
        over = (ratio - (MARGIN - 0.01 * tries) * fraction) * self.original / self.line().b
        sums = self.frontier.raw.latency
        nearest = int(np.searchsorted(sums, sums[index] - over, side="right")) - 1
        held = [i for i, r in self.ratios.items() if i < index and r <= ACCEPT * fraction]
        return max(min(nearest, index - 1), *held, 0)

    def point(self, index: int) -> tuple[float, float]:
        """(sum of rows, measured whole) of a plan that was measured."""
        return float(self.frontier.raw.latency[index]), self.ratios[index] * self.original

    def refuse(self, fraction: float) -> None:
        self.ratio(0)
        reached = min(self.ratios.values()) * self.original
        raise InfeasibleBudget(
            f"no plan reaches the budget {self.budget} ({fraction * self.original:.4g} ms of {self.original:.4g} ms on "
            f"{self.backend.name}): the fastest measured takes {reached:.4g} ms ({reached / self.original:.1%}). Ask "
            "for that or more, or allow more with realize=, max_kernel_size=, max_span_convs= or fewer exclude=",
            reached,
            self.original,
        )
