"""Reads and writes what is known of the value of a node: its shape, its dtype, the module that it came from.

fx keeps such things in `node.meta`, a dict. This file alone knows the keys; `annotate` of `trace` notes them while the
example runs, and every pass that puts a node in the place of another one says what is still so of it (`note_like`).

    known of any value     shape_of    dtype_of    is_floating   path_of     None, False, "" where nothing is known
    known of a tensor      tensor_shape            tensor_dtype              `VerifyError` where nothing is known
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..errors import VerifyError

__all__ = [
    "attribute_of",
    "call_of",
    "comes_from_leaf",
    "dtype_of",
    "gives_its_operand",
    "is_floating",
    "known_value",
    "note_leaf",
    "note_like",
    "note_shape",
    "note_value",
    "path_of",
    "same_kind",
    "shape_of",
    "tensor_dtype",
    "tensor_shape",
]

Shape = tuple[int, ...]


def shape_of(value: object) -> Shape | None:
    """The shape of a node's value; None for what is no node or no tensor, and where it is unknown."""
    found: Shape | None = value.meta.get("shape") if isinstance(value, fx.Node) else None
    return found


def tensor_shape(node: fx.Node) -> Shape:
    """The shape of a node's value, which is known to be a tensor."""
    found = shape_of(node)
    if found is None:
        raise VerifyError(f"the shape of {node.name} is not known: this is a bug in lmfx")
    return found


def dtype_of(value: object) -> torch.dtype | None:
    """The dtype of a node's value; None for what is no node or no tensor, and where it is unknown."""
    found: torch.dtype | None = value.meta.get("dtype") if isinstance(value, fx.Node) else None
    return found


def tensor_dtype(node: fx.Node) -> torch.dtype:
    """The dtype of a node's value, which is known to be a tensor."""
    found = dtype_of(node)
    if found is None:
        raise VerifyError(f"the dtype of {node.name} is not known: this is a bug in lmfx")
    return found


def same_kind(one: object, other: object) -> bool:
    """Whether two values have one shape and one dtype."""
    return shape_of(one) == shape_of(other) and dtype_of(one) == dtype_of(other)


def is_floating(node: fx.Node, unknown: bool = False) -> bool:
    """Whether a node's value is a floating-point tensor; `unknown` where nothing is known."""
    return bool(node.meta.get("floating", unknown))


def attribute_of(node: fx.Node, name: str) -> Any:
    """What `x.shape`, `x.dtype` or `x.device` of a node's value is, None if it is none of them or unknown."""
    return node.meta.get(name) if name in ("shape", "dtype", "device") else None


def gives_its_operand(node: fx.Node) -> bool:
    """Whether a node gave its first operand itself, as a cast to the dtype that a tensor has already does."""
    return bool(node.meta.get("same"))


def path_of(node: fx.Node) -> str:
    """The qualified name of the module that a node came from, empty for the model itself."""
    return str(node.meta.get("path", ""))


def comes_from_leaf(node: fx.Node) -> bool:
    """Whether the module that a node came from is a layer of torch's own."""
    return bool(node.meta.get("leaf"))


def call_of(node: fx.Node) -> int:
    """Which call of its merged conv a node is: 0 for the first."""
    return int(node.meta.get("call", 0))


def known_value(node: fx.Node) -> bool:
    """Whether anything was noted of a node."""
    return bool(node.meta)


def note_value(node: fx.Node, value: object, same: bool) -> None:
    """Note what a node gave for the example, and whether that is its first operand itself."""
    tensor = value if isinstance(value, Tensor) else None
    node.meta["shape"] = tuple(tensor.shape) if tensor is not None else None
    node.meta["dtype"] = tensor.dtype if tensor is not None else None
    node.meta["device"] = tensor.device if tensor is not None else None
    node.meta["same"] = tensor is not None and same
    node.meta["floating"] = tensor is not None and tensor.is_floating_point()
    if "path" not in node.meta:
        stack = node.meta.get("nn_module_stack")  # tracers of torch write it
        node.meta["path"] = (list(stack.values())[-1][0] if stack else "") or ""


def note_shape(node: fx.Node, shape: Shape | None) -> None:
    """Note another shape of a node's value, None where it is not known."""
    node.meta["shape"] = shape


def note_leaf(node: fx.Node, leaf: bool) -> None:
    """Note whether the module that a node came from is a layer of torch's own."""
    node.meta["leaf"] = leaf


def note_like(new: fx.Node, old: fx.Node, **changed: Any) -> None:
    """Note of a new node what is known of an old one, but for what is `changed`: `shape`, `path`, `call`."""
    assert changed.keys() <= {"shape", "path", "call"}, changed
    new.meta = {**old.meta, **changed}
