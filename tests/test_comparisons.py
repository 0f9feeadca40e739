"""The comparison benchmarks run to their end on tiny settings, and keep what they measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import one_thread as one_thread
from torch import nn

from benchmarks import diffusion_digits, methods

pytestmark = pytest.mark.usefixtures("one_thread")


class Small(nn.Module):
    """Three convolutions with norms, in place of the network of the benchmark."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def tiny(seed: int) -> Any:
    """A hundred images of the drawn characters."""
    from benchmarks import characters

    return characters.load(seed, train=128, test=36)


def test_methods_compares_all_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import characters

    monkeypatch.setattr(characters, "load", tiny)
    monkeypatch.setattr(characters, "Classifier", Small)
    file = tmp_path / "methods.json"
    arguments = (
        f"--data characters --seeds 0 --budgets 0.7 --epochs 1 --train-epochs 1 --width 4 --images 16 --json {file}"
    )
    arguments += " --latency roofline"
    methods.main(arguments.split())
    rows = json.loads(file.read_text())["rows"]
    assert set(rows) == {"characters 0 original", *(f"characters 0 {name} 0.7" for name in methods.METHODS)}
    for name in methods.METHODS:
        row = rows[f"characters 0 {name} 0.7"]
        assert "infeasible_ms" in row or (row["ratio"] <= 0.7 and 0 <= row["after"] <= 1)
    assert "ratio" in rows["characters 0 fit 0.7"]
    assert (tmp_path / "methods.png").exists()
    monkeypatch.setattr(methods, "row", None)  # a second run measures nothing
    methods.main(arguments.split())
    told = capsys.readouterr().out
    assert "layermerge" in told and "1 seeds" in told


def test_the_table_says_what_can_not_be_reached() -> None:
    args = methods.options(["--data", "digits", "--seeds", "0", "--budgets", "0.5"])
    rows = {"digits 0 original": {"after": 1.0}, "digits 0 layeronly 0.5": {"infeasible_ms": 1.0}}
    told = methods.table(rows, args)
    assert "layeronly     0.50 can not be reached" in told
    assert "depth         0.50 not run" in told


def test_the_frechet_distance_is_that_of_gaussians() -> None:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=random)
    assert diffusion_digits.frechet(a, a) == pytest.approx(0, abs=1e-8)
    moved = a + torch.tensor([3.0, 0.0, 4.0])
    assert diffusion_digits.frechet(a, moved) == pytest.approx(25, rel=1e-6)
    # diagonal covariances: the sum of (s - s')^2
    scaled = a * torch.tensor([2.0, 1.0, 1.0])
    assert diffusion_digits.frechet(a, scaled) == pytest.approx(
        float(a[:, 0].std() ** 2 + scaled[:, 0].mean() ** 2), rel=0.05
    )


def test_sampling_recovers_a_distribution_whose_best_denoiser_is_known() -> None:
    """For one image c, the noise in x is (x - sqrt(a) c) / sqrt(1 - a): DDIM ends at c."""
    c = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def best(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = diffusion_digits.ALPHA[t][:, None, None, None]
        return (x - a.sqrt() * c) / (1 - a).sqrt()

    drawn = diffusion_digits.sample(best, 4, seed=0)
    assert torch.allclose(drawn, c.expand_as(drawn), atol=1e-4)


def test_diffusion_digits_runs_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    whole = diffusion_digits.digits.load(0)
    few = diffusion_digits.digits.Digits(*(v[:70] for v in vars(whole).values()))
    monkeypatch.setattr(diffusion_digits.digits, "load", lambda seed: few)
    arguments = (
        f"--steps 2 --fine-tune 2 --width 8 --budget 0.85 --samples 8 --images 4 --latency roofline --out {tmp_path}"
    )
    diffusion_digits.main([*arguments.split(), "--classifier-epochs", "1"])
    rows = json.loads((tmp_path / "diffusion_digits.json").read_text())
    assert rows["compressed"]["convs"] <= rows["original"]["convs"]
    assert rows["compressed"]["ms"] <= 0.85 * rows["original"]["ms"] * 1.001
    assert (tmp_path / "samples.png").exists()
    assert "fine-tuned" in capsys.readouterr().out
