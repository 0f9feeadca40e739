"""Runs the commands that start from a saved network: `lmfx export`, `lmfx quantize` and `lmfx recover`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from lmfx.cli.inputs import check_images, images, loaded_model
from lmfx.cli.models import load as load_model
from lmfx.cli.outputs import output_folder, save_network, write_onnx
from lmfx.int8.quantize import file_example, quantize
from lmfx.passes.errors import PlanError
from lmfx.planning.saved_files import example_of
from lmfx.planning.saved_networks import load, model_spec
from lmfx.stages import merge
from lmfx.training.recovery import MOST_IMAGES, recover
from lmfx.training.recovery_clock import seconds_of

__all__ = ["export_command", "quantize_command", "recover_command"]

ZOO = re.compile(r"(torchvision|timm):\w[\w.]*")


def quantize_command(args: argparse.Namespace) -> None:
    """`lmfx quantize`: writes a saved network, a model or an ONNX file as a Q/DQ file."""
    target, source = Path(args.output), Path(args.network)
    check_images(args)
    options = {
        "runtime": args.runtime,
        "per_channel": not args.per_tensor,
        "weights": args.rounding,
        "ranges": args.ranges,
        "exclude": tuple(args.exclude or ()),
        "progress": not args.quiet,
    }
    if source.suffix == ".onnx":
        data, what = images(args, file_example(source), spec=args.network)
        print(quantize(source, data, target, **options))
    else:
        spec, inputs = _model_of(args, source)
        model = load_model(spec, "auto").model  # as in `export_command`
        net = load(source, model)
        positional, keyword = example_of(inputs)
        x = keyword or tuple(positional)
        data, what = images(args, x, model=model, spec=spec)
        print(quantize(net, data, target, example_input=x, **options))
    print(f"calibrated on {what}")
    print(f"wrote {target}")


def recover_command(args: argparse.Namespace) -> None:
    """`lmfx recover`: trains a saved network on images without labels, and saves it again."""
    seconds_of(args.minutes)
    check_images(args)
    folder, output = Path(args.directory), output_folder(args.output)
    spec, inputs = _model_of(args, folder)
    loaded = loaded_model(args, spec)
    student = load(folder, loaded.model)
    positional, keyword = example_of(inputs)
    like = keyword or tuple(positional)
    data, what = images(args, like, MOST_IMAGES, model=loaded.model, spec=spec)
    recover(student, loaded.model, data, minutes=args.minutes, checkpoint=args.checkpoint, progress=not args.quiet)
    print(student.meta["lmfx_recovery"])
    print(f"trained and judged on {what}")
    save_network(student if args.trainable else merge(student), output, args, like, spec)


def export_command(args: argparse.Namespace) -> None:
    """`lmfx export`: writes a saved network as ONNX."""
    folder = Path(args.directory)
    spec, inputs = _model_of(args, folder)
    # Its weights are replaced; but some builders make another network where they are to have the published ones.
    net = load(folder, load_model(spec, "auto").model)
    positional, keyword = example_of(inputs)
    write_onnx(net, keyword or tuple(positional), Path(args.output) if args.output else folder / "net.onnx")


def _model_of(args: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any]]:
    """The name of the model that a folder's network was made of, and its inputs."""
    spec, inputs = model_spec(folder)
    spec = args.model or _zoo_name(spec, args.command, folder)
    if spec is None:
        raise PlanError(
            f"{folder / 'plan.json'} does not say which model it was made for, as lmfx.save does not know: "
            f"write lmfx {args.command} {folder} MODEL"
        )
    return spec, inputs


def _zoo_name(spec: str | None, command: str, folder: Path) -> str | None:
    """What a folder may say of its model: a name of torchvision or timm. Code of its own is run on no file's word."""
    if spec is None or ZOO.fullmatch(spec):
        return spec
    raise PlanError(
        f"{folder / 'plan.json'} was made for {spec!r}, and a file does not decide what is imported: if you trust that "
        f"code, write lmfx {command} {folder} MODEL"
    )
