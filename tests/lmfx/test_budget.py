from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmfx.budget import Budget
from lmfx.passes.errors import BudgetError, LmfxError


@pytest.mark.parametrize(
    ("written", "kind", "value"),
    [
        (0.6, "fraction", 0.6),
        (1, "fraction", 1.0),
        (np.float32(0.5), "fraction", 0.5),
        (Fraction(1, 4), "fraction", 0.25),
        ("0.6", "fraction", 0.6),
        (".5", "fraction", 0.5),
        ("5e-1", "fraction", 0.5),
        ("60%", "fraction", 0.6),
        (" 60 % ", "fraction", 0.6),
        ("100%", "fraction", 1.0),
        ("4.5ms", "ms", 4.5),
        ("4.5 MS", "ms", 4.5),
        ("500us", "ms", 0.5),
        ("500µs", "ms", 0.5),
        ("2s", "ms", 2000.0),
        ("2x", "speedup", 2.0),
        ("1X", "speedup", 1.0),
        ("1.5 x", "speedup", 1.5),
    ],
)
def test_a_budget_is_read_in_every_form(written: Any, kind: str, value: float) -> None:
    budget = Budget.parse(written)
    assert budget.kind == kind
    assert budget.value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (0, "not positive"),
        (0.0, "not positive"),
        (-0.5, "not positive"),
        ("-5ms", "not positive"),
        ("0%", "not positive"),
        ("0x", "not positive"),
        ("1e-999", "not positive"),
        (float("nan"), "not a finite number"),
        (float("inf"), "not a finite number"),
        (-float("inf"), "not a finite number"),
        ("1e999ms", "not a finite number"),
        ("nan", "not understood"),
        ("inf", "not understood"),
        (10**400, "too large"),
        (True, "cannot be True"),
        (False, "cannot be False"),
        (None, "cannot be None"),
        ([0.5], "cannot be"),
        (0.5j, "cannot be"),
        (torch.tensor(0.5), "cannot be"),
        (b"60%", "cannot be"),
        ("", "not understood"),
        ("  ", "not understood"),
        ("abc", "not understood"),
        ("%", "not understood"),
        ("ms", "not understood"),
        ("4,5ms", "not understood"),
        ("4.5ms!", "not understood"),
        ("1_000ms", "not understood"),
        ("2x2x", "not understood"),
        ("5min", "unknown unit 'min'"),
        ("5 fps", "unknown unit 'fps'"),
        ("0.5x", 'slower than the original.*0.5 .*"2x"'),
        (60, 'Did you mean "60%", "60ms" or "60x"'),
        ("60", 'Did you mean "60%", "60ms" or "60x"'),
        (1.0001, "more than the original"),
        ("150%", "at most 100%"),
    ],
)
def test_what_is_no_budget_is_refused_with_what_was_seen_and_what_to_write(written: Any, says: str) -> None:
    with pytest.raises(BudgetError, match=says) as caught:
        Budget.parse(written)
    assert isinstance(caught.value, LmfxError)
    assert '"60%"' in str(caught.value) or "Did you mean" in str(caught.value)


def test_a_budget_is_checked_when_it_is_made_directly() -> None:
    with pytest.raises(BudgetError, match="kind 'percent' is unknown"):
        Budget("percent", 0.5)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="not positive"):
        Budget("ms", -1.0)


def test_a_budget_can_not_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget.parse(0.5).value = 2.0  # type: ignore[misc]


def test_a_budget_is_resolved_against_the_original() -> None:
    assert Budget.parse("60%").resolve(10.0) == pytest.approx(6.0)
    assert Budget.parse("4x").resolve(10.0) == pytest.approx(2.5)
    assert Budget.parse("4.5ms").resolve(10.0) == 4.5


@pytest.mark.parametrize("latency", [0.0, -1.0, float("nan"), float("inf")])
def test_an_original_that_takes_no_time_gives_no_budget(latency: float) -> None:
    with pytest.raises(BudgetError, match="Measure it again"):
        Budget.parse("60%").resolve(latency)


positive = st.floats(1e-6, 1e6)


@given(st.floats(1e-6, 1.0), positive)
def test_a_fraction_a_percentage_and_a_speedup_say_the_same(share: float, original: float) -> None:
    expected = pytest.approx(share * original, rel=1e-9)
    assert Budget.parse(share).resolve(original) == expected
    assert Budget.parse(f"{share!r}").resolve(original) == expected
    assert Budget.parse(f"{share * 100!r}%" if share * 100 <= 100 else "100%").resolve(original) == expected
    assert Budget.parse(f"{1 / share!r}x").resolve(original) == expected


@given(positive, positive)
def test_an_absolute_budget_does_not_depend_on_the_original(ms: float, original: float) -> None:
    for text in (f"{ms!r}ms", f"{ms * 1000!r} us", f"{ms / 1000!r}s"):
        assert Budget.parse(text).resolve(original) == pytest.approx(ms, rel=1e-9)


@given(positive)
def test_a_budget_of_one_asks_for_no_change(original: float) -> None:
    for written in (1, 1.0, "1", "100%", "1x"):
        assert Budget.parse(written).resolve(original) == original


@given(st.one_of(st.floats(1e-3, 1.0), st.integers(1, 100).map("{}%".format), st.integers(1, 99).map("{}ms".format)))
def test_parsing_twice_changes_nothing_and_what_is_printed_can_be_read(written: float | str) -> None:
    budget = Budget.parse(written)
    assert Budget.parse(budget) is budget
    again = Budget.parse(str(budget))
    assert again.kind == budget.kind
    assert again.value == pytest.approx(budget.value, rel=1e-5)


@given(st.one_of(st.text(max_size=12), st.floats(), st.integers(), st.none(), st.booleans(), st.binary(max_size=4)))
def test_anything_is_a_budget_or_a_budget_error(written: Any) -> None:
    try:
        budget = Budget.parse(written)
    except BudgetError:
        return
    assert 0 < budget.resolve(7.0) < float("inf")
