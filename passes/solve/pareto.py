"""Keeps the labels of `dynamic_program` that no other dominates, and thins them when there are too many.

Pareto set     labels sorted by latency whose importance is above that of all before them.

Relaxation     For a slope s >= 0 (importance a ms), B[i](s) = max of (importance - s latency) over all paths from
               vertex i to the end is a longest path, so cheap. By weak duality, whatever path led to label (l, v) at i,

                   v  <=  min over s of  ( B[0](s) - B[i](s) + s l )          potential = v - that bound  <=  0
                   best importance within T  <=  U(T) = min over s of  ( B[0](s) + s T )

               The first says how far a label is below the concave hull of everything through it, the second bounds
               what any budget can reach, nested parallels included (Lagrangian relaxation of the latency constraint).

Thinning       Along the staircase, cells of equal length in (latency + importance, both scaled to 1); of each cell
               stays the label with the best potential, so paths on the hull survive every thinning. Keeping the
               last label of each cell instead loses two to ten times as much on chains of 1,000 layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["FloatArray", "Graph", "IntArray", "Relaxation", "pareto", "thin"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]

# Slopes of the relaxation: a coarse grid of decades around the mean slope, then refined where the hull is long.
COARSE = np.concatenate((np.geomspace(1e6, 1e-6, 49), [0.0]))
SLOPES = 192


def pareto(latency: FloatArray, importance: FloatArray) -> IntArray:
    """Indices of the Pareto-optimal labels, by ascending latency; of equal labels the first."""
    order = np.argsort(latency, kind="stable")  # a merge: the input is a few sorted runs
    ranked = importance[order]
    best = np.maximum.accumulate(ranked)
    better = np.empty(len(order), dtype=bool)
    better[:1] = True
    np.greater(ranked[1:], best[:-1], out=better[1:])
    kept = order[better]
    # Of labels with equal latency the last one kept has the best importance.
    sorted_latency = latency[kept]
    last = np.empty(len(kept), dtype=bool)
    last[-1:] = True
    np.less(sorted_latency[:-1], sorted_latency[1:], out=last[:-1])
    return kept if last.all() else kept[last]


def thin(latency: FloatArray, importance: FloatArray, potential: FloatArray, points: int) -> IntArray:
    """Indices of at most `points` (>= 2) labels of a Pareto set, ascending: first, last, and the best of each cell."""
    last = len(latency) - 1
    cells = points - 2
    arc = (latency - latency[0]) / (latency[-1] - latency[0]) + (importance - importance[0]) / (
        importance[-1] - importance[0]
    )
    cell = np.minimum((arc * (cells / 2)).astype(np.intp), cells - 1)[1:-1] if cells else np.empty(0, dtype=np.intp)
    if not len(cell):
        return np.array([0, last])
    inner = potential[1:-1]
    starts = np.flatnonzero(np.concatenate(([True], cell[1:] > cell[:-1])))
    top = np.maximum.reduceat(inner, starts)
    winners = np.flatnonzero(inner == np.repeat(top, np.diff(np.append(starts, len(cell)))))
    winners = winners[np.concatenate(([True], cell[winners[1:]] > cell[winners[:-1]]))]  # one a cell
    return np.concatenate(([0], winners + 1, [last]))


class Graph:
    """A flat graph of entries from vertex 0 to the last; every edge leads upwards.

    Edges that cannot be on the frontier are left out: those from which the end cannot be reached, and those that
    another edge with the same ends dominates (of equal ones the first stays). `into[j]` and `out[i]` are edge indices.
    """

    def __init__(self, vertices: int, edges: Sequence[tuple[int, int, float, float]]) -> None:
        self.vertices = vertices
        self.source = np.array([e[0] for e in edges], dtype=np.intp)
        self.target = np.array([e[1] for e in edges], dtype=np.intp)
        self.latency = np.array([e[2] for e in edges], dtype=np.float64)
        self.importance = np.array([e[3] for e in edges], dtype=np.float64)
        self.into: list[list[int]] = [[] for _ in range(vertices)]
        self.out: list[list[int]] = [[] for _ in range(vertices)]

        order = np.lexsort((-self.importance, self.latency, self.target, -self.source)).tolist()
        leads_on = [False] * vertices
        leads_on[-1] = True
        kept = []
        ends, best = (-1, -1), 0.0
        for i in order:  # from the last source to the first, so that leads_on is final where it is read
            source, target, _, importance = edges[i]
            if not leads_on[target] or (ends == (source, target) and importance <= best):
                continue
            ends, best = (source, target), importance
            leads_on[source] = True
            kept.append(i)
        for i in sorted(kept):
            self.into[edges[i][1]].append(i)
            self.out[edges[i][0]].append(i)

    def longest(self, cost: FloatArray, gain: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Longest paths to the end for weights (gain importance - cost latency), one for each of k weights.

        Returns their lengths from every vertex, (vertices, k), and latency and importance of those from vertex 0.
        """
        size = len(cost)
        columns = np.arange(size)
        length = np.zeros((self.vertices, size))
        latency = np.zeros((self.vertices, size))
        importance = np.zeros((self.vertices, size))
        for vertex in range(self.vertices - 2, -1, -1):
            edges = self.out[vertex]
            if not edges:
                continue  # not on any path from 0 to the end
            target = self.target[edges]
            own_latency, own_importance = self.latency[edges], self.importance[edges]
            lengths = length[target]
            lengths += own_importance[:, None] * gain
            lengths -= own_latency[:, None] * cost
            pick = lengths.argmax(axis=0)
            length[vertex] = lengths[pick, columns]
            latency[vertex] = latency[target[pick], columns] + own_latency[pick]
            importance[vertex] = importance[target[pick], columns] + own_importance[pick]
        return length, latency[0], importance[0]


class Relaxation:
    """Upper bounds on what a graph can reach, from longest paths at some slopes (see the module's docstring)."""

    def __init__(self, graph: Graph, fixed: float) -> None:
        ends = graph.longest(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
        width, height = float(ends[1][1] - ends[1][0]), float(ends[2][1] - ends[2][0])
        slopes = COARSE * np.clip(height / width, 1e-100, 1e100) if width > 0 and height > 0 else np.array([1.0, 0.0])
        length, latency, importance = graph.longest(slopes, np.ones(len(slopes)))
        for size in (SLOPES // 2, SLOPES) if len(slopes) > 2 else ():
            # New slopes where the path of one slope is far from that of the next; none are found on a straight hull.
            arc = np.maximum.accumulate((latency - latency[0]) / width + (importance - importance[0]) / height)
            targets = np.linspace(arc[0], arc[-1], size - len(slopes) + 2)[1:-1]
            after = np.clip(np.searchsorted(arc, targets), 1, len(arc) - 1)
            part = np.clip((targets - arc[after - 1]) / np.maximum(arc[after] - arc[after - 1], 1e-300), 0, 1)
            slopes = np.unique(np.concatenate((slopes, slopes[after - 1] * (1 - part) + slopes[after] * part)))[::-1]
            length, latency, importance = graph.longest(slopes, np.ones(len(slopes)))
        self.vertices = graph.vertices
        self.slopes = slopes  # descending, the last one is 0
        self.total = length[0] - slopes * fixed
        self.before = self.total - length  # (vertices, k): importance - s latency that a label at a vertex can have
        self.fixed = fixed

    def potential(self, vertex: int, latency: FloatArray, importance: FloatArray) -> FloatArray:
        """How far labels of a vertex (ascending latency) are below the hull of all that pass it; about <= 0."""
        lines = self.before[vertex]
        bends = np.diff(lines) / -np.diff(self.slopes)  # where neighbouring lines cross
        at = np.sort(np.concatenate((latency[[0, -1]], np.clip(bends, latency[0], latency[-1]))))
        # Exact at the bends and a chord between them; only the choice of labels rests on it, never a bound.
        bound = np.min(lines + self.slopes * at[:, None], axis=1)
        return importance - np.interp(latency, at, bound)

    def gaps(self, latency: FloatArray, importance: FloatArray) -> FloatArray:
        """For each frontier point: what a budget between it and the next can lose at most, rounding included."""
        gaps = np.zeros(len(latency))
        noise = 4 * self.vertices * np.finfo(np.float64).eps
        scale = np.abs(self.total) + 2 * self.slopes * self.fixed
        for low in range(0, len(latency) - 1, 4096):
            reach = latency[1:][low : low + 4096, None] * self.slopes
            bound = np.min(self.total + reach + noise * (scale + reach), axis=1)
            gaps[low : low + len(bound)] = bound - importance[:-1][low : low + 4096]
        return np.maximum(gaps, 0.0)  # within rounding: the last point is the best there is
