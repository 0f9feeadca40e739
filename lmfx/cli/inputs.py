"""Makes what the command line feeds a model: an example of its inputs, and calibration images.

--shape 1,3,224,224             one tensor of standard normal noise (of a FILE.pt2 by default what it was exported with)
--example FILE.npy              that array
--example FILE.npz              several inputs: arr_0, arr_1, ... are positional, other names are keywords
--example package.module:name   a tensor, tuple or dict, or a function that returns one
--calibration                   the same forms with more rows (a function may also return a DataLoader), or random:N
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmfx.calibration.images import MAX_IMAGES, Calibration, as_calibration
from lmfx.cli.models import PROGRAM, call, imported, load_model, load_program
from lmfx.passes.errors import InputError
from lmfx.passes.trace.programs import example_of_program

__all__ = ["calibration_option", "example", "images", "model_and_example", "model_options", "size_list"]

RANDOM_IMAGES = 64
SEED = 0
SHAPE = (1, 3, 224, 224)


# --- options ----------------------------------------------------------------------------------------------------------


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*([,x][1-9]\d*)+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write 1,3,224,224 (batch, channels, height, width)")
    return tuple(int(n) for n in re.split("[,x]", text))


def size_list(text: str) -> tuple[tuple[int, int], ...]:
    """(height, width) of each entry of "208,192" or "208x160,96x80"."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?(,[1-9]\d*(x[1-9]\d*)?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes; write 208,192 or 208x160,96x80")
    parts = [[int(n) for n in part.split("x")] for part in text.split(",")]
    return tuple((part[0], part[-1]) for part in parts)


def model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, its weights and its input."""
    parser.add_argument(
        "model", metavar="MODEL", help="torchvision:NAME, timm:NAME, package.module:factory or FILE.pt2"
    )
    parser.add_argument("--weights", metavar="FILE", help="safetensors file with the weights (default: as it is made)")
    shown = ",".join(map(str, SHAPE))
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--shape", type=_shape, metavar="N,C,H,W", help=f"of the input (default {shown})")
    given.add_argument(
        "--example",
        metavar="FILE|package.module:NAME",
        help="the input itself, for models that take several: an .npy or .npz file (arr_0, arr_1, ... or keywords), or "
        "what a function returns",
    )


def calibration_option(parser: argparse.ArgumentParser) -> None:
    """Images to estimate quality on."""
    parser.add_argument(
        "--calibration",
        default=f"random:{RANDOM_IMAGES}",
        metavar="FILE|package.module:NAME|random:N",
        help="images (N, channels, ...) without labels: an .npy or .npz file, or what a function returns, a DataLoader "
        f"for example (default random:{RANDOM_IMAGES}, which is noise)",
    )


# --- what they stand for ----------------------------------------------------------------------------------------------


def example(args: argparse.Namespace) -> Any:
    """The example: noise of --shape, what --example says, or a program's own. Raises `InputError`."""
    if args.example is None and args.shape is None and args.model.endswith(PROGRAM):
        positional, keyword = example_of_program(load_program(args.model))
        if not (positional and keyword):
            return keyword or positional
    if args.example is None:
        return torch.randn(args.shape or SHAPE, generator=torch.Generator().manual_seed(SEED))
    return _read(args.example, "--example", "the example")


def model_and_example(args: argparse.Namespace, like: Any = None) -> tuple[nn.Module, Any]:
    """The model and an example (or `like`). Seeded, so that the importances of random weights are found again."""
    made = example(args) if like is None else like
    torch.manual_seed(SEED)
    return load_model(args.model, args.weights), made


def images(args: argparse.Namespace, like: Any, most: int = MAX_IMAGES) -> tuple[Calibration, str]:
    """(at most `most` calibration images, what they are, for a person), checked against the example `like`. Raises
    `InputError`."""
    text = args.calibration
    if text.startswith("random:") or text == "random":
        found = re.fullmatch(r"random(?::([1-9]\d*))?", text)
        if found is None:
            raise InputError(f"--calibration {text!r} is not understood: write random:64, or the name of a .npy file")
        count = int(found[1] or RANDOM_IMAGES)
        what = f"{count} images of standard normal noise, which tell nothing of your data; see --calibration"
        return _noise(count, like), what
    data = as_calibration(_read(text, "--calibration", "the calibration images"), like, most)
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
