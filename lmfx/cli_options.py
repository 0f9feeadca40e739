"""The options of the command line, and the inputs they stand for.

Options are named after the parameters of the functions and dataclasses behind them, and take their defaults from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmfx.compress import compress
from lmfx.latency import BACKENDS
from lmfx.models import load_model
from lmfx.passes.errors import InputError
from lmfx.passes.spans import SpanOptions

__all__ = [
    "COMPRESS_DEFAULTS",
    "COMPRESS_OPTIONS",
    "SPAN_OPTIONS",
    "add",
    "calibration",
    "measure_options",
    "model_and_example",
    "model_options",
    "score_options",
    "table_option",
    "taken",
]

RANDOM_IMAGES = 64
SEED = 0


# --- how a parameter looks on the command line ------------------------------------------------------------------------


def _number_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _name_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*([,x][1-9]\d*)+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write 1,3,224,224 (batch, channels, height, width)")
    return tuple(int(n) for n in re.split("[,x]", text))


SYNTAX: dict[str, dict[str, Any]] = {
    "realize": {"type": _words, "metavar": "WAYS", "help": "comma-separated: compose, fit"},
    "max_kernel_size": {"help": "largest merged kernel"},
    "max_span_convs": {"help": "most convs of the main path that one merged conv replaces"},
    "max_fit_convs": {"help": "the same where it is fitted"},
    "max_fit_unknowns": {"help": "most input channels times taps of a fitted conv"},
    "method": {"choices": ("layermerge", "depth", "layeronly"), "help": "what may be done to a span"},
    "norm": {"choices": ("affine", "post"), "help": "what becomes of a GroupNorm inside a composed span"},
    "activation_after": {"metavar": "NAME", "type": _name_or_none, "help": "behind merged convs that have none: relu6"},
    "include": {"action": "append", "metavar": "GLOB", "help": "touch only modules of these names (repeatable)"},
    "exclude": {"action": "append", "metavar": "GLOB", "help": "leave modules of these names alone (repeatable)"},
    # "finetune" needs two functions, which a command line can not give.
    "importance": {"choices": ("reconstruction", "magnitude"), "help": "how the cost in quality is estimated"},
    "surrogate": {"choices": ("affine", "identity"), "help": "what stands for the activations that composing removes"},
    "cache_dir": {"metavar": "DIR", "help": "where measurements are kept and found again"},
}
NUMBER: dict[str, Any] = {"type": _number_or_none, "metavar": "N|none"}  # what has no type above; none: unbounded

SPAN_OPTIONS = tuple(f.name for f in dataclasses.fields(SpanOptions))
COMPRESS_OPTIONS = tuple(name for name in SPAN_OPTIONS if name in inspect.signature(compress).parameters)
# Tables and frontiers are made of the spans that `compress` would look at.
COMPRESS_DEFAULTS = {name: inspect.signature(compress).parameters[name].default for name in COMPRESS_OPTIONS}


def add(parser: argparse.ArgumentParser, source: Callable[..., Any], names: Sequence[str], **defaults: Any) -> None:
    """Options for parameters of `source`, with its defaults or those given."""
    parameters = inspect.signature(source).parameters
    for name in names:
        syntax = dict(SYNTAX.get(name, {"help": name.replace("_", " ")}))
        if not {"type", "action", "choices", "metavar"} & set(syntax):
            syntax |= NUMBER
        default = defaults.get(name, parameters[name].default)
        if syntax.get("action") != "append" and name != "cache_dir":
            shown = ",".join(default) if isinstance(default, tuple) else str(default).lower()
            syntax["help"] += f" (default {shown})"
        parser.add_argument("--" + name.replace("_", "-"), default=None if default == () else default, **syntax)


def taken(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The values of these options as keyword arguments."""
    values = {name: getattr(args, name) for name in names}
    return {name: tuple(v or ()) if name in ("include", "exclude") else v for name, v in values.items()}


def model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, its weights and the shape of its input."""
    parser.add_argument("model", metavar="MODEL", help="torchvision:NAME, timm:NAME or package.module:factory")
    parser.add_argument("--weights", metavar="FILE", help="safetensors file with the weights (default: as it is made)")
    shape = (1, 3, 224, 224)
    parser.add_argument(
        "--shape", type=_shape, default=shape, metavar="N,C,H,W", help="of the input (default 1,3,224,224)"
    )


def measure_options(parser: argparse.ArgumentParser) -> None:
    """What to measure on."""
    parser.add_argument("--backend", choices=BACKENDS, help="to measure on (default onnxruntime, on a GPU torch)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the backend (default 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add(parser, compress, ("cache_dir",))


def table_option(parser: argparse.ArgumentParser) -> None:
    """Latencies that were measured elsewhere."""
    text = "use these latencies (lmfx profile -o, on the machine that is to run it) and measure nothing here"
    parser.add_argument("--table", metavar="TABLE.json", help=text)


def score_options(parser: argparse.ArgumentParser) -> None:
    """How the cost in quality is estimated, and on which images."""
    add(parser, compress, ("importance", "surrogate"))
    parser.add_argument(
        "--calibration",
        default=f"random:{RANDOM_IMAGES}",
        metavar="FILE.npy|random:N",
        help=f"images (N, channels, ...) without labels (default random:{RANDOM_IMAGES}, which is noise)",
    )


# --- inputs -----------------------------------------------------------------------------------------------------------


def model_and_example(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model and an example. Seeded, so that the importances of random weights are found again."""
    torch.manual_seed(SEED)
    model = load_model(args.model, args.weights)
    return model, torch.randn(args.shape, generator=torch.Generator().manual_seed(SEED))


def calibration(text: str, shape: tuple[int, ...]) -> tuple[Tensor, str]:
    """(images, what they are, for a person) from `FILE.npy` or `random:N`. Raises `InputError`."""
    if text.startswith("random:") or text == "random":
        found = re.fullmatch(r"random(?::([1-9]\d*))?", text)
        if found is None:
            raise InputError(f"--calibration {text!r} is not understood: write random:64, or the name of a .npy file")
        count = int(found[1] or RANDOM_IMAGES)
        images = torch.randn(count, *shape[1:], generator=torch.Generator().manual_seed(SEED + 1))
        return images, f"{count} images of standard normal noise, which tell nothing of your data; see --calibration"
    path = Path(text)
    if path.suffix != ".npy":
        raise InputError(f"--calibration {text!r} is no .npy file: save the images with numpy.save, or write random:64")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"can not read the calibration images {path}: {error}; save them with numpy.save") from error
    if array.dtype.kind != "f":
        raise InputError(f"the images in {path} are {array.dtype}: normalise them as for the model, to float32")
    if array.shape[1:] != tuple(shape[1:]):
        raise InputError(
            f"the images in {path} have shape {array.shape}, --shape is {shape}: all but the first number must agree"
        )
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)), f"{len(array)} images of {path}"
