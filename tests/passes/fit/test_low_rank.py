"""A conv through fewer channels, by what its outputs are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmfx.passes.fit.low_rank import LowRank, low_rank, principal


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(count: int = 4000) -> Tensor:
    """Samples of (in 5, taps 9) that vary far more in some directions than in others."""
    return draw(count, 8, seed=1) @ (draw(8, 45, seed=2) * 2.0 ** -torch.arange(8.0)[:, None].double())


def error(found: LowRank, weight: Tensor, x: Tensor) -> float:
    y, made = (x @ w.flatten(1).T for w in (weight, found.product))
    return float((y - made).square().sum() / y.square().sum())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_weight_of_that_rank_is_found_as_it_is(rank: int) -> None:
    weight = LowRank(draw(rank, 5, 9), draw(7, rank, seed=3)).product
    y = inputs() @ weight.flatten(1).T
    for found in (low_rank(weight, rank), low_rank(weight, rank, principal(y.T @ y))):
        assert torch.allclose(found.product, weight, atol=1e-9)
        assert found.first.shape == (rank, 5, 9) and found.pointwise.shape == (7, rank)


def test_what_is_read_decides_and_no_other_pair_is_better() -> None:
    weight, x = draw(7, 5, 9), inputs()
    y = x @ weight.flatten(1).T
    found = low_rank(weight, 3, principal(y.T @ y))
    least = error(found, weight, x)
    assert least < 0.5 * error(low_rank(weight, 3), weight, x)
    singular = torch.linalg.svdvals(y).square()  # Eckart and Young
    assert least == pytest.approx(float(singular[3:].sum() / singular.sum()), rel=1e-6)
    errors = [error(low_rank(weight, r, principal(y.T @ y)), weight, x) for r in range(1, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-20


def test_of_directions_that_no_sample_shows_the_weight_decides() -> None:
    weight = LowRank(draw(3, 5, 9), draw(7, 3, seed=3)).product
    y = inputs(2) @ weight.flatten(1).T
    for covariance in (y.T @ y, torch.zeros(7, 7, dtype=torch.float64)):
        assert torch.allclose(low_rank(weight, 3, principal(covariance, weight)).product, weight, atol=1e-6)
    assert not torch.allclose(low_rank(weight, 3, principal(y.T @ y)).product, weight, atol=1e-2)
    nothing = torch.zeros_like(weight)
    assert torch.equal(low_rank(nothing, 2, principal(torch.zeros(7, 7), nothing)).product, nothing)
