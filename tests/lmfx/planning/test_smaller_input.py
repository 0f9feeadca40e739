"""A result says what a smaller input alone would keep at its latency, where the network takes one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.calibration.images import Calibration
from lmfx.latency.backends.roofline import RooflineBackend
from lmfx.passes.errors import LmfxError
from lmfx.planning import smaller_input as module
from lmfx.planning.smaller_input import smaller_input
from tests.lmfx.planning.test_input_sizes import scaled, strided
from tests.toys import images

X = images(32, 48)


def looked_at(model: nn.Module, share: float, x: Tensor = X, backend: Any = None) -> lmfx.Alternative | None:
    graph = lmfx.trace(model, x[:1])
    return smaller_input(model, graph, x[:1], Calibration((x,), ()), backend or RooflineBackend(), share, 1.0)


@pytest.fixture
def by_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks take as long as their images have pixels."""
    monkeypatch.setattr(module, "measure_pair", lambda _, a, b, ms: b[1][0].numel() / a[1][0].numel())


@pytest.mark.usefixtures("by_pixels")
@pytest.mark.parametrize(("share", "size"), [(0.9, 40), (0.7, 40), (0.69, 32), (0.25, 24)])
def test_it_is_the_largest_size_that_is_fast_enough(share: float, size: int) -> None:
    found = looked_at(strided(), share)
    assert found is not None and found.what == f"input {size} x {size} alone"
    assert found.ratio == pytest.approx((size / 48) ** 2) and found.ratio <= share
    with torch.no_grad():
        same = (strided()(scaled(X, size, size)).argmax(1) == strided()(X).argmax(1)).double().mean()
    assert found.quality.agreement == pytest.approx(float(same))


@pytest.mark.usefixtures("by_pixels")
def test_there_is_none_below_half_of_each_side() -> None:
    assert looked_at(strided(), 0.2) is None


def test_networks_of_one_size_have_none() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(2304, 5),
    )
    assert looked_at(model.eval(), 0.7) is None


def test_networks_whose_output_is_a_map_have_none() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Tanh()
    )
    assert looked_at(model.eval(), 0.7) is None


def test_where_it_cannot_be_measured_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise LmfxError("no such op")

    monkeypatch.setattr(module, "measure_pair", refuse)
    assert looked_at(strided(), 0.7) is None


@pytest.mark.usefixtures("by_pixels")
def test_the_report_says_where_a_smaller_input_keeps_more() -> None:
    model, data = strided(), images(64, 48)
    options: dict[str, Any] = {"calibration": data, "latency": "roofline", "progress": False}
    net = lmfx.compress(model, data[:1], 0.8, **options)
    result = lmfx.result_of(net)
    (other,) = result.alternatives
    assert result.ratio is not None and other.ratio <= result.ratio and result.quality is not None
    said = f"{other.what}: {other.quality} at {other.ratio:.1%}"
    text = str(lmfx.report(net))
    assert said in text
    assert (f"{said}; that keeps more, see input_sizes=" in text) == (other.quality.kept > result.quality.kept)


def test_nothing_is_looked_at_where_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmfx.planning.compression.smaller_input", lambda *args: pytest.fail("was looked at"))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    )
    model.eval()(X[:1])
    net = lmfx.compress(model, X[:1], 0.99, calibration=X, latency="roofline", progress=False)
    assert lmfx.result_of(net).alternatives == ()
