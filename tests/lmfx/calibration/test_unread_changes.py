"""A plan may change what nobody reads any more, because another of its changes leaves the only reader out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.calibration.images import Calibration
from lmfx.calibration.students import Students
from lmfx.passes.algebra.linear_op import from_linear
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.passes.spans.enumeration import SpanSet
from tests.helpers import double


class Block(nn.Module):
    """A residual block with a vector that a path of its own makes of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.SiLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x) + self.time(t)[:, :, None, None]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, t)
        return self.last(x)


Made = tuple[Analysis, SpanSet, tuple[Tensor, Tensor]]
CHANGES = [
    ("fit", ("blocks.1.time.2", "blocks.1.time.4")),
    ("fit", ("blocks.1.time.0", "blocks.1.time.2", "blocks.1.time.4")),
    ("compose", ("blocks.1.time.2", "blocks.1.time.4")),
    ("narrow", ("blocks.1.time.0", "blocks.1.time.2")),
]


@pytest.fixture(scope="module")
def made() -> Made:
    torch.manual_seed(0)
    x, t = torch.randn(16, 3, 9, 7, dtype=torch.float64), torch.randn(16, 6, dtype=torch.float64)
    spans = lmfx.spans(lmfx.trace(double(Net()), (x[:2], t[:2])), realize=("compose", "fit", "drop", "narrow"))
    return Analysis.of(spans.network), spans, (x, t)


def found(spans: SpanSet, realization: str, *convs: str) -> Candidate:
    return next(c for c in spans if c.realization == realization and c.all_convs == convs)


def plans(spans: SpanSet, realization: str, convs: tuple[str, ...]) -> tuple[MergePlan, MergePlan]:
    """A plan that leaves a block out, and one that changes the block's path of the time as well."""
    block = next(c for c in spans if c.realization == "drop" and c.spans[0].output == "add_3")
    return MergePlan((block,)), MergePlan((found(spans, realization, *convs), block))


@pytest.mark.parametrize(("realization", "convs"), CHANGES)
def test_a_change_that_nobody_reads_is_left_out_of_every_student(
    made: Made, realization: str, convs: tuple[str, ...]
) -> None:
    analysis, spans, data = made
    alone, both = plans(spans, realization, convs)
    expected = lmfx.rewrite(analysis.graph, alone, calibration=[data])
    students = Students(analysis, Calibration(data))
    for student in (
        lmfx.rewrite(analysis.graph, both, calibration=[data]),
        *(students.student(both) for _ in range(2)),
    ):
        assert torch.equal(student(*data), expected(*data))
        assert set(student.state_dict()) == set(expected.state_dict())


def test_a_fit_that_is_known_is_not_set_where_nobody_reads_it(made: Made) -> None:
    analysis, spans, data = made
    alone, both = plans(spans, *CHANGES[0])
    students = Students(analysis, Calibration(data))
    students.student(MergePlan(both.candidates[:1]))  # here it is read, and fitted
    student = students.student(both)
    assert torch.equal(student(*data), students.student(alone)(*data))


def test_an_op_from_elsewhere_is_not_set_where_nobody_reads_it(made: Made) -> None:
    analysis, spans, data = made
    alone, both = plans(spans, *CHANGES[0])
    op = from_linear(nn.Linear(32, 4).double())
    students = Students(analysis, Calibration(data))
    student = students.sketch(both, lambda c: op)
    assert torch.equal(student(*data), students.student(alone)(*data))
