"""A smaller input is a way to be faster too: what it keeps is measured, and the best size is taken."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.latency.backends.roofline import RooflineBackend
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.planning import input_sizes
from lmfx.planning.scaled_images import usual_sizes
from tests.helpers import one_thread as one_thread
from tests.lmfx.test_quality_of_results import IMAGES, MODEL, compress
from tests.toys import images

pytestmark = pytest.mark.usefixtures("one_thread")


def scaled(x: Tensor, *size: int) -> Tensor:
    return nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True)


def pointwise() -> nn.Module:
    """A network that hardly sees the size of smooth images, and of which no layer can go."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (3, 16, 16):
        conv = nn.Conv2d(width, 16, 1)
        conv.weight.data *= 4
        layers += [conv, nn.Tanh()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).eval()


def test_a_smaller_input_is_a_candidate(tmp_path: Path) -> None:
    net = compress(0.5, input_sizes=((8, 8), 10), cache_dir=tmp_path)
    result = lmfx.result_of(net)
    assert result.input_size in ((12, 10), (8, 8), (10, 10))
    assert result.ratio is not None and result.ratio <= 0.5
    assert any(a.what.startswith("compressed for") for a in result.alternatives)
    graph = lmfx.trace(MODEL, IMAGES[:1])
    assert result.quality is not None and result.quality.images == 8
    with torch.no_grad():
        same = float(
            (net(scaled(IMAGES[7::8], *result.input_size)).argmax(1) == graph(IMAGES[7::8]).argmax(1)).double().mean()
        )
    assert result.quality.agreement == pytest.approx(same)
    assert "input      images of" in lmfx.report(net)
    lmfx.save(net, tmp_path / "net")


def test_an_input_that_is_small_enough_needs_no_plan(tmp_path: Path) -> None:
    result = lmfx.result_of(compress(0.9, input_sizes=((8, 8),), cache_dir=tmp_path))
    (alone,) = [a for a in result.alternatives if a.what == "input 8 x 8 alone"]
    assert alone.ratio < 0.9
    with torch.no_grad():  # of the original on images of that size, against itself at its own
        wanted, seen = MODEL(IMAGES[7::8]).double(), MODEL(scaled(IMAGES[7::8], 8, 8)).double()
    divergence = float((seen - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
    assert divergence > 0.01 and alone.quality.divergence == pytest.approx(divergence, rel=1e-3)


def loss(net: Any, graph: Any, choosing: Tensor) -> float:
    """The divergence of a result from the original, on images at the size that the result takes."""
    size = lmfx.result_of(net).input_size or choosing.shape[2:]
    with torch.no_grad():
        wanted, seen = graph(choosing).double(), net(scaled(choosing, *size)).double()
    return float((seen - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def test_the_own_size_is_taken_where_a_smaller_one_loses_more(tmp_path: Path) -> None:
    result = lmfx.result_of(compress(0.5, input_sizes=((3, 3),), cache_dir=tmp_path))
    assert result.input_size == (12, 10)
    losses = {a.what: a.quality.loss() for a in result.alternatives}
    assert losses["compressed for 12 x 10"] < 0.5 * losses["compressed for 3 x 3"]
    assert result.quality is not None and result.quality.loss() == losses["compressed for 12 x 10"]


def test_a_smaller_size_is_taken_where_it_loses_less_than_a_plan(tmp_path: Path) -> None:
    model, data = pointwise(), images(64, 24)
    options: dict[str, Any] = {"calibration": data, "latency": "roofline", "progress": False, "cache_dir": tmp_path}
    nets = [
        lmfx.compress(model, data[:1], 0.7, quality="divergence", input_sizes=sizes, **options) for sizes in ((), (12,))
    ]
    assert lmfx.result_of(nets[1]).input_size == (12, 12)
    own, best = (loss(net, model, data[3::8]) for net in nets)
    assert best < 0.3 * own


class Dearer(RooflineBackend):
    """Measures that a network for a smaller input takes `factor` of what was said of it, beside one for a larger."""

    factor = 1.3

    def measure_interleaved(self, modules: Sequence[Any], repeats: int = 5) -> list[list[float]]:
        rows = super().measure_interleaved(modules, repeats)
        sizes = [inputs[0].numel() for _, inputs in modules]
        # Both of one pair: the table of all originals is measured once, and is what was said.
        dearer = [len(sizes) == 2 and repeats > 5 and n < sizes[0] for n in sizes]
        return [[self.factor * t for t in row] if d else row for row, d in zip(rows, dearer, strict=True)]


def at_eight(backend: RooflineBackend, budget: float) -> float:
    """The ratio of what was made for images of 8 x 8."""
    result = lmfx.result_of(compress(budget, input_sizes=((8, 8),), latency=backend))
    return next(a.ratio for a in result.alternatives if a.what == "compressed for 8 x 8")


def test_what_is_made_for_a_smaller_input_is_measured_beside_the_original() -> None:
    """Two ratios, multiplied, say 1.3 times too little: it is made again, within less."""
    plain = at_eight(RooflineBackend(), 0.5)
    assert plain <= 0.5 < Dearer.factor * plain
    assert at_eight(Dearer(), 0.5) <= 0.5


def test_a_smaller_input_that_never_measures_within_the_budget_is_refused() -> None:
    model, data = pointwise(), images(64, 24)
    options: dict[str, Any] = {"calibration": data, "progress": False, "quality": "divergence", "input_sizes": (12,)}
    with pytest.raises(lmfx.InfeasibleBudget, match="for images of 12 x 12 no network within 40.0%.*Leave that size"):
        lmfx.compress(model, data[:1], 0.4, latency=Dearer(), **options)


def test_sizes_that_the_network_does_not_take_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 120, 5)).eval()
    with pytest.raises(lmfx.InputError, match="leave that size out"):
        lmfx.compress(model, IMAGES[:1], 0.8, calibration=IMAGES, latency="roofline", input_sizes=(8,), progress=False)


@pytest.mark.parametrize("bad", [(0,), ("8",), ((1, 2, 3),), (True,)])
def test_what_is_no_size_is_refused(bad: Any) -> None:
    with pytest.raises(lmfx.OptionError, match="input_sizes"):
        compress(0.8, input_sizes=bad)


class Strided(nn.Module):
    """A classifier whose smallest map has a pixel for each 8 x 8 of the image."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 8, 8)
        self.body = nn.Sequential(*(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)))
        self.more = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(x))
        return self.head((x + torch.relu(self.more(x))).mean((2, 3)))


def strided() -> nn.Module:
    torch.manual_seed(1)
    model = Strided().eval()
    with torch.no_grad():
        features: list[Tensor] = []
        handle = model.head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
        model(images(64, 48))
        handle.remove()
        model.head.weight /= features[0].std(0)
        model.head.bias -= model(images(64, 48)).mean(0)
    return model


def test_usual_sizes_keep_the_phase_of_padding_and_strides() -> None:
    graph = lmfx.trace(strided(), torch.zeros(1, 3, 48, 64))
    assert usual_sizes(graph, (48, 64)) == [(40, 56), (32, 40), (24, 32)]
    assert usual_sizes(lmfx.trace(pointwise(), torch.zeros(1, 3, 24, 24)), (24, 24)) == []


@pytest.fixture
def by_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Originals take as long as their images have pixels."""
    monkeypatch.setattr(input_sizes, "time_wholes", lambda _, nets: [[float(x[0].numel())] for _, x in nets])


@pytest.mark.usefixtures("by_pixels")
def test_auto_looks_at_the_sizes_that_suit_the_network(tmp_path: Path) -> None:
    model, data = strided(), images(64, 48)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    options: dict[str, Any] = {"calibration": data, "latency": "roofline", "progress": False, "cache_dir": tmp_path}
    result = lmfx.result_of(lmfx.compress(model, data[:1], 0.6, input_sizes="auto", **options))
    assert result.input_size in ((40, 40), (32, 32), (24, 24), (48, 48))
    alone = {a.what for a in result.alternatives if a.what.endswith("alone")}
    assert "input 24 x 24 alone" in alone and "input 40 x 40 alone" not in alone  # (5 / 6)^2 is more than 0.6
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), "the model is not touched"


def test_auto_leaves_out_sizes_that_the_network_does_not_take(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(288, 5),
    ).eval()
    options: dict[str, Any] = {"calibration": images(64), "latency": "roofline", "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmfx.QualityWarning)
        net = lmfx.compress(model, images(1), 0.9, input_sizes="auto", **options)
    assert lmfx.result_of(net).input_size == (12, 12)


def searched(
    monkeypatch: pytest.MonkeyPatch, alone: dict[int, float], made: dict[int, float], budget: float
) -> list[int]:
    """The heights that are compressed, where sizes lose so much alone and compressed."""
    heights: list[int] = []

    def compressed(self: Any, size: tuple[int, int]) -> Any:
        heights.append(size[0])
        return input_sizes._Made(self.whole, 0.5, size, made[size[0]])

    monkeypatch.setattr(input_sizes.SizeSearch, "alone", lambda self, size: alone[size[0]])
    monkeypatch.setattr(input_sizes.SizeSearch, "made", compressed)
    monkeypatch.setattr(input_sizes.SizeSearch, "finished", lambda self, best: best)
    monkeypatch.setattr(sys.modules["lmfx.compress"], "_check_quality", lambda *args: None)
    model, data = strided(), images(64, 48)
    best: Any = lmfx.compress(
        model, data[:1], budget, calibration=data, latency="roofline", progress=False, input_sizes=tuple(alone)
    )
    assert best.loss == min(made[h] for h in heights)
    return heights


@pytest.mark.usefixtures("by_pixels")
def test_sizes_that_cannot_be_the_best_are_not_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {24: 0.5, 32: 0.3, 40: 0.1}
    # Of those that are fast enough alone, only the best; from there to larger ones, until they become worse.
    assert searched(monkeypatch, few, {32: 0.3, 40: 0.15, 48: 0.2}, 0.5) == [32, 40, 48]
    assert searched(monkeypatch, few, {32: 0.3, 40: 0.35, 48: 0.2}, 0.5) == [32, 40]
    assert searched(monkeypatch, {24: 0.1, 32: 0.3, 40: 0.2}, {24: 0.1, 48: 0.05}, 0.35) == [24, 48]
    assert searched(monkeypatch, {24: 0.1, 32: 0.11}, {24: 0.12, 48: 0.05}, 0.5) == [24, 48]


def kl(net: Any, model: nn.Module, data: Tensor) -> float:
    """What a network for images of 24 x 24 loses of the scores."""
    with torch.no_grad():
        wanted, seen = model(data).log_softmax(1), net(scaled(data, 24, 24)).log_softmax(1)
    return float((wanted.exp() * (wanted - seen)).sum(1).mean())


def test_last_layers_are_fitted_to_smaller_images_alone_and_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = strided(), images(96, 48)
    losses: list[tuple[float, float]] = []
    alone = input_sizes.SizeSearch.alone

    def both(self: Any, size: tuple[int, int]) -> float:
        as_it_is = self.choose.of(input_sizes._outputs(self.graphs[size], self.choose, size)).loss(self.name)
        losses.append((as_it_is, alone(self, size)))
        return losses[-1][1]

    monkeypatch.setattr(input_sizes.SizeSearch, "alone", both)
    net = lmfx.compress(model, data[:1], 0.4, input_sizes=(24,), calibration=data, latency="roofline", progress=False)
    assert lmfx.result_of(net).input_size == (24, 24)
    assert not torch.equal(net.get_submodule("head").weight, model.get_submodule("head").weight)
    assert kl(net, model, data[3::8]) < 0.9 * kl(model, model, data[3::8])
    ((as_it_is, fitted),) = losses  # at the best scale of the scores, both
    assert fitted < 0.98 * as_it_is


def test_what_is_trained_for_a_smaller_input_learns_from_the_original_at_its_own_size(tmp_path: Path) -> None:
    model, data = strided(), images(96, 48)
    options: dict[str, Any] = {"calibration": data, "latency": "roofline", "progress": False, "cache_dir": tmp_path}
    plain, trained = (
        lmfx.compress(model, data[:1], 0.4, input_sizes=(24,), recover=recover, **options) for recover in (None, "6s")
    )
    result = lmfx.result_of(trained)
    assert result.input_size == lmfx.result_of(plain).input_size == (24, 24) and result.merged
    assert "lmfx_recovery" in trained.meta
    assert kl(trained, model, data[3::8]) < 0.9 * kl(plain, model, data[3::8])
    lmfx.save(trained, tmp_path / "net", model="toy")
    again = lmfx.load(tmp_path / "net", model)
    x = scaled(data[:5], 24, 24)
    assert torch.allclose(again(x), trained(x), atol=1e-5)


def test_only_the_best_one_is_trained_also_where_it_is_that_of_the_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    train = input_sizes.recover

    def recover(student: Any, model: Any, images: Any, **options: Any) -> Any:
        sizes.append(tuple(images.tensors[0].shape[2:]))
        return train(student, model, images, **options)

    monkeypatch.setattr(input_sizes, "recover", recover)
    monkeypatch.setattr(
        "lmfx.planning.compression.recover_student", lambda *args, **options: pytest.fail("was trained")
    )
    net = compress(0.6, input_sizes=((3, 3),), recover="2s", realize=("compose",))
    result = lmfx.result_of(net)
    assert result.input_size == (12, 10) and sizes == [(12, 10)]
    assert result.merged and "lmfx_recovery" in net.meta
    spans = [
        m
        for m in compress(0.6, input_sizes=((3, 3),), merge=False, realize=("compose",)).modules()
        if isinstance(m, LinearSpan)
    ]
    assert spans and not any(isinstance(m, LinearSpan) for m in net.modules())
