"""The 8-bit form of what `compress` made: the Q/DQ file that its latency is measured with, and what that keeps.

Which layers stay float is what the backend measured; where no choice is faster than the float network there is no 8-bit
form, and the rows say why. The file lies with the network (`made_of(net).int8`), whose weights it was made of: once
these change it is stale, and `export_onnx` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import floating_outputs
from lmfx.int8.activations import FeedsOf, run_model
from lmfx.int8.quantize import float_form, quantize_model
from lmfx.int8.report import Int8Facts
from lmfx.int8.units import SCHEMES, Unit
from lmfx.latency import Backend, LatencyTable
from lmfx.latency.chosen_backend import identity_of
from lmfx.made_of import weights_digest
from lmfx.passes.errors import ExportError
from lmfx.passes.rewrite.trainable import merge
from lmfx.quality import Judge, Quality

Source = Backend | LatencyTable

__all__ = ["Int8Form", "Int8Judge", "Int8Keeps", "int8_form"]


@dataclass(frozen=True)
class Int8Form:
    """A Q/DQ model, the shapes of its inputs, and the digest of the weights that it was made of."""

    model: bytes
    shapes: tuple[tuple[int, ...], ...]
    weights: str


class Int8Judge:
    """Judges an ONNX model as `judge` judges graphs: on its images, a batch of the model's own size at a time."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def outputs(self, model: bytes, feeds: FeedsOf) -> list[Tensor]:
        """What the model gives for the judge's images."""
        images = self.judge.images
        made = feeds(images)
        short = -len(images) % made.size
        if short:  # the last batch is filled up, and cut again
            filled = tuple(torch.cat([t, t[-1:].expand(short, *t.shape[1:])]) for t in images.tensors)
            made = feeds(Calibration(filled, images.names))
        joined = self.judge.joined([floating_outputs(tuple(v)) for v in run_model(model, made)])
        cut = zip(joined, self.judge.rows, strict=True)
        return [
            v if dim is None else v.narrow(dim, 0, v.shape[dim] - _rows(v, dim, short, len(images))) for v, dim in cut
        ]


class Int8Keeps:
    """Says what the 8-bit form of a student keeps, or the student where there is none; `judge` has the images."""

    def __init__(self, judge: Judge, images: Calibration, example: Any, source: Source) -> None:
        self.judge, self.images, self.example, self.source = judge, images, example, source

    def __call__(self, student: fx.GraphModule) -> Quality:
        net = merge(student).train(False)
        form, _, feeds = int8_form(net, self.images, self.example, self.source)
        return self.judge(net) if form is None else self.judge.of(Int8Judge(self.judge).outputs(form.model, feeds))


def _rows(value: Tensor, dim: int, short: int, images: int) -> int:
    """How many rows of an output belong to images that were only filled in."""
    return value.shape[dim] // (images + short) * short


def int8_form(
    net: fx.GraphModule, images: Calibration, example: Any, source: Source, original: fx.GraphModule | None = None
) -> tuple[Int8Form | None, Int8Facts, FeedsOf]:
    """(the form or None where it does not pay, the facts, what makes feeds of images) of a compressed network.

    The times of the `original` are facts as well, where it is given. `source` is the backend or table, of the precision
    "int8".
    """
    view, feeds = float_form(net, example, images)
    choose = getattr(source, "int8_forms", None)
    ms: dict[str, float] = {}
    chosen: set[str] | None = None
    rows: tuple[str, ...] = ()
    times: dict[str, str] = {}
    if choose is not None:
        if original is not None:
            before, _ = float_form(original, example, images)
            first = choose(bytes(before.model.SerializeToString()))
            ms = {f"original {k}": v for k, v in first.ms.items()}
        found = choose(bytes(view.model.SerializeToString()))
        ms |= found.ms
        rows = tuple(str(f) for f in found.forms if f.unit.kind == "weighted")
        times = {f.unit.name: f"int8 {f.int8:.4f} ms, float {f.float32:.4f} ms" for f in found.forms}
        if not found.pays:
            return None, Int8Facts(False, ms, None, rows), feeds
        chosen = {f.unit.name for f in found.forms if f.quantized}

    def why_not(unit: Unit) -> str:
        return times.get(unit.name, "")

    scheme = SCHEMES[_runtime(source)]
    model, quantized = quantize_model(view, feeds, scheme, chosen=chosen, why_not=why_not)
    shapes = tuple(view.shapes[n] for n in view.inputs)
    return Int8Form(model, shapes, weights_digest(net)), Int8Facts(True, ms, quantized, rows), feeds


def _runtime(source: Source) -> str:
    name = str(identity_of(source).get("backend"))
    if name not in SCHEMES:
        raise ExportError(f"networks of the backend {name!r} have no 8-bit form: use onnxruntime or tensorrt")
    return name
