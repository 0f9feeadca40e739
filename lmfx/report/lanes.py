"""Places the blocks of a drawing in lanes, and leads long edges past them, so that nothing lies on anything else.

Each block has a row of its own, so only columns are to be found:

    lanes    the graph is cut into paths: of the readers of a block the one from which most blocks follow goes on in its
             lane. The longest path has lane 0, each other one the first lane that is free beside it
    tracks   an edge between two paths that ends at neither's end (a skip) goes down a narrow track left of lane 0;
             those of one block share it, short ones are further in

A free lane or track is one that no other path, or edge, uses in the same rows: first fit over intervals.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Lanes", "Route", "in_lanes"]

Edge = tuple[int, int]
CROWDED, NEAR = 4, 4  # lanes from which on room is scarce; rows that an edge may then be long to have a lane


@dataclass(frozen=True)
class Route:
    """How an edge leads from one row to another: down a `lane`, or down a `track` (the other is None)."""

    source: int
    target: int
    lane: int | None
    track: int | None


@dataclass(frozen=True)
class Lanes:
    """The lane of each row, the routes of all edges, and how many lanes and tracks there are."""

    lane: tuple[int, ...]
    routes: tuple[Route, ...]
    lanes: int
    tracks: int


def in_lanes(rows: int, edges: Iterable[Edge]) -> Lanes:
    """Lanes and routes of a graph whose edges lead downwards; where lanes are many, long edges have tracks."""
    edges = sorted(set(edges))
    found = _laid(rows, edges, rows)
    if found.lanes <= CROWDED:
        return found
    narrow = _laid(rows, edges, NEAR)
    return narrow if narrow.lanes < found.lanes else found


def _laid(rows: int, edges: list[Edge], near: int) -> Lanes:
    """Lanes and routes; an edge to another path that is longer than `near` rows takes no lane."""
    after, before = defaultdict(list), defaultdict(list)
    for a, b in edges:
        after[a].append(b)
        before[b].append(a)
    path_of, paths = _paths(rows, after, before)
    lane_of = _lanes_of(paths, after, before, near)
    lane = tuple(lane_of[path_of[row]] for row in range(rows))
    free: dict[int, list[Edge]] = defaultdict(list)  # block -> its edges that need a track
    routes: list[Route] = []
    for a, b in edges:
        mine, theirs = paths[path_of[a]], paths[path_of[b]]
        if (mine is theirs and mine.index(b) == mine.index(a) + 1) or (a == mine[-1] and b - a <= near):
            routes.append(Route(a, b, lane[a], None))
        elif b == theirs[0] and b - a <= near:
            routes.append(Route(a, b, lane[b], None))
        else:
            free[a].append((a, b))
    spans = {a: (a, max(b for _, b in some)) for a, some in free.items()}
    track_of = _first_fit(sorted(spans.items(), key=lambda item: item[1][1] - item[1][0]))
    routes += [Route(a, b, None, track_of[a]) for a, some in free.items() for _, b in some]
    return Lanes(
        lane, tuple(sorted(routes, key=lambda r: (r.source, r.target))), _count(lane), _count(track_of.values())
    )


def _count(places: Iterable[int]) -> int:
    return max(places, default=-1) + 1


def _paths(rows: int, after: dict[int, list[int]], before: dict[int, list[int]]) -> tuple[list[int], list[list[int]]]:
    """The path of each row, and the rows of each path."""
    down, up = [0] * rows, [0] * rows
    for row in reversed(range(rows)):
        down[row] = max((down[b] + 1 for b in after[row]), default=0)
    for row in range(rows):
        up[row] = max((up[a] + 1 for a in before[row]), default=0)
    follows = {row: max(after[row], key=lambda b: (down[b], -b)) for row in range(rows) if after[row]}
    path_of, paths = [-1] * rows, list[list[int]]()
    for row in range(rows):
        mine = [a for a in before[row] if follows.get(a) == row]
        if mine:
            path_of[row] = path_of[max(mine, key=lambda a: (up[a], -a))]
            paths[path_of[row]].append(row)
        else:
            path_of[row] = len(paths)
            paths.append([row])
    return path_of, paths


def _lanes_of(
    paths: list[list[int]], after: dict[int, list[int]], before: dict[int, list[int]], near: int
) -> dict[int, int]:
    """The lane of each path, the longest first; a path needs its lane from what it reads to what reads it."""
    spans = {}
    for i, path in enumerate(paths):
        starts = min((a for a in before[path[0]] if path[0] - a <= near), default=path[0])
        ends = max((b for b in after[path[-1]] if b - path[-1] <= near), default=path[-1])
        spans[i] = starts, max(ends, starts + 1)
    longest = sorted(spans.items(), key=lambda item: -len(paths[item[0]]))
    return _first_fit(longest)


def _first_fit(spans: Iterable[tuple[int, Edge]]) -> dict[int, int]:
    """A place for each interval (by its key) such that no two in one place overlap; touching ends do not."""
    taken: list[list[Edge]] = []
    found: dict[int, int] = {}
    for key, (start, stop) in spans:
        place = next((i for i, some in enumerate(taken) if all(stop <= a or start >= b for a, b in some)), len(taken))
        if place == len(taken):
            taken.append([])
        taken[place].append((start, stop))
        found[key] = place
    return found
