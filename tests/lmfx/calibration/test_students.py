"""Many students of one graph: what is kept between them changes nothing but the time that they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lmfx
from lmfx.calibration import students as students_module
from lmfx.calibration.images import Calibration
from lmfx.calibration.students import Students
from lmfx.passes.errors import PlanError
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.passes.spans.enumeration import SpanSet
from tests.helpers import double


@dataclass
class Made:
    graph: fx.GraphModule
    spans: SpanSet
    images: Calibration

    def plan(self, *picks: tuple[str, tuple[str, ...]]) -> MergePlan:
        return MergePlan(tuple(self.candidate(*pick) for pick in picks), surrogate="affine")

    def candidate(self, realization: str, convs: tuple[str, ...]) -> Candidate:
        found = [c for c in self.spans if (c.realization, c.convs) == (realization, convs)]
        return next(c for c in found if realization == "fit" or c.kept == convs)

    def students(self) -> Students:
        return Students(Analysis.of(self.spans.network), self.images)


def conv(channels: int = 6) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]


@pytest.fixture(scope="module")
def made() -> Made:
    torch.manual_seed(0)
    model = double(nn.Sequential(*conv(), *conv(), *conv(), *conv()))
    data = torch.randn(12, 6, 11, 9, dtype=torch.float64)
    graph = lmfx.trace(model, data[:1])
    return Made(graph, lmfx.spans(graph), Calibration((data,)))


def same(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())


FIRST: tuple[str, tuple[str, ...]] = ("fit", ("0", "3"))
LAST: tuple[str, tuple[str, ...]] = ("fit", ("6", "9"))
BEFORE: tuple[str, tuple[str, ...]] = ("compose", ("0", "3"))


@pytest.mark.parametrize("share", [True, False])
def test_a_student_is_what_rewrite_gives_whatever_was_built_before_it(made: Made, share: bool) -> None:
    students = made.students()
    for picks in ((FIRST, LAST), (BEFORE, LAST), (LAST,), (FIRST,), (FIRST, LAST), (BEFORE,)):
        plan = made.plan(*picks)
        expected = lmfx.rewrite(made.graph, plan, calibration=made.images)
        assert same(students.student(plan, share_tensors=share), expected)


def test_what_is_before_a_fit_decides_it_and_what_is_after_does_not(made: Made, counted: Callable[[], int]) -> None:
    students = made.students()
    students.student(made.plan(FIRST))
    assert counted() == 1
    students.student(made.plan(FIRST, LAST))
    assert counted() == 2  # the first is known
    students.student(made.plan(BEFORE, LAST))
    assert counted() == 3  # the last reads another value
    students.student(made.plan(LAST))
    assert counted() == 4
    for picks in ((FIRST, LAST), (BEFORE, LAST), (LAST,), (FIRST,)):
        students.student(made.plan(*picks))
    assert counted() == 4


def test_without_room_everything_is_made_anew(
    made: Made, counted: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(students_module, "HELD_BYTES", 0)
    students, plan = made.students(), made.plan(FIRST, LAST)
    one, other = students.student(plan), students.student(plan)
    assert counted() == 4 and same(one, other)


def test_the_original_is_recorded_once_and_linearized_once(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[set[str]] = []
    record, linearize = students_module.record_batches, students_module.affine_surrogates

    def recorded(gm: fx.GraphModule, calibration: Calibration, wanted: Any) -> dict[str, Tensor]:
        runs.append(set(wanted))
        return record(gm, calibration, wanted)

    def linearized(*arguments: Any) -> Any:
        runs.append({"surrogates"})
        return linearize(*arguments)

    monkeypatch.setattr(students_module, "record_batches", recorded)
    monkeypatch.setattr(students_module, "affine_surrogates", linearized)
    students = made.students()
    for picks in ((FIRST,), (FIRST, LAST), (BEFORE, LAST), (BEFORE,)):
        students.student(made.plan(*picks))
    first, last = (made.candidate(*pick).span.output for pick in (FIRST, LAST))
    assert runs == [{first}, {last}, {"surrogates"}]


def test_a_shared_student_holds_no_copy_and_an_own_one_holds_nothing_else(made: Made) -> None:
    graph = {id(p) for p in made.graph.parameters()}
    students, plan = made.students(), made.plan(FIRST)
    shared = {id(p) for p in students.student(plan).parameters()}
    own = {id(p) for p in students.student(plan, share_tensors=False).parameters()}
    assert len(shared - graph) == 2 and len(shared & graph) == 8  # weight and bias of the fit; two convs and norms
    assert not own & graph


def test_building_students_leaves_the_graph_as_it_was(made: Made) -> None:
    before = {k: v.clone() for k, v in made.graph.state_dict().items()}
    code, names = made.graph.code, [n.name for n in made.graph.graph.nodes]
    students = made.students()
    for picks in ((FIRST, LAST), (BEFORE, LAST), (FIRST,)):
        students.student(made.plan(*picks))
    assert made.graph.code == code and [n.name for n in made.graph.graph.nodes] == names
    assert all(torch.equal(v, before[k]) for k, v in made.graph.state_dict().items())


def test_a_plan_of_another_graph_is_refused_however_many_were_built(made: Made) -> None:
    students = made.students()
    students.student(made.plan(FIRST))
    with pytest.raises(PlanError, match="the plan was made for graph 2-other"):
        students.student(replace(made.plan(FIRST), fingerprint="2-other"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many fits were solved so far."""
    fits: list[str] = []
    fit = students_module.fit_student

    def counting(*arguments: Any) -> Any:
        for name, op in fit(*arguments):
            fits.append(name)
            yield name, op

    monkeypatch.setattr(students_module, "fit_student", counting)
    return lambda: len(fits)
