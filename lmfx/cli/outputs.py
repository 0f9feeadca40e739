"""Writes what a command made, the network's folder with its page and ONNX file, and looks beforehand whether it can."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import fx, nn

from lmfx.cli.next_steps import say_next
from lmfx.passes.errors import MissingExtra, OptionError, PlanError
from lmfx.planning.saved_networks import save
from lmfx.report import report

__all__ = ["check_folder", "output_folder", "save_network", "write_onnx"]


def output_folder(text: str) -> Path:
    """The folder to save to, looked at before the work is done."""
    output = Path(text)
    if output.exists() and not output.is_dir():
        raise PlanError(f"--output {output} is a file; give a folder")
    for above in output.absolute().parents:
        if above.exists():
            try:
                tempfile.TemporaryFile(dir=above).close()
            except OSError as error:
                raise PlanError(f"--output {output} cannot be made: {error}; give another folder") from error
            break
    return output


def save_network(
    net: fx.GraphModule,
    output: Path,
    args: argparse.Namespace,
    x: Any,
    spec: str | None = None,
    random_weights: bool = False,
) -> None:
    """Saves the network to the folder `output`, and says what was written and what may come next. `spec` names its
    model where no model was given, and the network is one that was saved before."""
    save(net, output, model=spec or args.model)
    print(f"wrote {output / 'plan.json'} and {output / 'model.safetensors'}")
    page = None
    if spec is None:  # what this run made; a page of a network that was trained after would tell of what it was
        page = _write_page(net, output / "report.html", args.model, random_weights)
    exported = getattr(args, "onnx", False) or getattr(args, "precision", None) == "int8"
    if exported:
        write_onnx(net, x, output / "net.onnx")
    say_next(args, output, spec or args.model, exported, page)


def write_onnx(net: nn.Module, example: Any, path: Path) -> None:
    """Writes the file and says so."""
    from lmfx.export import export_onnx

    print(f"wrote {export_onnx(net, example, path)}")


def _write_page(net: fx.GraphModule, path: Path, model: str, random_weights: bool) -> Path | None:
    """The result as a page, where what writes pages is installed: the network itself is saved already."""
    try:
        page = report(net).html(path, title=model, random_weights=random_weights)
    except MissingExtra as error:
        print(f"no page was written: {error}", file=sys.stderr)
        return None
    print(f"wrote {page}")
    return page


def check_folder(path: Path) -> None:
    """Said now and not after minutes of work."""
    if not path.absolute().parent.is_dir():
        raise OptionError(f"cannot write {path}: the folder {path.absolute().parent} does not exist; make it first")
