"""Chooses one of two forms for every part of a graph, at the least sum of costs: a minimum cut.

    cost = sum over parts of  a_i  (first form) or  b_i  (second)
         + sum over (i, j, there, back):   `there` where i has the first form and j the second, `back` the other way

Costs between parts are not negative, so the least sum is the least capacity of a cut between two terminals (Ford,
Fulkerson 1956; Greig, Porteous, Seheult 1989), found exactly by augmenting shortest paths.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

__all__ = ["choose_forms"]

LEAST = 1e-12


def choose_forms(
    first: Sequence[float], second: Sequence[float], between: Iterable[tuple[int, int, float, float]]
) -> list[bool]:
    """Whether each part has its first form. A form that costs `math.inf` is not there; of equal sums the one with more
    second forms is taken."""
    n = len(first)
    source, sink = n, n + 1
    room: list[dict[int, float]] = [{} for _ in range(n + 2)]

    def add(a: int, b: int, capacity: float, back: float = 0.0) -> None:
        room[a][b] = room[a].get(b, 0.0) + capacity
        room[b][a] = room[b].get(a, 0.0) + back

    finite = [v for v in (*first, *second) if math.isfinite(v)]
    pairs = list(between)
    huge = 1.0 + sum(abs(v) for v in finite) + sum(p[2] + p[3] for p in pairs)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        a, b = (v if math.isfinite(v) else huge for v in (a, b))
        least = min(a, b)
        add(source, i, b - least)  # cut where i has the second form
        add(i, sink, a - least)  # cut where it has the first
    for i, j, there, back in pairs:
        add(i, j, there, back)
    while (path := _path(room, source, sink)) is not None:
        flow = min(room[a][b] for a, b in path)
        for a, b in path:
            room[a][b] -= flow
            room[b][a] = room[b].get(a, 0.0) + flow
    reached = _reached(room, source)
    return [i in reached for i in range(n)]


def _reached(room: list[dict[int, float]], source: int) -> dict[int, int]:
    """Every place that still has room from the source, with the place before it."""
    before = {source: source}
    queue = deque([source])
    while queue:
        a = queue.popleft()
        for b, left in room[a].items():
            if left > LEAST and b not in before:
                before[b] = a
                queue.append(b)
    return before


def _path(room: list[dict[int, float]], source: int, sink: int) -> list[tuple[int, int]] | None:
    before = _reached(room, source)
    if sink not in before:
        return None
    path, at = [], sink
    while at != source:
        path.append((before[at], at))
        at = before[at]
    return path[::-1]
