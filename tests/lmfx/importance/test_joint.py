"""Losses of whole plans from the changes that their candidates make alone."""

import pytest
import torch
from torch import nn

import lmfx
from benchmarks.shared.random_plans import randomise_norms
from lmfx.calibration.images import as_calibration
from lmfx.calibration.students import Students
from lmfx.importance import Reconstruction
from lmfx.importance.change import Scorer
from lmfx.importance.joint import JointLoss, overlap
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.trace.tracing import fingerprint

Joint = tuple[SpanSet, JointLoss]


class Sum(nn.Module):
    """Two branches whose sum is the output of a Linear: their errors add up exactly."""

    def __init__(self) -> None:
        super().__init__()
        make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))  # noqa: E731
        self.a, self.b, self.head = make(), make(), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.a(x) + self.b(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def joint() -> Joint:
    torch.manual_seed(0)
    model = randomise_norms(Sum().double().eval())
    images = torch.randn(32, 3, 9, 7, dtype=torch.float64)
    spans = lmfx.spans(lmfx.trace(model, images[:1]))
    scorer = Scorer(Reconstruction(exact=True), spans, as_calibration(images, images[:1]), None, list(spans))
    return spans, JointLoss(scorer, list(spans))


def in_branch(spans: SpanSet, branch: str) -> Candidate:
    return next(c for c in spans if c.realization == "fit" and c.all_convs == (f"{branch}.0", f"{branch}.2"))


def test_a_plan_of_branches_that_are_added_loses_what_is_predicted(joint: Joint) -> None:
    spans, losses = joint
    a, b = in_branch(spans, "a"), in_branch(spans, "b")
    plan = MergePlan((a, b), fingerprint(spans.network.gm))
    students = Students(Analysis.of(spans.network), losses.judge.images)
    student = students.sketch(plan, lambda c: losses.scorer.made(c)[0])
    truth = losses.judge(student).loss()
    assert losses.loss([a, b]) == pytest.approx(truth, rel=1e-4)
    assert abs(losses.loss([a]) + losses.loss([b]) - truth) > 0.05 * truth, "their own losses do not add up"


def test_seen_from_a_plan_a_candidate_costs_what_it_adds(joint: Joint) -> None:
    spans, losses = joint
    a, b = in_branch(spans, "a"), in_branch(spans, "b")
    seen, alone = losses.seen_from([a, b]), losses.seen_from([])
    u, v = (losses.vectors[c.key].double() for c in (a, b))
    assert -alone[a.key] == pytest.approx(0.5 * float(u @ u), rel=1e-6)
    assert -seen[a.key] == pytest.approx(0.5 * float(u @ u) + float(u @ v), rel=1e-6)
    assert -(seen[a.key]) != pytest.approx(-alone[a.key])


def test_what_overlaps_is_told(joint: Joint) -> None:
    spans, _ = joint
    a, b = in_branch(spans, "a"), in_branch(spans, "b")
    whole = next(c for c in spans if {"a.0", "b.0"} <= set(c.all_convs))
    assert overlap(a, a) and not overlap(a, b)
    assert overlap(whole, a) and overlap(a, whole)


def test_no_candidate_loses_nothing(joint: Joint) -> None:
    assert joint[1].loss([]) == 0


def test_the_change_of_a_fit_with_a_vector_from_the_side_is_in_the_networks_dtype() -> None:
    class Sided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.side = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(5, 4)
            self.head = nn.Linear(4, 5)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.a(x) + self.side(t)[:, :, None, None])
            return self.head(self.b(y).mean((2, 3)))

    torch.manual_seed(0)
    data = torch.randn(32, 3, 9, 7), torch.randn(32, 5)
    example = data[0][:2], data[1][:2]
    spans = lmfx.spans(lmfx.trace(Sided().eval(), example))
    sided = [c for c in spans if c.realization == "fit" and {"a", "b"} <= set(c.all_convs)]
    losses = JointLoss(Scorer(Reconstruction(exact=True), spans, as_calibration(data, example), None, sided), sided)
    assert sided and all(losses.loss([c]) > 0 for c in sided)
