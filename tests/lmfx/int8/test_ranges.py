"""Ranges of activations: over all batches, and by the method that is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmfx.int8.ranges import Ranges
from lmfx.passes.errors import InputError


def values(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (8, 4, 25, 25)).astype(np.float32)


def test_a_range_has_the_values_of_every_batch_and_of_every_channel() -> None:
    ranges = Ranges()
    for first in (5.0, 0.0):
        batch = values(0)
        batch[0, 2, 0, 0], batch[1, 3, 0, 0] = first, -first
        ranges.add({"v": batch})
    assert ranges.found() == {"v": (-5.0, 5.0)}
    highs = ranges.seen["v"].highs
    assert highs is not None and highs.shape == (4,) and highs[2] == 5.0 and highs[0] < 1.0


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_the_other_methods_leave_a_rare_value_out(method: Any) -> None:
    ranges = Ranges(method, percentile=99.0)
    for seed in range(2):
        batch = values(seed)
        batch[0, 0, 0, 0] = 40.0
        ranges.add({"v": batch})
    low, high = ranges.found()["v"]
    assert low < 0 < high < 10 and ranges.seen["v"].high == 40.0
    assert any("channel 0 reaches 40" in w for w in ranges.warnings("v", "conv", True))
    assert any("ranges='percentile'" in w for w in ranges.warnings("v", "add", False))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        Ranges().add({"v": np.full((1, 2), np.inf, np.float32)})
