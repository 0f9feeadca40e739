"""benchmarks/runtimes/engines.py: networks build for SM89 and SM120, before and after merging, with fewer layers
after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.runtimes import engines
from benchmarks.runtimes.engines import ACCEPTANCE, examine, main, names
from lmfx.passes.errors import ExportError
from tests.helpers import one_thread as one_thread
from tests.lmfx.test_zoo import NETWORKS as ZOO
from tests.toys import toy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def libraries() -> None:
    for library in ("tensorrt_rtx", "onnx", "onnxscript", "torchvision", "timm", "diffusers"):
        pytest.importorskip(library)


def small(monkeypatch: pytest.MonkeyPatch, model: nn.Module | None = None) -> None:
    monkeypatch.setattr(engines, "network", lambda name: (model or toy(), torch.randn(1, 3, 12, 12)))


def check(row: dict[str, Any], targets: tuple[str, ...]) -> None:
    assert "error" not in row, row
    before, after = row["original"], row["merged"]
    assert "error" not in before and "error" not in after, row
    for target in targets:
        assert before[target]["mb"] > 0 and after[target]["mb"] > 0
    assert after["layers"] < before["layers"] and after["convs"] <= before["convs"]  # a fit may only shrink kernels


def test_a_row_has_both_forms_and_every_target(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    check(examine("toy", ("sm89", "sm120")), ("sm89", "sm120"))
    check(examine("toy", ("sm89",), precision="fp16"), ("sm89",))


def test_what_fails_is_a_cell_and_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    small(monkeypatch, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval())
    arguments = ["--models", "resnet18", "--targets", "sm89", "--rows", str(tmp_path / "rows.jsonl")]
    assert main(arguments) == 0
    assert "1 of 1 networks: no build failed" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.jsonl").read_text())["original"]["convs"] == 2

    def fail(*_: Any, **__: Any) -> None:
        raise ExportError("no such kernel")

    monkeypatch.setattr(engines.lmfx, "build_engine", fail)
    assert main(arguments) == 0, "a finished row is taken again"
    assert main([*arguments, "--precision", "fp16"]) == 1
    assert "no such kernel" in capsys.readouterr().out


def test_names_are_globs_and_the_zoo() -> None:
    assert names(["resnet?8", "unet"]) == ["resnet18", "unet"]
    assert set(names(["zoo"])) == set(ZOO) and len(names(["tv/*"])) > 50
    with pytest.raises(SystemExit):
        main(["--models", "nothing*"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCEPTANCE)
def test_the_networks_of_the_acceptance_build_before_and_after_merging(name: str) -> None:
    check(examine(name, ("sm89", "sm120")), ("sm89", "sm120"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_network_of_the_test_zoo_that_exports_builds(name: str) -> None:
    row = examine(name, ("sm89",))
    for form in engines.FORMS:
        assert "error" not in row.get(form, {}), row[form]
