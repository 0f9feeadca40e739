"""`solve`: tables -> every Pareto-optimal plan of a network, in the latency of the whole network."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmfx.budget import Budget
from lmfx.environment.caller_state import entry
from lmfx.environment.rows import RowTable
from lmfx.importance import ImportanceTable
from lmfx.latency import CalibrationLine, LatencyTable
from lmfx.passes.errors import InfeasibleBudget, MissingExtra, OptionError
from lmfx.passes.html_text import html_facts
from lmfx.passes.ir import Candidate, MergePlan, Series, Surrogate
from lmfx.passes.solve.dynamic_program import Chain, Entry, ParetoFrontier, solve_chains
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.trace.tracing import fingerprint
from lmfx.planning.loss_decades import loss_decades
from lmfx.quality.measures import Alternative

__all__ = ["Frontier", "Point", "solve_spans"]

IDENTITY = CalibrationLine(0.0, 1.0, 0.0, float("nan"), float("nan"))


@dataclass(frozen=True)
class Point:
    """One Pareto-optimal choice: predicted latency of the whole network in ms, importance, and its plan."""

    latency: float
    importance: float
    plan: MergePlan


class Frontier:
    """Every Pareto-optimal plan, fastest first. `len()`, iteration and indexing give `Point`s."""

    def __init__(
        self,
        spans: SpanSet,
        raw: ParetoFrontier,
        original: float,
        line: CalibrationLine = IDENTITY,
        surrogate: Surrogate = "identity",
        latencies: LatencyTable | None = None,
        scores: ImportanceTable | None = None,
    ) -> None:
        self.spans = spans
        self.latencies, self.scores = latencies, scores  # the rows that were solved
        self.raw = raw
        self.original_sum = original
        self.line = line
        self.surrogate = surrogate
        self._fingerprint = fingerprint(spans.network.gm)
        self._order = {name: i for i, name in enumerate(spans.network.nodes)}

    @property
    def latency(self) -> np.ndarray:
        """Predicted latency of the whole network at each point, ms, ascending."""
        return np.asarray(self.line.a + self.line.b * self.raw.latency)

    @property
    def importance(self) -> np.ndarray:
        """Importance at each point, ascending; 0 is the original network."""
        return self.raw.importance

    @property
    def original(self) -> float:
        """Predicted latency of the original network, ms."""
        return self.line(self.original_sum)

    @entry
    def calibrated(self, line: CalibrationLine) -> Frontier:
        """The same frontier with another relation between sums of rows and whole networks."""
        return Frontier(self.spans, self.raw, self.original_sum, line, self.surrogate, self.latencies, self.scores)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> Point:
        index = range(len(self))[index]
        return Point(float(self.latency[index]), float(self.importance[index]), self.plan(index))

    def __iter__(self) -> Iterator[Point]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Frontier({len(self)} points, {self.latency[0]:.4g} to {self.latency[-1]:.4g} ms)"

    @entry
    def plan(self, index: int) -> MergePlan:
        """The plan of one point."""
        return MergePlan(
            tuple(sorted(self._chosen(index), key=lambda c: self._order[c.span.exit])),
            self._fingerprint,
            float(self.latency[index]),
            float(self.importance[index]),
            self.surrogate,
            activation_after=self.spans.options.activation_after,
        )

    def _chosen(self, index: int) -> tuple[Candidate, ...]:
        """What changes something at a point, in the order of the solver."""
        return tuple(c for c in self.raw.choice(index) if isinstance(c, Candidate) and c.realization != "keep")

    @entry
    def index_at(self, budget: Any) -> int:
        """The best point whose predicted latency is within a budget: 0.6, "60%", "4.5ms", "2x" or a `Budget`.

        A relative budget counts from the predicted latency of the original. Raises `InfeasibleBudget` with the fastest
        predicted latency if there is none.
        """
        wanted = Budget.parse(budget)
        limit = wanted.resolve(self.original)
        latency = self.latency
        index = int(np.searchsorted(latency, limit * (1 + 1e-12), side="right")) - 1
        if index < 0:
            raise InfeasibleBudget(
                f"no plan reaches {limit:.4g} ms (budget {wanted}, original {self.original:.4g} ms): the fastest is "
                f"predicted at {latency[0]:.4g} ms. Ask for that or more, or allow more with realize=, "
                "max_kernel_size= or fewer exclude=",
                float(latency[0]),
                self.original,
            )
        return index

    @entry
    def at(self, budget: Any) -> MergePlan:
        """The best plan within a budget; see `index_at`."""
        return self.plan(self.index_at(budget))

    @entry
    def table(self) -> RowTable:
        """A row for each point, fastest first: what it is predicted to take and to cost, and what its plan changes.

        `latency_ms` and `of_original` (a share) are of the whole network; `loss` is minus the importance; `compose`,
        `fit`, `narrow` and `drop` count the spans that the plan changes in that way, `convs` what convolutions of the
        changed spans become. A list of dicts, as data frames read it, that prints as a table.
        """
        rows = []
        for i, (ms, value) in enumerate(zip(self.latency.tolist(), self.importance.tolist(), strict=True)):
            plan = MergePlan(self._chosen(i))
            before, after = plan.conv_counts
            share = ms / self.original if self.original else 1.0
            figures: dict[str, Any] = {"latency_ms": ms, "of_original": share, "loss": 0.0 - value}
            rows.append({**figures, **plan.ways, "convs": f"{before} -> {after}"})
        return RowTable(rows)

    def _repr_html_(self) -> str:
        facts = [
            ("points", len(self)),
            ("latency", f"{self.latency[0]:.4g} to {self.latency[-1]:.4g} ms; the original {self.original:.4g} ms"),
        ]
        return html_facts("lmfx: every Pareto-optimal plan", facts) + self.table()._repr_html_()

    @entry
    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        ax: Any = None,
        mark: Any = None,
        alternatives: Sequence[Alternative] = (),
    ) -> Any:
        """Draw importance over latency with matplotlib, save it to `path` if given, and return the axes.

        `mark` is a budget to mark. `alternatives` are other ways to be as fast, drawn where they were measured: those
        of a result (`result_of(net).alternatives`), or what `lmfx.alternative` says of any network. Raises
        `MissingExtra` without matplotlib.
        """
        for other in alternatives:
            if not isinstance(other, Alternative):
                kind = type(other).__name__
                raise OptionError(
                    f"alternatives= takes what lmfx.alternative gives, or those of a result, not a {kind}"
                )
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtra('plots need matplotlib: pip install "lmfx[plot]"') from error
        if ax is None:
            ax = Figure(figsize=(6, 4), layout="constrained").subplots()
        ax.step(self.latency, self.importance, where="post", label=f"{len(self)} Pareto-optimal plans")
        ax.axvline(self.original, color="0.6", linestyle=":", label="original")
        if mark is not None:
            index = self.index_at(mark)
            ax.plot(self.latency[index], self.importance[index], "o", label=f"budget {mark}")
        for number, other in enumerate(alternatives):
            at = other.ratio * self.original, 0.0 - other.quality.loss()
            ax.plot(*at, "svD^P"[number % 5], color=f"C{2 + number % 8}", label=f"{other.what} (measured)")
        ax.set_xlabel("predicted latency (ms)")
        ax.set_ylabel("importance")
        ax.set_yscale("symlog", linthresh=10.0 ** loss_decades(-self.importance)[0])
        ax.legend()
        if path is not None:
            ax.figure.savefig(path, dpi=120)
        return ax


def solve_spans(
    spans: SpanSet,
    latency: LatencyTable,
    importance: ImportanceTable,
    line: CalibrationLine | None = None,
    surrogate: Surrogate = "identity",
) -> Frontier:
    """Every budget from one exact solve. Candidates without a row in both tables cannot be chosen.

    What is the same function as its span has importance 0, whatever a table says, and is taken where another choice has
    the same latency and importance. Latencies are those of whole networks by `line`, by default the table's calibration
    if it has one.
    """
    line = line or latency.calibration or IDENTITY
    by_series: dict[str, list[Candidate]] = {}
    for c in spans:
        by_series.setdefault(c.span.series, []).append(c)
    total = 0.0

    calls = spans.network.calls

    def kept(c: Candidate) -> float:
        others = calls.others(c.span.series, c.span.start, c.span.stop)
        return latency.ms(c.key) + sum(latency.ms(f"{name}:{i}-{j}:keep") for name, i, j in others)

    def chain(series: Series) -> Chain:
        nonlocal total
        # A run that is called before is decided there, with the latencies of all calls.
        entries = [Entry(start, stop, 0.0, 0.0, None) for start, stop in calls.passed(series.name)]
        for c in sorted(by_series.get(series.name, []), key=lambda c: not (c.exact or c.realization == "keep")):
            if calls.role(series.name, c.span.start, c.span.stop) == "other":
                continue
            if c.realization == "keep":
                parallel = series.layers[c.span.start].parallel
                branches = tuple(chain(b) for b in parallel.branches) if parallel else ()
                total += kept(c)
                entries.append(Entry(c.span.start, c.span.stop, kept(c), 0.0, c, branches))
            elif c.key in latency and (c.exact or c.key in importance):
                value = 0.0 if c.exact else importance[c.key]
                entries.append(Entry(c.span.start, c.span.stop, latency.ms(c.key), value, c))
        return Chain(entries, len(series.layers))

    chains = [chain(region.series) for region in spans.network.regions]
    return Frontier(spans, solve_chains(chains), total, line, surrogate, latency, importance)
