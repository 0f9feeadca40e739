"""The loss of outputs that differ by a known change, exactly and to second order."""

import pytest
import torch

import lmfx
from lmfx.calibration.images import Calibration
from lmfx.quality import Judge
from lmfx.quality.loss_space import FEATURES, LossSpace
from tests.lmfx.quality.test_measures import Heads


def judge_of(tail: str, size: tuple[int, int] = (9, 7), count: int = 24) -> Judge:
    torch.manual_seed(0)
    graph = lmfx.trace(Heads(tail).double().eval(), torch.randn(1, 3, *size, dtype=torch.float64))
    return Judge(graph, Calibration((torch.randn(count, 3, *size, dtype=torch.float64),)))


@pytest.mark.parametrize("tail", ["logits", "softmax", "boxes", "map", "named", "sequence", "sigmoid"])
def test_the_loss_of_a_change_is_that_of_the_network_that_makes_it(tail: str) -> None:
    judge = judge_of(tail)
    space = LossSpace(judge)
    other = [y + 0.05 * torch.randn_like(y) * y.abs() for y in judge.reference]
    if tail in ("softmax", "boxes"):
        other[-1] = other[-1] / other[-1].sum(1, keepdim=True)
    loss = space.loss(space.flat(other) - space.reference)
    assert loss == pytest.approx(judge.of(other).loss(), rel=1e-3)


@pytest.mark.parametrize("tail", ["logits", "softmax", "boxes", "map", "named", "sequence"])
def test_half_the_squared_length_is_the_loss_to_second_order(tail: str) -> None:
    judge = judge_of(tail)
    space = LossSpace(judge)
    other = [y * (1 + 1e-2 * torch.randn_like(y)) for y in judge.reference]
    if tail in ("softmax", "boxes"):
        other[-1] = other[-1] / other[-1].sum(1, keepdim=True)
    change = space.flat(other) - space.reference
    quadratic = 0.5 * float(space.vectors(change).double().square().sum())
    assert quadratic == pytest.approx(space.loss(change), rel=0.05)


def test_a_large_map_is_told_by_some_of_its_values() -> None:
    judge = judge_of("map", (60, 50), 2)
    space = LossSpace(judge)
    assert space.reference.shape == (2, FEATURES)
    other = [y + 0.1 * torch.randn_like(y) for y in judge.reference]
    assert space.loss(space.flat(other) - space.reference) == pytest.approx(judge.of(other).loss(), rel=0.1)


def test_no_change_costs_nothing_and_what_overflows_costs_much() -> None:
    judge = judge_of("logits")
    space = LossSpace(judge)
    assert space.loss(torch.zeros_like(space.reference)) == 0
    bad = [y.clone() for y in judge.reference]
    bad[0][0] = float("nan")
    assert space.loss(space.flat(bad) - space.reference) >= 0
    assert bool(space.flat(bad).isfinite().all())
