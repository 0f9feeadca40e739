"""Converts a float32 ONNX model to half precision: strongly typed runtimes compute in the types that the model has.

    x, W, b (half) -> Conv -> BatchNormalization                    folded into W and b before these are rounded
    x (half) -> Cast float -> InstanceNormalization -> Cast half    what loses too much in half stays in float32

Each op is of one of three kinds, and casts are put only where the kinds of two ops differ:

    half      convolutions, matrix products, poolings: always
    float     norms, softmax, reductions, exponentials: always; norms and softmax give half again
    follow    all else: half, unless one of its operands is float32 already, as torch promotes types

So the angles of a time embedding, the mean that is taken off, and what is divided by a deviation are computed in
float32 up to the next convolution or matrix product. Constants are rounded to the type in which they are read; values
out of range become the largest finite ones (masks of -1e38 stay masks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmfx.export.builder import require_onnx
from lmfx.export.fold_norms import fold_norms, infer
from lmfx.passes.errors import ExportError, OptionError

if TYPE_CHECKING:
    import onnx

__all__ = ["PRECISIONS", "check_precision", "convert", "convert_bytes"]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HALF_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "AveragePool", "MaxPool", "GlobalAveragePool"})
NORMS = frozenset(
    {"BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "Softmax", "LogSoftmax"}
)
FLOAT_OPS = NORMS | {
    *("Exp", "Log", "Pow", "Sin", "Cos", "Range", "CumSum"),
    *("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd", "ReduceLogSumExp"),
}
FIXED_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}
"""Inputs that ONNX wants in float32 whatever the type of the values."""
BF16_OPSET = 22  # the first in which convolutions and poolings take bfloat16


def check_precision(precision: str) -> torch.dtype:
    """The dtype of "fp32", "fp16" or "bf16". Raises `OptionError` for anything else."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise OptionError(f"the precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
    return PRECISIONS[precision]


def convert_bytes(model: bytes, precision: str, *, keep_io: bool = False) -> bytes:
    """`convert` for a serialized model. Raises `ExportError` if it is none."""
    onnx = require_onnx()
    if check_precision(precision) == torch.float32:
        return model
    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's DecodeError, whose module has changed its name
        raise ExportError(f"cannot read the ONNX model: {error}; give one that lmfx.export_onnx wrote") from error
    return bytes(convert(proto, precision, keep_io=keep_io).SerializeToString())


def convert(model: onnx.ModelProto, precision: str, *, keep_io: bool = False) -> onnx.ModelProto:
    """The float32 values of a model in "fp16" or "bf16", changed in place; with "fp32" nothing happens.

    With `keep_io` the graph's inputs and outputs stay in float32, with casts after and before them. Raises
    `ExportError` for a model with control flow, `OptionError` for an unknown precision.
    """
    if check_precision(precision) == torch.float32:
        return model
    onnx = require_onnx()
    if model.functions:
        from onnx.inliner import inline_local_functions

        model.CopyFrom(inline_local_functions(model))
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise ExportError(
                f"the ONNX model has control flow ({node.op_type}), which cannot be converted to {precision}; "
                "export the network in that precision"
            )
    types = infer(onnx, model)
    fold_norms(onnx, model.graph, types)
    _Converter(onnx, model, precision, types.floating).run(keep_io)
    if precision == "bf16":
        for opset in model.opset_import:
            if opset.domain in ("", "ai.onnx"):
                opset.version = max(opset.version, BF16_OPSET)
    return model


class _Converter:
    """Walks the nodes in order; `name_in[kind]` is where a value can be read in that kind ("half" or "float")."""

    def __init__(self, onnx: Any, model: Any, precision: str, floating: set[str]) -> None:
        self.onnx, self.graph = onnx, model.graph
        self.dtype = PRECISIONS[precision]
        proto = onnx.TensorProto
        self.types = {"float": proto.FLOAT, "half": proto.FLOAT16 if precision == "fp16" else proto.BFLOAT16}
        self.floating = floating
        self.constants = {t.name: t for t in self.graph.initializer if t.data_type == proto.FLOAT}
        self.name_in: dict[str, dict[str, str]] = {}
        self.nodes: list[Any] = []
        self.used: dict[str, Any] = {}

    def run(self, keep_io: bool) -> None:
        outputs = {v.name: v for v in self.graph.output if v.name in self.floating}
        for value in self.graph.input:
            if value.name not in self.floating or value.name in self.constants:
                continue
            kind = "float" if keep_io else "half"
            value.type.tensor_type.elem_type = self.types[kind]
            self.name_in[value.name] = {kind: value.name}
        for node in list(self.graph.node):
            self._visit(node)
        for name, value in outputs.items():
            kind = "float" if keep_io else "half"
            value.type.tensor_type.elem_type = self.types[kind]
            if self.name_in.get(name, {}).get(kind) != name:
                self._rename_output(name, kind)
        self._write_constants()
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        del self.graph.value_info[:]  # the old types

    def _visit(self, node: Any) -> None:
        if node.op_type == "Constant" and node.output[0] in self.floating:
            self._take_constant(node)
            return
        dynamic = [n for n in node.input if n in self.name_in]
        kind = self._kind(node, dynamic)
        for i, name in enumerate(node.input):
            if i in FIXED_INPUTS.get(node.op_type, ()):
                node.input[i] = self._read(name, "float")
            elif name in self.floating:
                node.input[i] = self._read(name, kind)
        out = "half" if node.op_type in NORMS else kind
        self._retype(node, kind)
        self.nodes.append(node)
        for name in node.output:
            if name in self.floating:  # the readers of a norm see half, whatever they are
                self.name_in[name] = {out: name if out == kind else self._cast(name, out)}

    def _kind(self, node: Any, dynamic: list[str]) -> str:
        if node.op_type in HALF_OPS:
            return "half"
        if node.op_type in FLOAT_OPS or (node.op_type == "Cast" and node.input[0] not in self.floating):
            return "float"  # integers above 2048 are not in half, and they count something
        if any("half" not in self.name_in[n] for n in dynamic):
            return "float"
        return "half" if dynamic else "float"

    def _read(self, name: str, kind: str) -> str:
        """The name of a value in one kind, cast if there is none yet."""
        if name in self.constants:
            key = name if kind == "float" else f"{name}.{kind}"
            self.used[key] = (self.constants[name], kind)
            return key
        if not name or name not in self.name_in:
            return name
        known = self.name_in[name]
        if kind not in known:
            known[kind] = self._cast(next(iter(known.values())), kind)
        return known[kind]

    def _cast(self, name: str, kind: str) -> str:
        new = f"{name}.{kind}"
        self.nodes.append(self.onnx.helper.make_node("Cast", [name], [new], to=self.types[kind]))
        return new

    def _take_constant(self, node: Any) -> None:
        """A Constant node becomes an initializer, which is rounded like any other."""
        (attribute,) = node.attribute
        values = self.onnx.helper.get_attribute_value(attribute)
        if attribute.name != "value":
            values = self.onnx.numpy_helper.from_array(np.asarray(values, dtype=np.float32))
        tensor = self.onnx.TensorProto()
        tensor.CopyFrom(values)
        tensor.name = node.output[0]
        self.constants[tensor.name] = tensor

    def _retype(self, node: Any, kind: str) -> None:
        """Attributes that name a type or hold a float tensor."""
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype"):
                if attribute.i == self.types["float"]:
                    attribute.i = self.types[kind]
            elif attribute.name == "value" and attribute.t.data_type == self.types["float"]:  # ConstantOfShape
                attribute.t.CopyFrom(self._tensor(attribute.t, attribute.t.name, kind))

    def _rename_output(self, name: str, kind: str) -> None:
        """The graph's output keeps its name: the value that had it gets another one."""
        inner = f"{name}.inner"
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, old in enumerate(names):
                    if old == name:
                        names[i] = inner
        known = {k: inner if n == name else n for k, n in self.name_in.get(name, {}).items()}
        if name in self.constants:
            known = {kind: self._read(name, kind)}
        if kind in known:
            self.nodes.append(self.onnx.helper.make_node("Identity", [known[kind]], [name]))
        else:
            self.nodes.append(self.onnx.helper.make_node("Cast", list(known.values()), [name], to=self.types[kind]))

    def _write_constants(self) -> None:
        tensors = [self._tensor(tensor, key, kind) for key, (tensor, kind) in self.used.items()]
        for values in (self.graph.initializer, self.graph.input):  # older models list initializers as inputs too
            for i in reversed(range(len(values))):
                if values[i].name in self.constants:
                    del values[i]
        self.graph.initializer.extend(tensors)

    def _tensor(self, tensor: Any, name: str, kind: str) -> Any:
        if kind == "float":
            new = self.onnx.TensorProto()
            new.CopyFrom(tensor)
            new.name = name
            return new
        values = torch.from_numpy(self.onnx.numpy_helper.to_array(tensor).copy())
        limit = torch.finfo(self.dtype).max
        half = values.clamp(-limit, limit).to(self.dtype).contiguous()
        raw = half.reshape(-1).view(torch.uint8).numpy().tobytes()
        return self.onnx.TensorProto(name=name, data_type=self.types[kind], dims=list(values.shape), raw_data=raw)
