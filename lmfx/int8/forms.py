"""Decides which units of a network run in 8 bits and which stay float, from measured times: a minimum cut.

    cost of a network = sum of its units, each in its form      measured alone, as inside a network
                      + a conversion wherever the form changes  DQ and the change of layout one way, Q and it the other

A depthwise conv may be slower in 8 bits than in float, and still be faster than with two conversions around it; a pool
between two convs is decided by them. All that is one choice, made exactly (`lmfx.passes.solve.minimum_cut`). What is no
unit stays float. Times are measured once for each configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmfx.int8.graph_view import GraphView, view_of
from lmfx.int8.qdq import with_qdq
from lmfx.int8.units import Scheme, Unit, find_units
from lmfx.passes.solve.minimum_cut import choose_forms

__all__ = ["SMALLEST", "FormTimes", "Forms", "UnitForm", "byte_ends_of", "made_up_int8", "unit_model"]

SMALLEST = 16  # channels: a value with fewer comes in float (an image), and in no layout but the plain one


@dataclass(frozen=True)
class UnitForm:
    """A unit with its times in ms, without conversions, and what was chosen."""

    unit: Unit
    int8: float
    float32: float
    quantized: bool

    def __str__(self) -> str:
        form = "int8" if self.quantized else "float"
        return f"{self.unit.name}: {self.unit.op}, int8 {self.int8:.4f} ms, float {self.float32:.4f} ms: {form}"


@dataclass
class FormTimes:
    """Measures the float ONNX model of a unit (bytes) as it runs inside a network, as it is or in 8 bits, and the
    `conversion` of a value (its shape, whether to 8 bits)."""

    float32: Callable[[bytes], float]
    int8: Callable[[bytes], float]
    conversion: Callable[[tuple[int, ...], bool], float]
    known: dict[Any, float] = field(default_factory=dict)


class Forms:
    """Chooses forms for graphs, and remembers what was measured."""

    def __init__(self, scheme: Scheme, times: FormTimes) -> None:
        self.scheme, self.times = scheme, times

    def choose(self, view: GraphView, byte_ends: Sequence[str] = ()) -> list[UnitForm]:
        """Every unit of a graph with its form. Values in `byte_ends` come or go in 8 bits."""
        units = find_units(view, self.scheme)
        int8, float32 = [], []
        for unit in units:
            a, b = (0.0, 0.0) if unit.kind == "move" else (self.unit_ms(view, unit, k) for k in (True, False))
            int8.append(a)
            float32.append(b)
        chosen = choose_forms([*int8, math.inf, 0.0], [*float32, 0.0, math.inf], self._edges(view, units, byte_ends))
        return [UnitForm(u, a, b, c) for u, a, b, c in zip(units, int8, float32, chosen[: len(units)], strict=True)]

    def _edges(
        self, view: GraphView, units: list[Unit], byte_ends: Sequence[str]
    ) -> list[tuple[int, int, float, float]]:
        """(maker, reader, cost of int8 to float, of float to int8) of every value between two parts. All float ops are
        one part, and all that is outside in 8 bits another."""
        count = len(units)
        always_float, outside = count, count + 1
        own = {i: at for at, u in enumerate(units) for i in u.nodes}
        maker = {n: own.get(i, always_float) for i, node in enumerate(view.graph.node) for n in node.output}
        readers: dict[str, set[int]] = {}
        for i, node in enumerate(view.graph.node):
            for name in node.input:
                if name in view.floating and not view.is_constant(name):
                    readers.setdefault(name, set()).add(own.get(i, always_float))
        for name in view.outputs:
            if name in byte_ends:
                readers.setdefault(name, set()).add(outside)
            else:
                readers.setdefault(name, set()).add(always_float)
        edges = []
        for name, found in readers.items():
            made = outside if name in view.inputs and name in byte_ends else maker.get(name, always_float)
            for reader in sorted(found - {made}):
                edges.append((made, reader, self.conversion(view, name, False), self.conversion(view, name, True)))
        return edges

    def unit_ms(self, view: GraphView, unit: Unit, int8: bool) -> float:
        """The time of a unit alone, as inside a network."""
        key = (int8, _signature(view, unit))
        if key not in self.times.known:
            model = unit_model(view, unit)
            measure = self.times.int8 if int8 else self.times.float32
            self.times.known[key] = measure(model.SerializeToString())
        return self.times.known[key]

    def conversion(self, view: GraphView, name: str, to_int8: bool) -> float:
        """The time of a conversion of a value; 0 where its size is not known."""
        shape = view.shapes.get(name, ())
        if not shape or min(shape) < 1:
            return 0.0
        key = ("convert", shape, to_int8)
        if key not in self.times.known:
            self.times.known[key] = self.times.conversion(shape, to_int8)
        return self.times.known[key]


def byte_ends_of(view: GraphView) -> list[str]:
    """The ends of a small graph that a neighbour in a network has in 8 bits: all but an image."""
    ends = [n for n in (*view.inputs, *view.outputs) if n in view.floating and view.shapes.get(n)]
    return [n for n in ends if not (n in view.inputs and len(view.shapes[n]) == 4 and view.shapes[n][1] < SMALLEST)]


def made_up_int8(model: bytes, scheme: Scheme, inside: bool) -> bytes:
    """A float model with all of its units in 8 bits, weights and ranges made up; `inside` a network its ends are in 8
    bits as well."""
    view = view_of(model)
    ends = byte_ends_of(view) if inside else ()
    return bytes(with_qdq(view, find_units(view, scheme), scheme, byte_ends=ends).SerializeToString())


def unit_model(view: GraphView, unit: Unit) -> Any:
    """The model of one unit alone."""
    onnx = view.onnx
    kind = onnx.TensorProto.FLOAT
    model = onnx.ModelProto(ir_version=view.model.ir_version, producer_name="lmfx")
    model.opset_import.extend(view.model.opset_import)
    model.graph.name = "unit"
    nodes = [view.graph.node[i] for i in unit.nodes]
    model.graph.node.extend(nodes)
    info = onnx.helper.make_tensor_value_info
    model.graph.input.extend([info(n, kind, list(view.shapes[n])) for n in unit.reads])
    model.graph.output.append(info(unit.gives, kind, list(view.shapes[unit.gives])))
    used = dict.fromkeys(n for node in nodes for n in node.input if view.is_constant(n))
    model.graph.initializer.extend([view.constants[n] for n in used])
    return model


def _signature(view: GraphView, unit: Unit) -> tuple[Any, ...]:
    """What the time of a unit depends on."""
    parts: list[Any] = []
    for i in unit.nodes:
        node = view.graph.node[i]
        attributes = sorted((a.name, a.SerializeToString()) for a in node.attribute)
        parts.append((node.op_type, tuple(attributes), tuple(view.shapes.get(n) for n in node.input)))
    return (tuple(parts), len(set(unit.reads)), unit.low, unit.high)
