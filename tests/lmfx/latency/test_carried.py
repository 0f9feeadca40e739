"""A table that was measured elsewhere: nothing is measured here, the budget is met by prediction, and it is said so."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lmfx
from lmfx.cli import main
from lmfx.latency import CalibrationLine, LatencyTable, Measurement
from lmfx.passes.errors import InfeasibleBudget, TableError
from tests.toys import Net, images, toy

X = images(1)
DATA = images(12)
LINE = CalibrationLine(0.001, 2.0, 0.0, 1.0, 0.02)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    """What was measured on the other machine, after a way as JSON."""
    path = tmp_path_factory.mktemp("there") / "table.json"
    made = lmfx.profile(lmfx.trace(toy(), X), "roofline", progress=False)
    replace(made, calibration=LINE).save(path)
    return LatencyTable.load(path)


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There is no backend here."""

    def no_backend(*args: Any, **options: Any) -> Any:
        raise AssertionError("a backend was asked for")

    for module in ("latency.chosen_backend", "stages", "cli.commands"):
        monkeypatch.setattr(importlib.import_module(f"lmfx.{module}"), "get_backend", no_backend)
    yield


def compress(budget: Any, latency: LatencyTable, model: nn.Module | None = None, **options: Any) -> Any:
    return lmfx.compress(model or toy(), X, budget, calibration=DATA, latency=latency, **{"progress": False, **options})


@pytest.mark.parametrize("budget", [0.9, "80%", 0.6, "1.5x"])
def test_a_relative_budget_is_met_by_prediction(table: LatencyTable, budget: Any, nothing_is_measured: None) -> None:
    result = lmfx.result_of(compress(budget, table))
    assert result.predicted is not None and result.original is not None and result.frontier is not None
    limit = lmfx.Budget.parse(budget).resolve(result.original)
    assert result.original == pytest.approx(table.predict())
    assert result.predicted == pytest.approx(table.predict(result.plan))
    assert result.predicted <= limit
    slower = [ms for ms in result.frontier.latency if ms > result.predicted]
    assert not slower or min(slower) > limit, "a better plan was within the budget"
    assert result.measured is None and result.ratio is None
    assert result.line == LINE


def test_a_budget_in_ms_is_one_of_the_other_machine(table: LatencyTable, nothing_is_measured: None) -> None:
    limit = 0.7 * table.predict()
    result = lmfx.result_of(compress(f"{limit}ms", table))
    assert 0.5 * limit < result.predicted <= limit  # type: ignore[operator]
    same = lmfx.result_of(compress(f"{1.01 * table.predict()}ms", table))
    assert same.plan.candidates == () and same.predicted == pytest.approx(table.predict())


def test_the_report_says_that_nothing_was_measured(table: LatencyTable, nothing_is_measured: None) -> None:
    text = lmfx.report(compress(0.6, table))
    (line,) = [line for line in text.splitlines() if "  latency" in line]
    assert line.endswith("predicted, not measured here") and f"{table.predict():.4g} ms before" in line
    (where,) = [line for line in text.splitlines() if "  backend" in line]
    assert "roofline 2 on" in where
    assert "network = 0.001 ms + 2 x sum of its rows" in text


def test_the_result_computes_what_its_plan_says_and_can_be_saved(
    table: LatencyTable, tmp_path: Path, nothing_is_measured: None
) -> None:
    model = toy()
    net = compress(0.6, table, model)
    lmfx.save(net, tmp_path / "out")
    again = lmfx.load(tmp_path / "out", model)
    assert torch.equal(again(X), net(X))
    assert lmfx.result_of(again).predicted == lmfx.result_of(net).predicted
    assert lmfx.result_of(again).measured is None
    assert "predicted, not measured here" in lmfx.report(again)
    student = compress(0.6, table, model, merge=False)
    assert torch.allclose(lmfx.merge(student)(X), net(X), atol=1e-4)


def test_it_is_the_plan_that_the_stages_give(table: LatencyTable, nothing_is_measured: None) -> None:
    model = toy()
    graph = lmfx.trace(model, X)
    spans = lmfx.spans(graph, max_kernel_size=7, max_span_convs=12, max_fit_convs=12)
    scores = lmfx.score(graph, calibration=DATA, latency=table, spans=spans, progress=False)
    plan = lmfx.solve(graph, table, scores, spans=spans).at(0.6)
    assert lmfx.result_of(compress(0.6, table, model)).plan.candidates == plan.candidates


def test_a_table_without_a_calibration_predicts_sums(table: LatencyTable) -> None:
    sums = replace(table, calibration=None)
    result = lmfx.result_of(compress(0.6, sums))
    assert result.original == pytest.approx(sums.total()) and result.predicted == pytest.approx(sums.total(result.plan))


def test_a_candidate_without_a_row_is_not_chosen(table: LatencyTable) -> None:
    model = toy()
    chosen = lmfx.result_of(compress(0.6, table, model)).plan.candidates
    assert chosen
    rows = {key: m for key, m in table.items() if key != chosen[0].key}
    other = lmfx.result_of(compress(0.6, replace(table, rows=rows), model))
    assert chosen[0].key not in {c.key for c in other.plan.candidates} and other.plan.candidates


def test_no_change_is_asked_for(table: LatencyTable, nothing_is_measured: None) -> None:
    result = lmfx.result_of(compress(1.0, table))
    assert result.plan.candidates == () and result.backend["backend"] == "roofline"


def test_a_budget_out_of_reach_says_the_fastest_prediction(table: LatencyTable, nothing_is_measured: None) -> None:
    with pytest.raises(InfeasibleBudget, match="no plan reaches") as caught:
        compress("0.0009ms", table)
    assert "budget 0.0009ms" in str(caught.value)
    assert LINE.a < caught.value.latency < table.predict()
    assert lmfx.result_of(compress(f"{caught.value.latency}ms", table)).predicted == pytest.approx(caught.value.latency)


def test_a_network_in_which_nothing_can_be_merged_is_infeasible(nothing_is_measured: None) -> None:
    graph = lmfx.trace(toy(), X)
    only = lmfx.spans(graph, exclude=("*",))
    rows = {c.key: Measurement(1.0) for c in only}
    with pytest.raises(InfeasibleBudget, match="nothing in Net can be merged, so it stays at"):
        compress(0.5, LatencyTable(rows, {}), exclude=("*",))


# --- tables that are not for this network -----------------------------------------------------------------------------


def test_a_table_of_another_network_is_refused(table: LatencyTable, nothing_is_measured: None) -> None:
    class Other(Net):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    with pytest.raises(TableError, match="made for another graph .* profile this one"):
        compress(0.6, table, Other().eval())


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (toy(), images(2), r"another batch \(1, this one is 2\)"),
        (toy().double(), X.double(), r"another dtype \(float32, this one is float64\)"),
        (toy(), images(1, size=16), "another graph"),
    ],
    ids=["batch", "dtype", "size"],
)
def test_a_table_of_another_input_is_refused(
    table: LatencyTable, model: nn.Module, example: Any, message: str, nothing_is_measured: None
) -> None:
    with pytest.raises(TableError, match=message):
        lmfx.compress(model, example, 0.6, latency=table, progress=False)


def test_a_table_that_lacks_a_kept_layer_is_refused(table: LatencyTable, nothing_is_measured: None) -> None:
    key = next(k for k in table if k.endswith(":keep"))
    with pytest.raises(TableError, match=f"no row for '{key}'"):
        compress(0.6, replace(table, rows={k: m for k, m in table.items() if k != key}))


# --- the command line -------------------------------------------------------------------------------------------------

MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *[block() for _ in range(3)]).eval()
"""
SMALL = ["carried_model:net", "--shape", "1,3,16,16", "--quiet"]
SCORED = [*SMALL, "--calibration", "random:4"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and the table of another machine."""
    (tmp_path / "carried_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["profile", *SMALL, "--backend", "roofline", "-o", "table.json", "--cache-dir", "there"]) == 0
    return tmp_path


def test_profile_there_then_frontier_and_compress_here(
    folder: Path, capsys: pytest.CaptureFixture[str], nothing_is_measured: None
) -> None:
    capsys.readouterr()
    assert main(["frontier", *SCORED, "--table", "table.json", "--json", "--cache-dir", "here"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["points"]) > 2
    command = ["compress", *SCORED, "--table", "table.json", "--budget", "0.6", "-o", "out", "--cache-dir", "here"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "predicted, not measured here" in text and "budget     0.6" in text
    result = lmfx.result_of(lmfx.load("out", __import__("carried_model").net()))
    assert result.predicted == pytest.approx(
        max(p["latency"] for p in found["points"] if p["latency"] <= 0.6 * found["original"])
    )
    from lmfx.latency import Store

    with Store.open(folder / "here") as store:
        assert store.count("latency") == 0 and store.count("importance") > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--table", "table.json", "--backend", "roofline"], "--backend says where to measure"),
        (["--table", "table.json", "--threads", "2"], "--threads says where to measure"),
        (["--table", "nowhere.json"], "cannot read the latency table nowhere.json"),
        (["--table", "cut.json"], "the latency table cut.json is damaged"),
        (["--table", "rows.json"], "not a latency table of lmfx"),
        (["--table", "table.json", "--shape", "2,3,16,16"], "another batch (1, this one is 2)"),
    ],
    ids=["backend", "threads", "missing", "cut", "export", "batch"],
)
@pytest.mark.parametrize("command", ["frontier", "compress"])
def test_a_table_that_can_not_be_used_is_one_message(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, argv: list[str], message: str
) -> None:
    (folder / "cut.json").write_text((folder / "table.json").read_text()[:500])
    assert main(["cache", "export", "rows.json", "--cache-dir", "there"]) == 0
    capsys.readouterr()
    further = ["--budget", "0.6", "-o", "out"] if command == "compress" else []
    assert main([command, *SCORED, *further, *argv]) == 2
    seen = capsys.readouterr()
    assert message in seen.err and seen.out == "" and "Traceback" not in seen.err
    assert not (folder / "out").exists()


def test_a_calibration_survives_the_way(table: LatencyTable) -> None:
    assert table.calibration == LINE
    assert table.predict() == pytest.approx(LINE.a + LINE.b * table.total()) and table.total() > 0
