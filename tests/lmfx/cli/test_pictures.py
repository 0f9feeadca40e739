"""Folders of pictures: what is read, how it is prepared for which model, and what is said where that cannot be."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lmfx.cli.inputs import images as images_of
from lmfx.cli.models import load_model
from lmfx.cli.pictures import find_pictures, read_pictures
from lmfx.cli.preprocessing import Preprocessing, preprocessing
from lmfx.passes.errors import InputError, MissingExtra, OptionError
from lmfx.training.recovery import MOST_IMAGES


def plain(size: tuple[int, int] = (8, 8), channels: int = 3) -> Preprocessing:
    """Nothing but [0, 1]: the numbers of the picture itself."""
    return preprocessing("m:f", nn.Identity(), (1, channels, *size), mean=(0.0,), std=(1.0,))


def saved(folder: Path, name: str, values: Any, **options: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path, **options)
    return path


def noise(h: int = 12, w: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


# --- which files ------------------------------------------------------------------------------------------------------


def test_pictures_of_all_folders_below_are_found_by_name_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b/two.PNG", "a/one.jpg", "a/.hidden.png"):
        saved(tmp_path, name, noise(), format="PNG")
    (tmp_path / "labels.csv").write_text("a,b")
    assert [str(p.relative_to(tmp_path)) for p in find_pictures(tmp_path)] == ["a/one.jpg", "b/two.PNG"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no such folder"),
        (lambda p: p.mkdir(), "no pictures there (it is empty); read are"),
        (lambda p: (p.mkdir(), (p / "a.heic").write_bytes(b"x")), "no pictures there (1 x .heic)"),
        (lambda p: p.write_bytes(b"x"), "is a file: give the folder that it lies in"),
    ],
    ids=["missing", "empty", "other files", "a file"],
)
def test_a_folder_without_pictures_is_told(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "photos")
    with pytest.raises(InputError) as error:
        find_pictures(tmp_path / "photos")
    assert message in str(error.value)


def test_of_too_many_pictures_some_of_every_folder_are_taken(tmp_path: Path) -> None:
    for i in range(30):
        saved(tmp_path, f"{'abc'[i // 10]}/{i:02}.png", np.full((8, 8, 3), i, np.uint8))
    images, what = read_pictures(tmp_path, plain(), 6, progress=False)
    values = (images[:, 0, 0, 0] * 255).round().int().tolist()
    assert values == [0, 5, 10, 15, 20, 25]
    assert what.startswith(f"6 of the 30 pictures of {tmp_path}, ")


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = saved(tmp_path, "c.jpg", noise(64, 64)).read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.png").write_bytes(b"not a picture\n")
    (tmp_path / "d.gif").write_bytes(b"")
    images, what = read_pictures(tmp_path, plain(), 100, progress=False)
    assert len(images) == 1
    assert what.startswith("1 pictures of")
    err = capsys.readouterr().err
    assert "3 of 4 pictures in" in err
    assert all(name in err for name in ("a.jpg", "b.png", "d.gif", "are left out"))


def test_a_folder_of_nothing_but_damaged_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"not a picture\n")
    with pytest.raises(InputError, match=r"1 of 1 pictures in .* cannot be read \(b.png: UnidentifiedImageError.*JPEG"):
        read_pictures(tmp_path, plain(), 100, progress=False)


def test_only_plain_decoders_look_at_a_file_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    real = Image.open

    def watched(path: Any, *args: Any, formats: Any = None, **kwargs: Any) -> Any:
        tried.append(set(formats))
        return real(path, *args, formats=formats, **kwargs)

    monkeypatch.setattr("PIL.Image.open", watched)
    saved(tmp_path, "a.png", noise())
    read_pictures(tmp_path, plain(), 1, progress=False)
    assert tried
    assert not tried[0] & {"EPS", "PDF", "WMF"}  # these start other programs
    (tmp_path / "b.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    assert len(read_pictures(tmp_path, plain(), 9, progress=False)[0]) == 1


# --- colours and directions -------------------------------------------------------------------------------------------


def test_a_picture_that_was_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    values = np.zeros((8, 8, 3), np.uint8)
    values[:4] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown, a quarter turn clockwise
    saved(tmp_path, "a.png", values, exif=exif)
    (image,), _ = read_pictures(tmp_path, plain(), 1, progress=False)
    assert image[:, :, 5:].mean() > 0.8  # the right half
    assert image[:, :, :3].mean() < 0.2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((8, 8), 51, np.uint8), [0.2, 0.2, 0.2]),
        (np.full((8, 8, 4), (51, 102, 0, 7), np.uint8), [0.2, 0.4, 0.0]),
        (np.full((8, 8), 257 * 51, np.uint16), [0.2, 0.2, 0.2]),
        (np.full((8, 8), True), [1.0, 1.0, 1.0]),
    ],
    ids=["gray", "with transparency", "16 bits", "black and white"],
)
def test_every_kind_of_colours_comes_out_as_three(values: np.ndarray, expected: list[float], tmp_path: Path) -> None:
    saved(tmp_path, "a.png", values)
    (image,), _ = read_pictures(tmp_path, plain(), 1, progress=False)
    assert image.shape == (3, 8, 8)
    assert torch.allclose(image.mean((1, 2)), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_channels_gets_them(channels: int, tmp_path: Path) -> None:
    saved(tmp_path, "a.png", noise())
    (image,), _ = read_pictures(tmp_path, plain(channels=channels), 1, progress=False)
    assert image.shape == (channels, 8, 8)


def test_small_pictures_are_enlarged_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, "a.png", noise(3, 5))
    saved(tmp_path, "b.png", noise(20, 20))
    images, _ = read_pictures(tmp_path, plain((8, 12)), 9, progress=False)
    assert images.shape == (2, 3, 8, 12)
    assert "1 of 2 pictures are smaller than 8 x 12 and were enlarged" in capsys.readouterr().err


# --- how they are prepared --------------------------------------------------------------------------------------------


def test_a_classifier_of_torchvision_is_shown_what_its_weights_say(tmp_path: Path) -> None:
    import torchvision

    path = saved(tmp_path, "a.png", noise(300, 280))
    prepare = preprocessing("torchvision:inception_v3", nn.Identity())
    assert prepare.shape == (3, 299, 299)
    expected = torchvision.models.Inception_V3_Weights.DEFAULT.transforms()(Image.open(path))
    (image,), what = read_pictures(tmp_path, prepare, 1, progress=False)
    assert torch.equal(image, expected)
    assert "that of Inception_V3_Weights.IMAGENET1K_V1: 299 x 299, mean [0.485 0.456 0.406]" in what


def test_a_model_of_timm_is_shown_what_its_configuration_says(tmp_path: Path) -> None:
    import timm

    path = saved(tmp_path, "a.png", noise(300, 280))
    model = timm.create_model("tf_efficientnet_lite0")
    config = timm.data.resolve_model_data_config(model)
    expected = timm.data.create_transform(**config, is_training=False)(Image.open(path))
    for spec in ("timm:tf_efficientnet_lite0", "mine:factory"):  # a factory's model of timm has it too
        prepare = preprocessing(spec, model)
        (image,), what = read_pictures(tmp_path, prepare, 1, progress=False)
        assert torch.equal(image, expected)
        assert prepare.known
        assert "timm's for this model: 224 x 224, mean [0.5 0.5 0.5], deviation [0.5 0.5 0.5]" in what


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18"])
def test_another_size_keeps_the_rest_of_the_preprocessing(spec: str) -> None:
    model = load_model(spec) if spec.startswith("timm") else nn.Identity()
    prepare = preprocessing(spec, model, (1, 3, 96, 128))
    white = prepare(Image.new("RGB", (200, 300), (255, 255, 255)))
    assert white.shape == (3, 96, 128)
    expected = (1 - torch.tensor((0.485, 0.456, 0.406))) / torch.tensor((0.229, 0.224, 0.225))
    assert torch.allclose(white.mean((1, 2)), expected, atol=1e-4)
    assert "96 x 128 (its own: 224 x 224)" in prepare.what


@pytest.mark.parametrize("size", [(320, 240), (101, 333), (60, 50)])
def test_at_another_size_pictures_are_scaled_and_cut_as_torchvision_does(size: tuple[int, int]) -> None:
    import torchvision

    prepare = preprocessing("torchvision:resnet18", nn.Identity(), (1, 3, 112, 112))
    preset = torchvision.transforms._presets.ImageClassification(crop_size=112, resize_size=128)
    picture = Image.fromarray(noise(6, 8)).resize(size, Image.Resampling.BICUBIC)
    assert torch.allclose(prepare(picture), preset(picture), atol=1e-5)


def test_a_model_that_says_nothing_gets_what_is_usual_and_that_is_said() -> None:
    prepare = preprocessing("mine:factory", nn.Identity())
    assert (prepare.shape, prepare.known) == ((3, 224, 224), False)
    assert "assumed, since mine:factory does not say" in prepare.what
    assert "(ImageNet's)" in prepare.what
    assert "--preprocess" in prepare.what


def test_what_is_usual_covers_eight_sevenths_of_the_size_and_cuts_out_the_centre() -> None:
    prepare = preprocessing("mine:factory", nn.Identity(), (1, 3, 14, 14), mean=(0.0,), std=(1.0,))
    values = noise(16, 16)
    assert torch.equal(prepare(Image.fromarray(values)), torch.from_numpy(values[1:15, 1:15]).permute(2, 0, 1) / 255)


def test_a_segmenter_of_torchvision_is_shown_whole_pictures_of_any_size() -> None:
    prepare = preprocessing("torchvision:lraspp_mobilenet_v3_large", nn.Identity(), (1, 3, 16, 12))
    assert prepare.known
    assert "that of LRASPP_MobileNet_V3_Large_Weights" in prepare.what
    values = noise(16, 12)
    mean, std = (torch.tensor(n).view(3, 1, 1) for n in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (torch.from_numpy(values).permute(2, 0, 1) / 255 - mean) / std
    assert torch.allclose(prepare(Image.fromarray(values)), expected, atol=1e-5)


def test_a_detector_of_torchvision_says_nothing_of_batches_of_pictures() -> None:
    assert not preprocessing("torchvision:ssdlite320_mobilenet_v3_large", nn.Identity()).known


@pytest.mark.parametrize(
    ("size", "training", "count"), [(224, False, 128), (32, False, 512), (224, True, 1783), (32, True, 4096)]
)
def test_of_large_pictures_fewer_are_read_and_of_those_that_train_more(
    size: int, training: bool, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def read(folder: Path, prepare: Preprocessing, most: int, progress: bool) -> tuple[torch.Tensor, str]:
        asked.append(most)
        return torch.zeros(2, *prepare.shape), "pictures"

    monkeypatch.setattr("lmfx.cli.inputs.read_pictures", read)
    like = torch.zeros(1, 3, size, size)
    for most in (None, 7):
        args = argparse.Namespace(images=".", max_images=most, quiet=True, preprocess=None, mean=None, std=None)
        given, _ = images_of(args, like, MOST_IMAGES if training else None)
        assert len(given) == 2
    assert asked == [count, 7]


@pytest.mark.parametrize(
    ("spec", "mean", "expected"),
    [("mine:factory", (0.0, 0.0, 1.0), [2.0, 2.0, 0.0]), ("torchvision:resnet18", (0.5,), [1.0, 1.0, 1.0])],
)
def test_numbers_of_the_callers_own_replace_those_of_the_model(
    spec: str, mean: tuple[float, ...], expected: list[float]
) -> None:
    for shape in (None, (1, 3, 4, 4)):
        prepare = preprocessing(spec, nn.Identity(), shape, mean=mean, std=(0.5,))
        white = prepare(Image.new("RGB", (9, 9), (255, 255, 255)))
        assert white.amin((1, 2)).tolist() == white.amax((1, 2)).tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5, 0.5)}, "--mean has 2 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "--std must be positive"),
        ({"shape": (1, 3, 16)}, "--images are pictures of 1, 3 or 4 channels"),
        ({"shape": (1, 5, 8, 8)}, "--images are pictures of 1, 3 or 4 channels"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, OptionError)) as error:
        preprocessing("mine:factory", nn.Identity(), **options)
    assert message in str(error.value)


def test_a_function_of_the_callers_own_is_used_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_preparation.py").write_text(
        "import torch\ndef good(p): return torch.full((3, 8, 8), float(p.width))\ndef wrong(p): return torch.zeros(8)\n"
        "def no_tensor(p): return p\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    good = preprocessing("m:f", nn.Identity(), (1, 3, 8, 8), "own_preparation:good")
    assert float(good(Image.new("RGB", (5, 7)))[0, 0, 0]) == 5
    for name, message in (("wrong", r"made of shape \(8,\)"), ("no_tensor", "made a Image")):
        saved(tmp_path, "photos/a.png", noise())
        with pytest.raises(InputError, match=message):  # of no picture in particular
            prepare = preprocessing("m:f", nn.Identity(), (1, 3, 8, 8), f"own_preparation:{name}")
            read_pictures(tmp_path / "photos", prepare, 1, progress=False)
    with pytest.raises(OptionError, match="name a function"):
        preprocessing("m:f", nn.Identity(), None, "own_preparation:number")


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(MissingExtra, match=r"lmfx\[vision\]"):
        read_pictures(tmp_path, plain(), 1, progress=False)
