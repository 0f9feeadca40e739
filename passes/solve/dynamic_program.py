"""Solves every budget at once: the exact Pareto dynamic program.

A chain has positions 0..N; an entry `(start, stop, latency, importance)` leads from one to the other. A *label* is a
(latency, importance) that some path reaches, and

    F[0] = {(0, 0)}        F[j] = pareto( union over entries e of (i, j] of  F[i] + e )

so F[N] holds the best importance for every budget. Nothing is discretised, and sums are accumulated from left to right:
a point's latency is the float sum of the latencies that `choice` names, in that order, to the last bit.

A `Parallel` element that is not merged adds up its branches and its join. A sum does not care where it is taken, so the
branches are walked one after the other on the way from `start` to `stop`, and the nested problem is a flat graph:

    0 ──────── a merged span ────────▶ 2            0 ───────────── a merged span ─────────────▶ 2
    0 ─▶ 1,  1 ── branches A, B ─▶ 2        =       0 ─▶ 1 ─▶ (chain of A) ─▶ (chain of B) ─join─▶ 2

Regions that follow each other are one longer chain, and a fixed remainder is the latency of the first label.

Label sets grow with the square of the depth or faster. When they become too many they are thinned (`pareto.py`): true
latencies stay, the fastest and the best stay, and the most that any budget can lose is bounded and reported as `gap`.
The dynamic program that this replaces (LayerMerge, ICML 2024, section 3.4) solves one budget on a floored latency grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from ..errors import BudgetError, InfeasibleBudget, OptionError, TableError
from .pareto import FloatArray, Graph, IntArray, Relaxation, pareto, thin

__all__ = ["Chain", "Entry", "ParetoFrontier", "solve_chains", "solve_series"]

MaxPoints = int | None | Literal["auto"]
Trail = list[tuple[IntArray, IntArray]]  # of every vertex and label: the edge that made it, and the label before that

# "auto" thins a set only where the labels still to be merged would pass AUTO_LABELS (about half a second) in all.
AUTO_LABELS = 8_000_000
AUTO_LEAST = 256
# Sums of entries up to this stay finite, and so do their products with slopes.
LARGEST = 1e60


@dataclass(frozen=True)
class Entry:
    """One thing that may be chosen for `(start, stop]`: latency in ms (>= 0), importance (higher is better).

    With `branches` it is a parallel element that is not merged: it adds the frontiers of its branches to its own
    latency and importance, which are those of the join. `tag` is what `ParetoFrontier.choice` gives back.
    """

    start: int
    stop: int
    latency: float
    importance: float
    tag: Any
    branches: tuple[Chain, ...] = ()


@dataclass(frozen=True)
class Chain:
    """Entries over positions 0..`length`. A chain of length 0 has no entries: a plain skip."""

    entries: Sequence[Entry]
    length: int


class ParetoFrontier:
    """Every Pareto-optimal (latency in ms, importance), both strictly ascending, and the choices that give each.

    Points with equal latency and importance are one point; of its realizations the one is given whose last entry comes
    first in the input, and so on towards the front.

    Attributes:
        latency, importance: read-only float64 arrays, one value a point.
        gaps: read-only; a budget between a point and the next loses at most this much importance against the true
            optimum, proven; all 0.0 when the frontier is exact.
        gap: the largest of them.
    """

    def __init__(
        self,
        latency: FloatArray,
        importance: FloatArray,
        gaps: FloatArray,
        tags: list[Any],
        sources: IntArray,
        trail: Trail,
    ) -> None:
        for array in (latency, importance, gaps):
            array.flags.writeable = False
        self.latency = latency
        self.importance = importance
        self.gaps = gaps
        self.gap = float(gaps.max())
        self._tags = tags
        self._sources = sources
        self._trail = trail

    def __len__(self) -> int:
        return len(self.latency)

    def __repr__(self) -> str:
        return (
            f"ParetoFrontier({len(self)} points, {self.latency[0]:.6g} to {self.latency[-1]:.6g} ms, "
            f"importance {self.importance[0]:.6g} to {self.importance[-1]:.6g}, gap {self.gap:.3g})"
        )

    def choice(self, index: int) -> tuple[Any, ...]:
        """What is chosen at point `index`, from left to right; a parallel element comes after its branches."""
        label = range(len(self))[index]
        chosen = []
        edges, parents = self._trail[-1]
        while len(edges):
            edge, label = int(edges[label]), int(parents[label])
            chosen.append(self._tags[edge])
            edges, parents = self._trail[self._sources[edge]]
        return tuple(reversed(chosen))

    def at(self, budget_ms: float) -> int:
        """The index of the best point whose latency is at most `budget_ms`.

        Raises InfeasibleBudget, with the fastest latency, if there is none, and BudgetError if it is no number.
        """
        if not isinstance(budget_ms, Real) or isnan(budget_ms):
            raise BudgetError(f"the budget is {budget_ms!r}; give a latency in ms")
        index = int(np.searchsorted(self.latency, budget_ms, side="right")) - 1
        if index < 0:
            fastest = float(self.latency[0])
            raise InfeasibleBudget(
                f"no choice reaches {budget_ms:g} ms: the fastest takes {fastest:g} ms; ask for that or more", fastest
            )
        return index


def solve_series(entries: Iterable[tuple[int, int, float, float]], *, max_points: MaxPoints = "auto") -> ParetoFrontier:
    """The frontier of one chain 0..N of `(start, stop, latency, importance)`, where N is the largest stop.

    `ParetoFrontier.choice` gives indices into `entries`. `max_points` bounds the labels at one position: a number, None
    (never thin; time and memory may explode), or "auto" (as many as let the solve merge 8 million labels in all, about
    half a second, so small problems are exact). The last position is never thinned.

    Raises TableError for a bad entry, or when no path leads from 0 to N.
    """
    checked = []
    for tag, entry in enumerate(entries):
        try:
            start, stop, latency, importance = entry
        except (TypeError, ValueError):
            raise TableError(
                f"entry {tag} is {entry!r}; an entry is (start, stop, latency in ms, importance)"
            ) from None
        checked.append(Entry(start, stop, latency, importance, tag))
    if not checked:
        raise TableError("there are no entries; give at least one (start, stop, latency, importance)")
    flat = _FlatChains()
    length = max(flat.check(entry, f"entry {entry.tag}") for entry in checked)
    flat.chain(Chain(checked, length), 0, "the chain")
    return _solve(flat, 0.0, max_points)


def solve_chains(
    chains: Iterable[Chain], fixed_latency: float = 0.0, *, max_points: MaxPoints = "auto"
) -> ParetoFrontier:
    """The frontier of regions that add up, one after the other, on top of `fixed_latency` ms that no choice changes.

    Without chains it is the one point (fixed_latency, 0). Raises as `solve_series` does.
    """
    if not _number(fixed_latency) or fixed_latency < 0:
        raise TableError(f"fixed_latency is {fixed_latency!r}; give a finite number of ms, at least 0")
    flat = _FlatChains()
    at = 0
    for number, chain in enumerate(chains):
        at = flat.chain(chain, at, f"chain {number}")
    return _solve(flat, float(fixed_latency), max_points)


class _FlatChains:
    """Nested chains as one graph, whose vertices are numbered so that every edge leads upwards."""

    def __init__(self) -> None:
        self.vertices = 1
        self.edges: list[tuple[int, int, float, float]] = []  # source, target, latency, importance
        self.tags: list[Any] = []

    def check(self, entry: Entry, name: str) -> int:
        """The stop of a sound entry."""
        if not isinstance(entry, Entry):
            raise TableError(f"{name} is {entry!r}; give an Entry(start, stop, latency, importance, tag)")
        start, stop, latency, importance = entry.start, entry.stop, entry.latency, entry.importance
        if not (_position(start) and _position(stop)):
            problem = "start and stop must be ints"
        elif not 0 <= start < stop:
            problem = "it must have 0 <= start < stop"
        elif not (_number(latency) and _number(importance)):
            problem = "both must be finite numbers (below 1e60), so measure it again or leave it out"
        elif latency < 0:
            problem = "a latency cannot be negative, so measure it again or leave it out"
        else:
            return int(stop)
        raise TableError(f"{name} is ({start!r}, {stop!r}, latency {latency!r}, importance {importance!r}); {problem}")

    def chain(self, chain: Chain, first: int, name: str) -> int:
        """Add a chain that begins at vertex `first`; its last vertex. Vertices are made for used positions only."""
        if not isinstance(chain, Chain):
            raise TableError(f"{name} is {chain!r}; give a Chain(entries, length)")
        if not _position(chain.length) or chain.length < 0:
            raise TableError(f"{name} has length {chain.length!r}; give an int, at least 0")
        leaving: dict[int, list[tuple[int, Entry]]] = {}
        for order, entry in enumerate(chain.entries):
            if self.check(entry, f"entry {order} of {name}") > chain.length:
                raise TableError(
                    f"entry {order} of {name}, {entry.tag!r}, stops at {entry.stop}, past the end at {chain.length}; "
                    "give the chain its true length"
                )
            leaving.setdefault(int(entry.start), []).append((order, entry))

        # By stop: place in the input, the vertex where the entry itself begins, and the entry.
        arriving: dict[int, list[tuple[int, int, Entry]]] = {}
        reached = {0}
        vertex = first
        for position in sorted({0, chain.length, *leaving, *(int(e.stop) for e in chain.entries)}):
            if position and position not in reached:
                continue
            if position:
                vertex = self.vertices
                self.vertices += 1
                for _, source, entry in sorted(arriving[position], key=lambda item: item[0]):
                    self.edges.append((source, vertex, float(entry.latency), float(entry.importance)))
                    self.tags.append(entry.tag)
            for order, entry in leaving.get(position, ()):
                source = vertex
                for branch in entry.branches:
                    source = self.chain(branch, source, f"a branch of {entry.tag!r}")
                arriving.setdefault(int(entry.stop), []).append((order, source, entry))
                reached.add(int(entry.stop))
        if chain.length not in reached:
            raise TableError(
                f"no path leads through {name} from 0 to {chain.length}: entries reach {max(reached)} at most, "
                "or leave a hole; add an entry (keep the layer as it is, say) for every position"
            )
        return vertex


def _solve(flat: _FlatChains, fixed: float, max_points: MaxPoints) -> ParetoFrontier:
    """F over the flat graph, from its first vertex to its last."""
    if max_points not in (None, "auto") and not (_position(max_points) and int(max_points) >= 2):
        raise OptionError(
            f'max_points is {max_points!r}; give an int of at least 2, "auto", or None to keep all points'
        )
    graph = Graph(flat.vertices, flat.edges)
    relaxation: Relaxation | None = None
    nothing = np.empty(0, dtype=np.intp)
    empty = np.empty(0)
    labels = [(empty, empty)] * flat.vertices
    labels[0] = np.array([fixed]), np.zeros(1)
    trail: Trail = [(nothing, nothing)] * flat.vertices
    merged, to_come = 0, sum(map(len, graph.into))
    for vertex in range(1, flat.vertices):
        edges = [e for e in graph.into[vertex] if len(labels[flat.edges[e][0]][0])]
        if not edges:
            continue  # leads nowhere, or nothing leads here
        runs = [labels[flat.edges[e][0]] for e in edges]
        latency = np.concatenate([run[0] + flat.edges[e][2] for run, e in zip(runs, edges, strict=True)])
        importance = np.concatenate([run[1] + flat.edges[e][3] for run, e in zip(runs, edges, strict=True)])
        kept = pareto(latency, importance)
        merged += len(latency)
        to_come -= len(edges)
        points = max(AUTO_LEAST, (AUTO_LABELS - merged) // max(to_come, 1)) if max_points == "auto" else max_points
        if points is not None and len(kept) > points and vertex < flat.vertices - 1:
            relaxation = relaxation or Relaxation(graph, fixed)
            potential = relaxation.potential(vertex, latency[kept], importance[kept])
            kept = kept[thin(latency[kept], importance[kept], potential, points)]
        labels[vertex] = latency[kept], importance[kept]
        begins = np.concatenate(([0], np.cumsum([len(run[0]) for run in runs])))
        piece = np.searchsorted(begins, kept, side="right") - 1
        trail[vertex] = np.array(edges)[piece], kept - begins[piece]
    latency, importance = labels[-1]
    gaps = relaxation.gaps(latency, importance) if relaxation else np.zeros(len(latency))
    return ParetoFrontier(latency, importance, gaps, flat.tags, graph.source, trail)


def _position(value: object) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _number(value: object) -> bool:
    if not isinstance(value, float | int):
        if not isinstance(value, Real):
            return False
        value = float(value)
    return not isinstance(value, bool) and abs(value) <= LARGEST
