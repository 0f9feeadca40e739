"""Which calibration image may be seen by what: fits, choices and refits never see the images that judge the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lmfx
from lmfx.importance import ImportanceTable
from tests.helpers import one_thread as one_thread
from tests.lmfx.test_quality_of_results import IMAGES, MODEL, compress

pytestmark = pytest.mark.usefixtures("one_thread")

FRESH = torch.randn(24, 3, 12, 10, generator=torch.Generator().manual_seed(5))


def others(places: slice) -> Tensor:
    """The calibration images with those at some places of quite another kind."""
    changed = IMAGES.clone()
    changed[places] = 5 + 3 * changed[places].flip(-1)
    return changed


def outputs(net: Any) -> Tensor:
    with torch.no_grad():
        return net(FRESH).double()


def test_nothing_but_the_quality_depends_on_the_images_that_judge(tmp_path: Path) -> None:
    data = others(slice(7, None, 8))
    nets = [compress(0.6, calibration=x, cache_dir=tmp_path / str(i)) for i, x in enumerate((IMAGES, data))]
    plain, changed = map(outputs, nets)
    assert float((changed - plain).abs().max()) <= 1e-4 * float(plain.abs().max())
    quality = lmfx.result_of(nets[1]).quality
    with torch.no_grad():
        wanted, seen = MODEL(data[7::8]).double(), nets[1](data[7::8]).double()
    divergence = float((seen - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
    assert quality is not None and quality.divergence == pytest.approx(divergence, rel=1e-3)
    assert divergence != pytest.approx(lmfx.result_of(nets[0]).quality.divergence, rel=0.05)


def test_no_fit_sees_the_images_that_choose(tmp_path: Path) -> None:
    graph = lmfx.trace(MODEL, IMAGES[:1])
    spans = lmfx.spans(graph)
    rows = {c.key: -float(len(c.convs)) for c in spans if c.realization == "fit"}
    nets = [
        compress(0.6, calibration=x, importance=ImportanceTable(rows, {}), cache_dir=tmp_path)
        for x in (IMAGES, others(slice(3, None, 4)), others(slice(0, None, 4)))
    ]
    assert any(c.realization == "fit" for c in lmfx.result_of(nets[0]).plan.candidates)
    plain, held_out, fitted = map(outputs, nets)
    assert float((held_out - plain).abs().max()) <= 1e-4 * float(plain.abs().max())
    assert float((fitted - plain).abs().max()) > 1e-2 * float(plain.abs().max())


def test_what_is_to_be_kept_is_kept_on_all_images_that_no_fit_saw() -> None:
    data = IMAGES.clone()  # plans change what the network says of the images that judge, and of those that choose not
    data[7::8] = 20 * data[7::8].mean((2, 3), keepdim=True)
    net = compress(keep=0.8, calibration=data)
    held_out = torch.cat([data[3::8], data[7::8]])
    with torch.no_grad():
        same = float((net(held_out).argmax(1) == MODEL(held_out).argmax(1)).double().mean())
    assert same >= 0.8
