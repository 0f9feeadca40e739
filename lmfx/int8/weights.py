"""Puts the weights of an ONNX graph on their grid, each layer by the Gram of what it reads.

    columns W, Gram G and mean m of the layer's patches on the calibration images     (`lmfx.passes.fit.feature_rows`)
    Q = round_by_gram(W, G)      b' = b - (Q - W)' m                                  (`lmfx.passes.fit.grid_rounding`)

Layers that read the same value in the same way share a Gram. Sums are made in as many passes over the images as their
memory allows; a layer of too many unknowns is rounded to the nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.int8.activations import Feeds, values_inside
from lmfx.int8.graph_view import GraphView
from lmfx.int8.qdq import Rounded, out_axis
from lmfx.int8.units import Unit
from lmfx.passes.fit import feature_rows
from lmfx.passes.fit.grid_rounding import bias_change, gram_error, nearest, round_by_gram, scales_of
from lmfx.passes.fit.normal_equations import Sums

__all__ = ["RoundedLayer", "UnitLayer", "layer_of", "round_weights"]

MOST_UNKNOWNS = 4700
SUM_BYTES = 1 << 30  # of Grams at a time
SAMPLES_AN_UNKNOWN, LEAST_SAMPLES, MOST_SAMPLES = 8, 4096, 20000
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class UnitLayer:
    """A weighted unit as a torch layer without padding; `pads` (F.pad's order) come before it."""

    unit: Unit
    module: Any  # on the meta device
    pads: tuple[int, ...]
    weight: Tensor  # in torch's layout
    bias: Tensor | None
    axis: int  # of the output channels, in the file
    key: tuple[Any, ...]  # equal for layers of one Gram

    @property
    def unknowns(self) -> int:
        return feature_rows.unknowns_of(self.module)

    @property
    def gram_bytes(self) -> int:
        return 8 * feature_rows.blocks_of(self.module) * (self.unknowns + 1) ** 2


@dataclass(frozen=True)
class RoundedLayer:
    """A weight on its grid, and by how much the layer's output is off, relative to its own size: with these weights and
    with the nearest ones (NaN where there is no Gram)."""

    layer: UnitLayer
    rounded: Rounded
    error: float
    nearest_error: float


def layer_of(view: GraphView, unit: Unit) -> UnitLayer:
    """The layer of a weighted unit."""
    node = view.graph.node[unit.nodes[0]]
    weight = torch.from_numpy(view.array(unit.weight).copy())
    bias = torch.from_numpy(view.array(unit.bias).copy()) if unit.bias else None
    if node.op_type != "Conv":
        axis = out_axis(view, node)
        weight = weight if axis == 0 else weight.T
        module: Any = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        return UnitLayer(unit, module, (), weight, bias, axis, (unit.reads[0], "linear"))
    dims, groups = weight.dim() - 2, int(view.attribute(node, "group", 1))
    stride = tuple(view.attribute(node, "strides", [1] * dims))
    dilation = tuple(view.attribute(node, "dilations", [1] * dims))
    pads = _pads(view, node, unit, stride, dilation, tuple(weight.shape[2:]))
    flat = tuple(p for i in reversed(range(dims)) for p in (pads[i], pads[dims + i]))
    module = CONVS[dims](
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), stride, 0, dilation, groups, device="meta"
    )
    key = (unit.reads[0], tuple(weight.shape[2:]), stride, dilation, flat, groups)
    return UnitLayer(unit, module, flat, weight, bias, 0, key)


def _pads(
    view: GraphView, node: Any, unit: Unit, stride: Sequence[int], dilation: Sequence[int], kernel: Sequence[int]
) -> list[int]:
    """Padding before in each dimension, then after."""
    auto = view.attribute(node, "auto_pad", b"NOTSET")
    mode = auto.decode() if isinstance(auto, bytes) else str(auto)
    if mode in ("NOTSET", "VALID", ""):
        return list(view.attribute(node, "pads", [0] * 2 * len(kernel)))
    before, after = [], []
    for n, s, d, k in zip(view.shapes[unit.reads[0]][2:], stride, dilation, kernel, strict=True):
        total = max((ceil(n / s) - 1) * s + d * (k - 1) + 1 - n, 0)
        low = total // 2 if mode == "SAME_UPPER" else total - total // 2
        before.append(low)
        after.append(total - low)
    return [*before, *after]


def round_weights(
    view: GraphView, units: Sequence[Unit], feeds: Feeds | None, per_channel: bool = True
) -> Iterator[RoundedLayer]:
    """Every weighted unit's weight on its grid; without `feeds` all are rounded to the nearest."""
    layers = [layer_of(view, u) for u in units if u.kind == "weighted"]
    groups: dict[tuple[Any, ...], list[UnitLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.key, []).append(layer)
    waiting = list(groups.values())
    while waiting:
        taken: list[list[UnitLayer]] = []
        held = 0
        while waiting and (not taken or held + waiting[0][0].gram_bytes <= SUM_BYTES):
            group = waiting.pop(0)
            held += group[0].gram_bytes if group[0].unknowns <= MOST_UNKNOWNS else 0
            taken.append(group)
        summed = [g[0] for g in taken if g[0].unknowns <= MOST_UNKNOWNS] if feeds is not None else []
        sums = _sums(view, summed, feeds) if summed and feeds is not None else {}
        for group in taken:
            made = sums.pop(group[0].key, None)
            gram, mean = (None, None) if made is None else _centred(made)
            del made
            for layer in group:
                yield _rounded(layer, gram, mean, per_channel)


def _sums(view: GraphView, layers: Sequence[UnitLayer], feeds: Feeds) -> dict[tuple[Any, ...], Sums]:
    """Sums over sampled patches of what each layer reads."""
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cpu")
    sums = {x.key: Sums.zeros(feature_rows.blocks_of(x.module), x.unknowns + 1, {}, device) for x in layers}
    names = list(dict.fromkeys(x.unit.reads[0] for x in layers))
    for values in values_inside(view, feeds, names):
        for layer in layers:
            x = torch.from_numpy(values[layer.unit.reads[0]])
            found = sums[layer.key]
            want = min(max(SAMPLES_AN_UNKNOWN * layer.unknowns, LEAST_SAMPLES), MOST_SAMPLES)
            each = ceil(want / (len(feeds) * len(x)))
            padded = F.pad(x, layer.pads) if layer.pads else x
            pixels = _pixels(layer.module, padded)
            order = torch.rand(len(x), pixels, generator=generator).topk(min(each, pixels)).indices
            rows = feature_rows.features(layer.module, padded, order).float()
            found.add(F.pad(rows, (0, 1), value=1.0), {})
            found.n += rows.shape[1]
    return sums


def _pixels(module: Any, x: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return feature_rows.pixels_of(module, tuple(x.shape))
    sizes = zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
    result = 1
    for n, k, s, d in sizes:
        result *= (n - d * (k - 1) - 1) // s + 1
    return result


def _centred(sums: Sums) -> tuple[Tensor, Tensor]:
    """(the Gram of features less their mean (blocks, m, m), the mean (blocks, m)); only blocks on and above the
    diagonal were summed."""
    xx = sums.xx.triu() + sums.xx.triu(1).transpose(1, 2)
    mean = xx[:, :-1, -1] / sums.n
    gram = xx[:, :-1, :-1] - sums.n * mean[:, :, None] * mean[:, None]
    return gram / sums.n, mean


def _rounded(layer: UnitLayer, gram: Tensor | None, mean: Tensor | None, per_channel: bool) -> RoundedLayer:
    columns = feature_rows.columns_of(layer.module, layer.weight)
    scales = scales_of(columns, per_channel)
    plain = nearest(columns, scales)
    numbers, bias = plain, layer.bias
    error = nearest_error = float("nan")
    if gram is not None and mean is not None:
        numbers = round_by_gram(columns, gram, scales)
        size = float(gram_error(gram, columns).sum())
        off = [float(gram_error(gram, n * scales - columns).sum()) for n in (numbers, plain)]
        error, nearest_error = ((v / size) ** 0.5 if size > 0 else 0.0 for v in off)
        change = bias_change(mean, numbers * scales - columns).flatten()
        old = torch.zeros_like(change) if bias is None else bias.double()
        bias = (old + change).float() if layer.unit.op != "MatMul" else None
    weight = feature_rows.weight_of(layer.module, numbers)
    scale = scales[:, 0].flatten().numpy() if per_channel else np.asarray(float(scales.flatten()[0]))
    return RoundedLayer(layer, _in_file(layer, weight, scale, bias), error, nearest_error)


def _in_file(layer: UnitLayer, weight: Tensor, scale: np.ndarray, bias: Tensor | None) -> Rounded:
    numbers = (weight if layer.axis == 0 else weight.T).numpy().astype(np.int8)
    return Rounded(numbers, scale, layer.axis, None if bias is None else bias.numpy())
