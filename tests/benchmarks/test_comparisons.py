"""The comparison benchmarks run to their end on tiny settings, and keep what they measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.diffusion import diffusion_network as diffusion
from benchmarks.diffusion import digits as diffusion_digits
from benchmarks.paper import methods, methods_report
from tests.helpers import one_thread as one_thread

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
    from benchmarks.shared import characters

    return characters.load(seed, train=128, test=36)


ARGUMENTS = "--data characters --seeds 0 --budgets 0.7 --epochs 2 --train-epochs 1 --width 4 --images 16"


@pytest.fixture
def small_task(monkeypatch: pytest.MonkeyPatch) -> None:
    import characters

    monkeypatch.setattr(characters, "load", tiny)
    monkeypatch.setattr(characters, "Classifier", Small)
    methods._data.cache_clear()


def test_methods_compares_all_in_stages_and_does_nothing_twice(
    small_task: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"{ARGUMENTS} --out {tmp_path} --latency roofline --stage".split()
    with pytest.raises(SystemExit, match="run --stage train first"):
        methods.main([*arguments, "compress"])
    for stage in methods.STAGES:
        methods.main([*arguments, stage])
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file() and "cache" not in f.parts}
    assert not (tmp_path / "methods.json").exists()
    methods.main([*arguments, "all"])
    assert all(f.stat().st_mtime_ns == written for f, written in files.items())
    found = json.loads((tmp_path / "methods.json").read_text())
    assert list(found) == ["characters resnet"]
    settings, rows = found["characters resnet"]["settings"], found["characters resnet"]["rows"]
    assert settings == {
        "width": 4, "train_epochs": 1, "images": 16, "latency": "roofline", "epochs": 2, "lr": 2e-3,
    }  # fmt: skip
    assert {"0 original", *(f"0 {name} 0.7" for name in methods.METHODS)} <= set(rows)
    for name in methods.METHODS:
        row = rows[f"0 {name} 0.7"]
        if "infeasible" in row:
            assert row["infeasible"] > 0.7
            row = rows[f"0 {name} fastest"]
            assert row["ratio"] >= rows[f"0 {name} 0.7"]["infeasible"] * 0.999
        else:
            assert row["ratio"] <= 0.7
        assert 0 <= row["renewed"] <= 1
        assert len(row["curve"]) == 2 and row["after"] == pytest.approx(row["curve"][-1], abs=0.1)
    assert "ratio" in rows["0 fit 0.7"]
    assert (tmp_path / "methods.png").exists()
    told = capsys.readouterr().out
    assert "layermerge" in told and "1 seeds, 2 epochs" in told
    with pytest.raises(SystemExit, match="begun with epochs=2, not 3"):
        methods.main([*arguments, "all", "--epochs", "3"])


def test_a_method_that_misses_a_budget_is_shown_with_its_fastest_plan(small_task: None, tmp_path: Path) -> None:
    """Nothing in `layeronly` makes the stem, most of this network's time, go away."""
    arguments = f"{ARGUMENTS} --out {tmp_path} --latency roofline --budgets 0.01 --stage".split()
    methods.main([*arguments, "train"])
    methods.main([*arguments, "compress"])
    rows = methods_report.gathered(tmp_path)["characters resnet"]["rows"]
    assert rows["0 layeronly 0.01"]["infeasible"] > 0.01
    assert rows["0 layeronly fastest"]["ratio"] == pytest.approx(rows["0 layeronly 0.01"]["infeasible"], rel=0.05)


def test_equal_plans_are_fine_tuned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = methods.Run("digits", "resnet", 0, methods.options(["--out", str(tmp_path)]))
    for label, plan in (("0.85", "a"), ("0.7", "b"), ("0.5", "b"), ("0.35", None)):
        row = {"ratio": 0.4, "plan": plan} if plan else {"infeasible": 0.5}
        methods.write(run.folder / f"fit-{label}" / "compressed.json", row)
    trained: list[str] = []
    monkeypatch.setattr(methods, "tuned", lambda run, folder: trained.append(folder.name) or {"after": len(trained)})
    methods.fine_tune(run)
    assert trained == ["fit-0.85", "fit-0.7"]
    assert methods.read(run.folder / "fit-0.5" / "fine-tuned.json") == {"after": 2}
    assert not (run.folder / "fit-0.35" / "fine-tuned.json").exists()


def test_the_table_says_what_can_not_be_reached() -> None:
    missed = {"infeasible": 0.83}
    fast = {"ratio": 0.84, "before": 0.1, "renewed": 0.4, "convs": 9, "after": 0.9, "curve": [0.5, 0.8, 0.85, 0.9]}
    rows = {"0 original": {"after": 1.0}, "0 layeronly 0.5": missed, "0 depth 0.5": missed, "0 depth fastest": fast}
    told = methods_report.table(
        {"digits resnet": {"settings": {"epochs": 4}, "rows": rows}}, ["layeronly", "depth", "fit"]
    )
    assert "layeronly       0.5 cannot be reached, least 0.830" in told
    assert "depth           0.5 *   0.840     9   10.0%    40.0%   90.0%   +5.0   90.0%" in told
    assert "fit             0.5 not run" in told


def test_the_frechet_distance_is_that_of_gaussians() -> None:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=random)
    assert diffusion.frechet(a, a) == pytest.approx(0, abs=1e-8)
    moved = a + torch.tensor([3.0, 0.0, 4.0])
    assert diffusion.frechet(a, moved) == pytest.approx(25, rel=1e-6)
    # diagonal covariances: the sum of (s - s')^2
    scaled = a * torch.tensor([2.0, 1.0, 1.0])
    assert diffusion.frechet(a, scaled) == pytest.approx(float(a[:, 0].std() ** 2 + scaled[:, 0].mean() ** 2), rel=0.05)


def test_sampling_recovers_a_distribution_whose_best_denoiser_is_known() -> None:
    """For one image c, the noise in x is (x - sqrt(a) c) / sqrt(1 - a): DDIM ends at c."""
    c = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def best(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = diffusion.ALPHA[t][:, None, None, None]
        return (x - a.sqrt() * c) / (1 - a).sqrt()

    drawn = diffusion.sample(best, 4, seed=0)
    assert torch.allclose(drawn, c.expand_as(drawn), atol=1e-4)


class SmallDenoiser(nn.Module):
    """Two residual blocks with a time embedding, GroupNorm and a long skip: a U-Net's parts, quick to trace.

    The library's own denoiser, traced at a batch of 1 and run at larger ones, is in test_multi_input.py.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(2 * width, 1, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(m for _ in range(2) for m in self.layers(width)), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(2)
        )

    @staticmethod
    def layers(width: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        late = self.time(timestep[:, None] / diffusion.TIMES)[:, :, None, None]
        first = y = self.first(sample)
        for block in self.blocks:
            y = y + block(y + late)
        return self.last(torch.cat([first, y], 1))


def test_diffusion_digits_runs_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = diffusion.digits.load(0)
    few = diffusion.digits.Digits(*(v[:70] for v in vars(whole).values()))
    monkeypatch.setattr(diffusion.digits, "load", lambda seed: few)
    monkeypatch.setattr(diffusion_digits, "Denoiser", SmallDenoiser)
    arguments = (
        "--steps 2 --fine-tune 2 --width 8 --budgets 0.85 --samples 8 --images 16 --batch 1 --latency roofline "
        f"--classifier-epochs 1 --out {tmp_path}"
    ).split()
    for stages in (["train", "profile"], ["score", "plan"]):
        diffusion_digits.main([*arguments, "--stage", *stages])
    kept = {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("*.safetensors")}
    assert len(kept) == 2
    diffusion_digits.main([*arguments, "--stage", "tune", "report"])
    assert kept == {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("*.safetensors")}
    rows = json.loads((tmp_path / "diffusion_digits.json").read_text())
    compressed, tuned = rows["0.85 compressed"], rows["0.85 fine-tuned"]
    assert compressed["ms"] <= 0.85 * rows["original"]["ms"] * 1.001
    assert compressed["errors"] != tuned["errors"] and len(tuned["errors"]) == diffusion.BUCKETS
    assert (tmp_path / "samples.png").exists()
    assert "0.85 fine-tuned" in capsys.readouterr().out


def test_errors_are_those_of_each_quarter_of_the_time_steps() -> None:
    images = torch.zeros(2, 1, 16, 16)

    def late(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Exact in the first half of the steps, nothing in the second."""
        a = diffusion.ALPHA[t][:, None, None, None]
        return torch.where((t < 100)[:, None, None, None], x / (1 - a).sqrt(), 0.0)

    first, second, third, fourth = diffusion.errors(late, images, 256)
    assert max(first, second) < 1e-6 and third == pytest.approx(1, abs=0.05) and fourth == pytest.approx(1, abs=0.05)
