"""A network runs on as many images at a time as its largest value allows, and what comes of it is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import lmfx
from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import BATCH, batches_for, images_at_once
from lmfx.importance import Reconstruction

RECORDING = "lmfx.calibration.recording.VALUE_BYTES"


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()


def drawn(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("example, limit, wanted", [(1, 1 << 30, BATCH), (1, 4 * 9216, 4), (3, 4 * 9216, 4), (1, 9, 1)])
def test_the_largest_value_of_a_batch_keeps_to_the_limit(
    example: int, limit: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RECORDING, limit)  # 8 channels of 12 x 12 in float64 are 9,216 bytes
    graph = lmfx.trace(chain(), drawn(example))
    assert images_at_once(graph) == wanted
    assert images_at_once(graph, 2) == min(wanted, 2)
    assert [len(b[0]) for b in batches_for(graph, Calibration((drawn(wanted + 1),)))] == [wanted, 1]


def test_a_weight_is_no_value_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 4, 3), nn.Parameter(torch.ones(64, 100))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).flatten(1) @ self.table

    monkeypatch.setattr(RECORDING, 1 << 14)
    graph = lmfx.trace(Scaled().eval(), torch.zeros(1, 3, 6, 6))
    assert images_at_once(graph) == BATCH


def test_where_shapes_are_not_known_or_no_cpu_computes_it_is_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RECORDING, 1)
    assert images_at_once(fx.symbolic_trace(chain()), 7) == 7
    graph = lmfx.trace(chain(), drawn(1))
    assert images_at_once(graph, 7) == 1
    for node in graph.graph.nodes:
        if node.meta.get("device") is not None:
            node.meta["device"] = torch.device("meta")
    assert images_at_once(graph, 7) == 7


def in_pieces(made: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    whole = made()
    monkeypatch.setattr(RECORDING, 3 * 9216)
    return whole, made()


@pytest.mark.parametrize("exact, norms", [(True, "kept"), (True, "batch"), (False, "kept")])
def test_scores_of_a_few_images_at_a_time_are_those_of_all_at_once(
    exact: bool, norms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = chain()
    norm = nn.BatchNorm2d(4, dtype=torch.float64)
    graph = lmfx.trace(nn.Sequential(*body[:5], norm, *body[5:]).eval(), drawn(1))
    estimator = Reconstruction(exact=exact, norms=norms, probes=64)

    def scores() -> Any:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))  # nothing is to be found there
        folder.mkdir()
        return lmfx.score(graph, estimator, calibration=drawn(64), cache_dir=folder, progress=False).rows

    whole, pieces = in_pieces(scores, monkeypatch)
    assert len(whole) > 3 and whole.keys() == pieces.keys() and min(whole.values()) < 0
    error = 1e-6 if exact else 0.5  # fits of sums in another order; random probes
    assert all(abs(pieces[k] - v) <= error * abs(v) + 1e-9 for k, v in whole.items())


def test_a_refit_of_a_few_images_at_a_time_is_that_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(64)
    graph = lmfx.trace(chain(), x[:1])
    fit = next(c for c in lmfx.spans(graph) if c.realization == "fit" and len(c.all_convs) == 2)

    def outputs() -> torch.Tensor:
        with torch.no_grad():
            return lmfx.rewrite(graph, lmfx.MergePlan((fit,)), calibration=x, refit=True, progress=False)(x)

    whole, pieces = in_pieces(outputs, monkeypatch)
    assert torch.allclose(whole, pieces, rtol=1e-4, atol=1e-6)
