"""The recipes of examples/ run end to end on tiny generated data, and go on where they were stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import one_thread as one_thread

import lmfx

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


def test_imagenet_from_importance_to_the_exported_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imagenet = pytest.importorskip("imagenet")
    data, out = image_folder(tmp_path / "data"), tmp_path / "out"
    arguments = imagenet_arguments(data, out, arch="mobilenet_v2")
    imagenet.main(arguments)
    plan = lmfx.load_plan(out / "plan.json")
    assert plan.candidates
    told = capsys.readouterr().out
    assert "compressed" in told and "written" in told
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out / "net.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {session.get_inputs()[0].name: np.zeros((1, 3, 32, 32), np.float32)})[0].shape == (1, 2)
    before = (out / "training" / "training.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(imagenet, "make_plan", None)
    imagenet.main(arguments)  # all is there: nothing is solved or trained again
    assert (out / "training" / "training.safetensors").stat().st_mtime_ns == before
    assert "compressed" in capsys.readouterr().out
    imagenet.main([*arguments, "--plan-only"])
    assert capsys.readouterr().out == ""


def test_the_short_training_of_imagenet_is_one_epoch_on_a_share_and_judged_on_another(tmp_path: Path) -> None:
    imagenet = pytest.importorskip("imagenet")
    data = image_folder(tmp_path / "data")
    short = imagenet.Short(data, 32, 0.25, 4, 0.05, 0, "cpu")
    parts = [set(short._loader(part).dataset.indices) for part in (0, 1)]
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
    imagenet = pytest.importorskip("imagenet")
    recipe = imagenet.RECIPES[arch]
    assert (recipe.epochs, recipe.rate, recipe.decay) == (epochs, rate, decay)
    args = imagenet.options(["data", "--arch", arch])
    assert (args.share, args.importance_batch, args.importance_rate) == (0.04, 256, 0.1)


def test_imagenet_without_its_folders_or_a_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet = pytest.importorskip("imagenet")
    with pytest.raises(SystemExit, match="needs train/CLASS"):
        imagenet.main(imagenet_arguments(tmp_path, tmp_path / "out"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="run with --plan-only in one process first"):
        imagenet.main(imagenet_arguments(image_folder(tmp_path / "data"), tmp_path / "out"))


def ddpm_arguments(data: Path, out: Path) -> list[str]:
    text = f"{data} --out {out} --weights none --channels 8 16 --device cpu --latency roofline"
    text += (
        " --share 0.1 --importance-epochs 1 --calibration 4 --steps 2 --batch 4 --budget 0.85 --importance magnitude"
    )
    return text.split()


def test_ddpm_from_importance_to_the_exported_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    ddpm = pytest.importorskip("ddpm_cifar10")
    data, out = cifar_folder(tmp_path / "data"), tmp_path / "out"
    ddpm.main(ddpm_arguments(data, out))
    assert "compressed   denoising loss" in capsys.readouterr().out
    assert lmfx.load_plan(out / "plan.json").candidates
    assert json.loads((out / "plan.json").read_text())
    assert (out / "net.onnx").stat().st_size > 1000
    assert (out / "training" / "training.safetensors").exists()


def test_cifar_is_read_as_it_is_and_damage_is_told(tmp_path: Path) -> None:
    ddpm = pytest.importorskip("ddpm_cifar10")
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
    args = pytest.importorskip("ddpm_cifar10").options(["data"])
    assert (args.share, args.importance_epochs, args.steps, args.batch, args.rate) == (0.01, 50, 100_000, 128, 4e-4)
    assert args.norm == "post"
