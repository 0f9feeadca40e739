"""A path that cannot be read or written is an error of lmfx that names it: a file where a folder is wanted, the other
way round, no parent, no permission. Nothing is left over, and nothing that was there is changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lmfx
from lmfx.passes.trace.tracing import fingerprint

X = torch.randn(1, 3, 9, 8)
Action = Callable[[Path], Any]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()


@pytest.fixture(scope="module")
def actions() -> dict[str, Action]:
    graph = lmfx.trace(model(), X)
    net = lmfx.rewrite(graph, lmfx.MergePlan((), fingerprint(graph)))
    table = lmfx.profile(graph, "roofline", progress=False, calibrate=False)
    return {
        "save": lambda p: lmfx.save(net, p),
        "load": lambda p: lmfx.load(p, model()),
        "save_plan": lambda p: lmfx.save_plan(lmfx.MergePlan((), "2-0"), p),
        "load_plan": lmfx.load_plan,
        "table.save": table.save,
        "table.load": lmfx.LatencyTable.load,
        "cache_dir": lambda p: lmfx.score(graph, calibration=torch.randn(4, 3, 9, 8), cache_dir=p, progress=False),
        "export_onnx": lambda p: lmfx.export_onnx(model(), X, p),
        "checkpoints": lambda p: lmfx.distill(net, model(), [X], epochs=1, checkpoint=p, progress=False),
    }


FOLDERS = ("save", "load", "cache_dir", "checkpoints")
FILES = ("save_plan", "load_plan", "table.save", "table.load", "export_onnx")


def refused(act: Action, path: Path, *words: str) -> None:
    with pytest.raises(lmfx.LmfxError) as seen:
        act(path)
    text = str(seen.value)
    assert str(path) in text or str(path.parent) in text
    assert ".lmfx-" not in text, "the name of a temporary folder says nothing"
    assert any(word in text for word in words), text


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_where_a_folder_is_wanted(name: str, actions: dict[str, Action], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    refused(actions[name], file, "it is a file", "Not a directory", "File exists", "a file")
    assert file.read_text() == "mine" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", FILES)
def test_a_folder_where_a_file_is_wanted(name: str, actions: dict[str, Action], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(actions[name], folder, "it is a folder", "Is a directory")
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir(folder)


@pytest.mark.parametrize("name", ["load", "load_plan", "table.load", "save_plan", "table.save", "export_onnx"])
def test_a_parent_that_is_not_there(name: str, actions: dict[str, Action], tmp_path: Path) -> None:
    refused(actions[name], tmp_path / "none" / "name", "does not exist", "No such file")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["save", "cache_dir", "checkpoints"])
def test_a_folder_in_a_folder_that_is_not_there_is_made(name: str, actions: dict[str, Action], tmp_path: Path) -> None:
    actions[name](tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder")


@pytest.mark.parametrize("name", ["save", "cache_dir", "checkpoints", "save_plan", "table.save", "export_onnx"])
def test_a_file_in_the_place_of_a_parent(name: str, actions: dict[str, Action], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(actions[name], tmp_path / "file" / "name", "Not a directory", "does not exist", "is a file", "File exists")
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder in which nobody may write")
@pytest.mark.parametrize("name", ["save", "cache_dir", "checkpoints", "save_plan", "table.save", "export_onnx"])
def test_a_folder_in_which_nobody_may_write(name: str, actions: dict[str, Action]) -> None:
    with pytest.raises(lmfx.LmfxError, match="/proc"):
        actions[name](Path("/proc/lmfx"))
