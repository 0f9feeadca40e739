"""Finds out how a model's pictures are prepared: its size, and what turns a picture into the numbers it was trained on.

torchvision:NAME          `transforms()` of the weights
timm:NAME                 `timm.data.create_transform` with the configuration of the model
package.module:factory    the same if the model carries timm's configuration; else what is usual, which is said

What is usual is torchvision's evaluation of classifiers: the picture is scaled to cover 8/7 of the size, its centre is
cut out, and of three channels ImageNet's mean and deviation are taken off. Another size than the model's own keeps
all but the size. `--preprocess package.module:NAME` puts a function of a picture in the place of all that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmfx.cli.models import imported
from lmfx.passes.errors import InputError, OptionError

__all__ = ["Preprocessing", "preprocessing"]

MARGIN = 8 / 7  # 256 for 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]
SIZE = (224, 224)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

Picture = Any  # PIL.Image.Image, which is not imported here


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become inputs: the shape (channels, height, width) of one, its transform, and both in words."""

    shape: tuple[int, int, int]
    transform: Callable[[Picture], Any]
    what: str
    known: bool = True  # by the model, and not assumed

    @property
    def mode(self) -> str:
        """PIL's name for pictures of so many channels."""
        return MODES[self.shape[0]]

    def __call__(self, picture: Picture) -> Tensor:
        """The input (channels, height, width) for one picture. Raises `InputError` if it comes out otherwise."""
        made = self.transform(picture)
        if not isinstance(made, Tensor) or tuple(made.shape) != self.shape:
            got = f"of shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise InputError(
                f"the preprocessing ({self.what}) made {got}, and the model takes a tensor of shape {self.shape}: "
                f"--shape says what it takes, --preprocess package.module:NAME names another function of a picture"
            )
        return made.float()


def preprocessing(
    spec: str,
    model: nn.Module,
    shape: Sequence[int] | None = None,
    function: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preprocessing:
    """How pictures are prepared for a model of that name. `shape` (batch, channels, height, width) is another size than
    its own, `function` the name of what does it instead, `mean` and `std` are the numbers to take instead of its own.

    Raises `InputError` for a model that takes no pictures, and `OptionError` for numbers that do not fit its channels.
    """
    wanted = _picture_shape(shape)
    if function is not None:
        made = imported(function)
        if not callable(made):
            raise OptionError(f"--preprocess {function} is a {type(made).__name__}: name a function of a PIL picture")
        return Preprocessing(wanted or (3, *SIZE), made, f"--preprocess {function}")
    numbers = (mean, std) if mean or std else None
    library, _, name = spec.partition(":")
    found = None
    if isinstance(config := getattr(model, "pretrained_cfg", None), dict) and "input_size" in config:
        found = _of_timm(model, wanted, numbers)
    elif library == "torchvision":
        found = _of_torchvision(name, wanted, numbers)
    return found or _usual(spec, wanted or (3, *SIZE), numbers)


def _picture_shape(shape: Sequence[int] | None) -> tuple[int, int, int] | None:
    if shape is None:
        return None
    if len(shape) != 4 or shape[1] not in MODES:
        raise InputError(
            f"--images are pictures of 1, 3 or 4 channels, and --shape {','.join(map(str, shape))} is not "
            f"batch,channels,height,width of such: {_meant(shape)}give --calibration with arrays, or a function that "
            "returns them"
        )
    return shape[1], shape[2], shape[3]


def _meant(shape: Sequence[int]) -> str:
    """The shape of pictures that was probably meant by one that is none."""
    whole = {1: (1, 3, *shape, *shape), 2: (1, 3, *shape), 3: (1, *shape)}.get(len(shape), ())
    return (
        f"did you mean --shape {','.join(map(str, whole))}? If not, " if len(whole) == 4 and whole[1] in MODES else ""
    )


# --- timm -------------------------------------------------------------------------------------------------------------


def _of_timm(model: nn.Module, wanted: tuple[int, int, int] | None, numbers: Any) -> Preprocessing:
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    own = tuple(config["input_size"])
    shape = wanted or own
    config |= {"input_size": shape} | _numbers(numbers, shape[0])
    transform = timm.data.create_transform(**config, is_training=False)
    details = f"crop {config['crop_pct']:.3g}, {config['interpolation']}"
    return Preprocessing(_three(shape), transform, f"timm's for this model: {_words(shape, config, own)}, {details}")


# --- torchvision ------------------------------------------------------------------------------------------------------


def _of_torchvision(name: str, wanted: tuple[int, int, int] | None, numbers: Any) -> Preprocessing | None:
    """None where the weights have transforms that make no batch of pictures: those of detectors, of clips."""
    import torchvision
    from torchvision.transforms._presets import ImageClassification, SemanticSegmentation, VideoClassification

    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):  # a model without any weights
        return None
    preset = weights.transforms()
    if isinstance(preset, SemanticSegmentation):  # of any size
        config = {"mean": preset.mean, "std": preset.std} | _numbers(numbers, 3)
        shape = wanted or (3, *SIZE)
        return Preprocessing(shape, _covering(shape, 1.0, config), f"that of {weights}: {_words(shape, config, shape)}")
    if isinstance(preset, VideoClassification):
        raise InputError(
            f"torchvision:{name} is shown clips, not pictures: give arrays (clips, 3, frames, height, width) with "
            "--calibration FILE.npy, and --shape 1,3,16,112,112"
        )
    if not isinstance(preset, ImageClassification):
        return None
    crop, ratio = preset.crop_size[0], preset.resize_size[0] / preset.crop_size[0]
    own = (3, crop, crop)
    config = {"mean": preset.mean, "std": preset.std} | _numbers(numbers, (wanted or own)[0])
    shape = wanted or own
    transform = preset if shape == own and not numbers else _covering(shape, ratio, config, preset.interpolation.value)
    return Preprocessing(shape, transform, f"that of {weights}: {_words(shape, config, own)}")


# --- what is usual ----------------------------------------------------------------------------------------------------


def _usual(spec: str, shape: tuple[int, int, int], numbers: Any) -> Preprocessing:
    config = {"mean": MEAN, "std": STD} if shape[0] == 3 else {"mean": (0.0,) * shape[0], "std": (1.0,) * shape[0]}
    config |= _numbers(numbers, shape[0])
    whose = "ImageNet's" if config["mean"] == MEAN and config["std"] == STD else "these"
    what = (
        f"assumed, since {spec} does not say how its pictures are prepared: {_words(shape, config, shape)} ({whose}); "
        "see --shape, --mean, --std, --preprocess"
    )
    return Preprocessing(shape, _covering(shape, MARGIN, config), what, known=False)


def _covering(
    shape: tuple[int, int, int], ratio: float, config: dict[str, Any], resample: str = "bilinear"
) -> Callable[[Picture], Tensor]:
    """Scale so that the picture covers `ratio` times the size, cut out the centre, take off the mean."""
    from PIL import Image

    _, height, width = shape
    way = getattr(Image.Resampling, resample.upper(), Image.Resampling.BILINEAR)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))

    def transform(picture: Picture) -> Tensor:
        w, h = picture.size
        scale = max(height / h, width / w) * ratio
        w, h = max(int(w * scale + 1e-6), width), max(int(h * scale + 1e-6), height)  # torchvision rounds down
        left, top = round((w - width) / 2), round((h - height) / 2)
        cut = picture.resize((w, h), way).crop((left, top, left + width, top + height))
        values = torch.from_numpy(np.array(cut, dtype=np.float32)).view(height, width, -1).permute(2, 0, 1) / 255
        return ((values - mean) / std).contiguous()

    return transform


# --- in words ---------------------------------------------------------------------------------------------------------


def _numbers(numbers: Any, channels: int) -> dict[str, tuple[float, ...]]:
    """The mean and deviation that were asked for, one for all channels or one each."""
    if numbers is None:
        return {}
    given = {}
    for name, value in zip(("mean", "std"), numbers, strict=True):
        if value is None:
            continue
        if len(value) not in (1, channels):
            raise OptionError(
                f"--{name} has {len(value)} numbers, and the pictures have {channels} channels: give one, or {channels}"
            )
        given[name] = tuple(value) * (channels // len(value))
    if any(n <= 0 for n in given.get("std", ())):
        raise OptionError("--std must be positive: what pictures are divided by, like 0.229,0.224,0.225")
    return given


def _words(shape: Sequence[int], config: dict[str, Any], own: Sequence[int]) -> str:
    mean, std = ("[" + " ".join(f"{v:g}" for v in config[name]) + "]" for name in ("mean", "std"))
    other = "" if tuple(shape) == tuple(own) else f" (its own: {own[1]} x {own[2]})"
    return f"{shape[1]} x {shape[2]}{other}, mean {mean}, deviation {std}"


def _three(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width
