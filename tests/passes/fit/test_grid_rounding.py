"""Rounding weights by the Gram of what the layer reads."""

from __future__ import annotations

import pytest
import torch

from lmfx.passes.errors import OptionError
from lmfx.passes.fit.grid_rounding import _one_by_one, bias_change, gram_error, nearest, round_by_gram, scales_of


def alike(blocks: int, features: int, samples: int = 400, seed: int = 0) -> torch.Tensor:
    """Samples (blocks, samples, features) whose features are much alike, as those of neighbouring taps are."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(blocks, samples, max(features // 4, 1), generator=generator, dtype=torch.float64)
    mixed = few @ torch.randn(blocks, few.shape[2], features, generator=generator, dtype=torch.float64)
    return mixed + 0.05 * torch.randn(blocks, samples, features, generator=generator, dtype=torch.float64) + 1.0


def sums_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = x.mean(1)
    centred = x - mean[:, None]
    return centred.transpose(1, 2) @ centred / x.shape[1], mean


@pytest.mark.parametrize(("blocks", "features", "out"), [(1, 40, 7), (3, 9, 5), (8, 9, 1), (1, 150, 3)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_no_channel_is_further_off_than_by_nearest_rounding(
    blocks: int, features: int, out: int, per_channel: bool
) -> None:
    gram, _ = sums_of(alike(blocks, features))
    columns = torch.randn(blocks, features, out, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scales = scales_of(columns, per_channel, levels=7)
    by_gram, plain = round_by_gram(columns, gram, scales, 7), nearest(columns, scales, 7)
    ours, theirs = (gram_error(gram, q * scales - columns) for q in (by_gram, plain))
    assert bool((ours <= theirs * (1 + 1e-12)).all())
    assert float(ours.sum()) < 0.5 * float(theirs.sum())  # of features that are much alike, far better


def test_a_channel_that_is_worse_one_by_one_keeps_the_nearest_step() -> None:
    gram, _ = sums_of(alike(1, 8))
    columns = torch.randn(1, 8, 400, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scales = scales_of(columns, levels=1)
    plain = gram_error(gram, nearest(columns, scales, 1) * scales - columns)
    one_by_one = _one_by_one(columns, gram, scales, 1, 1e-2)
    assert one_by_one is not None
    assert bool((gram_error(gram, one_by_one * scales - columns) > 1.01 * plain).any())  # greedy, so some are
    ours = gram_error(gram, round_by_gram(columns, gram, scales, 1) * scales - columns)
    assert bool((ours <= plain * (1 + 1e-12)).all())


def test_the_rounded_weights_are_whole_numbers_on_the_grid() -> None:
    gram, _ = sums_of(alike(1, 30))
    columns = 10 * torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    numbers = round_by_gram(columns, gram, scales_of(columns))
    assert torch.equal(numbers, numbers.round())
    assert float(numbers.abs().max()) <= 127


def test_weights_that_lie_on_the_grid_stay() -> None:
    gram, _ = sums_of(alike(2, 12))
    whole = torch.randint(-127, 128, (2, 12, 5), generator=torch.Generator().manual_seed(3)).double()
    whole[:, 0] = 127
    scales = torch.full((2, 1, 5), 0.25, dtype=torch.float64)
    assert torch.equal(scales_of(whole * 0.25), scales)
    assert torch.equal(round_by_gram(whole * 0.25, gram, scales), whole)


def test_the_bias_takes_the_mean_of_the_error() -> None:
    x = alike(1, 16)
    gram, mean = sums_of(x)
    columns = torch.randn(1, 16, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scales = scales_of(columns, levels=3)
    error = round_by_gram(columns, gram, scales, 3) * scales - columns
    off = x[0] @ error[0] + bias_change(mean, error)
    assert torch.allclose(off.mean(0), torch.zeros(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(off.square().mean(0), gram_error(gram, error)[0], rtol=1e-9)


def test_features_that_never_change_and_columns_of_zeros_are_rounded_to_the_nearest() -> None:
    columns = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    columns[..., 1] = 0
    scales = scales_of(columns)
    assert scales[0, 0, 1] == 1
    dead = torch.zeros(1, 8, 8, dtype=torch.float64)
    assert torch.equal(round_by_gram(columns, dead, scales), nearest(columns, scales))
    half = dead.clone()
    half[0, :4, :4] = torch.eye(4)
    assert bool(round_by_gram(columns, half, scales).isfinite().all())


def test_a_gram_of_other_features_is_refused() -> None:
    with pytest.raises(OptionError, match="one a block"):
        round_by_gram(torch.ones(1, 4, 2), torch.eye(5)[None], torch.ones(1, 1, 2))
