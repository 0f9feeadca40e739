"""An ONNX graph as the int8 stages see it: norms folded, constants known, values with shape, maker and readers.

A file that another exporter wrote first goes through ONNX Runtime's basic optimisations, which compute what is constant
and take identities out; what lmfx emits has none of that.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lmfx.environment.caller_state import one_line
from lmfx.export.builder import require_onnx
from lmfx.export.fold_norms import fold_norms, infer
from lmfx.passes.errors import ExportError, MissingExtra

__all__ = ["GraphView", "basic_form", "require_onnxruntime", "structure", "view_of"]

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class GraphView:
    """A float32 model and what is asked of it again and again. `model` is changed: its batch norms are folded."""

    def __init__(self, model: Any) -> None:
        self.onnx = require_onnx()
        self.model, self.graph = model, model.graph
        _no_constant_nodes(self.onnx, self.graph)
        _no_identities(self.graph)
        fold_norms(self.onnx, self.graph, infer(self.onnx, model))
        self.constants = {t.name: t for t in self.graph.initializer}
        self.maker = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.inputs = [v.name for v in self.graph.input if v.name not in self.constants]
        self.dtypes = {  # of inputs
            v.name: self.onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in self.graph.input
        }
        self.outputs = [v.name for v in self.graph.output]
        self.shapes, self.floating = _shapes(self.onnx, model)
        for value in self.graph.output:  # what lmfx emits says no shape there
            if value.name in self.shapes and not value.type.tensor_type.HasField("shape"):
                dims = [d if d >= 0 else None for d in self.shapes[value.name]]
                kind = value.type.tensor_type.elem_type
                value.CopyFrom(self.onnx.helper.make_tensor_value_info(value.name, kind, dims))

    def is_constant(self, name: str) -> bool:
        return name in self.constants

    def array(self, name: str) -> np.ndarray:
        """The values of a constant."""
        return np.asarray(self.onnx.numpy_helper.to_array(self.constants[name]))

    def attribute(self, node: Any, name: str, default: Any = None) -> Any:
        for a in node.attribute:
            if a.name == name:
                return self.onnx.helper.get_attribute_value(a)
        return default


def _no_constant_nodes(onnx: Any, graph: Any) -> None:
    """Constant nodes become initializers."""
    for node in [n for n in graph.node if n.op_type == "Constant"]:
        value = onnx.helper.get_attribute_value(node.attribute[0])
        if node.attribute[0].name != "value":
            kind = np.int64 if node.attribute[0].name.startswith("value_int") else np.float32
            value = onnx.numpy_helper.from_array(np.asarray(value, dtype=kind))
        tensor = onnx.TensorProto()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)


def _no_identities(graph: Any) -> None:
    """Identities go: of what gives the graph's output the maker gets its name, all else is read directly."""
    outputs = {v.name for v in graph.output}
    for node in [n for n in graph.node if n.op_type == "Identity"]:
        source, given = node.input[0], node.output[0]
        old, new = (source, given) if given in outputs else (given, source)
        if given in outputs and (source in outputs or not any(source in n.output for n in graph.node)):
            continue  # an input or a constant that is an output, or a value that is two
        graph.node.remove(node)
        for other in graph.node:
            for names in (other.input, other.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new


def _shapes(onnx: Any, model: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """The shapes of all values with fixed sizes (-1 for a free one), and the names of those in float32."""
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    del slim.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(slim, data_prop=True).graph
    shapes: dict[str, tuple[int, ...]] = {}
    floating = set()
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if kind.elem_type == onnx.TensorProto.FLOAT:
            floating.add(value.name)
        if kind.HasField("shape"):
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    for tensor in model.graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
        if tensor.data_type == onnx.TensorProto.FLOAT:
            floating.add(tensor.name)
    return shapes, floating


def basic_form(model: bytes) -> Any:
    """A model of another exporter without constant subgraphs, identities and functions. Raises `ExportError`."""
    onnx, ort = require_onnx(), require_onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="lmfx-") as folder:
        path = Path(folder) / "basic.onnx"
        options.optimized_model_filepath = str(path)
        try:
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            return onnx.load(path)
        except Exception as error:  # ONNX Runtime has errors of its own, all of them about this model
            raise ExportError(
                f"ONNX Runtime cannot load the network that is to be quantized: {one_line(error)}; give an ONNX file "
                "that it runs, in float32"
            ) from error


def view_of(model: bytes) -> GraphView:
    """The view of a model: as lmfx emits it, or else in ONNX Runtime's basic form."""
    proto = require_onnx().load_from_string(model)
    return GraphView(proto if proto.producer_name == "lmfx" else basic_form(model))


def structure(view: GraphView) -> str:
    """A digest of all that the time of a network depends on: its ops and what they read, sizes and constants; of the
    weights of layers only the shapes, and no names."""
    place = {name: i for i, name in enumerate(view.inputs)}
    told: list[Any] = [[(view.shapes.get(n), str(view.dtypes[n])) for n in view.inputs]]
    for node in view.graph.node:
        reads: list[Any] = []
        for name in node.input:
            if name not in view.constants:
                reads.append(place.get(name))
                continue
            tensor = view.constants[name]
            weight = node.op_type in LAYERS and name in view.floating
            reads.append((tuple(tensor.dims), tensor.data_type, b"" if weight else view.array(name).tobytes()))
        attributes = sorted((a.name, a.SerializeToString(deterministic=True)) for a in node.attribute)
        told.append((node.domain, node.op_type, reads, attributes, len(node.output)))
        for name in node.output:
            place[name] = len(place)
    told.append([place.get(n) for n in view.outputs])
    return hashlib.sha256(repr(told).encode()).hexdigest()


def require_onnxruntime() -> Any:
    """The onnxruntime package, or `MissingExtra` with the pip command."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(
            f'quantizing needs the package onnxruntime, which cannot be imported ({error}); pip install "lmfx[ort]"'
        ) from error
    return onnxruntime
