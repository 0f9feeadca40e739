"""Layers that are kept are fitted to what they now read: what that mends, and what it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import lmfx
from lmfx.calibration.divergence import Divergence
from lmfx.calibration.images import Calibration, as_calibration
from lmfx.calibration.lockstep import Lockstep
from lmfx.calibration.places import find_sites
from lmfx.calibration.refitting import mixed, refit
from lmfx.importance import Reconstruction
from lmfx.passes.spans.globs import Globs
from tests.helpers import double


class Block(nn.Module):
    """A residual block between a stem and a head: conv, norm, clamp, conv, norm, sum, clamp."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu6(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(y)) + x)
        return self.head(x.mean((2, 3)))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return double(make())


def traced(make: Callable[[], nn.Module], *size: int, images: int = 48) -> tuple[fx.GraphModule, Tensor]:
    model = seeded(make)
    x = torch.randn(images, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return lmfx.trace(model, x[:2]), x


def calibrated(x: Tensor) -> Calibration:
    return as_calibration(x, x[:1])


def wrecked(graph: fx.GraphModule, *names: str) -> fx.GraphModule:
    student = copy.deepcopy(graph)
    for name in names:
        layer: Any = student.get_submodule(name)
        noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2)).to(layer.weight)
        layer.weight.data += 0.5 * layer.weight.std() * noise
        if layer.bias is not None:
            layer.bias.data += 0.3
    return student


def divergence(net: nn.Module, graph: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, z = graph(x), net(x)
    return float((z - a).square().sum() / (a - a.mean(0)).square().sum())


def test_a_student_that_is_the_original_stays_bit_for_bit() -> None:
    graph, x = traced(Block, 3, 8, 8)
    found = refit(copy.deepcopy(graph), graph, calibrated(x))
    for name, value in graph.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


@pytest.mark.parametrize("name", ["stem", "conv1", "conv2", "head"])
def test_a_wrecked_layer_gets_the_values_of_the_original_back(name: str) -> None:
    graph, x = traced(Block, 3, 9, 7)
    student = wrecked(graph, name)
    assert divergence(student, graph, x) > 1e-3
    found = refit(student, graph, calibrated(x))
    assert divergence(found, graph, x) < 1e-8


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 4, 5, 2, 2), (3, 17)),
    "3d": (lambda: nn.Conv3d(2, 4, 3, padding=1), (2, 4, 5, 4)),
    "dilated": (lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2), (3, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 7, 7)),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 7, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1), (3, 5, 5)),
    "sequence": (lambda: nn.Linear(5, 4), (6, 5)),
    "vector": (lambda: nn.Linear(5, 4), (5,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_is_mended(kind: str) -> None:
    make, size = KINDS[kind]
    tail = [nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 2, 1)] if kind == "vector" else []
    tail = [nn.Conv1d(6, 2, 1)] if kind == "sequence" else tail
    graph, x = traced(lambda: nn.Sequential(make(), nn.Tanh(), *tail), *size, images=64)
    found = refit(wrecked(graph, "0"), graph, calibrated(x))
    assert divergence(found, graph, x) < 1e-8


def test_a_layer_makes_up_for_what_the_other_branch_of_a_sum_lacks() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.skip, self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.skip(x) - self.norm(self.conv(x))

    graph, x = traced(Sum, 3, 6, 6)
    student = wrecked(graph, "skip")
    # what is wrecked has no say: it is no layer that is refitted
    (site,) = [s for s in find_sites(student, graph, None) if s.path == "conv"]
    assert site.place.name == site.goal.name
    assert site.place.target is torch.sub
    student.skip.register_forward_hook(lambda *_: None)  # a module with hooks is left alone
    found = refit(student, graph, calibrated(x))
    assert torch.equal(found.skip.weight, student.skip.weight)
    assert divergence(found, graph, x) < 1e-8


def test_the_bias_of_a_layer_without_one_goes_into_the_norm_after_it() -> None:
    graph, x = traced(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), 3, 6, 6)
    student = copy.deepcopy(graph)
    student.get_submodule("1").running_mean += 0.5
    found = refit(student, graph, calibrated(x))
    assert found.get_submodule("0").bias is None
    assert torch.allclose(found.get_submodule("1").running_mean, graph.get_submodule("1").running_mean, atol=1e-6)


def test_what_the_judge_finds_worse_is_taken_back() -> None:
    graph, x = traced(Block, 3, 8, 8)
    student = wrecked(graph, "conv1")

    class Contrary:
        images = calibrated(x[:8])
        calls = 0

        def loss(self, outputs: list[Any]) -> float:
            self.calls += 1
            return float(self.calls)  # every change is worse than what was before

    found = refit(student, graph, calibrated(x), Contrary())
    for name, value in student.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


@pytest.mark.parametrize("globs", [{"include": ("conv1",)}, {"exclude": ("stem", "conv2", "head")}])
def test_what_was_to_stay_as_it_is_is_not_refitted(globs: dict[str, tuple[str, ...]]) -> None:
    graph, x = traced(Block, 3, 9, 7)
    student = wrecked(graph, "stem", "conv1", "conv2", "head")
    found = refit(student, graph, calibrated(x), globs=Globs(graph, **globs))
    for name in ("stem", "conv1", "conv2", "head"):
        same = torch.equal(student.get_submodule(name).weight, found.get_submodule(name).weight)
        assert same == (name != "conv1"), name
    everything = refit(student, graph, calibrated(x), globs=Globs(graph))
    assert not torch.equal(student.stem.weight, everything.stem.weight)


def test_the_student_that_is_given_is_not_changed() -> None:
    graph, x = traced(Block, 3, 8, 8)
    student = wrecked(graph, "conv1")
    before = copy.deepcopy(student.state_dict())
    refit(student, graph, calibrated(x))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_the_example_alone_teaches_nothing() -> None:
    graph, x = traced(Block, 3, 8, 8)
    student = wrecked(graph, "conv1")
    found = refit(student, graph, calibrated(x[:1]))
    assert torch.equal(found.conv1.weight, student.conv1.weight)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(torch.relu(self.conv(x)))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.conv.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.first(x)))


@pytest.mark.parametrize("make", [Twice, Tied])
def test_layers_that_are_shared_are_left_alone(make: Callable[[], nn.Module]) -> None:
    graph, _ = traced(make, 4, 6, 6)
    left = {s.path for s in find_sites(copy.deepcopy(graph), graph, None)}
    assert left <= {"last"}


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor, v: Tensor) -> dict[str, Tensor]:
            h = torch.relu(self.a(x)) + self.b(v)[:, :, None, None]
            return {"map": self.c(h), "mean": h.mean((2, 3))}

    model = seeded(Two)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, 6, 6, dtype=torch.float64, generator=generator)
    v = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    graph = lmfx.trace(model, (x[:2], v[:2]))
    found = refit(wrecked(graph, "a", "b", "c"), graph, as_calibration((x, v), (x[:2], v[:2])))
    with torch.no_grad():
        wanted, seen = graph(x, v), found(x, v)
    assert all(torch.allclose(seen[k], wanted[k], atol=1e-3) for k in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_refit_keeps_the_type_of_the_network(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(48, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    graph = lmfx.trace(model, x[:1]).to(dtype)
    x = x.to(dtype)
    student = wrecked(graph, "0")
    found = refit(student, graph, Calibration((x,)))
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert divergence(found.double(), graph.double(), x.double()) < 0.2 * divergence(
        student.double(), graph.double(), x.double()
    )


def test_a_plan_that_drops_a_block_is_aimed_at_what_the_block_gave() -> None:
    graph, x = traced(Block, 3, 8, 8)
    spans = lmfx.spans(graph, method="layeronly")
    drops = [c for c in spans if c.realization == "drop" and "conv2" in c.all_convs]
    if not drops:
        drops = [c for c in spans if c.realization == "drop"]
    assert drops
    plan = lmfx.MergePlan((drops[0],))
    student = lmfx.rewrite(graph, plan, calibration=x)
    goals = {s.path: s.goal.name for s in find_sites(student, graph, plan)}
    assert drops[0].span.output in goals.values()
    found = refit(student, graph, calibrated(x))
    assert divergence(found, graph, x) < divergence(student, graph, x)


def test_a_lockstep_gives_what_the_graph_gives_wherever_it_holds() -> None:
    graph, x = traced(Block, 3, 8, 8, images=20)
    with torch.no_grad():
        wanted = graph(x)
    run = Lockstep(graph, calibrated(x), 8)
    assert run.images == [8, 8, 4]
    for stop in range(len(run.nodes)):
        run.hold(stop)
        assert run.at <= stop
        assert torch.allclose(torch.cat(run.outputs()), wanted)


def test_a_lockstep_holds_where_little_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmfx.calibration.lockstep.HELD_BYTES", 0)
    wide = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 50, 1), nn.Tanh(), nn.Conv2d(50, 2, 1))
    graph, x = traced(lambda: wide, 2, 6, 6)
    run = Lockstep(graph, calibrated(x))
    run.hold(run.index[next(n for n in run.nodes if n.target == "3")])
    assert run.nodes[run.at - 1].target == "0"
    assert torch.allclose(torch.cat(run.outputs()), graph(x))


def test_the_divergence_of_the_original_is_none() -> None:
    graph, x = traced(Block, 3, 8, 8)
    judge = Divergence(graph, calibrated(x))
    assert judge.loss(Lockstep(graph, calibrated(x)).outputs()) == 0.0


def test_a_refitted_network_is_saved_and_loaded_with_the_biases_that_it_got(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False)]
    model = double(nn.Sequential(*layers))
    x = torch.randn(40, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    graph = lmfx.trace(model, x[:1])
    drop = next(c for c in lmfx.spans(graph) if c.realization == "fit" and len(c.all_convs) == 2)
    student = lmfx.rewrite(graph, lmfx.MergePlan((drop,)), calibration=x, refit=True)
    assert any(m.bias is not None for n, m in student.named_modules() if n in ("0", "4"))
    for name, net in (("student", student), ("merged", lmfx.merge(student))):
        lmfx.save(net, tmp_path / name)
        assert torch.equal(lmfx.load(tmp_path / name, model)(x), net(x))


def narrowed(graph: fx.GraphModule) -> fx.GraphModule:
    """A student that cannot be what the original is: its second conv is one of 1 x 1."""
    student = copy.deepcopy(graph)
    conv = nn.Conv2d(6, 6, 1, groups=2, bias=False, dtype=torch.float64)
    student.conv2 = conv.requires_grad_(False)
    return student


def test_layers_that_are_set_together_come_nearer_than_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = traced(Block, 3, 8, 8, images=160)
    student, images = narrowed(graph), calibrated(x)
    joint = refit(student, graph, images)
    monkeypatch.setattr("lmfx.calibration.refitting.MOST_WORK", 0.0)
    alone = refit(student, graph, images)
    fresh = torch.randn(100, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert divergence(joint, graph, fresh) < 0.97 * divergence(alone, graph, fresh)
    assert divergence(alone, graph, fresh) < divergence(student, graph, fresh)


def test_setting_layers_together_gives_back_what_it_borrowed() -> None:
    graph, x = traced(Block, 3, 8, 8, images=64)
    student = narrowed(graph)
    found = refit(student, graph, calibrated(x))
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in student.named_parameters()]
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in student.parameters()]
    assert all(p.grad is None for p in found.parameters())


def test_layers_of_a_network_that_is_too_large_are_not_set_together(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = traced(Block, 3, 8, 8)
    seen: list[list[str]] = []
    monkeypatch.setattr(
        "lmfx.calibration.joint_fit.JointFit.step",
        lambda self, best, judged: seen.append([s.path for s, _ in self.metrics]) or best,
    )
    student = wrecked(graph, "stem", "conv1", "conv2", "head")
    student.head.bias.data += torch.tensor([3.0, 0, 0, 0, 0], dtype=torch.float64)
    monkeypatch.setattr("lmfx.calibration.refitting.MOST_WORK", 50 * 36 * 1000.0)
    refit(student, graph, calibrated(x))
    assert seen == []
    monkeypatch.setattr("lmfx.calibration.refitting.MOST_WORK", 1e12)
    refit(student, graph, calibrated(x))
    assert "stem" in seen[-1]


def test_a_divergence_counts_each_output_in_its_own_unit() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y, 1e6 * y.mean((2, 3))

    graph, x = traced(Two, 3, 6, 6)
    judge = Divergence(graph, calibrated(x))
    y, mean = graph(x)
    pieces = list(zip(y.detach().split(16), mean.detach().split(16), strict=True))
    assert judge.loss(pieces) < 1e-20
    wrong = [(a + 0.1, b) for a, b in pieces]
    other = [(a, b + 1e5) for a, b in pieces]
    assert 1e-4 < judge.loss(wrong) < 1e2
    assert 1e-4 < judge.loss(other) < 1e2
    assert judge.loss([(a * float("nan"), b) for a, b in pieces]) == float("inf")


class Gamma(nn.Module):
    """Ends in an op that has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.register_buffer("above", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.igamma(1 + self.b(torch.relu(self.a(x))).abs(), self.above)


def test_layers_before_an_op_without_a_derivative_are_set_one_by_one() -> None:
    graph, x = traced(Gamma, 3, 8, 8, images=64)
    student = wrecked(graph, "a")
    found = refit(student, graph, calibrated(x))
    assert divergence(found, graph, x) < 1e-8
    with pytest.raises(RuntimeError, match="derivative"):
        torch.autograd.grad(graph(x).sum(), graph.a.weight)


def test_an_estimate_that_needs_a_derivative_says_so_and_another_one_does_without(tmp_path: Path) -> None:
    graph, x = traced(Gamma, 3, 8, 8, images=32)
    spans = lmfx.spans(graph)
    table = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    options: dict[str, Any] = {"latency": table, "calibration": x, "spans": spans, "progress": False}
    with pytest.raises(lmfx.ModelError, match=r"igamma.*Reconstruction\(exact=True\)"):
        lmfx.score(graph, Reconstruction(exact=False), cache_dir=tmp_path, **options)
    assert len(lmfx.score(graph, Reconstruction(exact=True), cache_dir=tmp_path, **options)) > 2


@pytest.mark.parametrize(("count", "in_all"), [(2, 8), (48, 192), (600, 1024), (1100, 1100), (1, 1)])
def test_joint_steps_see_mixtures_of_few_images(count: int, in_all: int) -> None:
    x = torch.randn(count, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    (found,) = mixed(Calibration((x,))).tensors
    assert found.shape == (in_all, 2, 5, 3)
    assert torch.equal(found[:count], x)
    assert torch.equal(found, mixed(Calibration((x,))).tensors[0]), "the same each time"
    if in_all > count > 2:
        assert len(torch.unique(found.flatten(1), dim=0)) > 0.75 * in_all


def test_integers_are_not_mixed() -> None:
    data = Calibration((torch.randn(8, 3, 4, 4), torch.arange(8)))
    assert mixed(data) is data


def chain() -> nn.Module:
    convs = [m for n in (3, 16, 16) for m in (nn.Conv2d(n, 16, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def test_mixtures_keep_joint_steps_from_learning_few_images_by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """On images that nothing saw, more of what the steps gain is left. The student lacks two activations, so no weights
    are right: what is compared is far above rounding."""
    graph, x = traced(chain, 3, 7, 6, images=400)
    student = copy.deepcopy(graph)
    for name in ("1", "3"):
        student.set_submodule(name, nn.Identity())
    judge, fresh = Divergence(graph, calibrated(x[100:116])), Divergence(graph, calibrated(x[200:]))

    def left() -> float:
        nets = [refit(student, graph, calibrated(few), judge) for few in x[:48].split(12)]
        return sum(fresh.loss(Lockstep(net, calibrated(x[200:])).outputs()) for net in nets)

    with_mixtures = left()
    monkeypatch.setattr("lmfx.calibration.refitting.MIXED", 0)
    without = left()
    assert without > 0.1
    assert with_mixtures < 0.97 * without
