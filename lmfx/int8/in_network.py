"""Gives an int8 graph the layout that its values have inside a network in ONNX Runtime: 8 bits, channels last.

ONNX Runtime runs 8-bit convolutions (and pools next to them) channels last, and puts a transpose where that begins and
ends. Alone, an op would pay both, or not be turned round at all. So it is optimised between stand-ins for its
neighbours, which are taken out again:

    Conv 1x1 -> v -> op -> w -> Conv 1x1        =>        v (8 bits, channels last) -> op -> w (the same)
    stand-in                    stand-in

What stays float in between is timed with its conversions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmfx.int8.forms import SMALLEST
from lmfx.int8.graph_view import GraphView
from lmfx.int8.qdq import with_qdq
from lmfx.int8.units import Scheme, Unit, find_units

__all__ = ["conversion_model", "has_blocked_layout", "in_int8_network"]

CHANNELS = 16  # of stand-ins
BLOCK, BLOCKED = 16, "com.microsoft.nchwc"  # channels of a block, and the domain of the ops on it
BEFORE, AFTER = "lmfx_before_", "lmfx_after_"


def in_int8_network(
    view: GraphView,
    scheme: Scheme,
    chosen: Callable[[Unit], bool],
    ends: Sequence[str],
    optimize: Callable[[bytes], Any],
) -> Any:
    """The optimised model of a float graph, `chosen` units of it in 8 bits, with the values of `ends` as neighbours in
    8 bits give and take them. It must be run without further optimisation."""
    onnx = view.onnx
    model = onnx.ModelProto()
    model.CopyFrom(view.model)
    shaped = [n for n in ends if len(view.shapes[n]) == 4 and view.shapes[n][1] >= SMALLEST]
    around = _with_neighbours(onnx, model, view, shaped)
    inner = GraphView(model)
    units = [u for u in find_units(inner, scheme) if u.name.startswith((BEFORE, AFTER)) or chosen(u)]
    outer = [around.get(n, n) for n in ends]
    made = optimize(with_qdq(inner, units, scheme, byte_ends=outer).SerializeToString())
    for name in shaped:
        _cut(onnx, made, around[name], view.shapes[name], name in view.inputs)
    used = {n for node in made.graph.node for n in node.input}
    for tensor in [t for t in made.graph.initializer if t.name not in used]:
        made.graph.initializer.remove(tensor)
    del made.graph.value_info[:]
    return made


def _with_neighbours(onnx: Any, model: Any, view: GraphView, names: Sequence[str]) -> dict[str, str]:
    """Adds a 1 x 1 conv before each of these inputs and after each of these outputs; its outer value for each."""
    helper, graph = onnx.helper, model.graph
    info, kind = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    outer = {}
    for i, name in enumerate(names):
        batch, channels, *size = view.shapes[name]
        before = name in view.inputs
        prefix = f"{BEFORE if before else AFTER}{i}"
        outer[name] = f"{prefix}_outer"
        shape = (channels, CHANNELS, 1, 1) if before else (CHANNELS, channels, 1, 1)
        graph.initializer.append(onnx.numpy_helper.from_array(np.full(shape, 0.01, np.float32), f"{prefix}_weight"))
        values = graph.input if before else graph.output
        values.remove(next(v for v in values if v.name == name))
        values.append(info(outer[name], kind, [batch, CHANNELS, *size]))
        reads, gives = (outer[name], name) if before else (name, outer[name])
        node = helper.make_node("Conv", [reads, f"{prefix}_weight"], [gives], name=prefix, kernel_shape=[1, 1])
        if before:
            graph.node.insert(0, node)
        else:
            graph.node.append(node)
    return outer


def _cut(onnx: Any, model: Any, outer: str, shape: tuple[int, ...], before: bool) -> None:
    """Takes the stand-in next to the end `outer` out, with the transpose between them; the graph now ends (or, `before`
    it, begins) at the stand-in's other side."""
    graph, at = model.graph, outer
    ends = graph.input if before else graph.output
    while True:
        node = next(n for n in graph.node if at in (n.input if before else n.output))
        graph.node.remove(node)
        at = node.output[0] if before else node.input[0]
        if node.op_type != "Transpose":
            break
    ends.remove(next(v for v in ends if v.name == outer))
    if all(v.name != at for v in ends):
        ends.append(_bytes_of(onnx, node, at, shape))


def _bytes_of(onnx: Any, conv: Any, name: str, shape: tuple[int, ...]) -> Any:
    batch, channels, *size = shape
    last = any(a.name == "channels_last" and a.i for a in conv.attribute)
    sizes = [batch, *size, channels] if last else [batch, channels, *size]
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, sizes)


def has_blocked_layout(onnx: Any, optimize: Callable[[bytes], Any]) -> bool:
    """Whether ONNX Runtime gives float convolutions a blocked layout (NCHWc) on this processor."""
    info, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.ones((BLOCK, BLOCK, 1, 1), np.float32), "w")
    ends = [[info(name, kind, [1, BLOCK, 4, 4])] for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Conv", ["x", "w"], ["y"])], "conv", *ends, [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return any(n.domain == BLOCKED for n in optimize(model.SerializeToString()).graph.node)


def conversion_model(onnx: Any, shape: tuple[int, ...], to_int8: bool, blocked: bool) -> Any:
    """A change between 8 bits, channels last, and float in the layout of float convolutions (`blocked` or plain), as a
    model of its own."""
    helper, proto = onnx.helper, onnx.TensorProto
    image = len(shape) == 4 and shape[1] >= SMALLEST
    blocked = blocked and image and shape[1] % BLOCK == 0
    last = [shape[0], *shape[2:], shape[1]] if image else list(shape)
    parameters = ["scale", "zero"]
    nodes: list[Any] = []
    at = "x"

    def add(op: str, inputs: list[str], **attributes: Any) -> None:
        nonlocal at
        nodes.append(helper.make_node(op, inputs, [f"v{len(nodes)}"], **attributes))
        at = f"v{len(nodes) - 1}"

    if to_int8:
        if blocked:
            add("ReorderOutput", [at], domain=BLOCKED, channels=shape[1])
        add("QuantizeLinear", [at, *parameters])
        if image:
            add("Transpose", [at], perm=[0, 2, 3, 1])
        ends = (proto.FLOAT, list(shape)), (proto.UINT8, last)
    else:
        if image:
            add("Transpose", [at], perm=[0, 3, 1, 2])
        add("DequantizeLinear", [at, *parameters])
        if blocked:
            add("ReorderInput", [at], domain=BLOCKED)
        ends = (proto.UINT8, last), (proto.FLOAT, list(shape))
    graph = helper.make_graph(
        nodes,
        "conversion",
        [helper.make_tensor_value_info("x", *ends[0])],
        [helper.make_tensor_value_info(at, ends[1][0], None)],
        [
            onnx.numpy_helper.from_array(np.asarray(0.01, np.float32), "scale"),
            onnx.numpy_helper.from_array(np.asarray(0, np.uint8), "zero"),
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(BLOCKED, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
