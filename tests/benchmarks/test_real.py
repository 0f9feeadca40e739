"""The benchmark of real networks, on a stand-in that needs no package of others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.real import (
    choices,
    estimates,
    exported,
    kept,
    last_layer,
    mosaics,
    packages,
    pruned,
    real,
    real_report,
    recovered,
    text_boxes,
    text_lines,
    variants,
)
from benchmarks.real.rows import Key, Rows
from benchmarks.real.subjects import Outputs, Subject, agreement, divergence
from lmfx.calibration import refitting
from lmfx.calibration.images import as_calibration
from lmfx.quality import Judge
from lmfx.training import recovery_clock
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")


def stand_in() -> Subject:
    """Four convs of equal width, so that there is something to drop, to merge, to prune and to scale."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7)).eval()

    def images(kind: str, count: int, size: int) -> Tensor:
        random = torch.Generator().manual_seed(len(kind))
        return torch.randn(count, 3, size, size, generator=random)

    def judge(outputs: Outputs, original: Outputs) -> dict[str, float]:
        figures = {"agreement": agreement(outputs[0], original[0]), "kl": divergence(outputs[0], original[0])}
        return {**figures, "height": float(np.abs(outputs[0]).max())}

    return Subject("stand-in", "a stand-in", model, images, judge, "agreement", 24, (16, 12), 8, 16, 12, pinned=("10",))


def quick_export(net: nn.Module, example: Tensor, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(exported.draft(net, example))
    return file


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setattr(real, "NETWORKS", {"stand-in": stand_in})
    monkeypatch.setattr(real, "version", lambda: "one")
    monkeypatch.setattr(real, "export", quick_export)
    return f"--budgets 0.6 --rounds 3 --latency roofline --out {tmp_path}".split()


def made(folder: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [(r["variant"], r["version"]) for r in lines if r["stage"] == "made"]


def test_stages_run_to_the_table_and_nothing_is_done_twice(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--variants", "lmfx", "smaller input", "uniform"]
    for stage in ("make", "measure", "judge"):
        real.main([*arguments, *named, "--stage", stage])
    assert not (tmp_path / "real.png").exists()
    before = (tmp_path / "rows.jsonl").read_text()
    real.main([*arguments, *named])
    assert (tmp_path / "rows.jsonl").read_text() == before
    assert (tmp_path / "real.png").exists()
    rows = Rows(tmp_path / "rows.jsonl")
    for name in ("lmfx", "smaller input", "uniform"):
        row = rows.whole(Key("stand-in", name, 0.6))
        assert row["ratio"] > 0 and 0 <= row["agreement"] <= 1 and row["kl"] >= 0
    assert rows.whole(Key("stand-in", "original", 1.0))["agreement"] == 1
    told = capsys.readouterr().out
    assert "stand-in" in told and "smaller input" in told and "100.0%" in told
    # A newer lmfx replaces its own rows, and only those.
    monkeypatch.setattr(real, "version", lambda: "two")
    real.main([*arguments, *named, "--stage", "make"])
    assert made(tmp_path) == [
        *((name, "one") for name in ("original", "lmfx", "smaller input", "uniform")), ("lmfx", "two"),
    ]  # fmt: skip


def test_channels_are_pruned_to_a_measured_latency(arguments: list[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        try:
            pruned._torch_pruning()
        except ImportError:
            pytest.skip("torch_pruning is not installed")
        patch.setattr(pruned, "IMPORTANCES", ("magnitude", "taylor", "hessian"))
        real.main([*arguments, "--variants", "torch-pruning"])
    row = Rows(tmp_path / "rows.jsonl").whole(Key("stand-in", "torch-pruning", 0.6))
    assert 0 < row["channels"] < 1 and row["importance"] == min(row["errors"], key=row["errors"].get)
    assert row["ratio"] < 1


def test_recovered_says_what_a_network_was_worth_before_and_after(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(student: Any, model: nn.Module, images: Tensor, *, minutes: str, progress: bool) -> None:
        assert minutes == "1.5s" and len(images) == 64
        for parameter in student.parameters():
            parameter.data.zero_()
        student.meta["lmfx_recovery"] = "none"

    monkeypatch.setattr(recovered.lmfx, "recover", spoil)
    monkeypatch.setattr(recovered, "NETWORKS", {"stand-in": stand_in})
    monkeypatch.setattr(recovery_clock, "now", recovery_clock.now)  # it is put back after the test
    recovered.main(["stand-in:0.6", "--seconds", "1.5", "--images", "64"])
    told = json.loads(capsys.readouterr().out)
    assert told["original"]["agreement"] == 1 and told["recovery"] == "none"
    assert told["before"]["height"] > told["after"]["height"] == 0


def test_recovery_trains_the_same_for_all(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def recover(student: nn.Module, model: nn.Module, images: Tensor, *, minutes: float, progress: bool) -> nn.Module:
        asked.append((student(images[:2]).shape, len(images), minutes))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.zero_()
        return student

    monkeypatch.setattr(variants.lmfx, "recover", recover, raising=False)
    named = ["--variants", "lmfx+recover", "smaller input+recover", "--recover", "0.5"]
    real.main([*arguments, *named])
    assert asked == [((2, 7), 16, 0.5)] * 2
    row = Rows(tmp_path / "rows.jsonl").whole(Key("stand-in", "smaller input+recover", 0.6))
    assert row["minutes"] == 0.5 and row["size"] in (16, 12) and row["ratio"] < 1
    assert row["height"] == 0  # what was trained is what is judged


def test_a_network_whose_package_is_absent_is_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REAL", str(tmp_path / "nothing"))
    real.main(["--networks", "mtcnn-onet", "crnn-english", "--out", str(tmp_path)])
    told = capsys.readouterr().err
    for name, package in (("mtcnn-onet", "facenet_pytorch"), ("crnn-english", "easyocr")):
        assert f"{name} is left out" in told and package in told and "fetch.sh" in told
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_baseline_that_misses_a_budget_says_what_it_reaches(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add(Key("net", "original", 1.0), "made", digest="a")
    rows.add(Key("net", "original", 1.0), "judged", digest="a", figure="lines", lines=0.99, unit="%")
    rows.add(Key("net", "uniform", 0.5), "made", missed=0.83)
    rows.add(Key("net", "lmfx", 0.5), "made", digest="b", version="c")
    rows.add(Key("net", "lmfx", 0.5), "judged", digest="older", figure="lines", lines=0.5, unit="%")
    told = real_report.table(Rows(tmp_path / "rows.jsonl"))
    assert "cannot be reached, least 0.830" in told
    assert "50.0%" not in told  # that line is about another file


def test_the_least_share_of_channels_is_found() -> None:
    tried: list[float] = []

    def ratio(share: float) -> float:
        tried.append(share)
        return 1 - share

    share = pruned.least_share(ratio, 0.7)
    assert 0.3 <= share < 0.32 and len(tried) < 10
    with pytest.raises(pruned.Missed, match=r"0\.200"):
        pruned.least_share(ratio, 0.1)


def test_lines_are_the_same_every_time_and_are_read_from_scores() -> None:
    text_lines.draw.cache_clear()
    lines, texts = text_lines.draw("held", 3)
    text_lines.draw.cache_clear()
    again, same = text_lines.draw("held", 3)
    assert torch.equal(lines, again) and texts == same and lines.shape == (3, 1, 64, 384)
    assert not torch.equal(lines, text_lines.draw("cal", 3)[0])
    letters = [0, *(text_lines.ALPHABET.index(c) + 1 for c in "bb"), 0, text_lines.ALPHABET.index("b") + 1]
    assert text_lines.read(np.eye(len(text_lines.ALPHABET) + 1)[letters]) == "bb"
    assert text_lines._distance("kitten", "sitting") == 3


def test_a_mosaic_has_one_colour_a_pixel() -> None:
    found = mosaics.mosaic(torch.ones(1, 3, 4, 4))
    assert torch.equal(found.sum(1), torch.ones(1, 4, 4))
    assert found[0, :, 0, 0].tolist() == [0, 1, 0] and found[0, :, 0, 1].tolist() == [1, 0, 0]
    assert found[0, :, 1, 0].tolist() == [0, 0, 1]


def test_a_module_is_loaded_without_what_its_package_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "site" / "outer_package" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("import nothing_like_this")
    (inner / "__init__.py").write_text("import nothing_like_this")
    (inner / "net.py").write_text(
        "import gone\nimport outer_package\nfrom .other import B\nA = gone.a + outer_package.c"
    )
    (inner / "other.py").write_text("B = 5")
    monkeypatch.setenv("REAL", str(tmp_path))
    module = packages.load_module("outer_package.inner.net", parents={"c": 1}, gone={"a": 2})
    assert (module.A, module.B) == (3, 5)
    import sys

    assert not {"gone", "outer_package", "outer_package.inner"} & set(sys.modules)
    with pytest.raises(packages.Absent, match="not_there"):
        packages.load_module("not_there.net")


def test_plans_are_compared_by_what_may_predict_them() -> None:
    subject = replace(stand_in(), calibration=24)
    told, judged, plan = choices.compare(subject, 0.6, "roofline")
    limit = 0.6 * judged.table.total()
    assert judged.table.total(plan) <= limit * (1 + 1e-9)
    assert told["plans"] and all(row.keys() == told["plans"][0].keys() for row in told["plans"])
    held = as_calibration(subject.images("held", subject.held, subject.size), subject.example)
    truth = Judge(judged.analysis.graph, held)(judged.sketch(plan)).loss()
    assert told["steps"]["held"] == pytest.approx(truth)
    before = refitting.MIXED, refitting.MOST_MIXED
    left = choices.mixtures(subject, judged, plan, [0, 2])
    assert left.keys() == {"no refit", "0", "2"} and before == (refitting.MIXED, refitting.MOST_MIXED)


def test_a_smaller_input_is_compared_as_it_is_and_fitted() -> None:
    subject = replace(stand_in(), calibration=64, held=40)
    rows = last_layer.figures(subject, [16])
    assert [(row["size"], row["way"]) for row in rows] == [
        (16, way) for way in ("as it is", "scale of the scores", "last layer fitted")
    ]
    held = subject.images("held", 40, 24)
    with torch.no_grad():
        small = nn.functional.interpolate(held, size=(16, 16), mode="bilinear", antialias=True)
        wanted, seen = subject.model()(held).double(), subject.model()(small).double()
    divergence = float((seen - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
    assert rows[0]["divergence"] == pytest.approx(divergence, rel=1e-3)


def test_the_same_call_is_made_several_times_and_what_is_kept_is_judged_on_other_inputs() -> None:
    subject = replace(stand_in(), calibration=24)
    found = kept.repeated(subject, 0.6, 2, "roofline")
    assert found["plans"] == 1 and len(found["losses"]) == 2 and found["losses"][0] == pytest.approx(found["losses"][1])
    row = kept.keeps(subject, 0.5, "roofline")
    assert row["ratio"] <= 1 and row["kept"] >= 0.5 and row["held_images"] == subject.held


def test_estimates_are_compared_with_the_truth_of_whole_plans() -> None:
    found = estimates.compare(replace(stand_in(), calibration=24), plans=4, seed=0)
    low, high = found["truth"]
    assert found["plans"] >= 2 and 0 < low < high
    assert all(-1 <= found[name]["tau"] <= 1 for name in ("second order", "alone", "joint"))
    assert found["joint"]["ratio"] > 0 and found["alone"]["ratio"] > 0


def test_text_is_judged_by_the_pixels_that_both_mark() -> None:
    made = text_boxes.put_lines(torch.zeros(2, 3, 60, 80), torch.ones(4, 1, 16, 96))
    assert made.shape == (2, 3, 60, 80) and {*(made * 100).round().unique().tolist()} == {0, 50, 100}
    scores = np.zeros((1, 4, 5, 2), dtype=np.float32)
    scores[0, 1, :4, 0] = 0.9
    other = scores.copy()
    other[0, 1, 0, 0], other[0, 2, 0, 0] = 0.1, 0.9
    assert text_boxes.judge([scores], [scores]) == {"marked": 1.0, "psnr": pytest.approx(100.0)}
    found = text_boxes.judge([other], [scores])
    assert found["marked"] == pytest.approx(3 / 5)
    assert found["psnr"] == pytest.approx(-10 * np.log10((0.8**2 + 0.9**2) / 40), abs=1e-4)
