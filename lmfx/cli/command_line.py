"""The command line: the stages of `lmfx.compress` by their names.

    lmfx spans MODEL        what could be merged, and what not and why
    lmfx profile MODEL      the latency of each candidate that may pay
    lmfx frontier MODEL     every Pareto-optimal latency and importance
    lmfx compress MODEL     a network within a budget, saved to a folder
    lmfx simplify MODEL     all merges that lose nothing, saved to a folder
    lmfx recover DIR        a saved network, trained without labels for minutes
    lmfx export DIR         a saved network as ONNX
    lmfx quantize NET       a saved network or an ONNX file in 8 bits, with Q/DQ nodes
    lmfx cache WHAT         what was measured and is kept: list, export, import, prune
    lmfx doctor             what works on this machine, and what to install

Results go to stdout, progress and errors to stderr. Exit codes: 0, 1 where the doctor finds something broken,
2 for an error that says what to do, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lmfx._version import __version__
from lmfx.cli.cache import cache_commands
from lmfx.cli.commands import (
    compress_command,
    frontier_command,
    profile_command,
    simplify_command,
    spans_command,
)
from lmfx.cli.doctor import doctor_command
from lmfx.cli.inputs import calibration_option, model_options, size_list, weights_option
from lmfx.cli.options import (
    COMPRESS_DEFAULTS,
    COMPRESS_OPTIONS,
    SPAN_OPTIONS,
    add,
    measure_options,
    score_options,
    table_option,
)
from lmfx.cli.saved_commands import export_command, quantize_command, recover_command
from lmfx.cli.suggestions import Parser
from lmfx.compress import compress
from lmfx.environment.bounded_reading import printable
from lmfx.environment.caller_state import entry
from lmfx.int8.ranges import METHODS
from lmfx.int8.units import RUNTIMES
from lmfx.passes.errors import LmfxError
from lmfx.passes.spans.span_options import SpanOptions
from lmfx.simplify import simplify

__all__ = ["main"]

INTERRUPTED = 130
FIRST_STEPS = """first steps:
  lmfx doctor                                                          what works on this machine
  lmfx compress torchvision:resnet18 --images FOLDER --budget 0.6      your pictures, without labels
  lmfx compress package.module:factory --shape 1,3,96,96 --budget 2x   your network
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. `argv` is without the program's name, `sys.argv[1:]` by default."""
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        parser.exit(2)
    args = parser.parse_args(argv)
    if args.command == "compress" and args.budget is None and args.keep is None:
        parser.error("compress needs --budget, how fast, or --keep, how much must be left")
    code = 0
    try:
        with _plain_warnings(args.command):
            code = _run(args) or 0
        sys.stdout.flush()
    except LmfxError as error:
        print(f"lmfx {args.command}: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\nlmfx {args.command}: stopped. Rows that were finished are kept; the same command goes on from there.",
            file=sys.stderr,
        )
        return INTERRUPTED
    except BrokenPipeError:  # `lmfx spans ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


@contextlib.contextmanager
def _plain_warnings(command: str) -> Iterator[None]:
    """A warning is told as a line of the command, without the line of code that it came from."""

    def told(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"lmfx {command}: warning: {printable(str(message))}", file=sys.stderr)

    before = warnings.showwarning
    warnings.showwarning = told
    try:
        yield
    finally:
        warnings.showwarning = before


@entry
def _run(args: argparse.Namespace) -> int | None:
    """The command itself, with its exit code where that says something; whatever fails is told as an `LmfxError`."""
    code: int | None = args.run(args)
    return code


# --- the parser -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lmfx", description="A depth compiler for convolutional networks.", epilog=FIRST_STEPS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"lmfx {__version__} (torch {torch.__version__})")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(run=run)
        return made

    made = command("spans", spans_command, "list what could be merged")
    model_options(made)
    made.add_argument("--json", action="store_true", help="print a JSON list, one object a candidate")
    made.add_argument("--refused", action="store_true", help="list what cannot be merged, and why")
    add(made, SpanOptions, SPAN_OPTIONS, max_kernel_size=None)

    made = command("profile", profile_command, "measure the candidates that may pay")
    model_options(made)
    measure_options(made)
    made.add_argument("-o", "--output", metavar="TABLE.json", help="write the table here")
    add(made, SpanOptions, SPAN_OPTIONS, **COMPRESS_DEFAULTS)

    made = command("frontier", frontier_command, "find every Pareto-optimal latency and importance")
    model_options(made, "auto")
    measure_options(made)
    table_option(made)
    score_options(made)
    made.add_argument("--plot", metavar="FILE.png", help="draw it")
    made.add_argument("--json", action="store_true", help="print a JSON object with all points")
    add(made, SpanOptions, SPAN_OPTIONS, **COMPRESS_DEFAULTS)

    made = command("compress", compress_command, "make a network that is within a latency budget, and save it")
    model_options(made, "auto")
    made.add_argument("--budget", metavar="B", help='0.6 or "60%%" of the latency, "4.5ms", or "2x" as fast')
    made.add_argument("--keep", metavar="SHARE", help='what must still agree, 0.98 or "98%%": as fast as that allows')
    made.add_argument("--recover", metavar="TIME", help="train so long on the calibration images: 3min, 90s")
    made.add_argument(
        "--input-sizes", type=size_list, default=(), metavar="N,N|auto", help="also compress for images of these sizes"
    )
    made.add_argument("--no-refit", action="store_true", help="leave the layers that the plan keeps as they are")
    made.add_argument(
        "-o", "--output", metavar="DIR", help="save plan.json and model.safetensors here (default out/MODEL-BUDGET)"
    )
    made.add_argument("--onnx", action="store_true", help="also write DIR/net.onnx")
    made.add_argument("--trainable", action="store_true", help="save the form that can be trained, not the merged one")
    measure_options(made)
    table_option(made)
    score_options(made)
    add(made, compress, ("quality", *COMPRESS_OPTIONS))

    made = command(
        "simplify", simplify_command, "make all merges that lose nothing, without a measurement, and save the result"
    )
    model_options(made, "auto")
    made.add_argument("-o", "--output", required=True, metavar="DIR", help="save plan.json and model.safetensors here")
    made.add_argument("--onnx", action="store_true", help="also write DIR/net.onnx")
    made.add_argument(
        "--growth", type=float, default=1.0, metavar="G", help="cost of a merged conv over that of its parts, at most"
    )
    add(made, simplify, ("include", "exclude"))

    made = command("recover", recover_command, "train a saved network on images without labels, and save it again")
    made.add_argument("directory", metavar="DIR", help="what lmfx compress --trainable or lmfx.save wrote")
    made.add_argument("model", metavar="MODEL", nargs="?", help="what was compressed (default: as for lmfx export)")
    weights_option(made)
    calibration_option(made, required=True)
    made.add_argument("--minutes", default="3", metavar="T", help="3, 90s or 1h, all in all (default: %(default)s)")
    made.add_argument("--checkpoint", metavar="DIR", help="keep the state here; the same command goes on from it")
    made.add_argument("--trainable", action="store_true", help="save the form that can be trained, not the merged one")
    made.add_argument("-o", "--output", required=True, metavar="DIR", help="save plan.json and model.safetensors here")
    made.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    made = command("export", export_command, "write a saved network as ONNX, checked against ONNX Runtime")
    made.add_argument("directory", metavar="DIR", help="what lmfx compress or lmfx.save wrote")
    made.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="what was compressed (default: the name in torchvision or timm that DIR has)",
    )
    made.add_argument("-o", "--output", metavar="FILE.onnx", help="default DIR/net.onnx")

    made = command("quantize", quantize_command, "write a network in 8 bits, as ONNX with Q/DQ nodes")
    made.add_argument("network", metavar="DIR|FILE.onnx", help="what lmfx compress or lmfx.save wrote, or a float file")
    made.add_argument("model", metavar="MODEL", nargs="?", help="what was compressed (default: as for lmfx export)")
    calibration_option(made)
    made.add_argument("-o", "--output", required=True, metavar="FILE.onnx", help="the file to write")
    made.add_argument(
        "--runtime", choices=RUNTIMES, default=RUNTIMES[0], help="what is to run it (default: %(default)s)"
    )
    made.add_argument("--per-tensor", action="store_true", help="one scale a layer, not one for each output channel")
    made.add_argument(
        "--rounding", choices=("gram", "nearest"), default="gram", help="of weights (default: %(default)s)"
    )
    made.add_argument("--ranges", choices=METHODS, default=METHODS[0], help="of activations (default: %(default)s)")
    made.add_argument("--exclude", action="append", metavar="GLOB", help="leave these layers float (repeatable)")
    made.add_argument("-q", "--quiet", action="store_true", help="no progress bars")

    made = command("doctor", doctor_command, "try which runtimes, devices and extras work on this machine")
    made.add_argument("--json", action="store_true", help="print a JSON object")

    text = "list, export, import and prune what was measured"
    cache_commands(commands.add_parser("cache", help=text, description=text[0].upper() + text[1:] + "."))
    return parser


if __name__ == "__main__":
    sys.exit(main())
