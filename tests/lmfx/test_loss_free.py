"""What loses nothing wins: exact candidates in the tables of every estimator, in `compress`, on the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.cli import main
from lmfx.importance import Finetune
from lmfx.latency import LatencyTable
from lmfx.passes.graph.verify import relative_error
from tests import finetune_toys
from tests.helpers import double
from tests.toys import compress, images

X = images(1).double()
DATA = images(8).double()


class Block(nn.Module):
    """A RepVGG block: a 3x3, a 1x1 and a norm, which are one convolution without any loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.narrow = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.skip = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.wide(x) + self.narrow(x) + self.skip(x))


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return double(Net())


def convs(net: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in net.modules())


def table(graph: Any) -> LatencyTable:
    return lmfx.profile(graph, backend="roofline", progress=False)


@pytest.mark.parametrize("budget", [1.0, "100%", 0.99, "99%", "1x"])
@pytest.mark.parametrize("offline", [False, True])
def test_a_budget_that_a_loss_free_plan_meets_loses_nothing(model: nn.Module, budget: Any, offline: bool) -> None:
    source = table(lmfx.trace(model, X)) if offline else "roofline"
    net = compress(model, X, budget, latency=source, calibration=DATA)
    found = lmfx.result_of(net)
    assert convs(net) == 3 < convs(model) == 5
    assert len(found.plan.candidates) == 2 and found.plan.exact and found.plan.importance == 0
    with torch.no_grad():
        assert relative_error(model(DATA), net(DATA)) < 1e-13


def test_a_smaller_budget_takes_more_than_loses_nothing(model: nn.Module) -> None:
    net = compress(model, X, 0.3, calibration=DATA)
    assert convs(net) < 3 and not lmfx.result_of(net).plan.exact


def test_nothing_is_scored_where_a_loss_free_plan_is_enough(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("scored")

    for kind in ("Reconstruction", "Magnitude"):
        monkeypatch.setattr(f"lmfx.importance.{kind}.score", never)
    for importance in ("reconstruction", "magnitude"):
        assert convs(compress(model, X, 1.0, calibration=DATA, importance=importance)) == 3


def test_the_exact_method_has_no_plan_below_what_loses_nothing(model: nn.Module) -> None:
    assert convs(compress(model, X, 1.0, method="exact", realize=("compose",))) == 3
    with pytest.raises(lmfx.InfeasibleBudget):
        compress(model, X, 0.3, method="exact", realize=("compose",))


@pytest.mark.parametrize("name", ["reconstruction", "reconstruction exact", "magnitude", "finetune", "finetune paper"])
def test_exact_rows_of_every_estimator_are_zero_and_others_are_not(model: nn.Module, name: str) -> None:
    model = model.float()
    graph = lmfx.trace(model, images(1))
    spans = lmfx.spans(graph, max_span_convs=3, max_kernel_size=5)
    if name.startswith("finetune"):
        objective = {"objective": "paper"} if "paper" in name else {}
        made = Finetune(finetune_toys.nothing, finetune_toys.accuracy, **objective)  # type: ignore[arg-type]
        scores = made.score(spans, spans.candidates, lmfx.calibration.as_calibration(images(4), images(1)))
    else:
        options: dict[str, Any] = {"exact": True} if "exact" in name else {}
        kind = name.split(" ")[0]
        scores = lmfx.score(graph, kind, spans=spans, calibration=images(4), progress=False, **options)
    exact = [c for c in spans if c.exact]
    assert len(exact) >= 2
    assert all(scores[c.key] == 0 for c in exact)
    others = [scores[c.key] for c in spans if not c.exact and c.realization != "keep" and c.key in scores]
    assert others and any(value != 0 for value in others)


@pytest.mark.parametrize("importance", ["reconstruction", "magnitude"])
def test_no_fit_takes_the_place_of_what_loses_nothing(model: nn.Module, importance: str) -> None:
    """A fit of the same configuration is as fast, and a magnitude may call it better."""
    graph = lmfx.trace(model, X)
    latency = table(graph)
    scores = lmfx.score(graph, importance, latency=latency, calibration=DATA, progress=False)
    frontier = lmfx.solve(graph, latency, scores)
    best = frontier.at(1.0)
    assert {c.realization for c in best.candidates} == {"compose"} and best.exact


# --- the command line -------------------------------------------------------------------------------------------------

MODEL = """
import torch
from torch import nn
from tests.lmfx.test_loss_free import Net

def factory():
    torch.manual_seed(0)
    return Net().eval()

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "rep_models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("rep_models", None)


SHAPE = ("--shape", "1,3,16,16")


def test_the_command_saves_what_simplify_gives(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simplify", "rep_models:factory", *SHAPE, "-o", "out"]) == 0
    text = capsys.readouterr().out
    assert "5 convolutions became 3" in text and "checked    in float64" in text and "plan.json" in text
    assert json.loads((folder / "out" / "plan.json").read_text())["plan"]["fine"] is True
    torch.manual_seed(0)
    model = Net().eval()
    net = lmfx.load(folder / "out", model)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert convs(net) == 3 and relative_error(model(x), net(x)) < 1e-5


def test_the_command_takes_names_and_a_growth(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simplify", "rep_models:factory", *SHAPE, "-o", "a", "--exclude", "blocks.0.*"]) == 0
    assert "convolutions became 4" in capsys.readouterr().out
    assert main(["simplify", "rep_models:factory", *SHAPE, "-o", "b", "--growth", "0.01"]) == 0
    assert "nothing was changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--growth", "0"), "growth=0.0: use a number above 0"),
        (("--growth", "nan"), "growth=nan: use a number above 0"),
        (("--exclude", "no.such.*"), "matches no"),
        (("-o", "rep_models.py"), "rep_models.py is a file; give a folder"),
    ],
)
def test_the_command_fails_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert main(["simplify", "rep_models:factory", *SHAPE, *(("-o", "out") if "-o" not in more else ()), *more]) == 2
    seen = capsys.readouterr()
    assert message in seen.err and "Traceback" not in seen.err and not (folder / "out").exists()
