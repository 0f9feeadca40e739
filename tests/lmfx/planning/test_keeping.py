"""The fastest plan that keeps a share is found by halving, with a standard error to spare."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lmfx
from lmfx.calibration.images import Calibration, Roles
from lmfx.passes.ir import MergePlan
from lmfx.planning.joint_search import Proposal
from lmfx.planning.keeping import fastest_that_keeps, keeping_judge
from lmfx.quality.measures import OutputQuality, Quality
from tests.toys import toy

IMAGES = 100


def judged() -> Any:
    """Plans that take any time from 1 to 2 ms, named by it."""
    return SimpleNamespace(
        analysis=SimpleNamespace(fingerprint=""),
        surrogate="affine",
        proposals=lambda limit: [Proposal(MergePlan((), "", latency=limit), limit, 0.0)],
        students=SimpleNamespace(student=lambda plan: plan),
    )


FRONTIER: Any = SimpleNamespace(raw=SimpleNamespace(latency=[1.0]), original_sum=2.0)


def found(keep: float, agreement: Any) -> float:
    """The latency of the plan that is found, where a plan of some latency agrees so often."""

    def judge(plan: Any) -> Quality:
        share = agreement(plan.latency)
        error = (share * (1 - share) / IMAGES) ** 0.5
        return Quality((OutputQuality("y", "scores", 0.0, agreement=share, agreement_error=error),), IMAGES)

    return fastest_that_keeps(judged(), FRONTIER, keep, judge).proposal.sum


def test_an_agreement_that_is_just_enough_is_not_taken() -> None:
    just = found(0.9, lambda ms: 0.9 if ms < 1.5 else 0.95)  # 0.95 - 0.022 is enough, 0.9 - 0.03 is not
    assert 1.5 <= just <= 1.5 + 1 / 32
    assert found(0.9, lambda ms: 0.91 if ms < 1.5 else 1.0) >= 1.5
    assert found(0.9, lambda ms: 0.95) == 1.0


def test_where_nothing_keeps_enough_nothing_is_changed() -> None:
    assert found(1.0, lambda ms: 0.99) == 2.0


@pytest.mark.parametrize(
    ("fit", "held", "seen", "count"),
    [(192, 32, False, 128), (48, 8, False, 32), (1500, 250, False, 500), (12, 12, True, 12)],
)
def test_few_images_that_no_fit_saw_are_joined_by_as_many_others(fit: int, held: int, seen: bool, count: int) -> None:
    def some(n: int) -> Calibration:
        return Calibration((torch.randn(n, 3, 8, 8),), ())

    graph = lmfx.trace(toy(), torch.randn(1, 3, 8, 8))
    roles = Roles(some(fit), some(held), some(held), seen)
    judge = keeping_judge(SimpleNamespace(roles=roles, analysis=SimpleNamespace(graph=graph)))  # type: ignore[arg-type]
    assert len(judge.images) == count
    assert judge.held_out == (count == 2 * held and not seen)
