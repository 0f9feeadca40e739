"""Defines the options of the command line, most of them from the fields of option classes.

Options are named after the parameters of the functions and dataclasses they set, and take their defaults from there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from lmfx.cli.inputs import calibration_option
from lmfx.cli.models import imported
from lmfx.compress import compress
from lmfx.importance import ESTIMATORS, Finetune
from lmfx.importance.pool import ExecutorLike
from lmfx.latency import BACKENDS
from lmfx.latency.chosen_backend import PRECISIONS
from lmfx.passes.errors import MissingExtra, OptionError
from lmfx.passes.spans.enumeration import SpanOptions

__all__ = [
    "COMPRESS_DEFAULTS",
    "COMPRESS_OPTIONS",
    "SPAN_OPTIONS",
    "add",
    "estimator",
    "executor",
    "measure_options",
    "score_options",
    "table_option",
    "taken",
]

DASK_TIMEOUT = 30  # seconds


# --- how a parameter looks on the command line ------------------------------------------------------------------------


def _number_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _name_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


SYNTAX: dict[str, dict[str, Any]] = {
    "realize": {"type": _words, "metavar": "WAYS", "help": "comma-separated: compose, fit, narrow, factor"},
    "max_kernel_size": {"help": "largest merged kernel"},
    "max_span_convs": {"help": "most convs of the main path that one merged conv replaces"},
    "max_fit_convs": {"help": "the same where it is fitted"},
    "max_fit_unknowns": {"help": "most input channels times taps of a fitted conv"},
    "method": {"choices": ("layermerge", "depth", "layeronly"), "help": "what may be done to a span"},
    "norm": {"choices": ("affine", "post"), "help": "what becomes of a GroupNorm inside a composed span"},
    "activation_after": {"metavar": "NAME", "type": _name_or_none, "help": "after merged convs that have none: relu6"},
    "include": {"action": "append", "metavar": "GLOB", "help": "touch only modules of these names (repeatable)"},
    "exclude": {"action": "append", "metavar": "GLOB", "help": "leave modules of these names alone (repeatable)"},
    "importance": {"choices": tuple(ESTIMATORS), "help": "how the cost in quality is estimated"},
    "surrogate": {"choices": ("affine", "identity"), "help": "what stands for the activations that composing removes"},
    "quality": {
        "metavar": "NAME",
        "type": _name_or_none,
        "help": "what plans are chosen by: auto, kl, agreement, divergence, psnr, or none",
    },
    "cache_dir": {"metavar": "DIR", "help": "where measurements are kept and found again"},
}
NUMBER: dict[str, Any] = {"type": _number_or_none, "metavar": "N|none"}  # what has no type above; none: unbounded

SPAN_OPTIONS = tuple(f.name for f in dataclasses.fields(SpanOptions))
COMPRESS_OPTIONS = tuple(name for name in SPAN_OPTIONS if name in inspect.signature(compress).parameters)
# Tables and frontiers are made of the spans that `compress` would look at.
COMPRESS_DEFAULTS = {name: inspect.signature(compress).parameters[name].default for name in COMPRESS_OPTIONS}


def add(parser: argparse.ArgumentParser, source: Callable[..., Any], names: Sequence[str], **defaults: Any) -> None:
    """Adds options for parameters of `source`, with its defaults or those given."""
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


def measure_options(parser: argparse.ArgumentParser) -> None:
    """What to measure on."""
    parser.add_argument("--backend", choices=BACKENDS, help="to measure on (default onnxruntime, on a GPU torch)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the backend (default 1)")
    text = "in which the backend runs networks (default fp32)"
    parser.add_argument("--precision", choices=PRECISIONS, help=text)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
    add(parser, compress, ("cache_dir",))


def table_option(parser: argparse.ArgumentParser) -> None:
    """Latencies that were measured elsewhere."""
    text = "use these latencies (lmfx profile -o, on the machine that is to run it) and measure nothing here"
    parser.add_argument("--table", metavar="TABLE.json", help=text)


def score_options(parser: argparse.ArgumentParser) -> None:
    """How the cost in quality is estimated, and on which images."""
    add(parser, compress, ("importance", "surrogate"))
    calibration_option(parser)
    group = parser.add_argument_group("with --importance finetune")
    for name in ("train", "evaluate"):
        group.add_argument(f"--{name}", metavar="package.module:NAME", help=f"the function {name}(model)")
    group.add_argument("--metric", choices=("accuracy", "loss"), help="what evaluate(model) gives (default accuracy)")
    group.add_argument("--key", metavar="TEXT", help="a name for the functions and their data; with it rows are kept")
    group.add_argument(
        "--executor", metavar="processes:N|dask:ADDRESS", help="train candidates side by side (default: one by one)"
    )


# --- finetune ---------------------------------------------------------------------------------------------------------


def estimator(args: argparse.Namespace) -> str | Finetune:
    """The estimator of --importance. Raises `OptionError` where its options do not fit."""
    given = [name for name in ("train", "evaluate", "metric", "key", "executor") if getattr(args, name) is not None]
    if args.importance != "finetune":
        if given:
            raise OptionError(f"--{given[0]} is for --importance finetune, which is {args.importance!r} here")
        return str(args.importance)
    if args.train is None or args.evaluate is None:
        raise OptionError(
            "--importance finetune trains: name the functions, --train package.module:train --evaluate "
            "package.module:evaluate"
        )
    sys.path.insert(0, os.getcwd())  # for good: workers look the functions up by name, and get this path
    train, evaluate = imported(args.train), imported(args.evaluate)
    return Finetune(train, evaluate, metric=args.metric or "accuracy", key=args.key, surrogate=args.surrogate)


@contextlib.contextmanager
def executor(args: argparse.Namespace) -> Iterator[ExecutorLike]:
    """What --executor names. Raises `OptionError`, and `MissingExtra` without Dask."""
    kind, _, where = (args.executor or "").partition(":")
    if not kind:
        yield None
    elif kind == "processes" and where.isdecimal() and int(where) > 0:
        # Spawned, since a process with threads of torch is not safe to fork.
        spawn = multiprocessing.get_context("spawn")
        yield lambda: ProcessPoolExecutor(int(where), mp_context=spawn)
    elif kind == "dask" and where:
        try:
            from distributed import Client
        except ImportError as error:
            raise MissingExtra(f'--executor {args.executor} needs Dask ({error}): pip install "lmfx[dask]"') from error
        try:
            client = Client(where, timeout=DASK_TIMEOUT)
        except (OSError, ValueError) as error:
            raise OptionError(
                f"--executor {args.executor}: no scheduler answers there ({error}): give its address"
            ) from error
        with client:
            yield client.get_executor()
    else:
        raise OptionError(f"--executor {args.executor!r} is not understood: write processes:4 or dask:tcp://host:8786")
