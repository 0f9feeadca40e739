"""Finds what of a float graph can run in 8 bits: *units*, each of which a runtime computes as one.

    weighted     Conv, Gemm, MatMul with constant weights        with the Relu or Clip after it, if that alone reads it
    join         Add, Mul, Concat of values                      the same
    pool         MaxPool, AveragePool, GlobalAveragePool
    pointwise    Sigmoid, LeakyRelu, Relu, Clip
    move         Flatten, Reshape, Transpose, Slice ...          the numbers stay as they are, and so does their range

A *scheme* says what a runtime fuses, and so which values of a unit get a Q/DQ pair:

    onnxruntime  all that a unit reads and what it gives: DQ ─ op ─ Q is one 8-bit op. Activations are uint8 with a zero
                 point, since what a relu gives then has all 256 levels, and the relu itself is the clipping of Q
    tensorrt     what a weighted unit or a pool reads, symmetric int8; of a sum only the operand that does not come
                 straight out of a convolution, because conv + add + relu are one kernel if nothing is between them
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lmfx.int8.graph_view import GraphView
from lmfx.passes.errors import OptionError

__all__ = ["RUNTIMES", "SCHEMES", "Scheme", "Unit", "find_units", "quantized_reads", "scheme_named"]

Kind = Literal["weighted", "join", "pool", "pointwise", "move"]
POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool"})
JOINS = frozenset({"Add", "Mul", "Concat"})
POINTWISE = frozenset({"Sigmoid", "LeakyRelu", "Relu", "Clip"})
MOVES = frozenset(
    {"Flatten", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Gather", "DepthToSpace", "SpaceToDepth"}
)
SAME_RANGE = frozenset({*MOVES, "MaxPool"})


@dataclass(frozen=True)
class Scheme:
    """What a runtime wants of a Q/DQ file."""

    name: str
    symmetric: bool  # activations: int8 without a zero point, else uint8 with one
    outputs: bool  # whether a Q/DQ pair is after a unit as well as before it
    integer_bias: bool
    kinds: frozenset[str]  # of units that can run in 8 bits


SCHEMES = {
    "onnxruntime": Scheme(
        "onnxruntime", False, True, True, frozenset({"weighted", "join", "pool", "pointwise", "move"})
    ),
    "tensorrt": Scheme("tensorrt", True, False, False, frozenset({"weighted", "join", "pool"})),
}


RUNTIMES = (*SCHEMES, "tensorrt_rtx")


def scheme_named(name: str) -> Scheme:
    """The scheme of "onnxruntime" or "tensorrt" (also "tensorrt_rtx"). Raises `OptionError`."""
    found = SCHEMES.get("tensorrt" if name == "tensorrt_rtx" else name) if isinstance(name, str) else None
    if found is None:
        raise OptionError(f"runtime={name!r}: Q/DQ files are written for {', '.join(SCHEMES)} or tensorrt_rtx")
    return found


@dataclass(frozen=True)
class Unit:
    """One op and the activation that a runtime fuses into it. Values by their names in the graph."""

    name: str
    kind: Kind
    op: str
    nodes: tuple[int, ...]  # places in graph.node
    reads: tuple[str, ...]  # values, without constants
    gives: str
    low: float | None = None  # bounds of what the fused activation gives
    high: float | None = None
    weight: str = ""
    bias: str = ""


def find_units(view: GraphView, scheme: Scheme) -> list[Unit]:
    """The units of a graph that the scheme's runtime can compute in 8 bits, in its order."""
    places = {id(node): i for i, node in enumerate(view.graph.node)}
    taken: set[int] = set()
    units = []
    for i, node in enumerate(view.graph.node):
        kind = None if i in taken else _kind(view, node)
        if kind is None or kind not in scheme.kinds or len(node.output) != 1 or node.output[0] not in view.floating:
            continue
        low, high = _bounds(view, node) if kind == "pointwise" else (None, None)
        gives, nodes = node.output[0], [i]
        after = view.readers.get(gives, [])
        if kind in ("weighted", "join") and len(after) == 1 and gives not in view.outputs:
            bounds = _bounds(view, after[0])
            if bounds != (None, None):
                (low, high), gives = bounds, after[0].output[0]
                nodes.append(places[id(after[0])])
        taken.update(nodes)
        reads = tuple(dict.fromkeys(n for n in node.input if n and not view.is_constant(n)))
        weight = node.input[1] if kind == "weighted" else ""
        bias = node.input[2] if kind == "weighted" and len(node.input) > 2 else ""
        units.append(Unit(_name(node), kind, node.op_type, tuple(nodes), reads, gives, low, high, weight, bias))
    return units


def quantized_reads(view: GraphView, unit: Unit, makers: dict[str, Unit], scheme: Scheme) -> Iterator[str]:
    """The values that get a Q/DQ pair before this unit."""
    if scheme.outputs or unit.kind != "join":
        yield from unit.reads
        return
    straight = [n for n in unit.reads if n in makers and makers[n].kind == "weighted" and makers[n].high is None]
    straight = [n for n in straight if makers[n].low is None and len(view.readers[n]) == 1]
    if unit.op == "Add" and straight:
        yield from (n for n in unit.reads if n != straight[0])


def _kind(view: GraphView, node: Any) -> Kind | None:
    op = node.op_type
    if node.domain not in ("", "ai.onnx") or not node.input or view.is_constant(node.input[0]):
        return None
    if op in ("Conv", "Gemm", "MatMul"):
        constant = all(view.is_constant(n) for n in node.input[1:] if n)
        weight = view.shapes.get(node.input[1], ())
        plain = op != "Gemm" or (
            not view.attribute(node, "transA", 0)
            and view.attribute(node, "alpha", 1.0) == 1
            and view.attribute(node, "beta", 1.0) == 1
            and (len(node.input) < 3 or len(view.shapes.get(node.input[2], ())) == 1)
        )
        return "weighted" if constant and plain and (op == "Conv" or len(weight) == 2) else None
    if op in JOINS:
        values = [n for n in node.input if not view.is_constant(n)]
        return "join" if len(values) == len(node.input) and len(set(values)) > (op == "Add") else None
    if op in POOLS:
        return "pool" if len(view.shapes.get(node.input[0], ())) == 4 else None
    if op in POINTWISE:
        return "pointwise" if op not in ("Relu", "Clip") or _bounds(view, node) != (None, None) else None
    if op in MOVES:
        return "move" if all(view.is_constant(n) for n in node.input[1:] if n) else None
    return None


def _bounds(view: GraphView, node: Any) -> tuple[float | None, float | None]:
    """What a Relu or a Clip with constant bounds clips to."""
    if node.op_type == "Relu":
        return 0.0, None
    if node.op_type != "Clip" or not all(view.is_constant(n) for n in node.input[1:] if n):
        return None, None
    low, high = (float(view.array(n).reshape(-1)[0]) if n else None for n in [*node.input[1:], "", ""][:2])
    return low, high


def _name(node: Any) -> str:
    return str(node.name or node.output[0])
