"""Recovery: it brings the student closer without labels, returns nothing worse, and knows its time."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lmfx
from lmfx.calibration.images import Calibration
from lmfx.passes.model.trace_facts import noted
from lmfx.quality import compare
from lmfx.training import recovery_clock, recovery_run, recovery_trainer
from lmfx.training.checkpoints import CHECKPOINT
from lmfx.training.recovery_clock import Clock, cosine, seconds_of
from tests.helpers import assert_unchanged, snapshot
from tests.helpers import one_thread as one_thread
from tests.lmfx.training.two_processes import weights_of_both
from tests.toys import TwoInputs, compress, images, toy

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = images(128)
OTHERS = images(48, seed=8)
QUICK: dict[str, Any] = {"steps": 24, "lr": 0.01, "batch": 16, "norms": "frozen", "progress": False}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """With scores as far apart as those of a trained network."""
    torch.manual_seed(3)
    made = toy()
    made.head.weight.data.mul_(20)
    return made


@pytest.fixture(scope="module")
def first(model: nn.Module) -> fx.GraphModule:
    """Neither refitted nor the best plan: there is something to recover."""
    options: dict[str, Any] = {"realize": ("compose",), "surrogate": "identity", "quality": None, "refit": False}
    return compress(model, DATA[:1], 0.5, calibration=DATA, merge=False, **options)


@pytest.fixture
def student(first: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(first)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def recover(student: fx.GraphModule, model: nn.Module, data: Any = DATA, **options: Any) -> fx.GraphModule:
    return lmfx.recover(student, model, data, **{**QUICK, **options})


def loss_of(student: fx.GraphModule, model: nn.Module) -> float:
    """On images that nothing saw."""
    return compare(student, lmfx.trace(model, DATA[:1]), OTHERS).loss()


def test_the_student_comes_closer_on_images_that_it_never_saw(student: fx.GraphModule, model: nn.Module) -> None:
    before, kept = loss_of(student, model), snapshot(model)
    returned = recover(student, model, steps=60)
    assert returned is student and not student.training
    assert_unchanged(kept, model)
    assert loss_of(student, model) < 0.5 * before
    told = student.meta["lmfx_recovery"]
    assert told.after < told.before and told.steps == 60 and told.batch == 16
    assert loss_of(lmfx.merge(student), model) == pytest.approx(loss_of(student, model), rel=1e-3)


def test_the_quality_of_the_result_is_that_of_the_recovered_network(student: fx.GraphModule, model: nn.Module) -> None:
    before = lmfx.result_of(student).quality
    after = lmfx.result_of(recover(student, model)).quality
    assert before is not None and after is not None
    assert after.loss() < before.loss()
    judged = Calibration((DATA,)).roles().judge.tensors[0]
    assert after == compare(student, lmfx.trace(model, DATA[:1]), judged)


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_what_does_not_help_changes_nothing(student: fx.GraphModule, model: nn.Module, rate: float) -> None:
    before = state(student)
    recover(student, model, lr=rate, steps=3)
    assert same(before, state(student))
    assert student.meta["lmfx_recovery"].after == student.meta["lmfx_recovery"].before


def test_a_student_that_loses_nothing_is_left_alone(model: nn.Module) -> None:
    student = compress(model, DATA[:1], 1.0, calibration=DATA, merge=False)
    before = state(student)
    recover(student, model)
    assert same(before, state(student))
    assert student.meta["lmfx_recovery"].rate is None


def test_a_rate_that_is_too_high_is_lowered_on_the_way(
    student: fx.GraphModule, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    step = recovery_trainer.Trainer.step

    def noted_step(self: Any, number: int, optimizer: Any, rate: float) -> float:
        seen.append(rate)
        return step(self, number, optimizer, rate)

    monkeypatch.setattr(recovery_trainer.Trainer, "step", noted_step)
    recover(student, model, lr=3.0, steps=80, mix=False)
    assert student.meta["lmfx_recovery"].rate < 1.0
    assert max(seen[:10]) > 1.0 > max(seen[40:])
    assert student.meta["lmfx_recovery"].after < student.meta["lmfx_recovery"].before


def test_the_student_is_judged_beside_its_average_only_where_that_says_little(
    student: fx.GraphModule, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []  # steps that were done by then
    offered = recovery_run.RecoveryRun._offered

    def counted(self: Any, net: Any) -> float:
        judged.append(self.done)
        # Each is better than all before, except what is judged first after half of the steps.
        self.value = lambda _: 1.0 if self.done == 20 and judged.count(20) == 1 else 0.5 - 1e-3 * len(judged)
        return offered(self, net)

    monkeypatch.setattr(recovery_run.RecoveryRun, "_offered", counted)
    recover(student, model, steps=40)
    assert judged == [5, 10, 15, 20, 20, 25, 30, 35, 40, 40]


def test_the_rate_and_the_norms_are_found_on_images_that_no_step_saw(
    student: fx.GraphModule, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Tensor] = []
    given = recovery_trainer.Trainer.images

    def watched(self: Any, step: int) -> tuple[Tensor, ...]:
        shown.extend(given(self, step)[0])
        return given(self, step)

    monkeypatch.setattr(recovery_trainer.Trainer, "images", watched)
    recover(student, model, lr=None, norms=None, steps=8)
    fit = {t.numpy().tobytes() for t in Calibration((DATA,)).roles().fit.tensors[0]}
    assert len(fit) == 96
    assert {t.numpy().tobytes() for t in shown} == fit
    assert 1e-5 < student.meta["lmfx_recovery"].rate < 1


def test_frozen_norms_keep_their_statistics_and_trained_ones_are_renewed(model: nn.Module) -> None:
    student = compress(model, DATA[:1], 0.9, calibration=DATA, merge=False, include=("blocks.1.*",))
    norms = [n for n in state(student) if n.endswith("running_mean")]
    assert norms
    frozen, trained = copy.deepcopy(student), copy.deepcopy(student)
    recover(frozen, model, norms="frozen")
    recover(trained, model, norms="train")
    before = state(student)
    assert all(torch.equal(before[n], state(frozen)[n]) for n in norms)
    assert trained.meta["lmfx_recovery"].norms == "train"
    assert all(m.momentum == 0.1 for m in trained.modules() if isinstance(m, nn.BatchNorm2d))
    if trained.meta["lmfx_recovery"].after < trained.meta["lmfx_recovery"].before:
        assert not all(torch.equal(before[n], state(trained)[n]) for n in norms)


def test_the_same_steps_give_the_same_weights_and_the_callers_numbers_go_on(
    first: fx.GraphModule, model: nn.Module
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    one = recover(copy.deepcopy(first), model)
    assert torch.equal(torch.rand(2), expected)
    assert same(state(one), state(recover(copy.deepcopy(first), model)))
    assert not same(state(one), state(recover(copy.deepcopy(first), model, seed=1)))


def test_the_model_may_be_its_traced_graph_and_images_a_loader(first: fx.GraphModule, model: nn.Module) -> None:
    one = recover(copy.deepcopy(first), model)
    labels = torch.zeros(128)
    loader = list(zip(DATA.split(16), labels.split(16), strict=True))
    other = recover(copy.deepcopy(first), lmfx.trace(model, DATA[:1]), loader)
    assert same(state(one), state(other))


# --- time -------------------------------------------------------------------------------------------------------------


class Ticks:
    """A clock that goes on by a second a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 100.0
        step = recovery_trainer.Trainer.step
        self.rates: list[float] = []

        def timed(trainer: Any, number: int, optimizer: Any, rate: float) -> float:
            self.seconds += 1
            self.rates.append(rate)
            return step(trainer, number, optimizer, rate)

        monkeypatch.setattr(recovery_trainer.Trainer, "step", timed)
        monkeypatch.setattr(recovery_clock, "now", lambda: self.seconds)


def test_the_schedule_ends_with_the_time_and_its_rate_with_it(
    student: fx.GraphModule, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = Ticks(monkeypatch)
    recover(student, model, steps=None, minutes="60s", batch=None)
    told = student.meta["lmfx_recovery"]
    assert told.seconds == pytest.approx(60, abs=1.5)
    assert 50 < told.steps <= 60
    assert ticks.rates[-1] < 1e-4 < 5e-3 < max(ticks.rates)


def test_the_search_takes_a_share_of_the_time_and_a_short_one_does_without(
    first: fx.GraphModule, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ticks(monkeypatch)
    options: dict[str, Any] = {"steps": None, "lr": None}
    told = recover(copy.deepcopy(first), model, minutes="20s", **options).meta["lmfx_recovery"]
    assert told.rate is not None and told.rate <= recovery_run.FIRST_RATE
    assert told.steps > 12
    told = recover(copy.deepcopy(first), model, minutes="250s", **options).meta["lmfx_recovery"]
    assert told.steps > 0.7 * 250
    assert told.seconds == pytest.approx(250, abs=1.5)


def test_nothing_is_judged_again_as_soon_as_the_search_has_ended(
    student: fx.GraphModule, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ticks(monkeypatch)
    judged: list[int] = []
    decide = recovery_run.RecoveryRun._judged

    def counted(self: Any, both: bool = False) -> bool:
        judged.append(self.done)
        return decide(self, both)

    monkeypatch.setattr(recovery_run.RecoveryRun, "_judged", counted)
    recover(student, model, steps=None, lr=None, norms=None, minutes="160s")  # three trials of twelve seconds
    assert len(judged) <= 7 and min(judged) >= 2


def test_a_batch_leaves_time_for_some_hundred_steps(
    first: fx.GraphModule, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ticks(monkeypatch)  # a second a step, whatever its batch: it is measured with 8 images
    monkeypatch.setattr(recovery_run, "FEWEST_STEPS", 10)
    options: dict[str, Any] = {"steps": None, "batch": None}
    batches = [
        recover(copy.deepcopy(first), model, minutes=f"{s}s", **options).meta["lmfx_recovery"].batch
        for s in (10, 24, 46)
    ]
    assert batches == [8, 16, 32]
    monkeypatch.undo()
    assert recover(copy.deepcopy(first), model, batch=None, steps=2).meta["lmfx_recovery"].batch == 64


@pytest.mark.parametrize(
    ("time", "seconds"), [(3, 180), (0.5, 30), ("3min", 180), ("90s", 90), ("1.5h", 5400), (" 2 m ", 120), ("4", 240)]
)
def test_a_time_is_minutes_or_says_its_unit(time: Any, seconds: float) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize("time", [0, -1, math.nan, math.inf, True, "", "3 days", "min", "-3min", None, "0s"])
def test_what_is_no_time_is_refused(time: Any) -> None:
    with pytest.raises(lmfx.OptionError, match="is no time to recover in: use minutes"):
        seconds_of(time)


def test_the_rate_rises_at_once_and_falls_to_nothing() -> None:
    rates = [cosine(i / 100) for i in range(101)]
    assert 0 < rates[0] < 0.1
    assert max(rates) > 0.98 and rates.index(max(rates)) <= 4
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9) == cosine(1.7)


def test_a_clock_that_goes_on_counts_what_was_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_clock, "now", lambda: 7.0)
    clock = Clock(100.0, spent=30.0)
    monkeypatch.setattr(recovery_clock, "now", lambda: 27.0)
    assert clock.fraction(1000) == pytest.approx(0.5)
    assert Clock(100.0, steps=4).fraction(1) == 0.25


# --- stopped ----------------------------------------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    step = recovery_trainer.Trainer.step

    def stopping(self: Any, number: int, optimizer: Any, rate: float) -> float:
        if number == last:
            raise KeyboardInterrupt
        return step(self, number, optimizer, rate)

    monkeypatch.setattr(recovery_trainer.Trainer, "step", stopping)


def test_ctrl_c_gives_the_best_so_far(
    student: fx.GraphModule, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = loss_of(student, model)
    stop_at(monkeypatch, 20)
    with pytest.warns(UserWarning, match="stopped after 20 steps, and returns the best"):
        recover(student, model)
    assert loss_of(student, model) < before
    assert not student.training


def test_a_stopped_run_with_a_checkpoint_goes_on_and_ends_at_the_same_bits(
    first: fx.GraphModule, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recover(copy.deepcopy(first), model, lr=None, steps=32)
    stop_at(monkeypatch, 29)
    with pytest.raises(KeyboardInterrupt):
        recover(copy.deepcopy(first), model, lr=None, steps=32, checkpoint=tmp_path)
    assert (tmp_path / CHECKPOINT).exists()
    monkeypatch.undo()
    resumed = recover(copy.deepcopy(first), model, lr=None, steps=32, checkpoint=tmp_path)
    assert same(state(whole), state(resumed))
    with pytest.raises(lmfx.StoreError, match="belongs to another training .*seed was 0 and is 1"):
        recover(copy.deepcopy(first), model, lr=None, steps=32, checkpoint=tmp_path, seed=1)


@pytest.mark.parametrize("better", ["orthogonal", "adam"])
def test_the_kind_of_step_is_tried_and_a_run_that_goes_on_keeps_it(
    first: fx.GraphModule, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: str
) -> None:
    step = recovery_trainer.Trainer.step
    kinds: list[str] = []

    def noted_step(self: Any, number: int, optimizer: Any, rate: float) -> float:
        kinds.append(optimizer.param_groups[0]["kind"])
        # The steps of the other kind go the wrong way.
        return step(self, number, optimizer, rate if kinds[-1] == better else -rate)

    monkeypatch.setattr(recovery_trainer.Trainer, "step", noted_step)
    whole = recover(copy.deepcopy(first), model, lr=None, steps=16)
    assert set(kinds) == {"orthogonal", "adam"}
    assert whole.meta["lmfx_recovery"].optimizer == better and f"{better} steps" in str(whole.meta["lmfx_recovery"])
    stop_at(monkeypatch, 13)
    with pytest.raises(KeyboardInterrupt):
        recover(copy.deepcopy(first), model, lr=None, steps=16, checkpoint=tmp_path)
    monkeypatch.setattr(recovery_trainer.Trainer, "step", noted_step)
    kinds.clear()
    resumed = recover(copy.deepcopy(first), model, lr=None, steps=16, checkpoint=tmp_path)
    assert set(kinds) == {better}
    assert resumed.meta["lmfx_recovery"].optimizer == better
    assert same(state(whole), state(resumed))


@pytest.mark.parametrize("kind", ["orthogonal", "adam"])
def test_a_kind_that_is_asked_for_is_the_only_one(
    student: fx.GraphModule, model: nn.Module, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    seen: set[str] = set()
    step = recovery_trainer.Trainer.step

    def noted_step(self: Any, number: int, optimizer: Any, rate: float) -> float:
        seen.add(optimizer.param_groups[0]["kind"])
        return step(self, number, optimizer, rate)

    monkeypatch.setattr(recovery_trainer.Trainer, "step", noted_step)
    told = recover(student, model, lr=None, steps=8, optimizer=kind).meta["lmfx_recovery"]
    assert seen == {kind} == {told.optimizer}
    assert told.after <= told.before


TWO = """
import os, sys
sys.path.insert(0, ".")
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from tests.lmfx.training.test_recovery import DATA, QUICK
from tests.toys import compress, toy
import lmfx
torch.manual_seed(3)
model = toy()
model.head.weight.data.mul_(20)
options = {"realize": ("compose",), "surrogate": "identity", "quality": None, "refit": False}
student = compress(model, DATA[:1], 0.5, calibration=DATA, merge=False, **options)
options = {**QUICK, "steps": 60, "batch": 8, "lr": None, "norms": None}
lmfx.recover(student, model, DATA, **options)
told = student.meta["lmfx_recovery"]
assert told.after < told.before, told
assert told.steps == 60
save_file({k: v.clone() for k, v in student.state_dict().items()}, f"{sys.argv[1]}/{os.environ['RANK']}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_decide_alike_and_end_with_the_same_weights(tmp_path: Path) -> None:
    one, other = weights_of_both(TWO, tmp_path, 29633)
    assert same(one, other)


# --- other inputs and outputs -----------------------------------------------------------------------------------------


def test_two_inputs_and_two_outputs() -> None:
    torch.manual_seed(0)
    model = TwoInputs().eval()
    pair = (DATA, DATA.flip(0))
    student = compress(
        model,
        (DATA[:1], DATA[:1]),
        0.6,
        calibration=pair,
        merge=False,
        realize=("compose",),
        surrogate="identity",
        refit=False,
    )
    told = recover(student, model, pair, steps=60, lr=0.003).meta["lmfx_recovery"]
    assert told.after < told.before


def test_inputs_by_name() -> None:
    torch.manual_seed(0)
    model = TwoInputs().eval()
    pair = {"depth": DATA.flip(0), "image": DATA}
    student = compress(
        model,
        {"depth": DATA[:1], "image": DATA[:1]},
        0.6,
        calibration=pair,
        merge=False,
        realize=("compose",),
        refit=False,
    )
    told = recover(student, model, pair, steps=40, lr=0.003).meta["lmfx_recovery"]
    assert told.after < told.before


def test_a_graph_of_one_batch_size_is_trained_with_that(student: fx.GraphModule, model: nn.Module) -> None:
    graph = lmfx.trace(model, DATA[:4])
    facts = noted(graph)
    graph.meta["lmfx"] = type(facts)(**{**facts.__dict__, "sizes": {"batch": "fixed"}})
    told = recover(student, graph, steps=8).meta["lmfx_recovery"]
    assert told.batch == 4


def test_a_network_without_a_plan_is_compared_by_its_outputs(model: nn.Module) -> None:
    torch.manual_seed(1)
    smaller = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    student = lmfx.trace(smaller.eval(), DATA[:1])
    told = recover(student, model, steps=40, lr=0.03).meta["lmfx_recovery"]
    assert told.after < told.before


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"minutes": 0}, "is no time to recover in"),
        ({"steps": 0}, "steps=0: use a whole number from 1"),
        ({"batch": 1.5}, "batch=1.5"),
        ({"lr": -1.0}, "lr=-1.0: use a positive number"),
        ({"optimizer": "sgd"}, "optimizer='sgd': use one of 'orthogonal', 'adam'"),
        ({"norms": "on"}, "norms='on': use one of 'train', 'frozen'"),
        ({"temperature": 0}, "temperature=0"),
        ({"features": -1}, "features=-1: use a weight from 0"),
    ],
)
def test_options_that_can_not_be(student: fx.GraphModule, model: nn.Module, options: dict[str, Any], told: str) -> None:
    with pytest.raises(lmfx.OptionError, match=told):
        recover(student, model, **options)


def test_networks_and_images_that_can_not_be(student: fx.GraphModule, model: nn.Module) -> None:
    with pytest.raises(lmfx.InputError, match="the student is a Net: trace it first"):
        recover(model, model)  # type: ignore[arg-type]
    with pytest.raises(lmfx.InputError, match="the calibration data is empty"):
        recover(student, model, [])
    with pytest.raises(lmfx.InputError, match="NaN or infinite"):
        recover(student, model, DATA * math.nan)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 7)).eval()
    with pytest.raises(lmfx.InputError, match="has the shape .* where the original's has"):
        recover(student, other)
    with pytest.raises(lmfx.InputError, match="requires a gradient"):
        recover(copy.deepcopy(student).requires_grad_(False), model)
    with torch.no_grad():
        next(student.parameters()).fill_(math.nan)
    with pytest.raises(lmfx.InputError, match="no number at any rate: check the weights"):
        recover(student, model)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.body(x)).relu().mean((2, 3)))


def test_a_student_that_was_pruned_after_it_was_traced_is_recovered_where_shapes_agree() -> None:
    torch.manual_seed(0)
    net, thin = Residual(8).eval(), Residual(5).eval()
    pruned = lmfx.trace(copy.deepcopy(net), DATA[:1])
    for name, module in thin.named_children():  # as Torch-Pruning does: the shapes that nodes have noted stay
        pruned.add_module(name, module)
    before = loss_of(pruned, net)
    assert loss_of(recover(pruned, net), net) < before
