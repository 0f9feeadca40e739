"""A small network of each of some 25 families through the stages of the zoo; `benchmarks/zoo/zoo.py` runs all of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo import runner as zoo_runner
from benchmarks.zoo import stages as zoo_stages
from benchmarks.zoo import zoo
from benchmarks.zoo.models import TABLE, build, examples, families, randomise
from benchmarks.zoo.runner import read_rows, run_all
from benchmarks.zoo.stages import examine
from benchmarks.zoo.table import cells, compare, read_table, summary, write_table
from lmfx.passes.errors import ExportError
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")

# model -> stages besides the trace and the regions
NETWORKS: dict[str, tuple[str, ...]] = {
    "timm/test_resnet": ("exact", "compress", "onnx"),
    "timm/test_efficientnet": ("exact", "compress", "onnx"),
    "timm/test_convnext": ("exact", "compress"),
    "timm/regnetx_002": ("exact",),
    "timm/regnety_002": ("exact",),
    "timm/mobilenetv2_050": ("exact",),
    "timm/mobilenetv3_small_050": ("exact",),
    "timm/mobilenetv4_conv_small": ("exact",),
    "timm/lcnet_050": ("exact", "compress"),
    "timm/tinynet_e": ("exact",),
    "timm/ghostnet_050": ("exact",),
    "timm/repvgg_a0": ("exact",),
    "timm/ese_vovnet19b_slim": ("exact",),
    "timm/dla46x_c": ("exact",),
    "timm/cs3darknet_focus_s": ("exact",),
    "timm/nf_regnet_b0": ("exact",),
    "timm/tf_efficientnet_lite0": ("exact",),
    "timm/mobilevit_xxs": ("exact",),
    "timm/starnet_s1": ("exact",),
    "tv/mnasnet0_5": ("exact", "compress"),
    "tv/shufflenet_v2_x0_5": ("exact", "compress"),
    "tv/squeezenet1_1": ("exact", "compress"),
    "tv/ssdlite320_mobilenet_v3_large.backbone": ("exact",),
    "diffusers/unet2d-tiny-noattn": ("exact", "compress"),
    "diffusers/autoencoderkl-tiny": ("exact",),
}
# More than a minute each. The library's other denoisers and autoencoder, smaller, are in test_multi_input.py.
SLOW = {"timm/mobilevit_xxs", "diffusers/unet2d-tiny-noattn", "diffusers/autoencoderkl-tiny"}


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    pytest.importorskip("diffusers")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETWORKS])
def test_a_network_of_the_zoo_is_traced_merged_exactly_and_compressed(name: str) -> None:
    row = examine(name, NETWORKS[name], seconds=240, sizes=(64, 96, 128, 224, 256))
    failed = {stage: row[stage] for stage in row if str(row[stage]).startswith("error")}
    assert failed == {}
    assert row["trace"] == "equal"
    assert row["other_batch"] in ("agrees", "says so") and row["other_size"] in ("agrees", "says so", "not taken")
    assert row["other_batch"] == "agrees" or row["tracer"] != "symbolic"
    assert row["exact"] == "exact"
    assert row["in_region"] >= 0.5 * row["convs"] > 0
    assert row["in_candidate"] <= row["convs"]
    if "compress" in NETWORKS[name]:
        assert row["compress"] in ("ok", "infeasible")
        assert row["compress"] == "infeasible" or 0 < row["ratio"] <= 0.8
    if "onnx" in NETWORKS[name]:
        assert row["onnx"] == "agrees"


# --- the networks ----------------------------------------------------------------------------------------------------


def test_every_name_of_the_table_is_a_network_that_a_library_has() -> None:
    import timm
    import torchvision

    from benchmarks.zoo.models import DIFFUSION

    known = set(torchvision.models.list_models())
    for name in families():
        library, _, rest = name.partition("/")
        if library == "tv":
            assert rest.partition(".")[0] in known or rest.endswith("_frozenbn"), name
        elif library == "timm":
            assert timm.is_model(rest), name
        else:
            assert (library == "diffusers" and rest in DIFFUSION) or library == "ddpm", name


def test_the_network_that_no_package_has_is_the_one_of_the_census() -> None:
    net = build("ddpm/ddpm-ermongroup-cifar")
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 89
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    assert net(torch.randn(2, 3, 16, 16), torch.tensor([3, 7])).shape == (2, 3, 16, 16)


def test_randomised_parameters_hide_no_branch() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.zero = nn.Conv2d(4, 4, 1)
            self.gamma, self.gain = nn.Parameter(torch.full((4,), 1e-6)), nn.Parameter(torch.zeros(()))

    block = Block()
    nn.init.zeros_(block.zero.weight)
    kept = block.conv.weight.clone()
    randomise(block)
    assert torch.equal(block.conv.weight, kept)
    assert block.norm.running_mean is not None and block.norm.running_mean.abs().min() > 0
    assert block.zero.weight.abs().mean() > 0.1
    assert block.gamma.min() >= 0.1 and block.gain.item() >= 0.1


def test_a_network_is_built_alike_twice() -> None:
    a, b = build("timm/test_resnet"), build("timm/test_resnet")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert next(tuple(x.shape) for x in examples("timm/test_resnet", a, odd=True, sizes=(64,))) == (1, 3, 49, 49)


def test_a_failing_stage_is_a_cell_and_the_next_stages_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(row: dict[str, Any], state: dict[str, Any]) -> None:
        raise ZeroDivisionError("in line\n  one")

    monkeypatch.setattr(zoo_stages, "_compress", fail)
    row = examine("timm/test_resnet", ("compress", "exact"), sizes=(64,))
    assert row["compress"] == "error: UNEXPECTED ZeroDivisionError: in line / one"
    assert row["exact"] == "exact"


def test_a_stage_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin(row: dict[str, Any], state: dict[str, Any]) -> None:
        try:
            while True:
                pass
        except Exception as error:
            raise AssertionError("swallowed") from error

    monkeypatch.setattr(zoo_stages, "_trace", spin)
    row = examine("timm/test_resnet", (), seconds=2, sizes=(64,))
    assert row["trace"] == "error: more than 2 CPU s"
    assert "regions" not in row and "tracer" not in row


@pytest.mark.parametrize(
    ("off", "cell"), [("torch", "agrees to rounding: "), ("file", "error: ExportError: ONNX Runtime and torch differ")]
)
def test_a_file_may_differ_by_torchs_own_rounding(off: str, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true_export = zoo_stages.lmfx.export_onnx

    def export(net: Any, example: Any, path: Path, tolerance: float = 1e-3) -> Any:
        if tolerance < 2e-3 and net is merged:
            raise ExportError("ONNX Runtime and torch differ by 0.00133")
        return true_export(net, example, path)

    merged, example = nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8)
    monkeypatch.setattr(zoo_stages.lmfx, "export_onnx", export)
    monkeypatch.setattr(zoo_stages, "_rounding", lambda net, example: 5e-4 if off == "torch" else 1e-6)
    row: dict[str, Any] = {}
    zoo_stages._onnx(row, {"net": merged, "example": example, "model": nn.Conv2d(3, 4, 3).eval()})
    assert row["onnx"].startswith(cell)


def test_the_rounding_of_a_network_is_measured() -> None:
    net, example = nn.Conv2d(3, 4, 3).eval().requires_grad_(False), torch.randn(1, 3, 8, 8)
    assert zoo_stages._rounding(net, example) < 1e-6
    net.weight[:, 0] = 1e5  # two large terms that cancel
    net.weight[:, 1] = -1e5
    example[:, 1] = example[:, 0]
    assert zoo_stages._rounding(net, example) > 1e-4


@pytest.mark.parametrize(
    ("wrong", "last_bit", "cell"),
    [
        (1, 1e-15, "error: off by"),  # the plan's network
        (1, 1e-9, "exact to rounding: "),  # ... which is so badly conditioned that no more can be asked of it
        (0, 1e-9, "error: off by"),  # the network of the empty plan has no excuse
        (2, 1e-9, "exact"),
    ],
)
def test_a_wrong_merge_is_an_error_in_the_row(
    wrong: int, last_bit: float, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_merge, calls = zoo_stages.merge, []

    def merge(net: Any, **options: Any) -> Any:
        merged = true_merge(net, **options)
        if len(calls) == wrong:
            conv = next(m for m in merged.modules() if isinstance(m, nn.Conv2d))
            conv.weight = nn.Parameter(conv.weight * (1 + 1e-9), requires_grad=False)
        calls.append(net)
        return merged

    monkeypatch.setattr(zoo_stages, "merge", merge)
    monkeypatch.setattr(zoo_stages, "_last_bit", lambda *arguments: last_bit)
    row = examine("timm/test_resnet", ("exact",), sizes=(64,))
    assert len(calls) == 2
    assert row["exact"].startswith(cell) and (cell != "exact" or row["exact"] == cell)


def test_the_last_bit_of_the_weights_is_measured() -> None:
    net, example = nn.Conv2d(3, 4, 3).double().requires_grad_(False), torch.randn(1, 3, 8, 8).double()
    assert 1e-17 < zoo_stages._last_bit(net, example, net(example)) < 1e-15
    net.weight[:, 0], net.weight[:, 1] = 1e9, -1e9  # two large terms that cancel
    example[:, 1] = example[:, 0]
    assert zoo_stages._last_bit(net, example, net(example)) > 1e-9


def test_a_graph_that_is_wrong_at_another_batch_is_an_error_in_the_row() -> None:
    class Reshaped(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.rows = nn.Conv2d(3, 4, 3), rows

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(x).reshape(self.rows or len(x), -1)

    state: dict[str, Any] = {"model": Reshaped(0), "graph": Reshaped(1), "example": torch.randn(1, 3, 32, 32)}
    row: dict[str, Any] = {}
    zoo_stages._sizes(row, state)
    assert row["other_batch"].startswith("error: output shapes") and row["other_size"] == "agrees"
    zoo_stages._sizes(row, {**state, "graph": Reshaped(0)})
    assert row["other_batch"] == row["other_size"] == "agrees"
    zoo_stages._sizes(row, {**state, "model": nn.Conv2d(9, 9, 9)})
    assert row["other_batch"] == row["other_size"] == "not taken"


# --- processes -------------------------------------------------------------------------------------------------------


def work(name: str) -> dict[str, Any]:
    if name == "sleeps":
        time.sleep(60)
    if name == "dies":
        os._exit(3)
    if name == "eats":
        return {"model": name, "held": len(bytearray(3 << 30))}
    if name == "raises":
        raise ValueError("no")
    print("what a network prints goes nowhere")
    return {"model": name, "long": "x" * 300_000}


def test_each_name_has_a_process_with_limits_and_a_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["sleeps", "dies", "eats", "raises", "good"]
    rows = run_all(names, work, tmp_path / "a" / "rows.jsonl", "v1", seconds=2.0, memory_gb=1.0)
    assert rows["sleeps"]["error"] == "more than 2 s"
    assert rows["dies"]["error"].startswith("the process ended with status")
    assert rows["eats"]["error"].startswith("MemoryError")
    assert rows["raises"]["error"] == "ValueError: no" and "in work" in rows["raises"]["traceback"]
    assert "error" not in rows["good"] and len(rows["good"]["long"]) == 300_000
    assert capfd.readouterr().out == ""


def test_a_run_that_is_stopped_goes_on_and_other_sources_start_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    run_all(["a", "b"], work, file, "v1")
    with file.open("a") as out:
        out.write('{"model": "half')
    assert set(read_rows(file, "v1")) == {"a", "b"}
    assert read_rows(file, "v2") == {}
    assert set(read_rows(file, None)) == {"a", "b"}
    assert read_rows(tmp_path / "none.jsonl", "v1") == {}


def test_a_run_that_is_terminated_leaves_no_process_behind(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def announce(name: str) -> dict[str, Any]:
        started.write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
        return {"model": name}

    with pytest.raises(SystemExit):
        run_all(["a"], announce, tmp_path / "r.jsonl", "v")
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_model_that_refuses_float64_is_skipped_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(x.float())

    monkeypatch.setattr(zoo_stages, "build", lambda name: Casts().eval().requires_grad_(False))
    row = examine("tv/casts", ("exact",), sizes=(32,))
    assert row["trace"] == "equal"
    assert row["exact"].startswith("skipped: the model does not run in float64")


def test_heavy_networks_run_one_at_a_time(tmp_path: Path) -> None:
    def clocked(name: str) -> dict[str, Any]:
        begin = time.time()
        time.sleep(0.3)
        return {"model": name, "span": (begin, time.time())}

    rows = run_all(["h1", "h2", "l1"], clocked, tmp_path / "r.jsonl", "v", heavy=lambda n: n.startswith("h"))
    (b1, e1), (b2, e2) = sorted(rows[n]["span"] for n in ("h1", "h2"))
    assert e1 <= b2 and b1 < e1 and b2 < e2


# --- the table -------------------------------------------------------------------------------------------------------

LINE = {
    "model": "tv/a",
    "family": "f",
    "trace": "equal",
    "tracer": "symbolic",
    "opaque": "0",
    "other_batch": "agrees",
    "other_size": "says so",
    "convs": "100",
    "in_region": "90",
    "in_candidate": "90",
    "exact": "exact",
    "exact_error": "1e-15",
    "compress": "ok",
    "onnx": "agrees",
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"trace": "error: TraceError"}, "trace was 'equal' and is 'error: TraceError'"),
        ({"exact": "error: off by 1e-9"}, "exact was"),
        ({"other_batch": "error: off by 1e+00"}, "other_batch was 'agrees'"),
        ({"other_size": "error: RuntimeError: shape"}, "other_size was 'says so'"),
        ({"compress": "infeasible"}, "compress was 'ok' and is 'infeasible'"),
        ({"compress": "error: UNEXPECTED TypeError"}, "compress was"),
        ({"onnx": "error: ExportError"}, "onnx was"),
        ({"in_region": "80"}, "in_region fell from 90.0% to 80.0%"),
        ({"in_candidate": "89"}, "in_candidate fell"),
    ],
)
def test_what_got_worse_is_found(change: dict[str, str], text: str) -> None:
    worse = compare({"tv/a": LINE}, {"tv/a": {**LINE, **change}})
    assert len(worse) == 1 and text in worse[0] and worse[0].startswith("tv/a: ")
    assert compare({"tv/a": {**LINE, **change}}, {"tv/a": LINE}) == []


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"exact": ""},
        {"onnx": "skipped: 300 M parameters"},
        {"exact_error": "9e-15"},
        {"candidates": "7"},
        {"exact": "exact to rounding: 2e-11"},
        {"onnx": "agrees to rounding: 1e-3"},
    ],
)
def test_what_is_as_good_or_was_not_asked_is_not_worse(change: dict[str, str]) -> None:
    assert compare({"tv/a": LINE}, {"tv/a": {**LINE, **change}}) == []
    assert compare({}, {"tv/a": LINE}) == []


def test_an_infeasible_network_that_ends_in_an_error_is_worse() -> None:
    assert compare({"tv/a": {**LINE, "compress": "infeasible"}}, {"tv/a": {**LINE, "compress": "error: X"}})


def test_the_table_is_written_in_order_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "zoo.csv"
    write_table(file, {"tv/b": {**LINE, "model": "tv/b"}, "tv/a": LINE, "tv/c": {"model": "tv/c", "family": "f"}})
    lines = file.read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["model", "tv/a", "tv/b", "tv/c"]
    assert set(read_table(file)) == {"tv/a", "tv/b"}  # nothing is known of tv/c
    assert set(families(file)) == {"tv/a", "tv/b", "tv/c"}
    assert read_table(tmp_path / "none.csv") == {}


def test_a_row_becomes_a_line_without_times() -> None:
    row = {
        "model": "tv/a",
        "trace": "equal",
        "seconds": 3.0,
        "keep_error": 2e-16,
        "exact_error": 3e-15,
        "ratio": 0.78123,
    }
    row["reasons"] = {"a reason": 3, "another": 2, "third": 1, "fourth": 1, "fifth": 1}
    line = cells(row, "f")
    assert line["ratio"] == "0.781" and line["exact_error"] == "3e-15" and line["family"] == "f"
    assert line["reasons"] == "3 x a reason; 2 x another; 1 x third; 1 x fourth"
    assert "seconds" not in line
    assert cells({"model": "x", "error": "more than 9 s"}, "f")["trace"] == "error: error: more than 9 s"
    assert cells({"model": "x", "build": "error: no"}, "f")["trace"] == "error: no"


def test_the_summary_counts_conv_networks_apart() -> None:
    other = {**LINE, "model": "timm/v", "family": "vit", "trace": "error: X", "convs": "1", "in_region": "0"}
    unsolved = {**LINE, "model": "timm/c", "compress": "infeasible", "in_region": "50", "exact_error": "4e-14"}
    text = summary({r["model"]: r for r in (LINE, other, unsolved)})
    assert "3 networks, of them 2 conv networks" in text
    assert "traced and equal: 2 of 2 (100.0%)" in text
    assert "in a region with another: 140 of 200 (70.0%)" in text
    assert "compressed to 0.8 of the roofline: 1 of 2 (50.0%)" in text and "1 infeasible" in text
    assert "conv networks: 2 exact; worst 4e-14" in text


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_compares_with_the_table_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, rows = tmp_path / "zoo.csv", tmp_path / "rows.jsonl"
    common = ["--models", "timm/test_resnet", "--stages", "--rows", str(rows), "--table", str(table)]
    assert zoo.main([*common, "--write"]) == 0
    assert len(read_table(table)) == 1 and len(families(table)) == len(families(TABLE))
    assert "traced and equal: 1 of 1" in capsys.readouterr().out
    before = rows.read_text()
    line = read_table(table)["timm/test_resnet"]
    write_table(table, {"timm/test_resnet": {**line, "in_region": "1000"}})
    assert zoo.main(common) == 1
    assert "in_region fell" in capsys.readouterr().out
    assert rows.read_text() == before  # the finished row was taken again


def test_the_command_sums_up_a_table_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "zoo.csv"
    write_table(table, {"timm/test_resnet": {**LINE, "model": "timm/test_resnet"}})
    assert zoo.main(["--summary", "--table", str(table), "--rows", str(tmp_path / "none")]) == 0
    assert "1 networks, of them 1 conv networks" in capsys.readouterr().out
    assert zoo.main(["--summary"]) == 0  # the committed one


def test_the_command_refuses_globs_that_match_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        zoo.main(["--models", "no/such"])
    assert "no network matches" in capsys.readouterr().err


def test_families_take_turns() -> None:
    assert zoo.in_turns(["a", "b", "c"], {"a": "f", "b": "f", "c": "g"}) == ["a", "c", "b"]
    assert zoo.chosen({"tv/a": "f", "timm/b": "g"}, ["t*/*"], ["g"]) == ["timm/b"]


def test_the_runner_knows_nothing_of_networks() -> None:
    assert zoo_runner.__doc__ is not None and "torch" not in vars(zoo_runner)
