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

Results go to stdout, progress and errors to stderr. Exit codes: 0, 2 for an error that says what to do, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch

from lmfx._version import __version__
from lmfx.cli.cache import cache_commands
from lmfx.cli.commands import (
    compress_command,
    export_command,
    frontier_command,
    profile_command,
    quantize_command,
    recover_command,
    simplify_command,
    spans_command,
)
from lmfx.cli.inputs import calibration_option, model_options, size_list
from lmfx.cli.options import (
    COMPRESS_DEFAULTS,
    COMPRESS_OPTIONS,
    SPAN_OPTIONS,
    add,
    measure_options,
    score_options,
    table_option,
)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. `argv` is without the program's name, `sys.argv[1:]` by default."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "compress" and args.budget is None and args.keep is None:
        parser.error("compress needs --budget, how fast, or --keep, how much must be left")
    try:
        _run(args)
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
    return 0


@entry
def _run(args: argparse.Namespace) -> None:
    """The command itself; whatever fails in it is told as an `LmfxError`."""
    args.run(args)


# --- the parser -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmfx", description="A depth compiler for convolutional networks.")
    parser.add_argument("--version", action="version", version=f"lmfx {__version__} (torch {torch.__version__})")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
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
    model_options(made)
    measure_options(made)
    table_option(made)
    score_options(made)
    made.add_argument("--plot", metavar="FILE.png", help="draw it")
    made.add_argument("--json", action="store_true", help="print a JSON object with all points")
    add(made, SpanOptions, SPAN_OPTIONS, **COMPRESS_DEFAULTS)

    made = command("compress", compress_command, "make a network that is within a latency budget, and save it")
    model_options(made)
    made.add_argument("--budget", metavar="B", help='0.6 or "60%%" of the latency, "4.5ms", or "2x" as fast')
    made.add_argument("--keep", metavar="SHARE", help='what must still agree, 0.98 or "98%%": as fast as that allows')
    made.add_argument("--recover", metavar="TIME", help="train so long on the calibration images: 3min, 90s")
    made.add_argument(
        "--input-sizes", type=size_list, default=(), metavar="N,N", help="also compress for images of these sizes"
    )
    made.add_argument("--no-refit", action="store_true", help="leave the layers that the plan keeps as they are")
    made.add_argument("-o", "--output", required=True, metavar="DIR", help="save plan.json and model.safetensors here")
    made.add_argument("--onnx", action="store_true", help="also write DIR/net.onnx")
    made.add_argument("--trainable", action="store_true", help="save the form that can be trained, not the merged one")
    measure_options(made)
    table_option(made)
    score_options(made)
    add(made, compress, ("quality", *COMPRESS_OPTIONS))

    made = command(
        "simplify", simplify_command, "make all merges that lose nothing, without a measurement, and save the result"
    )
    model_options(made)
    made.add_argument("-o", "--output", required=True, metavar="DIR", help="save plan.json and model.safetensors here")
    made.add_argument("--onnx", action="store_true", help="also write DIR/net.onnx")
    made.add_argument(
        "--growth", type=float, default=1.0, metavar="G", help="cost of a merged conv over that of its parts, at most"
    )
    add(made, simplify, ("include", "exclude"))

    made = command("recover", recover_command, "train a saved network on images without labels, and save it again")
    made.add_argument("directory", metavar="DIR", help="what lmfx compress --trainable or lmfx.save wrote")
    made.add_argument("model", metavar="MODEL", nargs="?", help="what was compressed (default: as for lmfx export)")
    made.add_argument("--weights", metavar="FILE", help="safetensors file with the model's weights")
    made.add_argument(
        "--calibration",
        required=True,
        metavar="FILE|package.module:NAME",
        help="images (N, channels, ...) without labels, as for lmfx compress; hundreds or more",
    )
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

    text = "list, export, import and prune what was measured"
    cache_commands(commands.add_parser("cache", help=text, description=text[0].upper() + text[1:] + "."))
    return parser


if __name__ == "__main__":
    sys.exit(main())
