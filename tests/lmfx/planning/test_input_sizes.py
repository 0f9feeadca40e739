"""A smaller input is a way to be faster too: what it keeps is measured, and the best size is taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.latency.backends.roofline import RooflineBackend
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
    assert len(result.alternatives) >= 3
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
