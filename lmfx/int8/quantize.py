"""`quantize`: a network as a Q/DQ ONNX file, from calibration images.

    float ONNX ─▶ units ─▶ ranges of all values ─▶ weights by their Gram ─▶ Q/DQ pairs ─▶ run beside the float one
                           one pass                one pass (or a few)      nowhere between what the runtime fuses

The file is what TensorRT (which has no calibrator any more) and ONNX Runtime read. Each wants other pairs, which
`runtime` says; `lmfx.int8.units` has the rules.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from lmfx.calibration.images import Calibration, as_calibration
from lmfx.calibration.recording import mean_square_distance
from lmfx.environment.atomic_files import atomic_write
from lmfx.environment.caller_state import entry
from lmfx.environment.progress import progress as progress_bar
from lmfx.export.builder import require_onnx
from lmfx.export.emit import to_onnx_bytes
from lmfx.int8.activations import FeedsOf, run_model, values_inside
from lmfx.int8.graph_view import GraphView, basic_form, require_onnxruntime, view_of
from lmfx.int8.qdq import Rounded, quantized_values, with_qdq
from lmfx.int8.ranges import RangeMethod, Ranges
from lmfx.int8.report import BAD, Quantized, QuantizedLayer
from lmfx.int8.units import Scheme, Unit, find_units, scheme_named
from lmfx.int8.weights import round_weights
from lmfx.made_of import made_of
from lmfx.passes.errors import ExportError, InputError, OptionError
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.identity.content import shortened
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.spans.globs import covers
from lmfx.passes.trace.tracing import example_arguments

__all__ = ["file_example", "float_form", "quantize", "quantize_model"]

RANGE_IMAGES = 128
JUDGED_IMAGES = 64
Weights = Literal["gram", "nearest"]


@entry
def quantize(
    net_or_path: nn.Module | str | os.PathLike[str],
    calibration: Any,
    path: str | os.PathLike[str],
    *,
    example_input: Any = None,
    runtime: str = "onnxruntime",
    per_channel: bool = True,
    weights: Weights = "gram",
    ranges: RangeMethod = "minmax",
    exclude: Sequence[str] = (),
    progress: bool = True,
) -> Quantized:
    """Writes a network with its convolutions and Linears in 8 bits as one ONNX file, and says how well that went.

    Args:
        net_or_path: a network (from `lmfx.compress`, or any that lmfx can trace), or a float32 ONNX file.
        calibration: unlabelled images, a tensor or a loader of batches, as for `lmfx.compress`; tens are enough for
            ranges, hundreds for weights.
        path: the file to write. It has the input shapes of the example or of the ONNX file, and float inputs and
            outputs.
        example_input: as for `lmfx.compress`, for a network; by default the first calibration image, or what a network
            of lmfx was made with.
        runtime: what is to run it: "onnxruntime" (uint8 activations with a zero point) or "tensorrt", also
            "tensorrt_rtx" (symmetric int8; its residual sums stay in the convolution's kernel).
        per_channel: a scale for each output channel of a weight, or one for the layer.
        weights: "gram" rounds each weight so that the layer's output on the calibration images changes least, "nearest"
            to the nearest step.
        ranges: of activations: "minmax", "percentile" or "entropy".
        exclude: globs of layers that stay float, by the names that the report and the file have; as for
            `lmfx.compress`, the name of a container covers what is in it, and a glob that covers nothing is an error.

    Returns a `Quantized`, which names bad ranges; print it. Raises `InputError` without images, `MissingExtra` without
    onnx or onnxruntime, `ExportError` for what cannot be written.
    """
    require_onnx()
    require_onnxruntime()
    scheme, target = scheme_named(runtime), Path(path)
    if weights not in ("gram", "nearest"):
        raise OptionError(f"weights={weights!r}: use 'gram' or 'nearest'")
    if isinstance(exclude, str):
        raise OptionError(f"exclude={exclude!r}: pass a tuple of globs, like ({exclude!r},)")
    Ranges(ranges)  # says now what is wrong
    if calibration is None:
        raise InputError(
            "quantize needs calibration images, from which ranges are taken: pass a tensor of images or a loader"
        )
    if not target.parent.is_dir() or target.is_dir():
        raise ExportError(f"cannot write {target}: it is a folder, or is in one that does not exist; make it first")
    view, feeds = _float_form(net_or_path, calibration, example_input)
    model, found = quantize_model(
        view,
        feeds,
        scheme,
        per_channel=per_channel,
        by_gram=weights == "gram",
        ranges=ranges,
        exclude=exclude,
        progress=progress,
    )
    if runtime != scheme.name:
        found = replace(found, runtime=runtime)
    return replace(found, path=atomic_write(target, model))


def quantize_model(
    view: GraphView,
    feeds: FeedsOf,
    scheme: Scheme,
    *,
    per_channel: bool = True,
    by_gram: bool = True,
    ranges: RangeMethod = "minmax",
    exclude: Sequence[str] = (),
    chosen: Collection[str] | None = None,
    why_not: Callable[[Unit], str] | None = None,
    progress: bool = False,
) -> tuple[bytes, Quantized]:
    """The Q/DQ model of a float one. `feeds` makes inputs of images; `chosen` are the names of units in 8 bits (all),
    and `why_not` says why another one is not."""
    every = find_units(view, scheme)
    for glob in exclude:
        if not any(covers((glob,), u.name) for u in every):
            names = ", ".join(u.name for u in every if u.kind == "weighted")
            raise OptionError(f"exclude={glob!r} covers nothing that runs in 8 bits; there is {shortened(names)}")
    if chosen is not None:
        every_chosen = [u for u in every if u.name in chosen]
        left = {u.name: "" if why_not is None else why_not(u) for u in every if u.name not in chosen}
    else:
        every_chosen, left = every, {}
    units = [u for u in every_chosen if not covers(exclude, u.name)]
    left |= {u.name: "exclude=" for u in every_chosen if u not in units}
    if not any(u.kind == "weighted" for u in units):
        raise ExportError(
            "nothing in this network runs in 8 bits: no convolution or Linear with constant weights in float32 is "
            "left; give the float32 network or file, and leave layers out of exclude="
        )
    roles = feeds.images.roles()
    fit = feeds(roles.fit)
    collected = Ranges(ranges)
    values = quantized_values(view, units, scheme)
    seen = feeds(_first(roles.fit, RANGE_IMAGES))
    with progress_bar(len(seen), "ranges of activations", progress) as bar:
        for batch in values_inside(view, seen, values):
            collected.add(batch)
            bar.update(1)
    rounded: dict[str, Rounded] = {}
    layers = []
    weighted = [u for u in units if u.kind == "weighted"]
    with progress_bar(len(weighted), "weights", progress) as bar:
        for layer in round_weights(view, units, fit if by_gram else None, per_channel):
            unit = layer.layer.unit
            rounded[unit.name] = layer.rounded
            layers.append(QuantizedLayer(unit.name, unit.op, layer.error, layer.nearest_error))
            bar.update(1)
    order = {u.name: i for i, u in enumerate(units)}
    layers.sort(key=lambda x: order[x.name])
    model = bytes(with_qdq(view, units, scheme, collected.found(), rounded).SerializeToString())
    judged = feeds(_first(roles.judge, JUDGED_IMAGES))
    divergence = _divergence(run_model(bytes(view.model.SerializeToString()), judged), run_model(model, judged))
    weighted_or_join = {u.name for u in every if u.kind in ("weighted", "join")}
    found = Quantized(
        None,
        scheme.name,
        tuple(layers),
        tuple((n, why) for n, why in left.items() if n in weighted_or_join),
        tuple(_warnings(units, collected, layers, per_channel)),
        divergence,
        len(judged.whole),
        per_channel,
        ranges,
    )
    return model, found


def _warnings(units: Sequence[Unit], ranges: Ranges, layers: Sequence[QuantizedLayer], per_channel: bool) -> list[str]:
    makers = {u.gives: u for u in units}
    found = []
    for name in ranges.seen:
        unit = makers.get(name)
        if unit is None or unit.kind not in ("move", "pool"):
            found += ranges.warnings(name, name if unit is None else unit.name, unit is not None and unit.op == "Conv")
    for layer in layers:
        if layer.error > BAD:
            advice = "exclude= it, or use more calibration images"
            advice = advice if per_channel else "use per_channel=True"
            found.append(f"{layer.name}: its weights on their grid change its output by {layer.error:.1%}: {advice}")
    return found


def _first(images: Calibration, count: int) -> Calibration:
    """At most so many images."""
    return Calibration(tuple(t[:count] for t in images.tensors), images.names) if len(images) > count else images


def _divergence(reference: list[list[Tensor]], others: list[list[Tensor]]) -> float:
    """The mean over the outputs of their squared error over their variance."""
    found = []
    for y, z in zip(zip(*reference, strict=True), zip(*others, strict=True), strict=True):
        if not y[0].is_floating_point() or not y[0].dim():
            continue
        a, b = (torch.cat(v).double() for v in (y, z))
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        found.append(float((a - b).square().sum()) / (len(a) * mean_square_distance(a)))
    return sum(found) / max(len(found), 1)


# --- the float model --------------------------------------------------------------------------------------------------


def _float_form(given: Any, calibration: Any, example: Any) -> tuple[GraphView, FeedsOf]:
    if isinstance(given, nn.Module):
        graph, example = _graph_of(given, calibration, example)
        return float_form(graph, example, as_calibration(calibration, example))
    view = _view_of_file(given)
    images = as_calibration(calibration, _example_of(view, calibration))
    return view, FeedsOf(view, images)


def _view_of_file(path: Any) -> GraphView:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"quantize takes a network or the path of an ONNX file, not {type(path).__name__}")
    source = Path(path)
    if not source.is_file():
        raise InputError(f"there is no ONNX file {source}; give a network, or a file that lmfx.export_onnx wrote")
    view = GraphView(basic_form(source.read_bytes()))
    if not view.inputs:
        raise InputError(f"{source} has no input: give an ONNX file of a network that takes images")
    return view


def file_example(path: str | os.PathLike[str]) -> Any:
    """Zeros of the shapes of an ONNX file's inputs."""
    return _example_of(_view_of_file(path), None)


def float_form(graph: fx.GraphModule, example: Any, images: Calibration) -> tuple[GraphView, FeedsOf]:
    """The view of a graph's float ONNX model, and what makes feeds for it."""
    plain, tensors = bare(graph, example_arguments(example))
    view = view_of(to_onnx_bytes(plain, tensors))
    return view, FeedsOf(view, images, graph)


def _graph_of(net: nn.Module, calibration: Any, example: Any) -> tuple[fx.GraphModule, Any]:
    """A traced graph of a network and its example."""
    from lmfx.stages import trace

    if example is None:
        example = noted(net).example if isinstance(net, fx.GraphModule) else None
        made = made_of(net)
        if example is None and made is not None and made.result is not None:
            example = _zeros(made.result.inputs)
        if example is None:
            example = _first_image(calibration)
    if isinstance(net, fx.GraphModule) and (made_of(net) is not None or noted(net).example is not None):
        return net, example
    return trace(net, example), example


def _zeros(inputs: dict[str, Any]) -> Any:
    from lmfx.planning.saved_files import example_of

    positional, keyword = example_of(inputs)
    return keyword or tuple(positional)


def _first_image(calibration: Any) -> Any:
    if isinstance(calibration, Tensor):
        return calibration[:1]
    raise InputError("quantize cannot tell the network's input from these calibration data: pass example_input=")


def _example_of(view: GraphView, calibration: Any) -> Any:
    """Zeros of the shapes and types that a file says; a free size is that of the calibration tensor."""
    zeros = []
    for name in view.inputs:
        shape = view.shapes[name]
        if min(shape, default=1) < 0:
            if not isinstance(calibration, Tensor) or calibration.dim() != len(shape):
                raise InputError(f"the file's input {name} has free sizes {shape}: pass calibration as one tensor")
            given = (1, *calibration.shape[1:])
            shape = tuple(n if n > 0 else given[i] for i, n in enumerate(shape))
        zeros.append(torch.from_numpy(np.zeros(shape, view.dtypes[name])))
    return zeros[0] if len(zeros) == 1 else tuple(zeros)
