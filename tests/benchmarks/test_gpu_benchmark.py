"""benchmarks/runtimes/gpu.py runs to its end without CUDA and says what it left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.runtimes import gpu
from benchmarks.shared.plain_networks import NETWORKS
from tests.helpers import one_thread as one_thread
from tests.toys import toy

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(NETWORKS, "resnet18", toy)


@pytest.mark.usefixtures("small")
def test_without_cuda_it_runs_to_its_end_and_skips_cuda_by_name(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--raise-errors", "--output", str(file)]) == 0
    body = json.loads(file.read_text())
    (case,) = body["cases"]
    assert set(case["runtimes"]) == {"torch cpu", "onnxruntime cpu"}
    for found in case["runtimes"].values():
        assert found["merged_ms"] > 0 and len(found["ratios"]) == 3
    assert case["compress"]["rows"]["measured"] > 0 and case["compress"]["convs"][1] <= case["compress"]["convs"][0]
    assert case["compress"]["ratio"] <= 0.6 and case["check"]["relative_error"] < 1e-4
    assert len(case["frontier"]["measured"]) == len(case["frontier"]["predicted"]) >= 2
    assert {p["part"] for p in body["left_out"]} == set(gpu.needs_cuda())
    assert {p["reason"] for p in body["left_out"]} == {"torch sees no CUDA device"}
    printed = capsys.readouterr().out
    assert "tensorrt_rtx: skipped" in printed and "onnxruntime cpu" in printed and "7 parts left out" in printed


@pytest.mark.usefixtures("small")
def test_no_part_is_begun_after_the_time_is_over(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--seconds", "-1", "--output", str(file)]) == 1
    body = json.loads(file.read_text())
    assert any(p["part"] == "resnet18 batch 1 fp32: compress" and "not begun" in p["reason"] for p in body["left_out"])


@pytest.mark.usefixtures("small")
def test_a_part_that_fails_costs_only_its_own_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: Any) -> Any:
        raise ZeroDivisionError("no such\nthing")

    monkeypatch.setattr(gpu, "check", fail)
    file = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--output", str(file)]) == 0
    body = json.loads(file.read_text())
    reasons = {p["part"]: p["reason"] for p in body["left_out"]}
    assert reasons["resnet18 batch 1 fp32: check"] == "ZeroDivisionError: no such thing"
    assert "onnxruntime cpu" in body["cases"][0]["runtimes"]
    monkeypatch.setattr(gpu, "compress", lambda case, options: fail(case))
    with pytest.raises(ZeroDivisionError):
        gpu.main(["--quick", "--raise-errors", "--output", str(file)])


def test_every_runtime_is_tried_on_a_gpu_and_the_slow_one_last(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "get_backend", lambda name, **options: made.append((name, options)))
    found = gpu.runtimes("fp16")
    assert set(found) == set(gpu.needs_cuda()) and list(found)[-1] == "torch.compile"
    for make in found.values():
        make()
    assert all(options["precision"] == "fp16" for _, options in made)
    assert {options.get("package") for name, options in made if name == "tensorrt"} == {"tensorrt", "tensorrt_rtx"}
    assert list(gpu.slow({"precision": "fp16", "_net": 1})) == ["torch.compile"] and not gpu.slow({"precision": "fp16"})


def test_it_needs_no_torchvision() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "for name in ('torchvision', 'timm', 'diffusers', 'tensorrt', 'tensorrt_rtx', 'hypothesis', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import benchmarks.runtimes.gpu as gpu\n"
        "print(gpu.machine()['onnx'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
