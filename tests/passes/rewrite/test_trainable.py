"""The trainable form trains like any module, and merging it afterwards is exact."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

import lmfx
from benchmarks.paper.after_training import check, train
from benchmarks.shared.random_plans import random_plan, randomise_norms
from benchmarks.zoo.denoising import DenoisingNet
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import MergePlan
from tests.helpers import run
from tests.toys import Net, compress


class Inverted(nn.Module):
    """1 x 1, depthwise, 1 x 1 with norms, beside a skip; then a strided conv."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for conv in (nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 4, 1)):
            layers += [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU6()]
        self.stem, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(*layers[:-1])
        self.down = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.down(self.body(x) + x)


def image(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def noisy(batch: int, size: int) -> tuple[Tensor, Tensor]:
    return image(batch, size), torch.randint(0, 1000, (batch,))


# --- exact after training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "draw", "size", "norm"),
    [
        (lambda: randomise_norms(Net(8)), image, 13, "affine"),
        (lambda: randomise_norms(Inverted()), image, 13, "affine"),
        (lambda: DenoisingNet(64, (1,), attention=1), noisy, 8, "post"),
        (lambda: DenoisingNet(64, (1,), attention=1), noisy, 8, "affine"),
    ],
    ids=["residual", "inverted", "norm behind", "norm as affine"],
)
def test_after_training_merged_equals_trainable(make: Any, draw: Any, size: int, norm: str) -> None:
    torch.manual_seed(0)
    outcome = check(make(), draw, size, norm, steps=8, seed=3)
    assert outcome.spans and (outcome.norms > 0) == (norm == "post")
    assert outcome.unchanged == () and outcome.moved > 1e-2
    assert outcome.error <= 1e-12


def test_what_merging_forgets_is_seen() -> None:
    torch.manual_seed(0)
    graph = lmfx.trace(Net(8).double().eval(), image(4, 13))
    plan = random_plan(lmfx.spans(graph, realize=("compose",)), random.Random(3), ("compose",))
    student = lmfx.rewrite(graph, plan)
    held = {id(m): m.reparameterize() for m in student.modules() if isinstance(m, LinearSpan)}
    assert held
    train(student, image, 13, 4)
    names = [n for n, m in student.named_modules() if isinstance(m, LinearSpan)]
    stale = {n: held[id(student.get_submodule(n))] for n in names}
    merged, x = lmfx.merge(student), image(2, 13)
    assert relative_error(run(student, x), run(merged, x)) <= 1e-12
    for name, conv in stale.items():
        merged.get_submodule(name).load_state_dict(conv.state_dict())
    assert relative_error(run(student, x), run(merged, x)) > 1e-3


# --- it trains like any module ----------------------------------------------------------------------------------------

X = torch.randn(4, 3, 13, 13)


@pytest.fixture
def student() -> fx.GraphModule:
    torch.manual_seed(0)
    graph = lmfx.trace(randomise_norms(Inverted()).eval(), X)
    spans = lmfx.spans(graph, realize=("compose",))
    whole = [c for c in spans if c.realization == "compose" and len(c.kept) == len(c.all_convs) >= 3]
    return lmfx.rewrite(graph, MergePlan((whole[0],), surrogate="affine"), calibration=X)


def test_every_parameter_has_a_gradient_and_norms_move_in_train_mode(student: fx.GraphModule) -> None:
    before = {n: b.clone() for n, b in student.named_buffers()}
    student.train()
    assert all(m.training for m in student.modules())
    student(X).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())
    moved = {n for n, b in student.named_buffers() if not torch.equal(b, before[n])}
    assert moved == {n for n in before if "running_" in n or "num_batches" in n} and moved
    student.eval()
    frozen = {n: b.clone() for n, b in student.named_buffers()}
    student(X)
    assert all(torch.equal(b, frozen[n]) for n, b in student.named_buffers())


def test_a_state_dict_goes_round(student: fx.GraphModule) -> None:
    other = copy.deepcopy(student)
    train_once(student)
    assert not torch.equal(run(student.eval(), X), run(other, X))
    missing = other.load_state_dict(student.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    assert torch.equal(run(student, X), run(other, X))
    assert torch.equal(run(lmfx.merge(student), X), run(lmfx.merge(other), X))


def train_once(net: nn.Module, lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr)
    net.train()
    optimizer.zero_grad()
    net(X).square().mean().backward()
    optimizer.step()


def test_under_autocast_it_trains_and_merges(student: fx.GraphModule) -> None:
    student.train()
    with torch.autocast("cpu", torch.bfloat16):
        output = student(X)
        loss = output.float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in student.parameters())
    assert all(bool(p.grad.isfinite().all()) for p in student.parameters())  # type: ignore[union-attr]
    student.eval()
    merged = lmfx.merge(student)
    assert relative_error(run(student, X), run(merged, X)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert relative_error(student(X).float(), merged(X).float()) < 5e-2


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_in_ddp_no_parameter_is_unused(student: fx.GraphModule, group: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(student)
    for _ in range(2):  # an unused parameter raises in the second step
        train_once(wrapped)
    student.eval()
    assert relative_error(run(student, X), run(lmfx.merge(student), X)) < 1e-5


def worker(rank: int, folder: str) -> None:
    """One of two processes: trains on its own images, and writes down what it has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = randomise_norms(Inverted()).eval()
    net = compress(model, torch.randn(4, 3, 13, 13), 0.8, realize=("compose",), merge=False)
    wrapped = nn.parallel.DistributedDataParallel(net.train())
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(torch.randn(4, 3, 13, 13)).square().mean().backward()
        optimizer.step()
    total = torch.stack([p.detach().double().sum() for p in net.parameters()])
    (Path(folder) / f"{rank}.txt").write_text(repr(total.tolist()))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()


def test_compress_gives_a_trainable_form_that_trains_and_merges() -> None:
    torch.manual_seed(0)
    model = randomise_norms(Net(8)).eval()
    net = compress(model, X, 0.7, realize=("compose",), merge=False, activation_after="relu6")
    before = run(net, X)
    for _ in range(3):
        train_once(net, 0.05)
    net.eval()
    assert relative_error(before, run(net, X)) > 1e-4
    merged = lmfx.merge(net)
    assert relative_error(run(net, X), run(merged, X)) < 1e-5
    assert not any(isinstance(m, LinearSpan) for m in merged.modules())
