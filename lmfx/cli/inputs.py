"""Makes what the command line feeds a model: an example of its inputs, and calibration images.

--shape 1,3,224,224             one tensor of standard normal noise (of a FILE.pt2 by default what it was exported with)
--example FILE.npy              that array
--example FILE.npz              several inputs: arr_0, arr_1, ... are positional, other names are keywords
--example package.module:name   a tensor, tuple or dict, or a function that returns one
--calibration                   the same forms with more rows (a function may also return a DataLoader), or random:N
--images FOLDER                 pictures, prepared as for the model (`lmfx.cli.preprocessing`), which also says its size

Without --shape and --example a model of torchvision or timm is shown noise of its own size.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lmfx.calibration.images import MAX_IMAGES, Calibration, as_calibration
from lmfx.cli.models import PROGRAM, Loaded, call, check_spec, imported, load, load_program, of_zoo
from lmfx.cli.pictures import find_pictures, read_pictures, require_pillow
from lmfx.cli.preprocessing import Preprocessing, preprocessing
from lmfx.environment.progress import step
from lmfx.passes.errors import InputError, OptionError
from lmfx.passes.trace.programs import example_of_program
from lmfx.passes.trace.tracing import example_arguments

__all__ = [
    "Fed",
    "calibration_option",
    "check_images",
    "example",
    "fed",
    "images",
    "loaded_model",
    "model_options",
    "preprocessing_options",
    "size_list",
    "weights_option",
]

RANDOM_IMAGES = 64
# Of pictures as many as cost a few minutes of one core: 128 of 224 x 224, 512 of small ones; what trains takes more.
FEW, PICTURE_VALUES, MOST_PICTURE_VALUES = 128, 2**24, 2**28
SEED = 0
SHAPE = (1, 3, 224, 224)


# --- options ----------------------------------------------------------------------------------------------------------


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*([,x][1-9]\d*)+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write 1,3,224,224 (batch, channels, height, width)")
    return tuple(int(n) for n in re.split("[,x]", text))


def size_list(text: str) -> tuple[tuple[int, int], ...] | Literal["auto"]:
    """(height, width) of each entry of "208,192" or "208x160,96x80"; "auto" as it is."""
    if text == "auto":
        return "auto"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?(,[1-9]\d*(x[1-9]\d*)?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes; write auto, 208,192 or 208x160,96x80")
    parts = [[int(n) for n in part.split("x")] for part in text.split(",")]
    return tuple((part[0], part[-1]) for part in parts)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers; write 0.485,0.456,0.406") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of pictures; write 256")
    return int(text)


def model_options(parser: argparse.ArgumentParser, weights: str = "random") -> None:
    """MODEL, its weights (`weights` where nobody says) and its input."""
    parser.add_argument(
        "model", metavar="MODEL", help="torchvision:NAME, timm:NAME, package.module:factory or FILE.pt2"
    )
    weights_option(parser, weights)
    shown = ",".join(map(str, SHAPE))
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--shape", type=_shape, metavar="N,C,H,W", help=f"of the input (default: the model's own, else {shown})"
    )
    given.add_argument(
        "--example",
        metavar="FILE|package.module:NAME",
        help="the input itself, for models that take several: an .npy or .npz file (arr_0, arr_1, ... or keywords), or "
        "what a function returns",
    )


def weights_option(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """The weights of MODEL."""
    what = {
        "auto": "pretrained where they can be had, else random",
        "random": "random: latencies do not depend on them",
    }
    parser.add_argument(
        "--weights",
        metavar="pretrained|random|FILE",
        default=default,
        help="of a model of torchvision or timm, or a safetensors file for any model (default: "
        f"{what[default]}; a factory's as it makes them)",
    )


def calibration_option(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Images to estimate quality on."""
    given = parser.add_mutually_exclusive_group(required=required)
    given.add_argument(
        "--images", metavar="FOLDER", help="a folder of pictures without labels, prepared as for the model"
    )
    default = "" if required else f" (default random:{RANDOM_IMAGES}, which is noise)"
    given.add_argument(
        "--calibration",
        metavar="FILE|package.module:NAME|random:N",
        help="images (N, channels, ...) without labels, prepared: an .npy or .npz file, or what a function returns, a "
        f"DataLoader for example{default}",
    )
    preprocessing_options(parser)


def preprocessing_options(parser: argparse.ArgumentParser) -> None:
    """How the pictures of --images are prepared."""
    group = parser.add_argument_group("with --images (defaults: the model's own)")
    group.add_argument("--max-images", type=_count, metavar="N", help="at most so many: more are surer and slower")
    group.add_argument("--mean", type=_numbers, metavar="M,M,M", help="taken off pictures in [0, 1]")
    group.add_argument("--std", type=_numbers, metavar="S,S,S", help="what they are then divided by")
    group.add_argument(
        "--preprocess",
        metavar="package.module:NAME",
        help="a function of a PIL picture that returns the input (channels, height, width)",
    )


# --- what they stand for ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fed:
    """A model with all that it is fed: an example, and calibration images with what they are, for a person."""

    loaded: Loaded
    example: Any
    images: Calibration
    what: str


def fed(args: argparse.Namespace) -> Fed:
    """What the options of a command say. Whatever can be wrong is looked at before a model is built or downloaded."""
    check_spec(args.model)
    check_images(args)
    if args.images is None:
        said = args.example is not None or args.shape is not None
        loaded = None if said else loaded_model(args)  # which says its size
        given = example(args, loaded)
        data, what = images(args, given)
        return Fed(loaded or loaded_model(args), given, data, what)
    if args.example is not None:
        raise OptionError("--images are for models of one input, a picture: with --example give --calibration")
    loaded = loaded_model(args)
    shape = args.shape
    if shape is None and args.model.endswith(PROGRAM):
        shape = _first_shape(example(args))
    prepare = _preparation(args, args.model, loaded.model, shape)
    given = _randn((shape[0] if shape else 1, *prepare.shape))
    return Fed(loaded, given, *images(args, given, prepare=prepare))


def example(args: argparse.Namespace, loaded: Loaded | None = None) -> Any:
    """The example: noise of --shape or of the model's own size, what --example says, or a program's own. Raises
    `InputError`."""
    if args.example is not None:
        return _read(args.example, "--example", "the example")
    if args.shape is None and args.model.endswith(PROGRAM):
        positional, keyword = example_of_program(load_program(args.model))
        if not (positional and keyword):
            return keyword or positional
    shape = args.shape
    if shape is None and loaded is not None:
        own = preprocessing(args.model, loaded.model)
        shape = (1, *own.shape) if own.known else None
    return _randn(shape or SHAPE)


def _randn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def loaded_model(args: argparse.Namespace, spec: str | None = None) -> Loaded:
    """The model with its weights. Seeded, so that the importances of random weights are found again. Says on stderr
    where pretrained weights cannot be had."""
    spec = spec or args.model
    check_spec(spec)
    torch.manual_seed(SEED)
    named = {"auto": "its pretrained weights", "pretrained": "its pretrained weights", "random": "random weights"}
    text = f"{spec} with {named.get(args.weights, args.weights)}" if of_zoo(spec) else f"making {spec}"
    with step(text, not getattr(args, "quiet", True)):
        loaded = load(spec, args.weights)
    if loaded.missing is not None:
        print(
            f"lmfx {args.command}: the pretrained weights of {spec} cannot be had ({loaded.missing}). Going on with "
            "random ones: latencies hold, outputs mean nothing. --weights FILE.safetensors gives the real ones",
            file=sys.stderr,
        )
    return loaded


def check_images(args: argparse.Namespace) -> None:
    """Looks at --images and its options before anything long is done. Raises `InputError` or `OptionError`."""
    given = [name for name in ("max_images", "mean", "std", "preprocess") if getattr(args, name) is not None]
    if args.images is None:
        if given:
            raise OptionError(
                f"--{given[0].replace('_', '-')} is about the pictures of --images FOLDER: name the folder"
            )
        return
    if args.preprocess and (args.mean or args.std):
        raise OptionError("--preprocess prepares the whole picture: leave --mean and --std out")
    require_pillow()
    find_pictures(Path(args.images))


def _preparation(args: argparse.Namespace, spec: str, model: nn.Module, shape: tuple[int, ...] | None) -> Preprocessing:
    return preprocessing(spec, model, shape, args.preprocess, args.mean, args.std)


def _first_shape(example_input: Any) -> tuple[int, ...] | None:
    """The shape of the first input of an example, if that is a tensor."""
    positional, keyword = example_arguments(example_input)
    first = next(iter((*positional, *keyword.values())), None)
    return tuple(first.shape) if isinstance(first, Tensor) else None


def images(
    args: argparse.Namespace,
    like: Any,
    most: int | None = None,
    prepare: Preprocessing | None = None,
    model: nn.Module | None = None,
    spec: str = "it",
) -> tuple[Calibration, str]:
    """(calibration images, what they are, for a person), checked against the example `like`; at most `most` where
    --max-images does not say. Pictures are prepared by `prepare`, or as for `model` of that name. Raises
    `InputError`."""
    if args.images is not None:
        if prepare is None:
            prepare = _preparation(args, spec, model or nn.Identity(), _first_shape(like))
        values = math.prod(prepare.shape)
        usual = min(MAX_IMAGES, max(FEW, PICTURE_VALUES // values))
        count = args.max_images or (usual if most is None else max(min(most, MOST_PICTURE_VALUES // values), 1))
        pictures, what = read_pictures(Path(args.images), prepare, count, not args.quiet)
        return as_calibration(pictures, like, count), what
    text = args.calibration or f"random:{RANDOM_IMAGES}"
    if text.startswith("random:") or text == "random":
        found = re.fullmatch(r"random(?::([1-9]\d*))?", text)
        if found is None:
            raise InputError(f"--calibration {text!r} is not understood: write random:64, or the name of a .npy file")
        count = int(found[1] or RANDOM_IMAGES)
        what = f"{count} images of standard normal noise, which tell nothing of your data; see --images"
        return _noise(count, like), what
    if Path(text).is_dir():
        raise InputError(f"--calibration {text} is a folder: pictures are read with --images {text}")
    data = as_calibration(_read(text, "--calibration", "the calibration images"), like, most or MAX_IMAGES)
    return data, f"{len(data)} images of {text}"


def _noise(count: int, like: Any) -> Calibration:
    """Standard normal numbers in place of each batched input; of integers, like time steps, the example's rows."""
    shown = as_calibration(None, like)
    generator = torch.Generator().manual_seed(SEED + 1)

    def row(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn(count, *value.shape[1:], generator=generator).to(value.dtype)
        return value[torch.arange(count) % len(value)]

    return Calibration(tuple(row(t) for t in shown.tensors), shown.names)


def _read(text: str, option: str, what: str) -> Any:
    path = Path(text)
    if path.suffix in (".npy", ".npz"):
        return _arrays(path, what)
    if not re.fullmatch(r"[\w.]+:[\w.]+", text):
        raise InputError(
            f"{option} {text!r} is no .npy or .npz file: save arrays with numpy.save or numpy.savez, or name a "
            "function that returns them, package.module:name"
        )
    torch.manual_seed(SEED)  # what a function draws is found again, and with it what is stored
    made = call(imported(text), text)
    # What is no tensor and no container of them may be a loader of batches, which only the calibration reads.
    if option == "--example" and not isinstance(made, (Tensor, tuple, dict)):
        raise InputError(f"{option} {text} gave a {type(made).__name__}: return a tensor, a tuple or a dict")
    return made


def _arrays(path: Path, what: str) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if path.suffix == ".npz" else {"": loaded}
    except (OSError, ValueError, EOFError, AttributeError, MemoryError) as error:
        raise InputError(f"cannot read {what} {path}: {error}; save them with numpy.save or numpy.savez") from error
    tensors = {name: _tensor(array, f"{path} {name}".strip()) for name, array in arrays.items()}
    if path.suffix == ".npy":
        return tensors[""]
    order = [f"arr_{i}" for i in range(len(tensors))]
    if not tensors:
        raise InputError(f"{path} is empty: save the inputs with numpy.savez")
    return tuple(tensors[name] for name in order) if set(order) == set(tensors) else tensors


def _tensor(array: np.ndarray, name: str) -> Tensor:
    """Floats as float32; signed integers and flags as they are."""
    if array.dtype == np.uint8:
        raise InputError(f"{name} is uint8: normalise images as for the model, to float32")
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    try:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    except TypeError as error:
        raise InputError(f"{name} is {array.dtype}: use float32, int64 or bool") from error
