"""A row goes through the whole public face; the networks, full width and all settings are the benchmark's."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.diffusion import public_face as diffusion_face
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")


class Small(nn.Module):
    """A residual block with norms and a time embedding, of two inputs and one output in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.time = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1), nn.Linear(1, 8)
        layers = [(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2)]
        self.block = nn.Sequential(*(m for some in layers for m in some))

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor]:
        y = self.first(x) + self.time(time[:, None] / 1000)[:, :, None, None]
        return (self.last(y + self.block(y)),)


def inputs(count: int) -> tuple[Tensor, ...]:
    return torch.randn(count, 3, 16, 16), torch.randint(0, 1000, (count,))


# The library's networks take minutes; smaller ones of the same kinds go through the face in test_multi_input.py.
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("small", "paper, post"),
        ("small", "magnitude"),
        pytest.param("conditional", "paper, post", marks=pytest.mark.slow),
        pytest.param("autoencoder", "magnitude", marks=pytest.mark.slow),
    ],
)
def test_a_row_has_every_stage_and_the_loaded_network_is_equal(
    name: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(diffusion_face.NETWORKS, "small", (Small, inputs))
    if name != "small":
        pytest.importorskip("diffusers")
    row = diffusion_face.row(name, setting, 0.9, 2)
    assert row["spans"] > 0 and row["ratio"] <= 0.9 and row["error"] == 0
    assert min(row[stage] for stage in ("compress", "save", "load", "export")) > 0
    assert 0.1 < row["gigabytes"] < 64


def test_a_failure_is_told_and_an_unreachable_budget_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Done:
        def __init__(self, error: str, row: dict[str, Any] | None = None) -> None:
            self.returncode, self.stderr, self.stdout = int(row is None), error, json.dumps(row)

    stages = dict.fromkeys(("compress", "report", "save", "load", "export", "gigabytes"), 1.0)
    good = {"candidates": 9, "spans": 2, "ratio": 0.7, "error": 0.0, **stages}
    for done, code, told in (
        (Done("", good), 0, "0.700"),
        (Done("", {**good, "error": 1e-2}), 1, "loaded is off by 1.0e-02"),
        (Done("x\nlmfx.passes.errors.InfeasibleBudget: no"), 0, "cannot be reached: lmfx"),
        (Done("KeyError: 'a'"), 1, "KeyError: 'a'"),
    ):
        monkeypatch.setattr(diffusion_face.subprocess, "run", lambda *_, done=done, **__: done)
        monkeypatch.setattr("sys.argv", ["x", "--networks", "ddpm", "--settings", "depth"])
        with pytest.raises(SystemExit) as ended:
            diffusion_face.main()
        assert int(ended.value.code or 0) == code
        assert told in capsys.readouterr().out
