"""The recipes of examples/ run end to end on tiny generated data, and go on where they were stopped."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lmfx
from lmfx.latency import Store
from lmfx.stages import worth_scoring
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")


def image_folder(root: Path, classes: int = 2, train: int = 12, val: int = 4) -> Path:
    """Images of one colour a class, with noise, in the layout of ImageFolder."""
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (40, 48, 3)) + np.eye(3, dtype=int)[label] * 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def cifar_folder(root: Path, count: int = 40) -> Path:
    random = np.random.default_rng(0)
    root.mkdir()
    for i in range(1, 3):
        random.integers(0, 256, (count, 3073), dtype=np.uint8).tofile(root / f"data_batch_{i}.bin")
    return root


def imagenet_arguments(data: Path, out: Path, **options: Any) -> list[str]:
    small: dict[str, Any] = {
        "out": out,
        "weights": "none",
        "size": 32,
        "device": "cpu",
        "workers": 0,
        "latency": "roofline",
        "latency-batch": 1,
        "importance": "magnitude",
        "calibration": 8,
        "epochs": 1,
        "batch": 8,
        "budget": 0.7,
        **options,
    }
    return [str(data), *(text for name, value in small.items() for text in (f"--{name}", str(value)))]


def told(main: Callable[[list[str]], None], arguments: list[str], said: Path) -> None:
    try:
        main(arguments)
    except BaseException:
        said.write_text(traceback.format_exc())
        raise


def kill_when(main: Callable[[list[str]], None], arguments: list[str], ready: Callable[[], bool]) -> None:
    """Runs a recipe in a process of its own, and kills it with SIGKILL at the first moment at which `ready()`."""
    said = Path(arguments[0]) / "error.txt"
    context = multiprocessing.get_context("forkserver")  # a fork of this process could not train
    context.set_forkserver_preload(["lmfx", "torchvision", "timm", "diffusers.models.unets.unet_2d"])
    process = context.Process(target=told, args=(main, arguments, said))
    process.start()
    deadline = time.monotonic() + 200
    try:
        while not ready():
            assert process.is_alive(), said.read_text() if said.exists() else "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


def importance_rows(out: Path) -> dict[str, int]:
    """How often each row was stored."""
    if not (out / "cache" / "rows").exists():
        return {}
    with Store.open(out / "cache") as store:
        return store.times_put("importance")


def test_imagenet_with_the_papers_importance_goes_on_after_kills_and_ends_at_the_same_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imagenet = importlib.import_module("imagenet")
    pytest.importorskip("timm")
    data, out, whole = image_folder(tmp_path / "data"), tmp_path / "out", tmp_path / "whole"
    small: dict[str, Any] = {"arch": "mobilenet_v2", "importance": "finetune", "share": 0.25, "epochs": 2}
    small |= {"importance-batch": 3, "include": "blocks.1.1*", "budget": 0.98}
    imagenet.main([*imagenet_arguments(data, whole, **small), "--plan-only"])
    rows = importance_rows(whole)
    assert len(rows) > 5 and set(rows.values()) == {1}

    arguments = imagenet_arguments(data, out, **small)
    kill_when(imagenet.main, arguments, lambda: len(importance_rows(out)) >= 3)
    assert not (out / "plan.json").exists()
    assert 3 <= len(importance_rows(out)) < len(rows)
    checkpoint = out / "training" / "training.safetensors"
    kill_when(imagenet.main, arguments, checkpoint.exists)
    assert importance_rows(out) == rows  # each row was trained once, by one of both runs
    assert (out / "plan.json").read_text() == (whole / "plan.json").read_text()
    assert not (out / "results.json").exists()

    monkeypatch.setattr(imagenet, "make_plan", None)
    capsys.readouterr()
    imagenet.main(arguments)
    assert len((out / "log.jsonl").read_text().splitlines()) <= 2  # the first epoch was not trained again
    told = capsys.readouterr().out
    assert "compressed" in told and "written" in told
    assert json.loads((out / "results.json").read_text()).keys() == {"original", "compressed"}
    net = lmfx.load(out / "net", imagenet.network("mobilenet_v2", "none", 2))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out / "net.onnx"), providers=["CPUExecutionProvider"])
    image = torch.randn(1, 3, 32, 32)
    (given,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    assert np.allclose(given, net(image).detach().numpy(), rtol=1e-3)


def test_imagenet_on_demand_scores_less_and_other_options_need_another_folder(tmp_path: Path) -> None:
    imagenet = importlib.import_module("imagenet")
    small: dict[str, Any] = {"arch": "resnet34", "importance": "finetune", "share": 0.25, "include": "layer1.*"}
    arguments = imagenet_arguments(image_folder(tmp_path / "data"), tmp_path / "out", budget=0.95, **small)
    imagenet.main([*arguments, "--on-demand", "--plan-only"])
    graph = lmfx.trace(imagenet.network("resnet34", "none", 2), torch.randn(1, 3, 32, 32))
    spans = lmfx.spans(graph, realize=("compose",), include=("layer1.*",))
    latency = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    assert 2 < len(importance_rows(tmp_path / "out")) < len(worth_scoring(spans, latency))
    assert lmfx.load_plan(tmp_path / "out" / "plan.json").candidates
    with pytest.raises(SystemExit, match=r"--budget was 0.95 and is 0.9;? ?.*use another --out"):
        imagenet.main([*arguments, "--on-demand", "--plan-only", "--budget", "0.9"])


def test_the_short_training_of_imagenet_is_one_epoch_on_a_share_and_judged_on_another(tmp_path: Path) -> None:
    imagenet = importlib.import_module("imagenet")
    data = image_folder(tmp_path / "data")
    short = imagenet.Short(data, 32, 0.25, 4, 0.05, 0, "cpu")
    parts = [set(short.loader(part).dataset.indices) for part in (0, 1)]
    assert [len(part) for part in parts] == [6, 6]
    assert not parts[0] & parts[1]
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    for _ in range(30):
        short.train(model)
    assert short.evaluate(model) == 1.0
    with pytest.raises(SystemExit, match="no two parts of 60%"):
        imagenet.Short(data, 32, 0.6, 4, 0.05, 0, "cpu").evaluate(model)


@pytest.mark.parametrize(
    ("arch", "epochs", "rate", "decay"),
    [("resnet34", 90, 1.024, 2**-15), ("mobilenet_v2", 180, 0.05, 1e-5), ("mobilenet_v2_1.4", 180, 0.1, 1e-5)],
)
def test_the_settings_are_the_published_ones(arch: str, epochs: int, rate: float, decay: float) -> None:
    imagenet = importlib.import_module("imagenet")
    recipe = imagenet.RECIPES[arch]
    assert (recipe.epochs, recipe.rate, recipe.decay) == (epochs, rate, decay)
    args = imagenet.options(["data", "--arch", arch])
    assert (args.share, args.importance_batch, args.importance_rate) == (0.04, 256, 0.1)


def test_imagenet_without_its_folders_says_so(tmp_path: Path) -> None:
    imagenet = importlib.import_module("imagenet")
    with pytest.raises(SystemExit, match="needs train/CLASS"):
        imagenet.main(imagenet_arguments(tmp_path, tmp_path / "out"))


def ddpm_arguments(data: Path, out: Path, *more: str) -> list[str]:
    text = f"{data} --out {out} --weights none --channels 8 16 --device cpu --latency roofline --samples 2"
    text += " --share 0.1 --importance-epochs 1 --calibration 4 --steps 2 --batch 4 --budget 0.9"
    return [*text.split(), *more]


def brightness(images: torch.Tensor) -> float:
    """A judge of samples."""
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 32, 32)
    return float(images.float().mean())


@pytest.mark.slow
def test_ddpm_with_the_papers_importance_goes_on_after_kills_and_ends_at_the_same_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    ddpm = importlib.import_module("ddpm_cifar10")
    data, out, whole = cifar_folder(tmp_path / "data"), tmp_path / "out", tmp_path / "whole"
    few = ("--include", "net.up_blocks.1.resnets.0*", "--budget", "0.96", "--save-every", "1")
    ddpm.main(ddpm_arguments(data, whole, *few, "--plan-only"))
    rows = importance_rows(whole)
    assert len(rows) > 4 and set(rows.values()) == {1}
    arguments = ddpm_arguments(data, out, *few, "--judge", "test_recipes:brightness")
    kill_when(ddpm.main, arguments, lambda: len(importance_rows(out)) >= 2)
    assert not (out / "plan.json").exists() and len(importance_rows(out)) < len(rows)
    kill_when(ddpm.main, arguments, (out / "training" / "training.safetensors").exists)
    assert importance_rows(out) == rows
    assert (out / "plan.json").read_text() == (whole / "plan.json").read_text()
    monkeypatch.setattr(ddpm, "make_plan", None)
    ddpm.main(arguments)
    results = json.loads((out / "results.json").read_text())
    assert results.keys() == {"original", "compressed"}
    assert all(row.keys() == {"denoising loss", "test_recipes:brightness"} for row in results.values())
    assert "compressed   denoising loss" in capsys.readouterr().out
    assert (out / "net.onnx").stat().st_size > 1000 and (out / "samples.png").exists()
    net = lmfx.load(out / "net", ddpm.Denoiser("none", (8, 16)).eval())
    short = ddpm.Short(data, 0.1, 1, 4, 1e-3, "cpu")
    assert short.evaluate(net) == pytest.approx(results["compressed"]["denoising loss"], rel=1e-4)


def test_ddpm_trains_with_a_share_of_the_batch_in_each_process_and_the_average_is_what_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    ddpm = importlib.import_module("ddpm_cifar10")
    seen: dict[str, Any] = {}

    def distill(student: Any, teacher: Any, batches: Any, **options: Any) -> Any:
        seen.update(options, batches=batches, sizes={len(t) for batch in batches for t in batch})
        student(*next(iter(batches))[:2])
        return student

    monkeypatch.setattr(lmfx, "distill", distill)
    few = ("--include", "net.up_blocks.1.resnets.0*", "--budget", "0.96", "--samples", "0")
    arguments = ddpm_arguments(cifar_folder(tmp_path / "data"), tmp_path / "out", *few)
    ddpm.main([*arguments, "--plan-only"])
    assert not seen and len(importance_rows(tmp_path / "out")) > 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    ddpm.main([*arguments, "--steps", "6"])
    assert seen["ema"] == 0.9999 and seen["epochs"] == 1
    assert seen["sizes"] == {2} and len(seen["batches"]) == 12  # each of two processes takes every second one
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="a batch of 4 images cannot be shared by 3 processes"):
        ddpm.main(arguments)


def test_samples_of_a_network_that_knows_the_noise_are_the_image() -> None:
    ddpm = importlib.import_module("ddpm_cifar10")
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)

    class Knows(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            alpha = ddpm.ALPHA[t][:, None, None, None]
            return (x - alpha.sqrt() * image) / (1 - alpha).sqrt()

    drawn = ddpm.sample(Knows(), 3, 2, "cpu", steps=10)
    assert drawn.shape == (3, 3, 32, 32) and drawn.dtype == torch.uint8
    assert (drawn.float() - (image + 1) * 127.5).abs().max() <= 1


def test_cifar_is_read_as_it_is_and_damage_is_told(tmp_path: Path) -> None:
    ddpm = importlib.import_module("ddpm_cifar10")
    data = cifar_folder(tmp_path / "data")
    images = ddpm.read(data)
    raw = np.fromfile(data / "data_batch_2.bin", dtype=np.uint8)
    assert images.shape == (80, 3, 32, 32)
    assert images[41, 2, 31, 31] == raw[2 * 3073 - 1]
    short = ddpm.Short(data, 0.1, 1, 4, 1e-3, "cpu")
    assert len(short._part(0)) == 8
    assert not {i.numpy().tobytes() for i in short._part(0)} & {i.numpy().tobytes() for i in short._part(1)}
    (data / "data_batch_1.bin").write_bytes(b"0" * 100)
    with pytest.raises(SystemExit, match="has 100 bytes, not a multiple of 3073"):
        ddpm.read(data)
    with pytest.raises(SystemExit, match="no data_batch"):
        ddpm.read(tmp_path)


def test_the_settings_of_ddpm_are_the_published_ones() -> None:
    args = importlib.import_module("ddpm_cifar10").options(["data"])
    assert (args.share, args.importance_epochs, args.steps, args.batch, args.rate) == (0.01, 50, 100_000, 128, 4e-4)
    assert args.norm == "post"


def test_each_worker_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = importlib.import_module("launch")
    names: Any = queue.Queue()
    for name in ("5", "GPU-7", ""):
        names.put(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
    for expected in ("5", "GPU-7", "GPU-7"):  # an empty name leaves it as it is
        launch.take_gpu(names)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert launch.job_pool(None, "cuda:0").args == (2, ["5", "GPU-7"])
    assert launch.job_pool(3, "cuda").args == (3, ["5", "GPU-7"])
    assert launch.job_pool(None, "cpu") is None and launch.job_pool(1, "cuda") is None
    assert launch.job_pool(4, "cpu").args == (4, [])


def test_a_process_knows_its_place_and_waits_for_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = importlib.import_module("launch")
    assert launch.Launch.of("cpu") == launch.Launch(0, 1, "cpu")
    taken: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, value in (("RANK", "9"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    run = launch.Launch.of("cuda")
    assert (run, taken) == (launch.Launch(9, 16, "cuda:1"), ["cuda:1"])
    assert not run.first and run.share(1024) == 64
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / "plan.json").touch())
    launch.wait_for(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["imagenet", "ddpm_cifar10"])
def test_two_processes_make_one_plan_with_two_workers_and_train_together(tmp_path: Path, recipe: str) -> None:
    pytest.importorskip("accelerate")
    if recipe == "imagenet":
        small: dict[str, Any] = {"arch": "mobilenet_v2", "importance": "finetune", "include": "blocks.1.1*"}
        small |= {"share": 0.25, "importance-batch": 3, "budget": 0.98}
        arguments = imagenet_arguments(image_folder(tmp_path / "data"), tmp_path / "out", **small)
    else:
        arguments = ddpm_arguments(
            cifar_folder(tmp_path / "data"), tmp_path / "out", "--include", "net.up_blocks.1.res*"
        )
    root = Path(__file__).resolve().parents[2]
    script = [str(root / "examples" / f"{recipe}.py"), *arguments, "--jobs", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29633"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written:") == 1
    assert set(importance_rows(tmp_path / "out").values()) == {1}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["compressed"]
