"""One of two forms for every part of a graph, at the least sum of costs."""

from __future__ import annotations

import itertools
import math
import random

from lmfx.passes.solve.minimum_cut import choose_forms

Edges = list[tuple[int, int, float, float]]


def cost(first: list[float], second: list[float], edges: Edges, forms: list[bool]) -> float:
    own = sum(a if f else b for a, b, f in zip(first, second, forms, strict=True))
    return own + sum(
        (there if forms[i] and not forms[j] else 0) + (back if forms[j] and not forms[i] else 0)
        for i, j, there, back in edges
    )


def test_no_other_choice_costs_less() -> None:
    draw = random.Random(0)
    for _ in range(60):
        n = draw.randint(1, 7)
        first, second = ([draw.random() for _ in range(n)] for _ in range(2))
        pairs = [p for p in itertools.combinations(range(n), 2) if draw.random() < 0.5]
        edges = [(i, j, draw.random() / 2, draw.random() / 2) for i, j in pairs]
        best = min(cost(first, second, edges, list(f)) for f in itertools.product((True, False), repeat=n))
        assert math.isclose(cost(first, second, edges, choose_forms(first, second, edges)), best, rel_tol=1e-9)


def test_a_part_between_two_others_takes_their_form_where_changing_costs_more() -> None:
    first, second = [1.0, 3.0, 1.0], [4.0, 2.0, 4.0]
    dear, cheap = ([(0, 1, c, c), (1, 2, c, c)] for c in (0.6, 0.4))
    assert choose_forms(first, second, dear) == [True, True, True]
    assert choose_forms(first, second, cheap) == [True, False, True]


def test_of_equal_sums_the_one_with_more_second_forms_is_taken() -> None:
    assert choose_forms([1.0, 2.0], [1.0, 2.0], [(0, 1, 1.0, 1.0)]) == [False, False]
    assert choose_forms([1.0, 3.0, 1.0], [1.0, 2.0, 9.0], [(0, 1, 1.0, 1.0), (1, 2, 1.0, 1.0)]) == [False, False, True]


def test_a_form_that_is_not_there_is_not_chosen_whatever_it_costs() -> None:
    assert choose_forms([math.inf, 0.0], [9.0, math.inf], [(0, 1, 50.0, 50.0)]) == [False, True]
    assert choose_forms([], [], []) == []
