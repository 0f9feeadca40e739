"""Keeps the Q/DQ file of a network in 8 bits in its folder, `model.int8.onnx`, beside the float weights.

The file says of which weights it was made (in its metadata), and a network of other weights does not take it.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lmfx.environment.atomic_files import atomic_write
from lmfx.export.builder import require_onnx
from lmfx.int8.compressed import Int8Form
from lmfx.made_of import weights_digest
from lmfx.passes.errors import PlanError

__all__ = ["INT8", "read_form", "write_form"]

INT8 = "model.int8.onnx"
KEY = "lmfx.weights"


def write_form(folder: Path, form: Int8Form) -> None:
    """Writes the file. Raises `PlanError` where that is not possible."""
    model = require_onnx().load_model_from_string(form.model)
    del model.metadata_props[:]
    model.metadata_props.add(key=KEY, value=form.weights)
    try:
        atomic_write(folder / INT8, model.SerializeToString())
    except OSError as error:
        raise PlanError(f"cannot write {folder / INT8}: {error}; give another folder") from error


def read_form(folder: Path, net: nn.Module) -> Int8Form | None:
    """The form of this network, None where there is none or it is that of other weights."""
    path = folder / INT8
    if not path.is_file():
        return None
    try:
        model = require_onnx().load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, whose module has changed its name
        raise PlanError(f"{path} is damaged ({error}): take it away, and write it anew with lmfx.quantize") from error
    weights = weights_digest(net)
    if not any(p.key == KEY and p.value == weights for p in model.metadata_props):
        return None
    shapes = tuple(tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in model.graph.input)
    return Int8Form(bytes(model.SerializeToString()), shapes, weights)
