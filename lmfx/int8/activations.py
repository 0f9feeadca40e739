"""Runs a float graph on calibration images and hands out the values inside of it, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import arguments_of
from lmfx.environment.caller_state import one_line
from lmfx.int8.graph_view import GraphView, require_onnxruntime
from lmfx.passes.errors import ExportError, InputError

__all__ = ["Feeds", "FeedsOf", "run_model", "values_inside"]

THREADS = 1
AT_ONCE = 8  # images of a graph that takes any number


class Feeds:
    """The inputs of a model for calibration images, in batches of the size that it takes."""

    def __init__(self, view: GraphView, images: Calibration, graph: fx.GraphModule | None = None) -> None:
        self.view, self.images, self.graph = view, images, graph
        first = view.shapes[view.inputs[0]]
        fixed = first[0] if first else 1
        self.size = fixed if fixed > 0 else AT_ONCE
        self.whole = images.whole_batches(self.size) if fixed > 0 else images

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in self.whole.batches(self.size):
            values = list(batch) if self.graph is None else self._tensors(batch)
            if len(values) != len(self.view.inputs):
                raise InputError(
                    f"the network takes {len(self.view.inputs)} tensors ({', '.join(self.view.inputs)}), and the "
                    f"calibration gives {len(values)}: give one for each"
                )
            yield {n: v.detach().cpu().contiguous().numpy() for n, v in zip(self.view.inputs, values, strict=True)}

    def _tensors(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        assert self.graph is not None
        given = arguments_of(self.graph, batch, self.images.names)
        return [v for v in pytree.tree_leaves(given) if isinstance(v, Tensor)]

    def __len__(self) -> int:
        return -(-len(self.whole) // self.size)


class FeedsOf:
    """Makes feeds of images for one model; `images` are those that calibrate."""

    def __init__(self, view: GraphView, images: Calibration, graph: fx.GraphModule | None = None) -> None:
        self.view, self.images, self.graph = view, images, graph

    def __call__(self, images: Calibration) -> Feeds:
        return Feeds(self.view, images, self.graph)


def values_inside(view: GraphView, feeds: Feeds, wanted: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """The values of some names of the float graph, for each batch."""
    onnx = view.onnx
    model = onnx.ModelProto()
    model.CopyFrom(view.model)
    inside = [n for n in wanted if n not in view.inputs]
    present = {v.name for v in model.graph.output}
    for name in inside:
        if name not in present:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = _session(model.SerializeToString())
    for feed in feeds:
        found = dict(zip(inside, session.run(inside, feed) if inside else (), strict=True))
        yield {n: feed[n] if n in feed else found[n] for n in wanted}


def run_model(model: bytes, feeds: Feeds) -> list[list[Tensor]]:
    """What a model gives for each batch: its outputs in order."""
    session = _session(model)
    return [[torch.from_numpy(np.asarray(v)) for v in session.run(None, feed)] for feed in feeds]


def _session(model: bytes) -> Any:
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has errors of its own, all of them about this model
        raise ExportError(f"ONNX Runtime cannot load the network: {one_line(error)}; report this") from error
