"""Gives a workload the blocked layout (NCHWc) that its values have inside a network in ONNX Runtime.

Around an isolated conv ONNX Runtime reorders the input and the output, which may take as long as the conv; and it does
not fuse an add whose other operand comes from outside. In a network neither happens. So the workload is optimised
between stand-ins for its neighbours, which are taken out again:

    stand-in q0 -> Conv 1x1 -> v0 ─┐                          v0 (NCHWc) ─┐
    stand-in q1 -> Conv 1x1 -> v1 ─┴─> op -> output     =>    v1 (NCHWc) ─┴─> op -> output (NCHWc)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["in_network"]

STAND_IN_CHANNELS = 16
SMALLEST = 16  # inputs with fewer channels (an image) are read in NCHW also in a network


def in_network(model: bytes, optimize: Callable[[bytes], Any]) -> Any:
    """The optimised ModelProto without the reorders at its ends. `optimize` runs ONNX Runtime's graph optimisations.

    Inputs are renamed and may have more channels (padded to the block). The result must be run without further
    optimisation.
    """
    import onnx

    proto = onnx.load_from_string(model)
    stand_ins = _add_neighbours(onnx, proto)
    optimized = optimize(proto.SerializeToString())
    _remove_neighbours(onnx, optimized, stand_ins)
    return optimized


def _add_neighbours(onnx: Any, proto: Any) -> list[str]:
    helper, graph = onnx.helper, proto.graph
    stand_ins = []
    nodes = []
    for i, value in enumerate(list(graph.input)):
        kind = value.type.tensor_type
        shape = [d.dim_value for d in kind.shape.dim]
        if kind.elem_type != onnx.TensorProto.FLOAT or len(shape) != 4 or shape[1] < SMALLEST:
            continue
        name, weight = f"lmfx_stand_in_{i}", f"lmfx_weight_{i}"
        graph.input.remove(value)
        graph.input.append(
            helper.make_tensor_value_info(name, kind.elem_type, [shape[0], STAND_IN_CHANNELS, *shape[2:]])
        )
        count = shape[1] * STAND_IN_CHANNELS
        graph.initializer.append(
            helper.make_tensor(weight, kind.elem_type, [shape[1], STAND_IN_CHANNELS, 1, 1], [0.01] * count)
        )
        nodes.append(helper.make_node("Conv", [name, weight], [value.name], kernel_shape=[1, 1]))
        # a second reader keeps the op from being fused into the stand-in
        graph.output.append(helper.make_tensor_value_info(value.name, kind.elem_type, shape))
        stand_ins.append(name)
    for node in reversed(nodes):
        graph.node.insert(0, node)
    return stand_ins


def _remove_neighbours(onnx: Any, proto: Any, stand_ins: list[str]) -> None:
    graph = proto.graph
    weights = {t.name: list(t.dims) for t in graph.initializer}
    extra = len(stand_ins)
    keep = list(graph.output)[: len(graph.output) - extra]
    beside = {value.name for value in list(graph.output)[len(keep) :]}
    for name in stand_ins:
        old = next(value for value in graph.input if value.name == name)
        shape = [d.dim_value for d in old.type.tensor_type.shape.dim]
        reader = _reader(graph, name)
        if reader.op_type == "ReorderInput":
            graph.node.remove(reader)
            reader = _reader(graph, reader.output[0])
        channels = weights[reader.input[1]][0]  # padded to the block where the layout is blocked
        graph.input.remove(old)
        graph.input.append(
            onnx.helper.make_tensor_value_info(
                reader.output[0], onnx.TensorProto.FLOAT, [shape[0], channels, *shape[2:]]
            )
        )
        graph.node.remove(reader)
    for node in list(graph.node):
        if node.op_type == "ReorderOutput" and node.output[0] in beside and not _readers(graph, node.output[0]):
            graph.node.remove(node)
    del graph.output[:]
    for value in keep:
        producer = next((n for n in graph.node if value.name in n.output), None)
        name = value.name
        if producer is not None and producer.op_type == "ReorderOutput" and not _readers(graph, name):
            name = producer.input[0]
            graph.node.remove(producer)
        graph.output.append(onnx.helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, None))
    used = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)
    del graph.value_info[:]


def _readers(graph: Any, name: str) -> Iterable[Any]:
    return [node for node in graph.node if name in node.input]


def _reader(graph: Any, name: str) -> Any:
    (reader,) = _readers(graph, name)
    return reader
