"""Axes hold their values, and their ticks are round numbers at the right places."""

from __future__ import annotations

import itertools

import pytest

from lmfx.report.charts import linear, number, symlog


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.93, 5.02], [3.0, 3.0], [0.0, 0.0], [1e-7, 9e-7], [-2.0, 7e4]])
def test_a_linear_axis_holds_its_values_and_its_ticks_are_in_order(values: list[float]) -> None:
    axis = linear(values, 10.0, 110.0)
    assert axis.low <= min(values) and max(values) <= axis.high
    assert [axis.at(axis.low), axis.at(axis.high)] == pytest.approx([10.0, 110.0])
    places = [at for at, _ in axis.labels]
    assert places == sorted(places) and 2 <= len(places) <= 12
    assert len({text for _, text in axis.labels}) == len(places)


def test_an_axis_may_run_upwards_and_begin_at_zero() -> None:
    axis = linear([4.0, 9.0], 200.0, 0.0, zero=True)
    assert axis.low == 0.0 and axis.at(0.0) == 200.0 and axis.at(axis.high) == 0.0


def test_powers_of_ten_are_apart_and_what_is_smaller_is_linear() -> None:
    axis = symlog([0.0, 0.04, 2.5], 0.0, 100.0)
    assert axis.ticks == (0.0, 0.01, 0.1, 1.0)
    a, b, c, d = (axis.at(t) for t in axis.ticks)
    assert a == 0.0 and b < c < d <= 100.0
    assert axis.at(2.5) == pytest.approx(100.0)
    assert axis.at(0.002) == pytest.approx(2 * axis.at(0.001), rel=0.15)


def test_small_losses_are_apart_and_not_at_zero() -> None:
    losses = [0.0, 3e-5, 4e-4, 0.2, 30.0]
    axis = symlog(losses, 0.0, 240.0)
    places = [axis.at(v) for v in losses]
    assert places[0] == 0.0 and all(b - a > 10 for a, b in itertools.pairwise(places))
    assert axis.ticks[1] <= 3e-5 and axis.ticks[-1] == 10.0


def test_losses_that_are_only_rounded_do_not_take_the_axis() -> None:
    axis = symlog([0.0, 1e-17, 0.5, 2.0], 0.0, 240.0)
    assert len(axis.ticks) <= 9 and axis.ticks[1] == pytest.approx(1e-6)
    assert axis.at(1e-17) < 1e-6


def test_no_label_of_a_loss_is_longer_than_five_letters() -> None:
    for least in (1e-7, 1e-5, 1e-4, 1e-3, 0.1):
        texts = [text for _, text in symlog([0.0, least, 0.5], 240.0, 0.0).labels]
        assert max(map(len, texts)) <= 5 and texts[0] == "0"
        assert [float(text) for text in texts[1:]] == pytest.approx(symlog([0.0, least, 0.5], 240.0, 0.0).ticks[1:])
    assert symlog([0.0], 0.0, 240.0).at(0.0) == 0.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (12345.6, "12,346"),
        (123.4, "123"),
        (0.000123, "0.000123"),
        (-2.0, "-2"),
        (1e-5, "0.00001"),
        (3e-7, "3e-7"),
    ],
)
def test_numbers_are_short_and_without_exponents(value: float, text: str) -> None:
    assert number(value) == text
    assert number(float("nan")) == "nan"
