"""A dense conv as a depthwise and a pointwise one, by what it reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmfx.passes.fit import factors
from lmfx.passes.fit.factors import Factors, first_factors, improved


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(channels: int, taps: int, seed: int = 1) -> Tensor:
    """Sums of inputs whose neighbours are alike, with channels of very different size."""
    size = channels * taps
    mix = torch.eye(size, dtype=torch.float64) * 0.1 + draw(size, 6, seed=seed) @ draw(6, size)
    mix = mix * (10 ** draw(channels, 1, seed=seed + 1)).repeat_interleave(taps, 0)
    return (mix @ mix.T).view(channels, taps, channels, taps)


def error(found: Factors, weight: Tensor, gram: Tensor) -> float:
    left = (weight - found.product).flatten(1)
    whole = weight.flatten(1)
    g = gram.reshape(left.shape[1], -1)
    return float(((left @ g) * left).sum() / ((whole @ g) * whole).sum())


@pytest.mark.parametrize("multiplier", [1, 2, 3])
@pytest.mark.parametrize("taps", [3, 9, 27])
def test_a_product_is_found_as_it_is(multiplier: int, taps: int) -> None:
    weight = Factors(draw(5, multiplier, taps), draw(7, 5, multiplier, seed=3)).product
    found = first_factors(weight, multiplier)
    assert torch.allclose(found.product, weight, atol=1e-12)
    again = improved(found, weight, correlated(5, taps), 0.01)
    assert torch.allclose(again.product, weight, atol=1e-10)
    assert found.depthwise.shape == (5, multiplier, taps) and found.pointwise.shape == (7, 5, multiplier)


def test_as_many_filters_as_taps_are_the_conv_itself() -> None:
    weight = draw(6, 4, 4)
    assert torch.allclose(first_factors(weight, 4).product, weight, atol=1e-12)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_what_is_read_decides(multiplier: int) -> None:
    weight, gram = draw(8, 6, 9), correlated(6, 9)
    begin = first_factors(weight, multiplier)
    found = improved(begin, weight, gram, 1e-6)
    assert error(found, weight, gram) < 0.5 * error(begin, weight, gram)
    assert torch.allclose(found.depthwise.norm(dim=2), torch.ones(6, multiplier, dtype=torch.float64))


def test_the_pointwise_half_is_the_best_for_its_filters() -> None:
    weight, gram = draw(8, 6, 9), correlated(6, 9)
    found = improved(first_factors(weight, 1), weight, gram, 0.0)
    least = error(found, weight, gram)
    for seed in range(5):
        step = 1e-3 * found.pointwise.abs().mean() * draw(*found.pointwise.shape, seed=seed)
        assert error(Factors(found.depthwise, found.pointwise + step), weight, gram) > least


def test_two_filters_are_no_worse_than_one() -> None:
    weight, gram = draw(8, 6, 9), correlated(6, 9)
    one, two = (error(improved(first_factors(weight, m), weight, gram, 1e-9), weight, gram) for m in (1, 2))
    assert two < one


@pytest.mark.parametrize("dead", ["a channel", "all but one tap", "everything"])
def test_inputs_that_never_vary_leave_finite_factors(dead: str) -> None:
    weight, gram = draw(5, 4, 9), correlated(4, 9)
    if dead == "a channel":
        gram[1], gram[:, :, 1] = 0, 0
    elif dead == "all but one tap":
        gram[:, 1:], gram[:, :, :, 1:] = 0, 0
    else:
        gram.zero_()
    begin = first_factors(weight, 1)
    found = improved(begin, weight, gram, 0.0)
    assert bool(found.product.isfinite().all())
    if dead == "everything":
        assert found is begin
    else:
        assert error(found, weight, gram) <= error(begin, weight, gram)


def test_a_weight_of_zeros_has_factors() -> None:
    weight = torch.zeros(3, 4, 9, dtype=torch.float64)
    found = improved(first_factors(weight, 2), weight, correlated(4, 9), 0.1)
    assert torch.equal(found.product, weight)


def test_a_step_that_makes_them_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = draw(5, 4, 9), correlated(4, 9)
    begin = improved(first_factors(weight, 1), weight, gram, 0.0)
    monkeypatch.setattr(factors, "_depthwise", lambda made, seen, gram: draw(4, 1, 9, seed=9))
    assert improved(begin, weight, gram, 0.0) is begin


def test_sums_that_rounding_made_indefinite_leave_the_filters_as_they_are() -> None:
    weight, gram = draw(5, 4, 9), -torch.eye(36, dtype=torch.float64)
    begin = first_factors(weight, 1)
    assert factors._depthwise(begin, weight.flatten(1) @ gram, gram) is begin.depthwise
