"""A network of each family as a Q/DQ file: does ONNX Runtime run it, does tensorrt_rtx read it, and what is it off?

    PYTHONPATH=. python benchmarks/promises/int8_zoo.py [--models 'timm/*'] [--table benchmarks/results/int8_zoo.csv]

Weights are random and rounded to the nearest step, inputs small (noise): what is asked is whether the file is right,
not how good. `layers` run in 8 bits; `error` is the largest of the outputs' errors over their sizes, in ONNX Runtime;
`quantizers` are the QuantizeLinear layers that tensorrt_rtx reads, and `rtx` whether it reads the file ("absent"
without the package).
Rows that are there are not made again.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lmfx
from benchmarks.promises.programs import NETWORKS
from benchmarks.shared.filled_table import fill_table
from benchmarks.zoo.models import build, examples, randomise
from lmfx.calibration.images import as_calibration
from lmfx.export.tensorrt import network_layers
from lmfx.int8.activations import run_model
from lmfx.int8.quantize import float_form
from lmfx.passes.errors import LmfxError

__all__ = ["row_of"]

TABLE = Path(__file__).parents[1] / "results" / "int8_zoo.csv"
SIZES = (64, 96, 128, 224, 256)
IMAGES = 4
FIELDS = ("model", "family", "input", "layers", "error", "rtx", "quantizers", "seconds", "note")


def row_of(name: str, folder: Path) -> dict[str, Any]:
    """What became of one network; its two files are written to `folder`."""
    begun = time.process_time()
    torch.manual_seed(0)
    model = randomise(build(name)).eval()
    example = example_of(name, model)
    images = pytree.tree_map(several, example)
    data = images if isinstance(images, Tensor) else [images]
    row: dict[str, Any] = {}
    row["input"] = "; ".join("x".join(map(str, v.shape)) for v in pytree.tree_leaves(example) if isinstance(v, Tensor))
    files = {runtime: folder / f"{runtime}.onnx" for runtime in ("onnxruntime", "tensorrt_rtx")}
    for runtime, file in files.items():
        options: dict[str, Any] = {"weights": "nearest", "runtime": runtime, "progress": False}
        made = lmfx.quantize(model, data, file, example_input=example, **options)
        row["layers"] = len(made.layers)
    view, feeds = float_form(lmfx.trace(model, example), example, as_calibration(data, example))
    both = [
        run_model(m, feeds(feeds.images))
        for m in (bytes(view.model.SerializeToString()), files["onnxruntime"].read_bytes())
    ]
    row["error"] = max(off(y, z) for y, z in zip(*(joined(outputs) for outputs in both), strict=True))
    row |= read_by_rtx(files["tensorrt_rtx"])
    row["seconds"] = round(time.process_time() - begun, 1)
    return row


def joined(batches: list[list[Tensor]]) -> list[Tensor]:
    """The outputs over all batches."""
    return [torch.cat([v.flatten() for v in output]).double() for output in zip(*batches, strict=True)]


def off(y: Tensor, z: Tensor) -> float:
    """The size of the difference over that of `y`; NaN where one is not finite."""
    return float((y - z).norm()) / float(y.norm())


def read_by_rtx(file: Path) -> dict[str, Any]:
    """Whether tensorrt_rtx reads a file, and how many quantizers it finds."""
    try:
        import tensorrt_rtx as trt
    except ImportError:
        return {"rtx": "absent", "quantizers": 0}
    return {"rtx": "read", "quantizers": network_layers(trt, file.read_bytes()).get("QUANTIZE", 0)}


def example_of(name: str, model: nn.Module) -> Any:
    """The smallest input that the model takes."""
    for example in examples(name, model, sizes=SIZES):
        with contextlib.suppress(Exception), torch.no_grad():  # the model says in its own way that it is too small
            model(*example) if isinstance(example, tuple) else model(example)
            return example
    raise AssertionError(f"{name} takes none of the examples")


def several(value: Any) -> Any:
    """A few of an input, different ones where it is an image."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    rows = value[torch.arange(IMAGES) % len(value)]
    return torch.randn(rows.shape) if value.is_floating_point() else rows


def row_with_files(name: str) -> dict[str, Any]:
    """What became of one network, with its error as it is read; its files are not kept."""
    with tempfile.TemporaryDirectory() as folder:
        row = row_of(name, Path(folder))
    return {**row, "error": f"{row['error']:.2g}"}


def main() -> None:
    """All networks that have no row yet."""
    problems = LmfxError, RuntimeError  # RuntimeError: tensorrt_rtx does not read the file
    fill_table(__doc__, TABLE, FIELDS, NETWORKS, row_with_files, problems)


if __name__ == "__main__":
    main()
