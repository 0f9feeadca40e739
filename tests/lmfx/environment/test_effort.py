"""What a call cost, by stage."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lmfx
from lmfx.environment.effort import Effort, StageClock


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_stages_add_up_also_where_one_fails() -> None:
    clock = StageClock()
    for _ in range(2):
        with clock.stage("first"):
            burn(0.01)
    with pytest.raises(ValueError, match="on the way"), clock.stage("second"):
        burn(0.01)
        raise ValueError("on the way")
    effort = clock.effort()
    assert [name for name, _ in effort.stages] == ["first", "second"]
    assert dict(effort.stages)["first"] >= 0.02 and dict(effort.stages)["second"] >= 0.01
    assert effort.seconds == sum(s for _, s in effort.stages)


def test_the_peak_of_memory_holds_what_was_there() -> None:
    before = StageClock().effort().peak
    if before is None:
        pytest.skip("this system does not tell")
    held = torch.ones(1 << 26)  # 256 MB
    after = StageClock().effort().peak
    assert after is not None and after >= max(before, held.numel() * 4)


def test_a_result_says_what_it_cost_and_where() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()).eval()
    images = torch.randn(32, 3, 12, 12)
    net = lmfx.compress(model, images[:1], 0.7, calibration=images, latency="roofline", progress=False)
    effort = lmfx.result_of(net).effort
    assert isinstance(effort, Effort) and effort.seconds > 0
    assert {"trace", "spans", "profile", "score", "solve", "judge plans", "rewrite"} <= {n for n, _ in effort.stages}
    assert "CPU time (" in str(lmfx.report(net))


def test_it_is_not_saved_and_tells_no_two_results_apart(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    images = torch.randn(4, 3, 12, 12)
    net = lmfx.compress(model, images[:1], 0.7, calibration=images, latency="roofline", progress=False)
    lmfx.save(net, tmp_path / "net")
    again = lmfx.load(tmp_path / "net", model)
    assert lmfx.result_of(again).effort is None
    one, two = (replace(lmfx.result_of(n), line=None) for n in (again, net))  # the line holds NaN, equal to nothing
    assert one == two
