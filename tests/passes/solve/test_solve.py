"""The dynamic program against brute force, its refusals, its thinning, and its speed."""

import itertools
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmfx.passes.errors import BudgetError, InfeasibleBudget, OptionError, TableError
from lmfx.passes.solve.dynamic_program import Chain, Entry, ParetoFrontier, solve_chains, solve_series
from lmfx.passes.solve.pareto import pareto, thin

# ---------------------------------------------------------------------------------------------- brute force


def all_paths(chain):
    """Every choice of a chain as a list of entries, a parallel element after its branches."""

    def from_position(position):
        if position == chain.length:
            yield []
        for entry in chain.entries:
            if entry.start == position:
                for branches in itertools.product(*(list(all_paths(b)) for b in entry.branches)):
                    inner = [e for branch in branches for e in branch]
                    for rest in from_position(entry.stop):
                        yield [*inner, entry, *rest]

    yield from from_position(0)


def total(path, fixed=0.0):
    latency, importance = fixed, 0.0
    for entry in path:
        latency += entry.latency
        importance += entry.importance
    return latency, importance


def brute_force(points):
    """The Pareto set of (latency, importance) pairs, in plain Python."""
    kept = []
    for latency, importance in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or importance > kept[-1][1]:
            kept.append((latency, importance))
    return kept


def check_against_brute_force(frontier, paths, fixed=0.0):
    """Same points to the last bit, every choice a real path with that sum, every budget optimal and kept."""
    totals = [total(path, fixed) for path in paths]
    expected = brute_force(totals)
    points = list(zip(frontier.latency.tolist(), frontier.importance.tolist(), strict=True))
    assert points == expected
    assert frontier.gap == 0.0
    sums = {tuple(e.tag for e in path): t for path, t in zip(paths, totals, strict=True)}
    for i, point in enumerate(points):
        assert sums[frontier.choice(i)] == point
    latencies = [latency for latency, _ in points]
    between = [(a + b) / 2 for a, b in itertools.pairwise(latencies)]
    for budget in [*latencies, *between, latencies[-1] + 1]:
        i = frontier.at(budget)
        assert points[i][0] <= budget
        assert points[i][1] == max(v for t, v in totals if t <= budget)
    below = math.nextafter(latencies[0], -1)
    with pytest.raises(InfeasibleBudget) as caught:
        frontier.at(below)
    assert caught.value.latency == latencies[0]


def draw_numbers(rng, kind):
    """Latency and importance: generic floats, small integers (many ties), or tenths (sums that differ by an ulp)."""
    if kind == 0:
        return float(rng.uniform(0, 3)), float(-rng.uniform(0, 2))
    if kind == 1:
        return float(rng.integers(0, 5)), float(-rng.integers(0, 4))
    return int(rng.integers(0, 30)) * 0.1, int(rng.integers(-20, 5)) * 0.1


def random_chain(rng, kind, length, count, depth, tags):
    """A chain with a path (one entry a position), then random spans; at `depth` > 0 some entries have branches."""
    if not length:
        return Chain((), 0)
    entries = []
    for i in range(length + count):
        start = i if i < length else int(rng.integers(0, length))
        stop = i + 1 if i < length else int(rng.integers(start + 1, length + 1))
        branches = ()
        if depth and rng.random() < 0.4:
            branches = tuple(
                random_chain(rng, kind, int(rng.integers(0, 3)), int(rng.integers(0, 2)), depth - 1, tags)
                for _ in range(int(rng.integers(1, 3)))
            )
        entries.append(Entry(start, stop, *draw_numbers(rng, kind), next(tags), branches))
    return Chain(tuple(entries[i] for i in rng.permutation(len(entries))), length)


# ---------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_random_series_agree_with_brute_force_at_every_budget(block):
    for seed in range(100 * block, 100 * block + 100):
        rng = np.random.default_rng(seed)
        chain = random_chain(rng, seed % 3, int(rng.integers(1, 7)), int(rng.integers(0, 9)), 0, itertools.count())
        chain = Chain(tuple(Entry(e.start, e.stop, e.latency, e.importance, i) for i, e in enumerate(chain.entries)),
                      chain.length)  # fmt: skip
        frontier = solve_series([(e.start, e.stop, e.latency, e.importance) for e in chain.entries])
        check_against_brute_force(frontier, list(all_paths(chain)))


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_random_nested_parallels_agree_with_brute_force_at_every_budget(block):
    for seed in range(100 * block, 100 * block + 100):
        rng = np.random.default_rng(10_000 + seed)
        chain = random_chain(rng, seed % 3, int(rng.integers(1, 4)), int(rng.integers(0, 4)), 2, itertools.count())
        paths = list(itertools.islice(all_paths(chain), 20_000))
        assert len(paths) < 20_000, "the instance is too large for brute force; draw smaller ones"
        check_against_brute_force(solve_chains([chain]), paths)


def test_regions_and_the_fixed_remainder_add_up():
    for seed in range(100):
        rng = np.random.default_rng(50_000 + seed)
        tags = itertools.count()
        chains = [random_chain(rng, seed % 3, int(rng.integers(0, 3)), 2, 1, tags) for _ in range(3)]
        products = itertools.product(*(list(all_paths(chain)) for chain in chains))
        paths = [[entry for part in product for entry in part] for product in products]
        check_against_brute_force(solve_chains(chains, 0.7), paths, fixed=0.7)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_series_that_hypothesis_draws_agrees_with_brute_force(data):
    length = data.draw(st.integers(1, 5))
    latencies = st.floats(0, 1e6)
    importances = st.floats(-1e6, 1e6)
    entries = [(i, i + 1, data.draw(latencies), data.draw(importances)) for i in range(length)]
    for _ in range(data.draw(st.integers(0, 6))):
        start = data.draw(st.integers(0, length - 1))
        stop = data.draw(st.integers(start + 1, length))
        entries.append((start, stop, data.draw(latencies), data.draw(importances)))
    chain = Chain(tuple(Entry(*entry, i) for i, entry in enumerate(entries)), length)
    check_against_brute_force(solve_series(entries), list(all_paths(chain)))


def test_both_arrays_ascend_strictly_and_can_not_be_written():
    frontier = solve_series(random_entries(40, 300))
    assert isinstance(frontier, ParetoFrontier)
    assert frontier.latency.dtype == frontier.importance.dtype == np.float64
    assert len(frontier) == len(frontier.latency) == len(frontier.importance) > 10
    assert (np.diff(frontier.latency) > 0).all()
    assert (np.diff(frontier.importance) > 0).all()
    with pytest.raises(ValueError, match="read-only"):
        frontier.latency[0] = 0


def test_a_choice_is_a_contiguous_path_whose_left_to_right_sums_are_the_point():
    entries = random_entries(200, 2000, seed=3)
    frontier = solve_series(entries)
    for i in [0, 1, len(frontier) // 2, len(frontier) - 1, -1]:
        choice = frontier.choice(i)
        assert_path(entries, choice, 200)
        assert total([Entry(*entries[c], c) for c in choice]) == (frontier.latency[i], frontier.importance[i])


def test_an_empty_branch_is_a_plain_skip():
    residual = Entry(0, 1, 0.5, 0.0, "add", (Chain((Entry(0, 1, 2.0, 0.0, "conv"),), 1), Chain((), 0)))
    frontier = solve_chains([Chain((residual, Entry(0, 1, 1.0, -1.0, "merged")), 1)])
    assert frontier.latency.tolist() == [1.0, 2.5]
    assert [frontier.choice(i) for i in range(2)] == [("merged",), ("conv", "add")]


def test_nothing_to_choose_is_one_point():
    for frontier, latency in ((solve_chains([Chain((), 0)]), 0.0), (solve_chains([], 3.5), 3.5)):
        assert (frontier.latency.tolist(), frontier.importance.tolist()) == ([latency], [0.0])
        assert frontier.choice(0) == ()
        assert frontier.at(latency) == 0


def test_a_hole_behind_a_branch_and_a_dead_end_are_walked_around():
    entries = [(0, 1, 1, 0), (1, 2, 1, 0), (2, 4, 1, 0), (1, 3, 0, 5), (0, 7, 9, -9), (4, 7, 2, 0)]
    frontier = solve_series(entries)
    assert frontier.latency.tolist() == [5.0]
    assert frontier.choice(0) == (0, 1, 2, 5)


def test_far_apart_positions_cost_no_memory():
    frontier = solve_series([(0, 10**15, 1.0, 0.0), (0, 10**12, 0.25, 0.0), (10**12, 10**15, 0.5, -1.0)])
    assert frontier.latency.tolist() == [0.75, 1.0]


def test_numpy_scalars_generators_and_integers_are_taken_as_they_come():
    rows = [(np.int64(0), np.int32(1), np.float32(0.5), np.float64(-1)), (0, 1, 2, 0), [0, 1, np.float16(1), -0.5]]
    frontier = solve_series(row for row in rows)
    assert frontier.latency.tolist() == [0.5, 1.0, 2.0]
    assert [frontier.choice(i) for i in range(3)] == [(0,), (2,), (1,)]
    assert all(type(i) is int for i in frontier.choice(0))


def test_of_equal_realizations_the_first_entry_is_chosen():
    entries = [(0, 1, 1, 0), (0, 1, 1, 0), (1, 2, 1, 0), (1, 2, 1, 0), (0, 2, 2, 0)]
    assert solve_series(entries).choice(0) == (0, 2)
    assert solve_series(entries[::-1]).choice(0) == (0,)  # now the whole span comes first
    assert solve_series([*entries[1:], entries[0]]).choice(0) == (0, 1)


def test_two_solves_of_one_table_are_equal_in_every_choice():
    entries = [(a, b, float(round(c * 3)), float(round(d * 3))) for a, b, c, d in random_entries(60, 600)]
    for points in ("auto", None, 20):
        one, two = (solve_series(entries, max_points=points) for _ in range(2))
        assert np.array_equal(one.latency, two.latency)
        assert np.array_equal(one.importance, two.importance)
        assert [one.choice(i) for i in range(len(one))] == [two.choice(i) for i in range(len(two))]


def test_the_solver_never_imports_torch():
    # By path, because the package around it may import torch.
    code = (
        "import importlib, sys, types; package = types.ModuleType('p'); package.__path__ = ['passes'];"
        "sys.modules['p'] = package; s = importlib.import_module('p.solve.dynamic_program');"
        "assert s.solve_series([(0, 1, 1.0, 0.0)]).choice(0) == (0,); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


# ---------------------------------------------------------------------------------------------- bad input

nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([], "no entries"),
        ([(0, 1, nan, 0.0)], "entry 0 .*nan.*finite"),
        ([(0, 1, 1.0, 0.0), (0, 1, inf, 0.0)], "entry 1 .*inf.*finite"),
        ([(0, 1, 1.0, nan)], "importance nan.*finite"),
        ([(0, 1, 1.0, -inf)], "importance -inf.*finite"),
        ([(0, 1, 1e300, 0.0)], "1e\\+300.*finite"),
        ([(0, 1, 10**400, 0.0)], "finite"),
        ([(0, 1, -0.1, 0.0)], "latency -0.1.*negative"),
        ([(0, 1, "1", 0.0)], "latency '1'.*finite numbers"),
        ([(0, 1, None, 0.0)], "latency None.*finite numbers"),
        ([(0, 1, True, 0.0)], "latency True.*finite numbers"),
        ([(1, 1, 1.0, 0.0)], "entry 0 .*0 <= start < stop"),
        ([(2, 1, 1.0, 0.0)], "0 <= start < stop"),
        ([(-1, 1, 1.0, 0.0)], "0 <= start < stop"),
        ([(0.0, 1, 1.0, 0.0)], "start and stop must be ints"),
        ([(0, 1.5, 1.0, 0.0)], "start and stop must be ints"),
        ([(False, True, 1.0, 0.0)], "start and stop must be ints"),
        ([(0, "1", 1.0, 0.0)], "start and stop must be ints"),
        ([(0, 1, 1.0)], r"entry 0 is \(0, 1, 1.0\); an entry is \(start, stop"),
        ([(0, 1, 1.0, 0.0, 0.0)], "an entry is"),
        ([7], "entry 0 is 7; an entry is"),
        ([(1, 2, 1.0, 0.0)], "no path .* from 0 to 2.*add an entry"),
        ([(0, 1, 1.0, 0.0), (2, 3, 1.0, 0.0)], "no path .* from 0 to 3: entries reach 1"),
        ([(0, 2, 1.0, 0.0), (1, 3, 1.0, 0.0)], "no path .* from 0 to 3"),
    ],
)
def test_a_bad_table_is_refused_with_the_entry_and_what_to_do(entries, says):
    with pytest.raises(TableError, match=says):
        solve_series(entries)


GOOD = Entry(0, 1, 1.0, 0.0, "good")


@pytest.mark.parametrize(
    ("chain", "says"),
    [
        (Chain((), 1), "no path leads through chain 0 from 0 to 1"),
        (Chain((), -1), "length -1"),
        (Chain((), 1.0), "length 1.0"),
        (Chain((GOOD,), 0), "'good', stops at 1, past the end at 0"),
        (Chain((GOOD, Entry(1, 3, 1.0, 0.0, "far")), 2), "entry 1 of chain 0, 'far', stops at 3"),
        (Chain(((0, 1, 1.0, 0.0),), 1), "give an Entry"),
        ((GOOD,), "give a Chain"),
        (Chain((Entry(0, 1, 1.0, 0.0, "add", (Chain((), 2),)),), 1), "a branch of 'add' from 0 to 2"),
        (Chain((Entry(0, 1, 1.0, 0.0, "add", (Chain((Entry(0, 1, nan, 0.0, "x"),), 1),)),), 1), "branch of 'add'.*nan"),
        (Chain((Entry(0, 1, 1.0, 0.0, "add", ((),)),), 1), "a branch of 'add' is .*give a Chain"),
    ],
)
def test_a_bad_chain_is_refused_with_the_entry_and_what_to_do(chain, says):
    with pytest.raises(TableError, match=says):
        solve_chains([chain])


@pytest.mark.parametrize("fixed", [-1.0, nan, inf, "1", None])
def test_a_fixed_latency_that_is_none_is_refused(fixed):
    with pytest.raises(TableError, match="fixed_latency is"):
        solve_chains([Chain((GOOD,), 1)], fixed)


@pytest.mark.parametrize("points", [1, 0, -5, 2.5, "all", True, nan])
def test_a_wrong_max_points_is_refused(points):
    with pytest.raises(OptionError, match="max_points is"):
        solve_series([(0, 1, 1.0, 0.0)], max_points=points)


@pytest.mark.parametrize("budget", [0.0, 0.999, -1.0, -inf])
def test_a_budget_below_the_fastest_path_raises_with_that_latency(budget):
    with pytest.raises(InfeasibleBudget, match="the fastest takes 1 ms") as caught:
        solve_series([(0, 1, 1.0, -1.0), (0, 1, 2.0, 0.0)]).at(budget)
    assert caught.value.latency == 1.0


@pytest.mark.parametrize("budget", [nan, "60%", None])
def test_a_budget_that_is_no_number_is_refused(budget):
    with pytest.raises(BudgetError, match="give a latency in ms"):
        solve_series([(0, 1, 1.0, 0.0)]).at(budget)


def test_a_point_that_is_not_there_raises_index_error():
    frontier = solve_series([(0, 1, 1.0, 0.0)])
    assert frontier.at(inf) == 0
    for index in (1, -2):
        with pytest.raises(IndexError):
            frontier.choice(index)


# ---------------------------------------------------------------------------------------------- thinning


def random_entries(length, count, seed=1, widest=6):
    """A chain whose layers take 0.5 to 1.5 ms, and spans that save time and lose importance."""
    rng = np.random.default_rng(seed)
    entries = [(i, i + 1, float(rng.uniform(0.5, 1.5)), 0.0) for i in range(length)]
    while len(entries) < count:
        width = int(rng.integers(1, min(widest, length) + 1))
        start = int(rng.integers(0, length - width + 1))
        entries.append((start, start + width, float(rng.uniform(0.1, 1.5) * width**0.5), -float(rng.uniform(0, width))))
    return entries


def correlated_entries(length, count, seed=1):
    """Importance lost is a convex function of the time saved: the hard case, with huge frontiers."""
    rng = np.random.default_rng(seed)
    entries = [(i, i + 1, float(1 + rng.uniform(0, 1)), 0.0) for i in range(length)]
    while len(entries) < count:
        width = int(rng.integers(1, 5))
        start = int(rng.integers(0, length - width + 1))
        left = rng.uniform(0.1, 0.9)
        saved = sum(e[2] for e in entries[start : start + width]) * left
        entries.append((start, start + width, float(saved), float(-width * (1 - left) ** 2 * rng.uniform(0.9, 1.1))))
    return entries


def assert_path(entries, choice, length):
    position = 0
    for c in choice:
        assert entries[c][0] == position
        position = entries[c][1]
    assert position == length


@pytest.mark.parametrize("points", [2, 3, 10, 50, 200])
@pytest.mark.parametrize("make", [random_entries, correlated_entries])
def test_thinning_keeps_true_latencies_the_ends_and_a_sound_gap(make, points):
    for seed in range(4):
        entries = make(30, 200, seed)
        exact = solve_series(entries, max_points=None)
        thinned = solve_series(entries, max_points=points)
        assert exact.gap == 0.0
        assert thinned.latency[0] == exact.latency[0]
        assert thinned.importance[0] == exact.importance[0]
        assert (thinned.latency[-1], thinned.importance[-1]) == (exact.latency[-1], exact.importance[-1])
        for i in range(len(thinned)):
            choice = thinned.choice(i)
            assert_path(entries, choice, 30)
            assert total([Entry(*entries[c], c) for c in choice]) == (thinned.latency[i], thinned.importance[i])
        reached = np.searchsorted(thinned.latency, exact.latency, side="right") - 1
        lost = exact.importance - thinned.importance[reached]
        assert (lost >= 0).all()
        assert (lost <= thinned.gaps[reached]).all()
        assert lost.max() <= thinned.gap
        if len(exact) > 20 * points:
            assert lost.max() > 0  # or nothing was thinned, and this test shows nothing


def test_the_gap_is_sound_and_small_for_nested_parallels_on_top_of_a_fixed_latency():
    def block(i):
        branch = Chain(tuple(Entry(*e, ("inner", i, j)) for j, e in enumerate(random_entries(4, 24, seed=i))), 4)
        return Entry(i, i + 1, 0.1, 0.0, ("add", i), (branch, branch, Chain((), 0)))

    chain = Chain(tuple(block(i) for i in range(6)), 6)
    exact = solve_chains([chain], 5.0, max_points=None)
    thinned = solve_chains([chain], 5.0, max_points=100)
    reached = np.searchsorted(thinned.latency, exact.latency, side="right") - 1
    lost = exact.importance - thinned.importance[reached]
    assert (lost <= thinned.gaps[reached]).all()
    assert 0 < lost.max() <= thinned.gap
    assert np.median(thinned.gaps) < 0.02 * np.ptp(exact.importance)
    assert thinned.latency[0] == exact.latency[0]


def test_entries_that_lead_nowhere_do_not_loosen_the_gap():
    entries = random_entries(30, 200)
    dead_ends = [(29, 31, 0.0, 9.0), (29, 32, 0.0, 9.0), (5, 33, 0.0, 0.0)]  # positions 31 to 33 have no way on
    shifted = [(a, b if b < 30 else 34, c, d) for a, b, c, d in entries]
    plain = solve_series(shifted, max_points=20)
    frontier = solve_series(shifted + dead_ends, max_points=20)
    np.testing.assert_allclose(frontier.gaps, plain.gaps, atol=1e-9)  # the allowance for rounding grows with positions
    assert plain.gap > 0


def test_thinning_with_extreme_numbers_raises_nothing():
    for scale in (1e-60, 1e-9, 1e9, 1e55):
        for other in (1e-60, 1.0, 1e55):
            entries = [(a, b, c * scale, d * other) for a, b, c, d in random_entries(20, 100)]
            frontier = solve_series(entries, max_points=5)
            assert frontier.latency[0] == solve_series(entries, max_points=None).latency[0]
            assert np.isfinite(frontier.gaps).all()


def test_a_small_problem_is_exact_by_default():
    entries = random_entries(52, 391)
    frontier, exact = solve_series(entries), solve_series(entries, max_points=None)
    assert frontier.gap == 0.0
    assert np.array_equal(frontier.latency, exact.latency)
    assert np.array_equal(frontier.importance, exact.importance)


def test_thin_keeps_one_label_a_cell_the_one_with_the_best_potential():
    latency = np.arange(9.0)
    importance = np.arange(9.0)
    potential = np.array([0, -3, -1, -2, -5, -4, -4, -9, 0.0])
    assert thin(latency, importance, potential, 4).tolist() == [0, 2, 5, 8]
    assert thin(latency, importance, potential, 2).tolist() == [0, 8]
    assert len(thin(latency, importance, potential, 5)) <= 5


def test_pareto_of_equal_labels_keeps_the_first():
    latency = np.array([1.0, 1.0, 0.5, 1.0, 2.0])
    importance = np.array([0.0, 2.0, -1.0, 2.0, 2.0])
    assert pareto(latency, importance).tolist() == [2, 1]
    assert pareto(np.array([1.0]), np.array([0.0])).tolist() == [0]


# ---------------------------------------------------------------------------------------------- speed


def seconds(work):
    """(CPU seconds, best of three, and what `work` gives)"""
    best = inf
    for _ in range(3):
        begin = time.process_time()
        result = work()
        best = min(best, time.process_time() - begin)
    return best, result


def machine():
    """How many times slower this machine is, here and now, than one that adds half a million squares in 20 ms."""
    return max(1.0, seconds(lambda: sum(i * i for i in range(500_000)))[0] / 0.02)


def test_all_budgets_of_391_entries_take_milliseconds():
    # 20 ms is asked for; three times that here, because test machines are shared. benchmarks/speed/solver.py has the
    # figure.
    entries = random_entries(52, 391)
    assert seconds(lambda: solve_series(entries))[0] < 0.06 * machine()


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("make", [random_entries, correlated_entries])
def test_a_thousand_layers_with_ten_thousand_entries_take_under_a_second(make, integers):
    entries = make(1000, 10_000)
    if integers:
        entries = [(a, b, float(max(1, round(40 * c))), d) for a, b, c, d in entries]
    taken, frontier = seconds(lambda: solve_series(entries))
    assert taken < 3.0 * machine()  # 1 s is asked for; see above
    assert_path(entries, frontier.choice(len(frontier) // 2), 1000)
    assert np.median(frontier.gaps) < 1e-3 * np.ptp(frontier.importance)
