"""Writes QuantizeLinear and DequantizeLinear into a graph: around units that run in 8 bits, and for their weights.

    x ─ Q ─ DQ ─┐
    W (int8) DQ ┴─ Conv ─ Relu ─ Q ─ DQ ─ ...        value = scale * (number - zero point)
    b (int32) DQ ┘                                   scale of b = scale of x * scale of W

Ranges come with a value each; moves and max pools give what they read, so their values share one. Without ranges (for
timing) each value has one that fits its activation. A range always has 0, so padding is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmfx.int8.graph_view import GraphView
from lmfx.int8.units import SAME_RANGE, Scheme, Unit, find_units, quantized_reads

__all__ = ["Range", "Rounded", "grid_of", "out_axis", "quantized_values", "with_qdq"]

QDQ_OPSET = 13  # the first with scales by channel
MOST_BIAS = 2.0**30
LEAST_SCALE = 1e-12
Range = tuple[float, float]


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid: whole numbers in the layout of the file, a scale for all or for each output channel along
    `axis`, and a bias."""

    numbers: np.ndarray
    scale: np.ndarray
    axis: int
    bias: np.ndarray | None


def grid_of(low: float, high: float, symmetric: bool) -> tuple[float, int]:
    """(scale, zero point) of a range: int8 without a zero point, or uint8."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return max(max(-low, high) / 127, LEAST_SCALE), 0
    scale = max((high - low) / 255, LEAST_SCALE)
    return scale, int(np.clip(round(-low / scale), 0, 255))


def quantized_values(view: GraphView, units: Sequence[Unit], scheme: Scheme, ends: bool = False) -> list[str]:
    """The values that get a Q/DQ pair if these units run in 8 bits; with `ends` the graph's inputs and outputs too."""
    makers = {u.gives: u for u in units}
    found = dict.fromkeys(n for u in units for n in quantized_reads(view, u, makers, scheme) if n in view.floating)
    if scheme.outputs:
        found |= dict.fromkeys(u.gives for u in units)
    if ends:
        found |= dict.fromkeys(n for n in (*view.inputs, *view.outputs) if n in view.floating)
    return list(found)


def with_qdq(
    view: GraphView,
    units: Sequence[Unit],
    scheme: Scheme,
    ranges: Mapping[str, Range] | None = None,
    rounded: Mapping[str, Rounded] | None = None,
    byte_ends: Collection[str] = (),
) -> Any:
    """A copy of the model with Q/DQ pairs around `units`. `rounded` has weights by the names of their units.

    Inputs and outputs in `byte_ends` are themselves in 8 bits: what a neighbour in a network reads and gives.
    """
    onnx = view.onnx
    model = onnx.ModelProto()
    model.CopyFrom(view.model)
    del model.graph.value_info[:]
    writer = _Writer(view, model, scheme, units, ranges, byte_ends)
    values = quantized_values(view, units, scheme)
    values += [n for n in byte_ends if n not in values]
    writer.grids(values)
    for unit in units:
        if unit.kind == "weighted":
            writer.weight(unit, None if rounded is None else rounded.get(unit.name))
    writer.write(values)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, QDQ_OPSET)
    return model


class _Writer:
    def __init__(
        self,
        view: GraphView,
        model: Any,
        scheme: Scheme,
        units: Sequence[Unit],
        ranges: Mapping[str, Range] | None,
        byte_ends: Collection[str],
    ) -> None:
        self.view, self.model, self.scheme, self.units, self.ranges = view, model, scheme, units, ranges
        self.onnx, self.helper = view.onnx, view.onnx.helper
        self.byte_ends = set(byte_ends)
        self.every = find_units(view, scheme)
        self.made: dict[str, Unit] = {u.gives: u for u in self.every}
        self.grid: dict[str, tuple[float, int]] = {}
        self.weights: list[Any] = []  # DQ nodes, which come first
        self.known: set[str] = set()  # constants that are there
        proto = self.onnx.TensorProto
        self.kind = proto.INT8 if scheme.symmetric else proto.UINT8
        self.number: Any = np.int8 if scheme.symmetric else np.uint8

    def grids(self, values: Sequence[str]) -> None:
        """A grid for every value; those that only are moved have that of what they are made of."""
        source = {}
        for unit in self.units:
            if unit.op in SAME_RANGE and unit.reads:
                source[unit.gives] = unit.reads[0]
        for value in values:
            root = value
            while root in source:
                root = source[root]
            if root not in self.grid:
                self.grid[root] = grid_of(*self.range(root), self.scheme.symmetric)
            self.grid[value] = self.grid[root]

    def range(self, value: str) -> Range:
        """The range of a value, within the bounds of the activation that gives it."""
        unit = self.made.get(value)
        low, high = (-1.0, 1.0) if self.ranges is None else self.ranges[value]
        if unit is not None and unit.low is not None:
            low = max(low, unit.low)
        if unit is not None and unit.high is not None:
            high = min(high, unit.high)
        return low, max(high, low)

    def weight(self, unit: Unit, rounded: Rounded | None) -> None:
        node = self.model.graph.node[unit.nodes[0]]
        if rounded is None:
            shape = self.view.shapes[unit.weight]
            channels = shape[out_axis(self.view, node)]
            rounded = Rounded(
                np.ones(shape, np.int8), np.full(channels, 0.01), out_axis(self.view, node), np.zeros(channels)
            )
        scale = np.maximum(np.asarray(rounded.scale, np.float64), LEAST_SCALE)
        step, _ = self.grid[unit.reads[0]]
        bias = rounded.bias
        if bias is not None and self.scheme.integer_bias:  # so small a step that a bias has no room: a coarser one
            needed = np.abs(bias) / (step * MOST_BIAS)
            coarser = np.maximum(scale, needed if scale.ndim else needed.max())
            numbers = np.clip(np.round(rounded.numbers * _along(scale / coarser, rounded)), -127, 127)
            rounded, scale = Rounded(numbers, coarser, rounded.axis, bias), coarser
        name = f"{unit.weight}.{unit.name}"
        scale_name = self.constant(f"{name}.scale", scale.astype(np.float32))
        zero = self.constant(f"{name}.zero", np.zeros(scale.shape, np.int8))
        number = self.constant(f"{name}.int8", np.asarray(rounded.numbers).astype(np.int8))
        axis = {"axis": rounded.axis} if scale.ndim else {}
        node.input[1] = self.dequantized(f"{name}.dq", [number, scale_name, zero], **axis)
        if bias is None:
            return
        if self.scheme.integer_bias:
            steps = (scale.astype(np.float32) * np.float32(step)).astype(np.float32)
            numbers = np.round(np.asarray(bias, np.float64) / steps).astype(np.int64).clip(-(2**31), 2**31 - 1)
            steps_name = self.constant(f"{name}.bias.scale", steps)
            zeros = self.constant(f"{name}.bias.zero", np.zeros(steps.shape, np.int32))
            number = self.constant(f"{name}.bias.int32", numbers.astype(np.int32))
            bias_name = self.dequantized(
                f"{name}.bias.dq", [number, steps_name, zeros], **({"axis": 0} if axis else {})
            )
        else:
            bias_name = self.constant(f"{name}.bias", np.asarray(bias, np.float32))
        if len(node.input) > 2:
            node.input[2] = bias_name
        elif node.op_type in ("Conv", "Gemm"):
            node.input.append(bias_name)
        # a MatMul has none: its Add is another node, and keeps its own

    def write(self, values: Sequence[str]) -> None:
        """The pairs, each after what gives its value; units read them, and float ops where there is nothing else."""
        graph = self.model.graph
        in_unit = {i: u for u in self.units for i in u.nodes}
        makers = {u.gives: u for u in self.units}
        wanted = {id(u): set(quantized_reads(self.view, u, makers, self.scheme)) for u in self.units}
        quantized = set(values)
        for i, node in enumerate(graph.node):
            unit = in_unit.get(i)
            for at, name in enumerate(node.input):
                if name not in quantized:
                    continue
                bytes_only = name in self.byte_ends and name in self.view.inputs
                from_bytes = self.scheme.outputs and (name in makers or bytes_only)
                if from_bytes or (unit is not None and name in wanted[id(unit)]):
                    node.input[at] = f"{name}.dq"
        if self.scheme.outputs:
            self.keep_float([graph.node[u.nodes[0]] for u in self.every if u.nodes[0] not in in_unit])
        nodes = list(self.weights)
        for name in values:
            if name in self.view.inputs:
                nodes += self.pair(name)
        for node in graph.node:
            nodes.append(node)
            for name in list(node.output):
                if name in quantized:
                    nodes += self.pair(name)
        del graph.node[:]
        graph.node.extend(nodes)
        self.ends(quantized)
        used = {n for node in graph.node for n in node.input} | {v.name for v in graph.output}
        for i in reversed(range(len(graph.initializer))):
            if graph.initializer[i].name not in used:
                del graph.initializer[i]

    def keep_float(self, layers: Sequence[Any]) -> None:
        """Puts an activation after float layers that read 8 bits, which changes nothing and is computed with them: ONNX
        Runtime would quantize their weights itself, unless it finds a LeakyRelu (of slope 0, a Relu; of 1, nothing)."""
        graph = self.model.graph
        for node in layers:
            if node.op_type not in ("Conv", "Gemm") or not node.input[0].endswith(".dq"):
                continue
            name = node.output[0]
            after = [n for n in graph.node if name in n.input]
            slope = self.helper.make_attribute("alpha", 0.0)
            if len(after) == 1 and after[0].op_type == "Relu" and name not in self.view.outputs:
                after[0].op_type = "LeakyRelu"
                after[0].attribute.append(slope)
                continue
            slope.f = 1.0
            inner = f"{name}.float"
            node.output[0] = inner
            same = self.helper.make_node("LeakyRelu", [inner], [name], name=inner)
            same.attribute.append(slope)
            graph.node.insert(list(graph.node).index(node) + 1, same)

    def pair(self, name: str) -> list[Any]:
        """Q and DQ of a value; of an input in 8 bits only DQ, of such an output only Q."""
        scale, zero = self.grid[name]
        parameters = [
            self.constant(f"{name}.q.scale", np.asarray(scale, np.float32)),
            self.constant(f"{name}.q.zero", np.asarray(zero, self.number)),
        ]
        q, dq = f"{name}.q", f"{name}.dq"
        if name in self.byte_ends and name in self.view.inputs:
            return [self.helper.make_node("DequantizeLinear", [name, *parameters], [dq], name=dq)]
        first = self.helper.make_node("QuantizeLinear", [name, *parameters], [q], name=q)
        if not any(dq in node.input for node in self.model.graph.node) and name not in self.view.outputs:
            return [first] if name in self.byte_ends else []
        return [first, self.helper.make_node("DequantizeLinear", [q, *parameters], [dq], name=dq)]

    def ends(self, quantized: set[str]) -> None:
        """Outputs keep their names and are read after their Q/DQ pairs; those in 8 bits are what Q gives."""
        graph = self.model.graph
        for value in graph.input:
            if value.name in self.byte_ends:
                value.type.tensor_type.elem_type = self.kind
        for value in graph.output:
            name = value.name
            if name not in quantized:
                continue
            inner, read = f"{name}.inner", f"{name}.q" if name in self.byte_ends else f"{name}.dq"
            for node in graph.node:
                for names in (node.input, node.output):
                    for i, old in enumerate(names):
                        if old == name:
                            names[i] = inner
                        elif old == read:
                            names[i] = name
            if name in self.byte_ends:
                value.type.tensor_type.elem_type = self.kind
                for node in [n for n in graph.node if n.op_type == "DequantizeLinear" and n.output[0] == f"{name}.dq"]:
                    if not any(node.output[0] in n.input for n in graph.node):
                        graph.node.remove(node)

    def constant(self, name: str, values: np.ndarray) -> str:
        if name not in self.known:
            self.known.add(name)
            values = np.ascontiguousarray(values).reshape(values.shape)  # which makes no array of no dimension a vector
            self.model.graph.initializer.append(self.onnx.numpy_helper.from_array(values, name))
        return name

    def dequantized(self, name: str, inputs: list[str], **attributes: Any) -> str:
        self.weights.append(self.helper.make_node("DequantizeLinear", inputs, [name], name=name, **attributes))
        return name


def _along(scale: np.ndarray, rounded: Rounded) -> np.ndarray:
    if not scale.ndim:
        return scale
    shape = [1] * np.asarray(rounded.numbers).ndim
    shape[rounded.axis] = -1
    return scale.reshape(shape)


def out_axis(view: GraphView, node: Any) -> int:
    """The axis of the output channels of a weight."""
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and view.attribute(node, "transB", 0) else 1
