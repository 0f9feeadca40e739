"""Fine-tuning: every objective trains what it says, a killed run goes on, and nothing of the caller's is changed."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, fx, nn

import lmfx
from lmfx.training.checkpoints import CHECKPOINT
from lmfx.training.losses import StudentLoss, shared_layers
from lmfx.training.processes import elsewhere
from tests.helpers import one_thread as one_thread
from tests.lmfx.training.two_processes import weights_of_both
from tests.toys import compress as roofline_compress
from tests.toys import images, toy

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = images(64)
LABELS = DATA[:, 0].mean((1, 2)).argsort().argsort() * 5 // 64  # how red an image is: it can be learned


def student_of(model: nn.Module, budget: float = 0.5, **options: Any) -> fx.GraphModule:
    options = {"realize": ("compose",), "surrogate": "identity", "refit": False, **options}
    return roofline_compress(model, DATA[:1], budget, calibration=DATA, merge=False, **options)


def pairs(size: int = 16) -> list[tuple[Tensor, Tensor]]:
    return list(zip(DATA.split(size), LABELS.split(size), strict=True))


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def entropy(net: nn.Module) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(net(DATA), LABELS))


def distill(student: Any, teacher: Any, batches: Any, **options: Any) -> fx.GraphModule:
    return lmfx.distill(student, teacher, batches, **{"progress": False, **options})


def test_plain_fine_tuning_learns_labels_without_a_teacher() -> None:
    student = student_of(toy())
    before = entropy(student)
    returned = distill(student, None, pairs(), epochs=8, lr=1e-2, loss=F.cross_entropy, distillation=None)
    assert returned is student
    assert not any(module.training for module in student.modules())
    assert entropy(student) < before - 0.1
    assert entropy(lmfx.merge(student)) == pytest.approx(entropy(student), rel=1e-3)


@pytest.mark.parametrize("distance", ["outputs", "logits", "features"])
def test_each_distance_brings_the_student_closer_and_leaves_the_teacher_alone(distance: Any) -> None:
    torch.manual_seed(0)
    model = toy()
    student, before = student_of(model, 0.7, quality=None), state(model)  # not the best plan, which has little to learn

    def apart() -> float:
        with torch.no_grad():
            return float((student(DATA).log_softmax(1) - model(DATA).log_softmax(1)).square().mean())

    start = apart()
    distill(student, model, DATA.split(16), epochs=6, lr=3e-3, distillation=distance)
    assert apart() < 0.7 * start
    assert same(before, state(model))


def test_labels_and_teacher_together_are_the_weighted_sum() -> None:
    model, student = toy(), student_of(toy())
    x, y = DATA[:16], LABELS[:16]
    wanted = model(x).detach()
    parts = [
        StudentLoss(student, F.cross_entropy, None)((x,), {}, (y,), None, {}),
        StudentLoss(student, None, "logits", temperature=2.0)((x,), {}, (), wanted, {}),
    ]
    both = StudentLoss(student, F.cross_entropy, "logits", weight=0.5, temperature=2.0)((x,), {}, (y,), wanted, {})
    assert float(both.detach()) == pytest.approx(float((parts[0] + 0.5 * parts[1]).detach()), rel=1e-5)
    mean = F.kl_div((student(x) / 2).log_softmax(1), (wanted / 2).softmax(1), reduction="batchmean") * 4
    assert float(parts[1].detach()) == pytest.approx(float(mean.detach()), rel=1e-4)


def test_norms_train_with_labels_and_stay_frozen_on_request() -> None:
    def statistics(net: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in state(net).items() if "running" in name}

    for norms, moved in ((None, True), ("train", True), ("frozen", False)):
        student = student_of(toy(), 1.0)
        before = statistics(student)
        assert before
        seen: list[bool] = []

        def loss(output: Tensor, labels: Tensor, seen: list[bool] = seen, net: nn.Module = student) -> Tensor:
            seen.append(any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d)))
            return F.cross_entropy(output, labels)

        distill(student, None, pairs(), loss=loss, distillation=None, norms=norms)
        assert (not same(before, statistics(student))) is moved
        assert set(seen) == {moved}


def test_features_are_the_layers_that_both_have() -> None:
    model = toy()
    student = student_of(model, 0.7)
    names = shared_layers(student, model, (DATA[:4],), {})
    assert names
    assert set(names) <= {name for name, _ in model.named_modules()}
    distill(student, model, [DATA[:8]], distillation="features", features=names[:1])
    with pytest.raises(lmfx.InputError, match="has no layer 'nowhere'.*that student and teacher share"):
        distill(student, model, [DATA[:8]], distillation="features", features=["nowhere"])


def test_features_before_an_activation_in_place_are_those_before_it() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu_(self.a(x)))

    model = InPlace()
    with lmfx.training.losses.recorded(model, ["a"]) as seen, torch.no_grad():
        model(DATA[:2])
        assert torch.equal(seen["a"], model.a(DATA[:2]))
    assert float(seen["a"].min()) < 0


def test_the_same_seed_trains_the_same_network_and_the_callers_numbers_go_on() -> None:
    model = toy()
    dataset = torch.utils.data.TensorDataset(DATA, LABELS)

    def trained(seed: int) -> dict[str, Tensor]:
        loader = torch.utils.data.DataLoader(dataset, 16, shuffle=True)
        student = copy.deepcopy(first)
        return state(distill(student, None, loader, epochs=2, loss=F.cross_entropy, distillation=None, seed=seed))

    first = student_of(model)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one = trained(0)
    assert torch.equal(torch.rand(3), wanted)
    assert same(one, trained(0))
    assert not same(one, trained(1))


def test_an_optimizer_of_ones_own_with_schedule_warmup_and_clip() -> None:
    student, rates = student_of(toy()), []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            norm = torch.stack([p.grad.norm() for p in self.param_groups[0]["params"] if p.grad is not None]).norm()
            assert float(norm) <= 0.011
            return super().step(closure)

    distill(
        student,
        None,
        pairs(8),
        epochs=2,
        loss=F.cross_entropy,
        distillation=None,
        optimizer=lambda p: Watched(p, lr=0.1, momentum=0.9, nesterov=True),
        warmup=0.5,
        clip=0.01,
    )
    assert len(rates) == 16
    assert rates[0] == pytest.approx(0.02) and rates[4] == pytest.approx(0.1)
    assert rates[:5] == sorted(rates[:5]) and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.01


class Stop(Exception):
    """What ends a training in the middle."""


@pytest.mark.parametrize(("shuffled", "ema"), [(False, None), (True, None), (True, 0.9)])
def test_a_stopped_run_goes_on_at_the_saved_epoch_and_ends_at_the_same_bits(
    tmp_path: Path, shuffled: bool, ema: float | None
) -> None:
    model = toy()
    first = student_of(model)
    options: dict[str, Any] = {"epochs": 4, "lr": 1e-2, "loss": F.cross_entropy, "distillation": "logits", "ema": ema}

    def loader() -> Any:
        own = torch.Generator().manual_seed(3)
        return (
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA, LABELS), 16, shuffle=True, generator=own)
            if shuffled
            else pairs()
        )

    whole = distill(copy.deepcopy(first), model, loader(), **options)

    def stop(done: int, _: fx.GraphModule) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        distill(copy.deepcopy(first), model, loader(), checkpoint=tmp_path, after_epoch=stop, **options)
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["lmfx"])["epoch"] == 2
    epochs: list[int] = []
    resumed = distill(
        copy.deepcopy(first), model, loader(), checkpoint=tmp_path, after_epoch=lambda n, _: epochs.append(n), **options
    )
    assert epochs == [3, 4]
    assert same(state(whole), state(resumed))
    again = distill(copy.deepcopy(first), model, loader(), checkpoint=tmp_path, **options)  # all done: only loaded
    assert same(state(whole), state(again))


def test_the_average_of_all_steps_is_returned_and_the_training_does_not_feel_it(tmp_path: Path) -> None:
    model = toy()
    first = student_of(model, 0.9)
    options: dict[str, Any] = {"epochs": 12, "lr": 1e-2, "loss": F.cross_entropy, "distillation": None}
    batch, steps = pairs()[:1], []  # one step an epoch
    plain = distill(copy.deepcopy(first), None, batch, **options, after_epoch=lambda _, net: steps.append(state(net)))
    student, averages = copy.deepcopy(first), []
    options |= {"ema": 0.6, "checkpoint": tmp_path}
    distill(student, None, batch, **options, after_epoch=lambda _, net: averages.append(state(net)))
    expected = steps[0]
    for n, values in enumerate(steps[1:], 1):
        d = min(0.6, (1 + n) / (10 + n))
        expected = {k: d * expected[k] + (1 - d) * v if v.is_floating_point() else v.clone() for k, v in values.items()}
        assert all(torch.allclose(averages[n][k], v, atol=1e-6) for k, v in expected.items())
    moved = [k for k in expected if not torch.equal(expected[k], steps[-1][k])]
    assert any("running_var" in k for k in moved) and any("weight" in k for k in moved)
    assert same(state(student), averages[-1]) and not student.training
    assert torch.allclose(lmfx.merge(student)(DATA), student(DATA), atol=1e-4)
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:  # which keeps both
        raw = {k.removeprefix("student."): file.get_tensor(k) for k in file.keys() if k.startswith("student.")}  # noqa: SIM118
    assert same(raw, state(plain))


def test_a_checkpoint_without_an_average_is_not_gone_on_with_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"loss": F.cross_entropy, "distillation": None, "checkpoint": tmp_path}
    distill(student_of(toy()), None, pairs(), **options)
    with pytest.raises(lmfx.StoreError, match=r"ema was None and is 0\.9"):
        distill(student_of(toy()), None, pairs(), ema=0.9, **options)


def test_a_device_without_an_index_is_that_of_its_type() -> None:
    device = torch.device
    assert not elsewhere(device("cuda"), device("cuda:1")) and not elsewhere(device("cuda:1"), device("cuda:1"))
    assert elsewhere(device("cuda:0"), device("cuda:1")) and elsewhere(device("cpu"), device("cuda"))


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, ".")
import torch
torch.set_num_threads(1)
from tests.lmfx.training.test_distill import pairs, student_of
from tests.toys import toy
import lmfx
torch.manual_seed(0)
student = student_of(toy())
def tell(done, net):
    print(done, flush=True)
    if done == 2 and sys.argv[2] == "wait":
        time.sleep(60)
lmfx.distill(student, None, pairs(), epochs=3, loss=torch.nn.functional.cross_entropy, distillation=None,
             checkpoint=sys.argv[1], after_epoch=tell, progress=False)
"""


def test_a_process_that_is_killed_loses_at_most_one_epoch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen([*command, "wait"], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["1", "2"]
        process.send_signal(signal.SIGKILL)
    done = subprocess.run([*command, "go"], cwd=root, capture_output=True, text=True, check=True, timeout=250)
    assert done.stdout.split() == ["3"]


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model, options = toy(), {"loss": F.cross_entropy, "distillation": None, "checkpoint": tmp_path}
    distill(student_of(model), None, pairs(), **options)
    with pytest.raises(lmfx.StoreError, match=r"another training \(lr was 0.0003 and is 0.5\).*delete it"):
        distill(student_of(model), None, pairs(), lr=0.5, **options)
    with pytest.raises(lmfx.StoreError, match="another training .*student was"):
        distill(student_of(toy(width=4)), None, pairs(), **options)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        (tmp_path / CHECKPOINT).write_bytes(damaged)
        with pytest.raises(lmfx.StoreError, match="cannot be read.*delete it"):
            distill(student_of(model), None, pairs(), **options)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"loss": F.cross_entropy, "distillation": None, "checkpoint": tmp_path, "epochs": 1}
    distill(student_of(toy()), None, pairs(), **options)
    before = (tmp_path / CHECKPOINT).read_bytes()
    other = student_of(toy())  # before nothing can be written: its rows go into the store

    def broken(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lmfx.training.checkpoints.os.replace", broken)
    (tmp_path / "other").mkdir()
    with pytest.raises(OSError, match="no space"):
        distill(other, None, pairs(), **{**options, "checkpoint": tmp_path / "other"})
    assert not (tmp_path / "other" / CHECKPOINT).exists()
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_batches_of_names_have_their_labels_under_other_names() -> None:
    student = student_of(toy())
    name = next(n.target for n in student.graph.nodes if n.op == "placeholder")
    batches = [{name: x, "label": y} for x, y in pairs()]
    before = entropy(student)
    distill(student, None, batches, epochs=8, lr=1e-2, loss=F.cross_entropy, distillation=None)
    assert entropy(student) < before - 0.1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"distillation": None}, "leaves nothing to minimise"),
        ({"distillation": "maps"}, "use one of 'outputs', 'logits', 'features'"),
        ({"schedule": "step"}, "use one of 'cosine', 'constant'"),
        ({"precision": "int8"}, "use one of 'fp32', 'fp16', 'bf16'"),
        ({"norms": "batch"}, "use one of 'train', 'frozen'"),
        ({"features": ["stem"]}, "goes with distillation='features'"),
        ({"temperature": 0.0}, "temperature=0.0: use a positive number"),
        ({"weight": -1.0}, "weight=-1.0: use a positive number"),
        ({"clip": 0}, "clip=0: use a positive number"),
        ({"ema": 1.0}, "ema=1.0: use a decay between 0 and 1"),
        ({"ema": "0.9"}, "ema='0.9': use a decay between 0 and 1"),
        ({"warmup": 1}, "a number of epochs below epochs=1"),
    ],
)
def test_options_that_can_not_be(options: dict[str, Any], told: str) -> None:
    with pytest.raises(lmfx.OptionError, match=told):
        distill(student_of(toy()), toy(), pairs(), **options)


def test_a_batch_without_the_labels_that_the_loss_wants_is_told() -> None:
    with pytest.raises(lmfx.InputError, match="with 0 labels"):
        distill(student_of(toy()), toy(), [DATA[:8]], loss=F.cross_entropy)
    with pytest.raises(lmfx.InputError, match="the teacher is a NoneType"):
        distill(student_of(toy()), None, [DATA[:8]])


def test_without_accelerate_mixed_precision_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    distill(student_of(toy()), toy(), [DATA[:8]])  # float32 in one process needs nothing
    with pytest.raises(lmfx.MissingExtra, match=r"precision='bf16' needs Accelerate.*lmfx\[train\]"):
        distill(student_of(toy()), toy(), [DATA[:8]], precision="bf16")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(lmfx.MissingExtra, match=r"training in 2 processes needs Accelerate"):
        distill(student_of(toy()), toy(), [DATA[:8]])


@pytest.fixture
def no_shared_state() -> Iterator[None]:
    """Accelerate keeps its settings in a class; tests must not see each other's."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(True)
    yield
    state.AcceleratorState._reset_state(True)


def test_bf16_through_accelerate_trains_in_mixed_precision(no_shared_state: None, tmp_path: Path) -> None:
    student, seen = student_of(toy()), set()
    dataset = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA, LABELS), 16, shuffle=True)

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        seen.add(output.dtype)
        return F.cross_entropy(output.float(), labels)

    before = entropy(student)
    options: dict[str, Any] = {"lr": 1e-2, "loss": loss, "precision": "bf16", "checkpoint": tmp_path, "epochs": 8}
    distill(student, toy(), dataset, distillation="logits", weight=0.1, **options)
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in student.parameters())
    assert entropy(student) < before - 0.1
    assert type(student.forward).__name__ == "method"  # nothing of the library is left on the student


def test_accelerate_in_float32_is_the_plain_loop(no_shared_state: None) -> None:
    from accelerate import Accelerator

    model = toy()
    first = student_of(model, 0.7)
    options: dict[str, Any] = {"epochs": 2, "lr": 1e-2, "loss": F.cross_entropy, "distillation": "features"}
    plain = distill(copy.deepcopy(first), model, pairs(), **options)
    other = distill(copy.deepcopy(first), model, pairs(), accelerator=Accelerator(cpu=True), **options)
    assert same(state(plain), state(other))


TWO = """
import sys
sys.path.insert(0, ".")
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from tests.lmfx.training.test_distill import DATA, LABELS, pairs, student_of
from tests.toys import toy
import lmfx
torch.manual_seed(0)
student = student_of(toy())
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA, LABELS), 8, shuffle=True)
seen = []
def loss(output, labels):
    seen.append(len(labels))
    return torch.nn.functional.cross_entropy(output, labels)
for loader in (data, pairs(8)):
    seen.clear()
    lmfx.distill(student, toy(), loader, epochs=2, loss=loss, distillation="logits", progress=False)
    assert seen == [8] * 8, seen  # half of the 64 images, twice
import os
save_file({k: v.clone() for k, v in student.state_dict().items()}, f"{sys.argv[1]}/{os.environ['RANK']}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_batches_and_end_with_the_same_weights(tmp_path: Path) -> None:
    one, other = weights_of_both(TWO, tmp_path, 29631)
    parameters = [name for name in one if "running" not in name and "batches" not in name]
    assert parameters
    assert all(torch.equal(one[name], other[name]) for name in parameters)
