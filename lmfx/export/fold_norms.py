"""Folds the batch norms of an ONNX model in float32, before anything is rounded; and infers its values' types.

    Conv(W, b) -> BatchNormalization        Conv(W s, b s + o)      s = gain / sqrt(var + eps), o = shift - mean s
    x -> BatchNormalization                 x s + o                 one Mul and one Add, where no conv is before it

In half precision a variance above 65504 or below 6e-8 would be lost, and a conv's output may overflow before its norm
brings it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lmfx.passes.errors import ExportError

__all__ = ["Types", "fold_norms", "infer"]


@dataclass(frozen=True)
class Types:
    """The names of all float32 values, and how many dimensions values have (those for which it is known)."""

    floating: set[str]
    ranks: dict[str, int]


def infer(onnx: Any, model: Any) -> Types:
    """ONNX's own type inference, on a copy without the large constants. Raises `ExportError` where it fails."""
    kind, graph = onnx.TensorProto.FLOAT, model.graph
    slim = onnx.ModelProto(ir_version=model.ir_version)
    slim.opset_import.extend(model.opset_import)
    slim.graph.name = "types"
    slim.graph.node.extend(graph.node)
    slim.graph.input.extend(graph.input)
    slim.graph.output.extend(graph.output)
    given = {v.name for v in graph.input}
    for tensor in graph.initializer:
        if tensor.data_type != kind or len(tensor.dims) == 0:
            slim.graph.initializer.append(tensor)
        elif tensor.name not in given:
            slim.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, kind, list(tensor.dims)))
    try:
        inferred = onnx.shape_inference.infer_shapes(slim, data_prop=True).graph
    except Exception as error:  # onnx has its own kinds for this
        raise ExportError(
            f"ONNX could not infer the types of the model ({error}); export the network in half precision"
        ) from error
    values = {v.name: v.type.tensor_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    unknown = sorted({n for node in graph.node for n in node.output if n} - set(values))
    if unknown:
        raise ExportError(f"ONNX could not infer the type of {unknown[0]!r}; export the network in half precision")
    floating = {n for n, t in values.items() if t.elem_type == kind}
    floating |= {t.name for t in graph.initializer if t.data_type == kind}
    return Types(floating, {n: len(t.shape.dim) for n, t in values.items() if t.HasField("shape")})


def fold_norms(onnx: Any, graph: Any, types: Types) -> None:
    """Replaces every BatchNormalization with constant statistics, in place; new float32 values are added to `types`."""
    if not any(node.op_type == "BatchNormalization" for node in graph.node):
        return
    constants = {t.name: t for t in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    readers: dict[str, int] = {}
    for name in (*(n for node in graph.node for n in node.input), *(v.name for v in graph.output)):
        readers[name] = readers.get(name, 0) + 1
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type != "BatchNormalization" or not all(n in constants for n in node.input[1:]):
            nodes.append(node)
            continue
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        gain, shift, mean, var = (_array(onnx, constants[n]) for n in node.input[1:5])
        scale = gain / np.sqrt(var + epsilon)
        offset = shift - mean * scale
        source, out = node.input[0], node.output[0]
        conv = made.get(source)
        weights = list(conv.input[1:]) if conv is not None and conv.op_type == "Conv" else []
        if weights and readers[source] == 1 and all(n in constants for n in weights):
            assert conv is not None
            weight = _array(onnx, constants[weights[0]])
            bias = _array(onnx, constants[weights[1]]) if len(weights) > 1 else np.zeros(len(scale))
            weight = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
            del conv.input[1:]
            conv.input.append(_constant(onnx, graph, types, f"{out}.weight", weight))
            conv.input.append(_constant(onnx, graph, types, f"{out}.bias", bias * scale + offset))
            conv.output[0] = out
        elif source in types.ranks:
            tail = (-1, *(1,) * (types.ranks[source] - 2))
            factor = _constant(onnx, graph, types, f"{out}.scale", scale.reshape(tail))
            addend = _constant(onnx, graph, types, f"{out}.offset", offset.reshape(tail))
            types.floating.add(f"{out}.scaled")
            nodes.append(onnx.helper.make_node("Mul", [source, factor], [f"{out}.scaled"]))
            nodes.append(onnx.helper.make_node("Add", [f"{out}.scaled", addend], [out]))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {n for node in nodes for n in node.input} | {v.name for v in graph.output}
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in used:
            del graph.initializer[i]


def _array(onnx: Any, tensor: Any) -> np.ndarray:
    return np.asarray(onnx.numpy_helper.to_array(tensor), dtype=np.float64)


def _constant(onnx: Any, graph: Any, types: Types, name: str, values: np.ndarray) -> str:
    graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    types.floating.add(name)
    return name
