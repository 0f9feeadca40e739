"""Rewrites channels-last parts as channels-first: what lies between two permutes becomes convs and norms of the map.

    %p = permute(%x, 0, 2, 3, 1)
    %n = call_module[norm](%p)       nn.LayerNorm(C)             %n = call_module[norm](%x)      ChannelLayerNorm(C)
    %a = call_module[fc1](%n)        nn.Linear           ->      %a = call_module[fc1](%n)       nn.Conv2d, 1 x 1
    %g = call_module[act](%a)        nn.GELU                     %g = call_module[act](%a)       nn.GELU
    %b = call_module[fc2](%g)        nn.Linear                   %b = call_module[fc2](%g)       nn.Conv2d, 1 x 1
    %s = mul(%b, %gamma)                                         %s = call_module[mul](%b)       ChannelAffine
    %y = permute(%s, 0, 3, 1, 2)

A permute of a map *enters*, one back *leaves*, and an island is everything that is connected between them. It is
rewritten whole or not at all: every value of it must be made by an op that is understood (Linear, LayerNorm over the
channels, pointwise activations, a constant a channel, add, sub and mul of two values of one shape), and be read by such
an op or by a permute back. The numbers are the same; modules keep their paths, and weights of a Linear get dimensions
of size 1.

What it costs a runtime if nothing is merged: each LayerNorm permutes there and back by itself. docs/design.md has the
figure for one such block.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..graph import ops
from ..graph.graph_edit import bypass, place, set_submodule
from ..graph.map_shapes import spatial_maps
from ..graph.node_facts import is_floating, note_shape, shape_of, tensor_shape
from ..graph.raw_nodes import NotConstant, constant, op_name
from ..graph.union_find import UnionFind
from .arithmetic import SCALAR, scale_and_bias

__all__ = ["channels_first", "leaves_channels_last"]

_PERMUTES = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"})
_JOINS = (torch.add, torch.sub, torch.mul)


@dataclass(frozen=True)
class _Becomes:
    """What a node becomes where the channels are first: another module, or without one the op that it is."""

    module: nn.Module | None = None


def channels_first(gm: fx.GraphModule) -> int:
    """Rewrite in place of `gm` (the caller's own copy), whose functions are modules; returns the number of islands."""
    found = 0
    while made := _islands(gm, spatial_maps(gm)):  # what an island gives is known as a map now
        found += made
    return found


def _islands(gm: fx.GraphModule, maps: frozenset[str]) -> int:
    found = UnionFind[fx.Node]()  # the values of islands
    spoiled: list[fx.Node] = []  # values with a reader that is not understood
    for node in gm.graph.nodes:
        members = [n for n in node.all_input_nodes if n in found]
        if not members and _enters(gm, node, maps):
            found.add(node)
        elif members and _kind(gm, node, found) is not None:
            found.add(node)
            for member in members:
                found.unite(member, node)
        elif members and not leaves_channels_last(gm, node):
            spoiled += members
    islands: dict[fx.Node, list[fx.Node]] = {}
    for node in found:
        islands.setdefault(found.root(node), []).append(node)
    for node in spoiled:
        islands.pop(found.root(node), None)
    return sum(_rewrite(gm, island) for island in islands.values())


def _rewrite(gm: fx.GraphModule, island: list[fx.Node]) -> bool:
    leaving = [user for node in island for user in node.users if user not in island]
    if not leaving:
        return False
    kinds = [_kind(gm, node, island) for node in island]
    for node, kind in zip(island, kinds, strict=True):
        shape = tensor_shape(node)
        note_shape(node, (shape[0], shape[-1], *shape[1:-1]))
        value = next(a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node) and a.op != "get_attr")
        if kind is None:
            bypass(node)  # it enters
        elif isinstance(kind.module, ops.ChannelAffine):
            place(gm, node, kind.module, op_name(node), value)
        elif kind.module is not None:
            set_submodule(gm, str(node.target), kind.module)
    for node in dict.fromkeys(leaving):
        bypass(node)
    return True


def _permutation(gm: fx.GraphModule, node: fx.Node) -> tuple[int, ...] | None:
    """Which dimension of its operand each dimension of a permute is."""
    shape = shape_of(node)
    if op_name(node) not in _PERMUTES or shape is None or len(node.all_input_nodes) != 1 or not node.args:
        return None
    probe: Any = torch.empty(tuple(range(1, len(shape) + 1)))  # sizes that name the dimensions
    try:
        args = [constant(gm, a) for a in node.args[1:]]
        kwargs = {k: constant(gm, v) for k, v in node.kwargs.items()}
        target: Any = node.target
        turned = getattr(probe, target)(*args, **kwargs) if node.op == "call_method" else target(probe, *args, **kwargs)
    except (NotConstant, RuntimeError, TypeError, IndexError):
        return None
    return tuple(n - 1 for n in turned.shape)


def _enters(gm: fx.GraphModule, node: fx.Node, maps: frozenset[str]) -> bool:
    order = _permutation(gm, node)
    return order is not None and order == (0, *range(2, len(order)), 1) and node.all_input_nodes[0].name in maps


def leaves_channels_last(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node makes a map of channels first of one of channels last."""
    order = _permutation(gm, node)
    return order is not None and order == (0, len(order) - 1, *range(1, len(order) - 1))


def _kind(gm: fx.GraphModule, node: fx.Node, inside: Container[fx.Node]) -> _Becomes | None:
    """What a node of an island becomes, or None if it is not understood."""
    shape = shape_of(node)
    if shape is None or not 3 <= len(shape) <= 5 or not is_floating(node):
        return None
    values = [n for n in node.all_input_nodes if n.op != "get_attr"]
    if node.op == "call_module":
        return _module(gm, node, shape) if list(node.args) == values and len(values) == 1 else None
    alike = (isinstance(a, fx.Node) and a in inside and shape_of(a) == shape for a in node.args)
    if node.target in _JOINS and len(node.args) == 2 and not node.kwargs and all(alike):
        return _Becomes()
    name = op_name(node)
    found = scale_and_bias(gm, node, name, -1) if name in SCALAR and len(values) == 1 else None
    return _Becomes(ops.ChannelAffine(*found[1:])) if found is not None else None


def _module(gm: fx.GraphModule, node: fx.Node, shape: tuple[int, ...]) -> _Becomes | None:
    module: Any = gm.get_submodule(str(node.target))
    if ops.has_hooks(module):
        return None
    if ops.is_plain(module, nn.PReLU) or type(module) is ops.ChannelAffine:
        numbers = module.weight if isinstance(module, nn.PReLU) else module.scale
        return _Becomes() if numbers.numel() == 1 else None  # else one a row here, not one a channel
    if ops.plain_in(module, ops.ACTIVATIONS):
        return _Becomes() if all(p.numel() == 1 for p in module.parameters()) else None
    if not _is_called_once(gm, node):
        return None
    if isinstance(module, nn.LayerNorm) and tuple(module.normalized_shape) == (shape[-1],) and _is_last(module, shape):
        norm = ops.ChannelLayerNorm(module.normalized_shape, module.eps, elementwise_affine=False)
        norm.elementwise_affine = module.elementwise_affine
        norm.weight, norm.bias = module.weight, module.bias
        return _Becomes(norm.train(module.training))
    return _Becomes(_pointwise_conv(module, len(shape) - 2)) if ops.is_plain(module, nn.Linear) else None


def _is_last(module: nn.LayerNorm, shape: tuple[int, ...]) -> bool:
    """Whether a class that may override what nn.LayerNorm computes gives the norm over the last dimension."""
    if ops.is_plain(module, nn.LayerNorm):
        return True
    like = module.weight if module.weight is not None else torch.empty(())
    x = torch.linspace(-1, 1, 2 * 3 ** (len(shape) - 2) * shape[-1], dtype=like.dtype, device=like.device).cos()
    x = x.view(2, *[3] * (len(shape) - 2), shape[-1])
    with torch.no_grad():
        try:
            found = module(x)
        except RuntimeError:
            return False
        expected = F.layer_norm(x, tuple(module.normalized_shape), module.weight, module.bias, module.eps)
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def _is_called_once(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether nobody else calls the node's module or reads its parameters, which are about to change."""
    module = gm.get_submodule(str(node.target))
    own = {id(p) for p in module.parameters()}
    others = [
        m for _, m in gm.named_modules() if m is not module and own & {id(p) for p in m.parameters(recurse=False)}
    ]
    return not others and not any(
        n is not node
        and (
            (n.op == "call_module" and gm.get_submodule(str(n.target)) is module)
            or (n.op == "get_attr" and str(n.target).startswith(f"{node.target}."))
        )
        for n in gm.graph.nodes
    )


def _pointwise_conv(module: nn.Linear, ndim: int) -> nn.Module:
    channels = module.in_features, module.out_features
    conv: Any = nn.utils.skip_init(ops.conv_class(ndim), *channels, 1, bias=module.bias is not None)
    weight = module.weight
    conv.weight = nn.Parameter(weight.detach().view(*weight.shape, *[1] * ndim), requires_grad=weight.requires_grad)
    conv.bias = module.bias
    conv.train(module.training)
    assert isinstance(conv, nn.Module)
    return conv
