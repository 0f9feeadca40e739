"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import lmfx.cli.models
import lmfx.cli.options
import lmfx.latency
from lmfx._version import __version__
from lmfx.cli import main
from lmfx.cli.models import load_model
from lmfx.latency import LatencyTable
from lmfx.passes.errors import MissingExtra, ModelError
from lmfx.planning.saved_networks import load, model_spec

TOY = """
import torch
from torch import nn

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.wise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)
        return self.head(self.pool(torch.relu(self.wise(x))).mean((2, 3)))

class spaces:
    @staticmethod
    def nested():
        return Toy()

made = Toy()
number = 3

def factory():
    return Toy()

def wants_more(width):
    return Toy()

def gives_text():
    return "a model"

def leaves():
    raise SystemExit(7)

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
"""
SMALL = ["--shape", "1,3,16,16"]
ROOFLINE = [*SMALL, "--backend", "roofline", "--quiet"]
SCORED = [*ROOFLINE, "--calibration", "random:4"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module `toy_models`, which is the current one."""
    (tmp_path / "toy_models.py").write_text(TOY)
    (tmp_path / "broken_models.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "raising_models.py").write_text("raise RuntimeError('not today')\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("toy_models", "broken_models", "raising_models"):
        sys.modules.pop(name, None)


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(argv) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that must fail as one line that names the command, with nothing on stdout."""
    assert main(argv) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.startswith(f"lmfx {argv[0]}: ")
    assert "Traceback" not in seen.err
    return seen.err


# --- spans ------------------------------------------------------------------------------------------------------------

COMMAND = importlib.import_module("lmfx.cli.command_line")
FIELDS = {
    "key",
    "series",
    "start",
    "stop",
    "realization",
    "convs",
    "all_convs",
    "kept",
    "calls",
    "cuts",
    "kernel_size",
    "stride",
    "upscale",
    "groups",
    "multiplier",
    "rank",
    "depthwise",
    "in_channels",
    "out_channels",
}


def test_spans_prints_one_json_object_a_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "spans", "toy_models:factory", *SMALL, "--json")
    assert all(set(row) == FIELDS for row in found)
    assert all(bool(row["cuts"]) is (row["realization"] == "narrow") for row in found)
    assert all(row["multiplier"] == row["rank"] == 0 for row in found)
    factors = run_json(capsys, "spans", "toy_models:factory", *SMALL, "--json", "--realize", "factor")
    assert {row["realization"]: row["multiplier"] > 0 for row in factors} == {"keep": False, "factor": True}
    assert len({row["key"] for row in found}) == len(found)
    assert {row["realization"] for row in found} == {"keep", "compose", "fit", "drop"}
    assert all(row["convs"] for row in found), "a kept layer without a convolution is no row"


def test_a_kept_convolution_is_described_by_its_own_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "spans", "toy_models:factory", *SMALL, "--json")
    kept = {row["convs"][0]: row for row in found if row["realization"] == "keep"}
    assert set(kept) == {"stem", "conv1", "conv2", "wise", "head"}
    assert kept["stem"]["kept"] == ["stem"]
    assert (kept["stem"]["kernel_size"], kept["stem"]["stride"], kept["stem"]["groups"]) == ([3, 3], [1, 1], 1)
    assert (kept["wise"]["groups"], kept["wise"]["depthwise"], kept["stem"]["depthwise"]) == (8, True, False)


def test_a_composed_block_has_every_kernel_size_and_what_is_kept_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "spans", "toy_models:factory", *SMALL, "--json", "--realize", "compose")
    block = [
        r for r in found if r["realization"] == "compose" and r["convs"] == ["conv1", "conv2"] and r["series"] == "0"
    ]
    assert {r["kernel_size"][0]: len(r["kept"]) for r in block} == {3: 1, 5: 2}
    assert "fit" not in {r["realization"] for r in found}


def test_a_dropped_span_is_an_identity(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "spans", "toy_models:factory", *SMALL, "--json")
    drops = [row for row in found if row["realization"] == "drop"]
    assert drops
    for row in drops:
        assert (row["kernel_size"], row["stride"], row["groups"], row["kept"]) == ([1, 1], [1, 1], 8, [])


def test_kernels_are_unbounded_unless_a_bound_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    def largest(*options: str) -> int:
        found = run_json(capsys, "spans", "toy_models:factory", *SMALL, "--json", *options)
        return max(size for row in found for size in row["kernel_size"])  # of a Linear layer there are none

    assert largest() == 9
    assert largest("--max-kernel-size", "none") == 9
    assert largest("--max-kernel-size", "5") == 5


def test_globs_bound_what_is_touched(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("spans", "toy_models:factory", *SMALL, "--json")
    without = run_json(capsys, *options, "--exclude", "conv1", "--exclude", "wise")
    touched = {name for row in without if row["realization"] != "keep" for name in row["all_convs"]}
    assert touched == {"stem", "conv2"}
    only = run_json(capsys, *options, "--include", "wise")
    assert {name for row in only if row["realization"] != "keep" for name in row["all_convs"]} == {"wise"}


def test_refusals_have_a_reason_and_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "spans", "toy_models:factory", *SMALL, "--json", "--refused")
    assert {"reason": "MaxPool2d is not affine", "nodes": ["pool"]} in found
    assert all(set(row) == {"reason", "nodes"} for row in found)


def test_spans_for_people_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spans", "toy_models:factory", *SMALL]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.split()[:2] == ["0:1-2", "conv1,"]]
    assert "compose 3x3, 5x5; drop; fit 1x1, 1x1 depthwise, ... 7x7 depthwise (8)" in line
    assert out.splitlines()[-1].startswith(
        f"{len(run_json(capsys, 'spans', 'toy_models:factory', *SMALL, '--json'))} candidates"
    )
    assert main(["spans", "toy_models:factory", *SMALL, "--refused"]) == 0
    assert "1 x MaxPool2d is not affine\n    pool\n" in capsys.readouterr().out


def test_spans_of_a_model_of_torchvision_need_no_backend(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "spans", "torchvision:resnet18", "--shape", "1,3,64,64", "--json", "--realize", "compose")
    strided = [row for row in found if row["convs"] == ["layer2.0.conv1", "layer2.0.conv2"] and row["stride"] == [2, 2]]
    assert any(row["all_convs"] == [*row["convs"], "layer2.0.downsample.0"] for row in strided)


# --- profile, frontier, compress, export ------------------------------------------------------------------------------


def test_profile_writes_a_table_that_can_be_read_again(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["profile", "toy_models:factory", *ROOFLINE, "-o", "table.json"]) == 0
    out = capsys.readouterr().out
    table = LatencyTable.load(folder / "table.json")
    assert table.identity["backend"] == "roofline"
    assert any(key in out for key in table)
    assert out.endswith("wrote table.json\n")


def test_frontier_is_monotone_and_ends_with_the_original(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "frontier", "toy_models:factory", *SCORED, "--json")
    latency = [point["latency"] for point in found["points"]]
    importance = [point["importance"] for point in found["points"]]
    assert len(latency) > 2
    assert latency == sorted(latency)
    assert importance == sorted(importance)
    assert found["points"][-1] == {"latency": found["original"], "importance": 0.0, "candidates": []}
    assert "4 images of standard normal noise" in found["calibration"]


def test_frontier_for_people_is_a_short_table_and_a_picture(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["frontier", "toy_models:factory", *SCORED, "--plot", "frontier.png"]) == 0
    out = capsys.readouterr().out
    assert "Pareto-optimal plans" in out
    assert len(out.splitlines()) < 25
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_compress_reports_and_saves_what_can_be_loaded_and_exported(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert main(["compress", "toy_models:factory", *SCORED, "--budget", "60%", "-o", "out"]) == 0
    out = capsys.readouterr().out
    assert "convolutions became" in out
    assert "budget     0.6" in out
    assert "calibrated on 4 images of standard normal noise" in out
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["model.safetensors", "plan.json", "report.html"]
    assert model_spec("out")[0] == "toy_models:factory"
    net = load("out", load_model("toy_models:factory"))
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 5)

    assert "made for 'toy_models:factory'" in failure(capsys, "export", "out")  # code is imported on no file's word
    assert main(["export", "out", "toy_models:factory"]) == 0
    assert capsys.readouterr().out == f"wrote {Path('out/net.onnx')}\n"
    assert (folder / "out" / "net.onnx").stat().st_size > 0
    assert main(["export", "out", "toy_models:spaces.nested", "-o", "mine.onnx"]) == 0
    assert (folder / "mine.onnx").exists()


def test_compress_takes_images_and_weights_and_gives_the_trainable_form(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    np.save(folder / "images.npy", np.random.default_rng(0).normal(size=(6, 3, 16, 16)))
    safetensors.torch.save_file(load_model("toy_models:factory").state_dict(), folder / "weights.safetensors")
    options = ["--budget", "2x", "-o", "out", "--calibration", "images.npy", "--weights", "weights.safetensors"]
    assert main(["compress", "toy_models:factory", *ROOFLINE, *options, "--trainable", "--realize", "compose"]) == 0
    out = capsys.readouterr().out
    assert "calibrated on 6 images of images.npy" in out
    assert "trainable; lmfx.merge(net)" in out
    assert "random" not in out


def test_recover_trains_what_compress_saved_and_saves_it_again(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    np.save(folder / "images.npy", np.random.default_rng(0).normal(size=(24, 3, 16, 16)).astype(np.float32))
    data = ["--calibration", "images.npy"]
    trainable = ["--budget", "2x", "-o", "student", *data, "--trainable", "--realize", "compose"]
    assert main(["compress", "toy_models:factory", *ROOFLINE, *trainable]) == 0
    capsys.readouterr()
    assert "write lmfx recover student MODEL" in failure(capsys, "recover", "student", *data, "-o", "out")
    told = failure(capsys, "recover", "student", "toy_models:factory", *data, "-o", "out", "--minutes", "2 weeks")
    assert "is no time to recover in" in told
    assert not Path("out").exists()
    assert main(["recover", "student", "toy_models:factory", *data, "-o", "out", "--minutes", "1s", "-q"]) == 0
    seen = capsys.readouterr()
    assert seen.out.startswith("held-out loss ") and "trained and judged on 24 images of images.npy" in seen.out
    assert seen.err == ""
    torch.manual_seed(0)
    net = load("out", load_model("toy_models:factory"))
    assert lmfx.result_of(net).merged
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 5)


def test_export_asks_for_the_model_where_the_folder_does_not_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "toy_models:factory", *SCORED, "--budget", "1.0", "-o", "out"]) == 0
    document = json.loads(Path("out/plan.json").read_text())
    document["save"]["model"] = None
    Path("out/plan.json").write_text(json.dumps(document))
    capsys.readouterr()
    assert "write lmfx export out MODEL" in failure(capsys, "export", "out")
    assert not Path("out/net.onnx").exists()


# --- several inputs, and training -------------------------------------------------------------------------------------

DENOISER = """
import torch
from torch import nn

class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.first, self.second, self.last = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, sample, timestep):
        x = torch.relu(self.first(sample)) + self.embed(timestep)[:, :, None, None]
        return self.last(torch.relu(self.second(x)))

def inputs():
    return torch.randn(2, 4, 16, 16), torch.tensor([3, 5])

def batches():
    for _ in range(3):
        yield torch.randn(4, 4, 16, 16), torch.arange(4)

def train(model):
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(torch.ones(2, 4, 16, 16), torch.tensor([3, 5])).square().mean().backward()
    optimizer.step()

@torch.no_grad()
def evaluate(model):
    return float(model(torch.ones(2, 4, 16, 16), torch.tensor([3, 5])).square().mean())

text = "no function"
"""
QUICK = ["--backend", "roofline", "--quiet"]
BEFORE = ("frontier", "denoisers:Denoiser", "--example", "denoisers:inputs", *QUICK)
FINETUNE = ["--importance", "finetune", "--train", "denoisers:train", "--evaluate", "denoisers:evaluate"]


@pytest.fixture
def denoisers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (folder / "denoisers.py").write_text(DENOISER)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    sys.modules.pop("denoisers", None)


def _arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((count, 4, 16, 16)), np.arange(count) % 10


@pytest.mark.parametrize("names", [(), ("sample", "timestep")], ids=["positional", "keywords"])
def test_a_model_of_several_inputs_goes_through_all_commands(
    names: tuple[str, ...], denoisers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, count in (("example.npz", 2), ("images.npz", 6)):
        values = _arrays(count)
        np.savez(denoisers / file, *(() if names else values), **dict(zip(names, values, strict=False)))
    given = ["denoisers:Denoiser", "--example", "example.npz"]
    assert main(["spans", *given]) == 0
    assert main(["profile", *given, *QUICK]) == 0
    assert main(["frontier", *given, *QUICK, "--calibration", "images.npz"]) == 0
    assert main(["compress", *given, *QUICK, "--calibration", "images.npz", "--budget", "0.8", "-o", "out"]) == 0
    assert "calibrated on 6 images of images.npz" in capsys.readouterr().out
    assert main(["export", "out", "denoisers:Denoiser"]) == 0
    inputs = json.loads((denoisers / "out" / "plan.json").read_text())["save"]["inputs"]
    assert list(inputs["keyword"]) == list(names) and len(inputs["positional"]) == 2 - len(names)


def test_the_example_and_the_images_may_come_from_functions(
    denoisers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["frontier", "denoisers:Denoiser", "--example", "denoisers:inputs", *QUICK]
    assert main([*given, "--calibration", "denoisers:batches"]) == 0
    assert "12 images of denoisers:batches" in capsys.readouterr().out
    assert main([*given, "--calibration", "random:8"]) == 0  # noise for the samples, the example's time steps
    assert "8 images of standard normal noise" in capsys.readouterr().out


def test_finetune_takes_its_functions_by_name_and_keeps_rows_by_key(
    denoisers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*BEFORE, "--cache-dir", "cache", "--json"]
    options = [*FINETUNE, "--metric", "loss", "--calibration", "denoisers:inputs", "--realize", "compose"]
    first = run_json(capsys, *given, *options, "--key", "1 step")
    assert first["points"][0]["candidates"]
    with lmfx.latency.Store.open(denoisers / "cache") as store:
        kept = store.count("importance")
    assert kept > 1
    workers = ["--executor", "processes:1", "--key", "1 step more"]
    assert run_json(capsys, *given, *options, *workers) == first  # in another process, without any row
    with lmfx.latency.Store.open(denoisers / "cache") as store:
        assert store.count("importance") == 2 * kept


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "training without finetune": ((*BEFORE, "--train", "denoisers:train"), "--train is for --importance finetune"),
    "finetune without functions": ((*BEFORE, "--importance", "finetune"), "--train package.module:train"),
    "no function": ((*BEFORE, *FINETUNE[:3], "denoisers:text", *FINETUNE[4:]), "needs functions"),
    "no such function": ((*BEFORE, *FINETUNE[:3], "denoisers:learn", *FINETUNE[4:]), "has no 'learn'"),
    "workers of no kind": ((*BEFORE, *FINETUNE, "--executor", "threads:2"), "write processes:4 or dask:"),
    "no workers": ((*BEFORE, *FINETUNE, "--executor", "processes:0"), "write processes:4 or dask:"),
    "no scheduler": ((*BEFORE, *FINETUNE, "--executor", "dask:no address"), "no scheduler answers there"),
    "an example of text": ((*BEFORE[:3], "denoisers:text"), "gave a str: return a tensor"),
    "an example of no file": ((*BEFORE[:3], "example.pt"), "no .npy or .npz file"),
    "an example that is not there": ((*BEFORE[:3], "no.npz"), "cannot read the example no.npz"),
    "images for one input": ((*BEFORE, "--calibration", "one.npy"), "has 1 inputs, the example has 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_inputs_and_functions_that_do_not_fit_are_one_message(
    name: str, denoisers: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmfx.cli.options, "DASK_TIMEOUT", 1)
    np.save(denoisers / "one.npy", _arrays(3)[0])
    argv, message = WRONG[name]
    assert message in failure(capsys, *argv)


def test_python_m_lmfx_is_the_command() -> None:
    root = Path(lmfx.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "lmfx", "--version"], capture_output=True, text=True, check=True, cwd=root
    )
    assert run.stdout.startswith(f"lmfx {__version__} ")


# --- how it fails -----------------------------------------------------------------------------------------------------

TOO_EARLY = ("compress", "toy_models:factory", *SCORED, "-o", "out", "--budget")
FAILURES: dict[str, tuple[tuple[str, ...], str]] = {
    "budget in words": ((*TOO_EARLY, "half"), "The budget 'half' is not understood"),
    "budget of zero": ((*TOO_EARLY, "0"), "is not positive"),
    "budget out of reach": ((*TOO_EARLY, "0.0000001ms"), "no plan reaches"),
    "unknown realization": ((*TOO_EARLY, "0.5", "--realize", "melt"), "'melt'"),
    "unknown glob": ((*TOO_EARLY, "0.5", "--exclude", "stam"), "exclude='stam' matches no module"),
    "no convolution": (("spans", "toy_models:plain", "--shape", "1,3"), "has no convolution"),
    "shape of other channels": (("spans", "toy_models:factory", "--shape", "1,4,8,8"), "does not run on the example"),
    "threads of the roofline": (
        ("profile", "toy_models:factory", *ROOFLINE, "--threads", "2"),
        "has no option threads",
    ),
    "table into no folder": (("profile", "toy_models:factory", *ROOFLINE, "-o", "no/t.json"), "does not exist"),
    "plot into no folder": (("frontier", "toy_models:factory", *SCORED, "--plot", "no/f.png"), "does not exist"),
    "images that are not there": (
        ("frontier", "toy_models:factory", *ROOFLINE, "--calibration", "no.npy"),
        "cannot read the calibration images no.npy",
    ),
    "images of a pickle": (
        ("frontier", "toy_models:factory", *ROOFLINE, "--calibration", "x.pt"),
        "is no .npy or .npz file",
    ),
    "no random images": (("frontier", "toy_models:factory", *ROOFLINE, "--calibration", "random:0"), "write random:64"),
    "export of nothing": (("export", "no"), "does not exist"),
    "model without a colon": (("spans", "resnet18"), "write torchvision:NAME"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_message_and_exit_code_2(name: str, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    argv, message = FAILURES[name]
    before = sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")
    assert message in failure(capsys, *argv)
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 8, 8), np.float32), "all but the first dimension must agree"),
        (np.zeros((2, 3, 16, 16), np.uint8), "normalise images"),
        (np.array([{}], dtype=object), "cannot read the calibration images"),
        (np.full((2, 3, 16, 16), np.nan), "NaN"),
        (np.zeros((0, 3, 16, 16)), "empty"),
    ],
    ids=["shape", "bytes", "pickle", "nan", "none"],
)
def test_images_that_do_not_fit_are_refused(
    array: Any, message: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    np.save(folder / "images.npy", array, allow_pickle=True)
    assert message in failure(capsys, "frontier", "toy_models:factory", *ROOFLINE, "--calibration", "images.npy")


def test_an_output_that_is_a_file_is_said_before_anything_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").write_text("mine")
    assert "is a file; give a folder" in failure(capsys, *TOO_EARLY, "0.5")
    assert Path("out").read_text() == "mine"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["melt"],
        ["spans"],
        ["spans", "toy_models:factory", "--shape", "large"],
        ["spans", "toy_models:factory", "--max-kernel-size", "five"],
        ["compress", "toy_models:factory", "-o", "out"],
        ["profile", "toy_models:factory", "--backend", "abacus"],
        ["spans", "toy_models:factory", "--shape", "1,3,8,8", "--example", "x.npy"],
    ],
    ids=lambda argv: " ".join(argv) or "nothing",
)
def test_a_wrong_option_shows_the_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: lmfx" in capsys.readouterr().err


def test_ctrl_c_ends_with_130_and_says_that_work_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmfx.cli.commands.profile", interrupted)
    assert main(["profile", "toy_models:factory", *ROOFLINE]) == 130
    assert "Rows that were finished are kept" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"lmfx {__version__} ")


def test_defaults_are_those_of_the_function_behind_the_command() -> None:
    args = COMMAND._parser().parse_args(["compress", "m:f", "--budget", "1", "-o", "out"])
    assert (args.max_kernel_size, args.realize, args.surrogate, args.importance) == (
        7,
        ("compose", "fit", "narrow", "factor"),
        "affine",
        "reconstruction",
    )
    assert COMMAND._parser().parse_args(["spans", "m:f"]).max_kernel_size is None


# --- models by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["toy_models:factory", "toy_models:Toy", "toy_models:made", "toy_models:spaces.nested"]
)
def test_a_factory_of_the_current_folder_gives_a_model_in_eval_mode(spec: str) -> None:
    before = list(sys.path)
    model = load_model(spec)
    assert type(model).__name__ == "Toy"
    assert not model.training
    assert sys.path == before


def test_a_model_of_torchvision_has_random_weights_and_is_made_quickly() -> None:
    model = load_model("torchvision:googlenet")
    assert type(model).__name__ == "GoogLeNet"
    assert not model.training


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"])
def test_a_model_with_a_backbone_downloads_no_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert not load_model(f"torchvision:{name}").training


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "write torchvision:NAME"),
        (":factory", "write torchvision:NAME"),
        ("toy_models:", "write torchvision:NAME"),
        ("toy_models:factroy", "did you mean factory"),
        ("toy_modles:factory", "there is no module 'toy_modles'"),
        ("toy_models.sub:factory", "toy_models"),
        ("broken_models:factory", "No module named 'no_such_package_at_all'; install"),
        ("raising_models:factory", "RuntimeError: not today"),
        ("toy_models:number", "is a int, neither a model nor"),
        ("toy_models:wants_more", "without arguments failed: TypeError"),
        ("toy_models:gives_text", "gave a str, not a torch.nn.Module"),
        ("toy_models:leaves", "SystemExit: 7"),
        ("..:factory", "importing"),
    ],
)
def test_a_name_that_leads_to_no_model_is_explained(spec: str, message: str) -> None:
    with pytest.raises(ModelError) as error:
        load_model(spec)
    assert message in str(error.value)


def test_a_misspelt_model_of_torchvision_gets_the_closest_names() -> None:
    with pytest.raises(ModelError, match=r"no model 'resnet35': did you mean .*resnet34"):
        load_model("torchvision:resnet35")


@pytest.mark.parametrize(("library", "hint"), [("torchvision", r"lmfx\[vision\]"), ("timm", r"lmfx\[vision\]")])
def test_a_library_that_is_not_installed_is_named_with_the_command(
    library: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=hint):
        load_model(f"{library}:resnet18")


def test_weights_are_loaded_strictly(folder: Path) -> None:
    model = load_model("toy_models:factory")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.fill_(0.5 + i)
    path = folder / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    loaded = load_model("toy_models:factory", path)
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
    safetensors.torch.save_file(nn.Conv2d(1, 1, 1).state_dict(), path)
    with pytest.raises(ModelError, match="are not those of toy_models:factory"):
        load_model("toy_models:factory", path)
    path.write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(ModelError, match="give a safetensors file"):
        load_model("toy_models:factory", path)
    with pytest.raises(ModelError, match="cannot read the weights"):
        load_model("toy_models:factory", folder / "no.safetensors")
