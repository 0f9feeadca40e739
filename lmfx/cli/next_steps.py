"""Says, after a command has saved a network, which command one would type next."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from lmfx.budget import Budget
from lmfx.cli.models import of_zoo

__all__ = ["default_output", "say_next"]


def default_output(spec: str, budget: Budget | None, keep: float | None) -> str:
    """A folder for the result that says what it is: out/resnet18-0.6."""
    name = re.sub(r"[^\w.-]+", "_", spec.partition(":")[2] or Path(spec).stem) or "model"
    return f"out/{name}-{budget if budget is not None else f'keep{keep:g}'}"


def say_next(args: argparse.Namespace, output: Path, spec: str, exported: bool, page: Path | None = None) -> None:
    """Prints what can be done with what was written to `output`, as commands that can be copied; last, its page."""
    words = [str(output), *([] if of_zoo(spec) else [spec])]  # a file does not decide what is imported
    rows = []
    if not exported:
        rows.append((["lmfx", "export", *words], "net.onnx, checked against ONNX Runtime"))
    if args.command == "compress" and args.recover is None:
        given = ["--images", args.images] if args.images else ["--calibration", args.calibration or "YOUR_IMAGES.npy"]
        if args.weights not in ("auto", "random"):
            given += ["--weights", args.weights]
        command = ["lmfx", "recover", *words, *given, "--minutes", "3", "-o", f"{output}-recovered"]
        rows.append((command, "train without labels, for quality"))
    python = f'net = lmfx.load("{output}", model)'
    lines = [(shlex.join(command), text) for command, text in rows] + [(python, "in Python; model as it was before")]
    lines += [(str(page), "open it in a browser: every budget, what became of each layer")] if page is not None else []
    width = max(len(line) for line, _ in lines)
    for i, (line, text) in enumerate(lines):
        print(f"{'next: ' if i == 0 else '      '}{line:{width}}  # {text}")
