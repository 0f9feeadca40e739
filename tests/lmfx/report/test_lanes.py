"""Whatever the graph, no block lies on another one, and no line runs through a block."""

from __future__ import annotations

import random

import pytest

from lmfx.report.lanes import in_lanes


def graph(seed: int) -> tuple[int, set[tuple[int, int]]]:
    """Rows and edges of a random graph whose edges lead downwards; every row but the first reads something."""
    rng = random.Random(seed)
    rows = rng.randint(2, 40)
    edges = {(rng.randrange(b) if rng.random() < 0.4 else b - 1, b) for b in range(1, rows)}
    edges |= {tuple(sorted(rng.sample(range(rows), 2))) for _ in range(rng.randint(0, rows // 2))}  # type: ignore[misc]
    return rows, edges


@pytest.mark.parametrize("seed", range(40))
def test_a_line_runs_through_no_block_and_shares_its_way_only_with_its_own(seed: int) -> None:
    rows, edges = graph(seed)
    found = in_lanes(rows, edges)
    assert {(r.source, r.target) for r in found.routes} == edges
    for route in found.routes:
        assert (route.lane is None) != (route.track is None)
        if route.lane is not None:
            between = range(route.source + 1, route.target)
            assert [row for row in between if found.lane[row] == route.lane] == []
    tracks = [r for r in found.routes if r.track is not None]
    for a in tracks:
        for b in tracks:
            if a.track == b.track and a.source != b.source:
                assert a.target <= b.source or b.target <= a.source


@pytest.mark.parametrize("seed", range(20))
def test_lines_in_one_lane_that_overlap_begin_or_end_together(seed: int) -> None:
    rows, edges = graph(seed)
    found = in_lanes(rows, edges)
    laned = [r for r in found.routes if r.lane is not None]
    for a in laned:
        for b in laned:
            if a.lane == b.lane and max(a.source, b.source) < min(a.target, b.target):
                assert a.source == b.source or a.target == b.target


def test_a_chain_is_one_lane() -> None:
    found = in_lanes(5, [(i, i + 1) for i in range(4)])
    assert (found.lane, found.lanes, found.tracks) == ((0,) * 5, 1, 0)


def test_a_skip_runs_beside_its_block_and_a_branch_has_a_lane_of_its_own() -> None:
    skip = in_lanes(4, [(0, 1), (1, 2), (2, 3), (0, 3)])
    assert (skip.lanes, skip.tracks) == (1, 1)
    branch = in_lanes(5, [(0, 1), (1, 2), (0, 3), (2, 4), (3, 4)])
    assert branch.lane == (0, 0, 0, 1, 0)
    assert branch.tracks == 0


def test_nested_skips_have_their_own_tracks_the_short_one_next_to_the_blocks() -> None:
    found = in_lanes(6, [(i, i + 1) for i in range(5)] + [(0, 5), (1, 4)])
    assert {(r.source, r.target): r.track for r in found.routes if r.track is not None} == {(1, 4): 0, (0, 5): 1}


def test_nothing_is_nothing() -> None:
    assert in_lanes(0, []).lanes == 0


def test_many_vectors_for_one_long_path_do_not_take_a_lane_each() -> None:
    sides, rest = 12, 40
    edges = [(0, 1 + i) for i in range(sides)]  # each is read far below
    edges += [(i, i + 1) for i in range(sides + 1, sides + rest)]
    edges += [(1 + i, sides + 4 + 3 * i) for i in range(sides)] + [(0, sides + 1)]
    found = in_lanes(sides + rest + 1, edges)
    assert found.lanes <= 5
    assert found.tracks >= sides
