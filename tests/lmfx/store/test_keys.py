"""Rows, tables, plans, folders and checkpoints of one network are never those of another one."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lmfx
from lmfx.importance import Reconstruction
from lmfx.importance.base import weights_identity
from lmfx.latency import Store, Workload, signature
from lmfx.latency.backends.roofline import RooflineBackend
from lmfx.latency.candidate_workloads import Workloads
from lmfx.latency.profiling import digest, profile_spans
from lmfx.latency.whole_networks import _key, measure_wholes, random_plans
from lmfx.passes.errors import PlanError, StoreError, TableError
from lmfx.passes.identity.fingerprint import fingerprint, identify
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.trainable import rewrite
from tests.fuzz import keys
from tests.fuzz.compare import Wrong, call
from tests.fuzz.networks import programs
from tests.fuzz.program import Program
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    """Whatever is done between two convs; one op for every tracer, because it has a hook."""

    def __init__(self, f: Callable[[Part, Tensor], Tensor], **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)
        self.f = f
        self.register_forward_hook(nothing)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def nothing(module: nn.Module, inputs: Any, output: Any) -> None:
    """A hook."""


def power(m: Any, x: Tensor) -> Tensor:
    return x.abs() ** m.p


def table(m: Any, x: Tensor) -> Tensor:
    return x * m.t


def inner(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.o.f(m.o, x)
    return y


def loops(m: Any, x: Tensor) -> Tensor:
    for _ in range(int(m.n)):
        x = torch.sin(x)
    return x


def counted(m: Any, x: Tensor) -> Tensor:
    m.calls = m.calls + 1
    return x * 2


class Net(nn.Module):
    """Four convs around a part, with equal weights each time."""

    def __init__(self, part: Any, before: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.part, self.before = part, before

    def forward(self, x: Tensor, t: Any = None) -> Tensor:
        x = x if self.before is None else self.before(x)
        h = self.part(torch.relu(self.b(torch.relu(self.a(x)))))
        h = h if t is None else h * t
        return self.d(torch.relu(self.c(h))).mean((2, 3))


def net(part: Any, **more: Any) -> nn.Module:
    return Net(part, **more).eval()


def graph_of(part: Any, **more: Any) -> Any:
    return lmfx.trace(net(part, **more), X[:1])


class Thing:
    """An object of a class of one's own: what can be seen of it tells it from some others, not from all."""

    def __init__(self, k: float) -> None:
        self.k = k


def closure(k: float) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: x * k


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "a constant of a function": (lambda: lambda x: torch.pow(x, 1.5), lambda: lambda x: torch.pow(x, 2.5)),
    "a constant of a method": (lambda: lambda x: x.roll(1, -1), lambda: lambda x: x.roll(2, -1)),
    "a keyword": (lambda: lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
                  lambda: lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "a slope": (lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.4)),
    "an attribute": (lambda: Part(power, p=1.0), lambda: Part(power, p=3.0)),
    "a plain list": (lambda: Part(lambda m, x: x * m.p[0], p=[1.0]), lambda: Part(lambda m, x: x * m.p[0], p=[2.0])),
    "a buffer that is not saved": (lambda: Part(table, t=torch.ones(12)), lambda: Part(table, t=torch.arange(12.0))),
    "what a part holds": (lambda: Part(inner, o=Part(power, p=1.0)), lambda: Part(inner, o=Part(power, p=2.0))),
    "an attribute of an object": (lambda: Part(lambda m, x: x * m.o.k, o=Thing(1.0)),
                                  lambda: Part(lambda m, x: x * m.o.k, o=Thing(2.0))),
    "what a closure reads": (lambda: Part(closure(1.0)), lambda: Part(closure(2.0))),
    "the code": (lambda: Part(lambda m, x: x.abs()), lambda: Part(lambda m, x: x.abs() + 1)),
}  # fmt: skip


class Called(nn.Module):
    """A function as a part that the tracers go through."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Any:
        return self.f(x)


def made(which: Callable[[], Any]) -> Any:
    part = which()
    return part if isinstance(part, nn.Module) else Called(part)


@pytest.mark.parametrize("name", PAIRS)
def test_networks_that_differ_in_one_thing_have_other_keys(name: str, tmp_path: Path) -> None:
    one, other = (graph_of(made(which)) for which in PAIRS[name])
    again = graph_of(made(PAIRS[name][0]))
    assert weights_identity(one).digest == weights_identity(again).digest != weights_identity(other).digest
    assert digest(one) == digest(again) != digest(other)
    assert (fingerprint(one) == fingerprint(other)) == (name == "the code"), "code is compared apart"
    scored = [lmfx.score(g, calibration=X, cache_dir=tmp_path, progress=False) for g in (one, other)]
    with Store.open(tmp_path) as store:
        every = sum(not k.endswith("keep") for table in scored for k in table)
        assert store.count("importance") == (every if identify(one).certain else 0)


@pytest.mark.parametrize("name", PAIRS)
def test_a_saved_network_does_not_load_into_another_model(name: str, tmp_path: Path) -> None:
    one, other = (net(made(which)) for which in PAIRS[name])
    small = lmfx.compress(
        one, X[:1], 0.9, calibration=X, latency="roofline", include=("a", "b"), cache_dir=tmp_path, progress=False
    )
    lmfx.save(small, tmp_path / "saved")
    weights = copy.deepcopy(one)
    for parameter in weights.parameters():
        parameter.data.mul_(2)
    assert torch.equal(lmfx.load(tmp_path / "saved", weights)(X), small(X)), "other weights are no other model"
    with pytest.raises(PlanError, match="was saved for another model.*(this one has|code of its own)"):
        lmfx.load(tmp_path / "saved", other)


def test_a_saved_plan_of_an_older_version_is_taken_with_a_warning(tmp_path: Path) -> None:
    from lmfx.passes.identity.fingerprint import _old_fingerprint

    graph, other = graph_of(nn.ReLU()), graph_of(nn.SiLU())
    with pytest.warns(UserWarning, match="older lmfx, which did not note constants"):
        rewrite(graph, MergePlan((), _old_fingerprint(graph)))
    with pytest.raises(PlanError, match="the plan was made for graph"):
        rewrite(other, MergePlan((), _old_fingerprint(graph)))


# --- what cannot be told apart ---------------------------------------------------------------------------------------


UNSURE: dict[str, Callable[[], Any]] = {
    "a closure": lambda: Part(closure(2.0)),
    "a foreign object": lambda: Part(lambda m, x: x * m.o.k, o=Thing(2.0)),
    "what changes while it runs": lambda: Part(counted, calls=0),
}


@pytest.mark.parametrize("name", UNSURE)
def test_nothing_is_stored_of_a_network_that_can_not_be_told_apart(name: str, tmp_path: Path) -> None:
    graph = graph_of(UNSURE[name]())
    found = identify(graph, "values")
    assert not found.certain and "part" in found.unsure[0]
    with Store.open(tmp_path) as store:
        spans = lmfx.spans(graph)
        first = lmfx.score(graph, calibration=X, cache_dir=tmp_path, progress=False)
        rows = profile_spans(spans, RooflineBackend(), store)
        measure_wholes(spans, rows, random_plans(spans, rows, 2), RooflineBackend(), store)
        assert store.count("importance") == store.count("whole") == 0
        kept = store.get_many("latency", RooflineBackend().identity())
        assert kept and not any("Part" in key for key in kept), "rows of other layers are kept"
        assert store.files(name="*.claim") == []
    lmfx.solve(graph, rows, first)  # tables of this very graph are good


def test_parts_that_can_not_be_told_apart_share_no_row_within_a_run() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.one, self.two = Part(closure(1.0)), Part(closure(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.two(self.one(self.a(x))))

    spans = lmfx.spans(lmfx.trace(Twice().eval(), X[:1]))
    make = Workloads(spans.network)
    opaque = [w for w in (make(c) for c in spans if c.realization == "keep") if w is not None and not w.lasting]
    assert len({w.signature for w in opaque}) == 2


def test_a_module_without_a_graph_is_never_taken_from_a_store(tmp_path: Path) -> None:
    workload = Workload.of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), ((1, 3, 8, 8), torch.float32))
    assert not workload.lasting
    with Store.open(tmp_path) as store:
        assert RooflineBackend().measure([workload], store)
        assert store.count() == 0


def test_a_counter_is_no_other_network(tmp_path: Path) -> None:
    model = net(Part(counted, calls=0))
    before = fingerprint(lmfx.trace(model, X[:1]))
    model(X)
    assert fingerprint(lmfx.trace(model, X[:1])) == before


# --- latencies --------------------------------------------------------------------------------------------------------


def opaque_row(part: nn.Module) -> str:
    spans = lmfx.spans(graph_of(part))
    make = Workloads(spans.network)
    found = [make(c) for c in spans if c.realization == "keep"]
    (row,) = [w.signature for w in found if w is not None and "Part" in w.signature]
    return row


def test_the_work_of_an_opaque_part_is_in_its_row() -> None:
    rows = [opaque_row(Part(loops, n=n)) for n in (1, 40, torch.tensor(1), torch.tensor(40))]
    assert len(set(rows)) == 4 and opaque_row(Part(loops, n=1)) == rows[0]


def test_weights_are_in_the_row_of_a_part_only_if_its_work_may_depend_on_them() -> None:
    def part(f: Any, value: float) -> nn.Module:
        made = Part(f)
        made.n = nn.Parameter(torch.tensor([value]))
        return made

    assert opaque_row(part(loops, 1.0)) != opaque_row(part(loops, 3.0))
    scaled: Any = lambda m, x: x * m.n  # noqa: E731
    assert opaque_row(part(scaled, 1.0)) == opaque_row(part(scaled, 3.0))


def test_values_of_plain_layers_are_in_no_row_and_their_slopes_are() -> None:
    specs = [((1, 3, 8, 8), torch.float32)]

    def row(*layers: nn.Module) -> str:
        return signature(torch.fx.symbolic_trace(nn.Sequential(*layers)), specs)

    assert row(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) == row(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3))
    assert row(nn.LeakyReLU(0.1)) != row(nn.LeakyReLU(0.2)) and row(nn.ELU(0.1)) != row(nn.ELU(0.2))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.b = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.n, self.c, self.d = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.i(x))
        return self.d(self.c(self.n(x + self.b(torch.relu(self.a(x)))))).mean((2, 3))


@pytest.fixture
def residual() -> Any:
    torch.manual_seed(0)
    return lmfx.trace(Residual().double().eval(), X[:1].double())


def test_the_activation_behind_merged_convs_is_in_rows_and_whole_networks(residual: Any) -> None:
    plain, active = lmfx.spans(residual), lmfx.spans(residual, activation_after="relu6")
    rows = [Workloads(residual_spans.network, name) for residual_spans, name in ((plain, None), (active, "relu6"))]
    with_one = 0
    for candidate in plain:
        before, after = (make(candidate) for make in rows)
        if before is None or after is None or candidate.realization in ("keep", "drop"):
            assert (before and before.signature) == (after and after.signature)
        elif len(candidate.all_convs) > 1:
            with_one += before.signature != after.signature
            assert ("ReLU6" in after.signature) == (before.signature != after.signature)
    assert with_one
    timed = profile_spans(plain, RooflineBackend()), profile_spans(active, RooflineBackend())
    plans = random_plans(plain, timed[0], 4)
    assert all(_key(p) != _key(MergePlan(p.candidates, activation_after="relu6")) for p in plans)
    with pytest.raises(TableError, match="another activation_after"):
        lmfx.solve(residual, timed[0], lmfx.score(residual, "magnitude", spans=active, progress=False), spans=active)


@pytest.mark.parametrize("exact", [True, False])
def test_an_importance_is_that_of_the_network_with_its_activation(residual: Any, exact: bool) -> None:
    from lmfx.calibration.images import as_calibration

    spans = lmfx.spans(residual, activation_after="relu", realize=("compose",))
    images = as_calibration(X.double(), X[:1].double())
    rows = Reconstruction(exact=exact, surrogate="identity", probes=1 if exact else 200).score(
        spans, spans.candidates, images
    )
    plain = Reconstruction(exact=exact, surrogate="identity", probes=1 if exact else 200).score(
        lmfx.spans(residual, realize=("compose",)), spans.candidates, images
    )
    judged = images.split(64)[1].tensors[0]
    with torch.no_grad():
        expected = residual(judged)
        scale = (expected - expected.mean(0)).square().sum(1).mean()
        for c in [c for c in spans if c.realization == "compose"]:
            changed = rewrite(residual, MergePlan((c,), activation_after="relu"))(judged)
            true = float(-0.5 * (changed - expected).square().sum(1).mean() / scale)
            assert rows[c.key] == pytest.approx(true, rel=1e-9 if exact else 0.25)
    assert any(rows[k] != plain[k] for k in rows)


# --- constants of the example, checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("one, other", [(1.0, -100.0), (torch.tensor(1.0), torch.tensor(3.0)), (2, 2.5)])
def test_scores_for_one_constant_of_the_example_are_none_for_another(one: Any, other: Any, tmp_path: Path) -> None:
    model = net(nn.ReLU())

    def scored(t: Any, folder: Path) -> dict[str, float]:
        return dict(lmfx.score(lmfx.trace(model, (X[:1], t)), calibration=X, cache_dir=folder, progress=False).rows)

    first, second, fresh = scored(one, tmp_path / "a"), scored(other, tmp_path / "a"), scored(other, tmp_path / "b")
    assert second == fresh != first


def test_a_checkpoint_is_that_of_its_teacher_data_loss_and_student(tmp_path: Path) -> None:
    model, batches = net(nn.ReLU()), [X[:8], X[8:]]
    graph = lmfx.trace(model, X[:1])
    spans = lmfx.spans(graph, realize=("compose",))
    plans = [MergePlan((c,), fingerprint(graph)) for c in spans if c.realization == "compose"]

    def run(
        plan: MergePlan = plans[0], teacher: nn.Module = model, data: Any = batches, scale: float = 1.0, **options: Any
    ) -> Any:
        student = rewrite(graph, plan)
        for parameter in student.parameters():
            parameter.data.mul_(scale)
        return lmfx.distill(student, teacher, data, checkpoint=tmp_path, progress=False, **options)

    first = run()
    assert torch.equal(run()(X), first(X)) and torch.equal(run(scale=1 + 1e-6)(X), first(X))
    other = copy.deepcopy(model)
    other.b.weight.data.mul_(5)  # type: ignore[union-attr, operator]
    for change, named in (
        ({"teacher": other}, "teacher"), ({"data": [X[:8], X[8:] + 1]}, "data"), ({"plan": plans[-1]}, "student"),
        ({"scale": 1.5}, "other weights"), ({"teacher": net(nn.LeakyReLU(0.2))}, "teacher"),
        ({"optimizer": lambda p: torch.optim.Adam(p, lr=3e-4, betas=(0.5, 0.9))}, "settings"),
        ({"distillation": "features", "features": ["a"]}, "features"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=f"another training.*{named}"):
            run(**change)  # type: ignore[arg-type]


def test_an_interrupted_student_goes_on(tmp_path: Path) -> None:
    model = net(nn.ReLU())
    graph = lmfx.trace(model, X[:1])
    student = rewrite(graph, MergePlan((), fingerprint(graph)))

    def stop(epoch: int, _: Any) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"lr": 0.1, "epochs": 2, "checkpoint": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        lmfx.distill(student, model, [X + 1, X], after_epoch=stop, **options)
    lmfx.distill(student, model, [X + 1, X], **options)


# --- random networks --------------------------------------------------------------------------------------------------


@seed(11)
@settings(
    max_examples=15, database=None, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)
@given(programs(), st.integers(0, 10**9))
def test_changed_networks_are_told_apart_and_respelled_ones_are_not(program: Program, number: int) -> None:
    model, example = program.build(), program.example()
    try:
        call(model, example)
    except Exception:
        return  # not many
    keys.check_keys(program, model, example, random.Random(number), tries=1)


@pytest.mark.parametrize("old", ["values", "structure", "fingerprint", "spelling"])
def test_the_properties_can_fail(old: str) -> None:
    one, other = (keys.keyed(net(Called(f)).double(), X[:1].double()) for f in (torch.sin, lambda x: torch.pow(x, 2.0)))
    assert one is not None and other is not None
    keys.check_told_apart(one, other, "nothing wrong", X[:1].double())
    wrong = {
        "values": {"values": one.values}, "structure": {"structure": one.structure, "work": one.work + 1},
        "fingerprint": {"fingerprint": one.fingerprint, "origin": one.origin}, "spelling": {},
    }[old]  # fmt: skip
    from dataclasses import replace

    with pytest.raises(Wrong, match="keys: "):
        if old == "spelling":
            keys.check_same_keys(one, other, "two")
        else:
            keys.check_told_apart(one, replace(other, **wrong), "two", X[:1].double())


def test_keys_of_a_deep_network_are_made_in_well_under_a_second() -> None:
    torchvision = pytest.importorskip("torchvision")
    graph = lmfx.trace(torchvision.models.resnet152().eval(), torch.randn(1, 3, 32, 32))
    start = time.process_time()
    fingerprint(graph)
    assert time.process_time() - start < 1.0
