"""Puts the ops of torch's core set together again: of a program that went through `run_decompositions()`.

    convolution(x, w, b, 2, 1, 1, False, 0, g)        ->     conv2d(x, w, b, 2, 1, 1, g), or conv_transpose2d
    addmm(b, view(x, (-1, n)), permute(w, (1, 0)))    ->     linear(x, w, b)       with the views around it
    max_pool2d_with_indices(x, ...)[0]                ->     max_pool2d(x, ...)
    native_layer_norm(x, ...)[0], native_group_norm   ->     layer_norm, group_norm

Each is the definition of the op on the right, read from right to left. The sizes of values stand in `meta["val"]`, as
torch.export writes them. Batch norms in eval mode are known to `canonical_form` itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["recompose"]

_ATEN: Any = torch.ops.aten
_CONVS = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default)
_TRANSPOSED = (_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input)
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default)
_SAME = (_ATEN.alias.default, _ATEN.detach.default, _ATEN.lift_fresh_copy.default)


def recompose(graph: fx.Graph) -> int:
    """Rewrite an aten graph in place; returns the number of nodes changed."""
    changed = 0
    for node in list(graph.nodes):
        if node.target in _SAME:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            changed += 1
        elif (rule := _RULES.get(node.target)) is not None:
            changed += bool(rule(graph, node))
    graph.eliminate_dead_code()
    return changed


def _convolution(graph: fx.Graph, node: fx.Node) -> bool:
    x, weight, bias, stride, padding, dilation, transposed, extra, groups = node.args
    ndim = len(stride)  # type: ignore[arg-type]
    if node.kwargs or not 1 <= ndim <= 3:
        return False
    if transposed:
        node.target = _TRANSPOSED[ndim - 1]
        node.args = (x, weight, bias, stride, padding, extra, groups, dilation)
    else:
        node.target, node.args = _CONVS[ndim - 1], (x, weight, bias, stride, padding, dilation, groups)
    return True


def _addmm(graph: fx.Graph, node: fx.Node) -> bool:
    bias, x, turned = node.args
    if node.kwargs or _rank(bias) != 1:
        return False
    return _linear(graph, node, x, turned, bias)


def _mm(graph: fx.Graph, node: fx.Node) -> bool:
    return _linear(graph, node, node.args[0], node.args[1], None)


def _linear(graph: fx.Graph, node: fx.Node, x: Any, turned: Any, bias: Any) -> bool:
    weight = _transposed(turned)
    if weight is None or weight.op != "get_attr":
        return False
    node.target = _ATEN.linear.default
    node.args = (x, weight) if bias is None else (x, weight, bias)
    after = next(iter(node.users)) if len(node.users) == 1 else None
    if x.target in _VIEWS and after is not None and after.target in _VIEWS:
        source: Any = x.args[0]
        before, rows, wanted = _shape(source), _shape(x), _shape(after)
        known = before is not None and rows is not None and wanted is not None
        if known and _same(before[:-1], wanted[:-1]) and _same(before[-1:], rows[-1:]):
            node.args = (source, *node.args[1:])
            node.meta["val"] = after.meta["val"]
            after.replace_all_uses_with(node)
            graph.erase_node(after)
    return True


def _transposed(value: Any) -> fx.Node | None:
    """The matrix of which a node is the transpose."""
    if not isinstance(value, fx.Node) or _rank(value) != 2:
        return None
    arguments: Any = value.args
    turns = (
        value.target is _ATEN.t.default
        or (value.target is _ATEN.permute.default and [d % 2 for d in arguments[1]] == [1, 0])
        or (value.target is _ATEN.transpose.int and {d % 2 for d in arguments[1:]} == {0, 1})
    )
    source: fx.Node = arguments[0]
    return source if turns else None


def _first(op: Any, arguments: Callable[[Any], tuple[Any, ...]]) -> Callable[[fx.Graph, fx.Node], bool]:
    """A rule for an op that gives several values, of which the network reads the first."""

    def rule(graph: fx.Graph, node: fx.Node) -> bool:
        items = list(node.users)
        if node.kwargs or not items or any(u.target is not operator.getitem or u.args[1] != 0 for u in items):
            return False
        for item in items:
            item.target, item.args = op, arguments(node.args)
        return True

    return rule


def _shape(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.shape if isinstance(value, torch.Tensor) else None


def _rank(node: Any) -> int | None:
    shape = _shape(node)
    return None if shape is None else len(shape)


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))


_RULES: dict[Any, Callable[[fx.Graph, fx.Node], bool]] = {
    _ATEN.convolution.default: _convolution,
    _ATEN.addmm.default: _addmm,
    _ATEN.mm.default: _mm,
    _ATEN.max_pool2d_with_indices.default: _first(_ATEN.max_pool2d.default, lambda a: a),
    _ATEN.max_pool3d_with_indices.default: _first(_ATEN.max_pool3d.default, lambda a: a),
    _ATEN.native_layer_norm.default: _first(_ATEN.layer_norm.default, lambda a: a),
    _ATEN.native_group_norm.default: _first(
        _ATEN.group_norm.default, lambda a: (a[0], a[6], a[1], a[2], *([a[7]] if len(a) > 7 else []))
    ),
}
