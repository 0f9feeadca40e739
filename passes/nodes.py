"""Reading single nodes of a raw graph: the op's plain name, its arguments by name, the tensors that it owns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from . import ops

__all__ = ["bind", "op_name", "tensor_of"]

_ALIASES = {"truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub"}


def op_name(node: fx.Node) -> str:
    """The plain name of a function or method node: `relu` for F.relu, torch.relu, x.relu() and aten.relu.default."""
    name = ops.function_name(node)
    return _ALIASES.get(name, name)


def bind(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The arguments after the first by name, or None if there are some that we do not know."""
    rest = list(node.args[1:])
    # x.flatten(1), F.pad(x, (1, 1)), x.clamp(0, 6) all bind in order.
    if len(rest) > len(names):
        return None
    bound = dict(zip(names, rest, strict=False))
    for key, value in node.kwargs.items():
        if key in ("input", "inplace", "self"):
            continue
        if key not in names or key in bound:
            return None
        bound[key] = value
    return bound


def tensor_of(gm: fx.GraphModule, value: Any) -> Tensor | None:
    """The parameter or buffer that a get_attr node reads."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    item: Any = gm
    for atom in str(value.target).split("."):
        item = getattr(item, atom, None)
    return item if isinstance(item, Tensor) else None
