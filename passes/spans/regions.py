"""Finds the regions of a network: the edges of its reduced value graph (`reduction`), with items grouped into layers.

    x ─conv1─bn1─relu─conv2─bn2─┐
    └───────────────────────────add─relu      ->     x ─ Parallel(add, [conv1 bn1 relu conv2 bn2], []) ─ relu

Each surviving edge that carries a convolution is a region. A value with an extra reader (a long skip, a model output, a
feature hook) is never reduced away, so nothing else has to be said about skips.
"""

from __future__ import annotations

from typing import Literal

from torch import fx, nn

from ..algebra.side_vectors import side_vector
from ..graph import ops
from ..graph.node_facts import is_floating, shape_of, tensor_shape
from ..graph.raw_nodes import op_name
from ..graph.reduction import Branching, Item, Reduction, carries_conv, join_of, operands_of
from ..ir import Layer, Parallel, Refusal, Region, Series
from ..model.trace_facts import noted
from .same_layers import Edges, call_edges

__all__ = ["find_regions", "node_kind", "refusal_of"]

_ON_VECTORS = (*ops.ACTIVATIONS, nn.BatchNorm1d, ops.ChannelAffine)
Kind = Literal["conv", "affine", "activation", "opaque"]


def find_regions(gm: fx.GraphModule, fine: bool = False) -> tuple[Region, ...]:
    """All regions of a canonical graph, in the order of their exits. `gm` must come from `trace`.

    With `fine` every op is a layer of its own: a norm may then be folded where a pool beside it stays.
    """
    found = [e for e in Reduction(gm).edges if any(carries_conv(gm, item) for item in e.items)]
    edges = Edges() if fine else call_edges(gm, lambda node: node_kind(gm, node))
    return tuple(Region(_series(gm, str(i), e.source, e.items, fine, edges)) for i, e in enumerate(found))


def node_kind(gm: fx.GraphModule, node: fx.Node) -> Kind:
    """What an op of one map is to the compiler."""
    if side_vector(node) is not None:
        return "affine"
    if refusal_of(gm, node) is not None:
        return "opaque"
    module = gm.get_submodule(str(node.target))
    if ops.plain_in(module, ops.ACTIVATIONS) or ops.normalizes(module, tensor_shape(node)):
        return "activation"
    return "conv" if ops.plain_in(module, (*ops.CONVS, *ops.TRANSPOSED, nn.Linear)) else "affine"


def refusal_of(gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
    """Why an op of one map is opaque, or None if it is understood."""
    if side_vector(node) is not None:
        return None
    join = join_of(node)
    if join is not None:
        return Refusal(_side_reason(node), (node.name, *(v.name for v in operands_of(node))))
    if node.op != "call_module":
        return Refusal(f"{op_name(node) or node.op} is not an affine op of a feature map", (node.name,))
    reasons = noted(gm).opaque
    if str(node.target) in reasons:
        return Refusal(reasons[str(node.target)], (node.name,))
    module = gm.get_submodule(str(node.target))
    shape = shape_of(node)
    if shape is not None and len(shape) == 2 and (ops.is_plain(module, nn.Linear) or ops.plain_in(module, _ON_VECTORS)):
        return None
    if shape is None or len(shape) < 3:
        return Refusal(f"{type(module).__name__} works on a vector, not on a feature map", (node.name,))
    if ops.plain_in(module, ops.ACTIVATIONS) or ops.normalizes(module, shape):
        return None
    reason = ops.affine_refusal(module)
    if reason is None and ops.enlarges(module) and (len(node.args) > 1 or node.kwargs):
        reason = f"{type(module).__name__} is asked for an output size"
    kinds = (*ops.CONVS, *ops.TRANSPOSED, *ops.BATCH_NORMS, *ops.AVG_POOLS, *ops.PADS, *ops.MIRRORS)
    kinds = (*kinds, nn.PixelUnshuffle, nn.PixelShuffle, ops.DepthToSpace)
    ranked = ops.plain_in(module, kinds)
    if reason is None and ranked and ops.rank(module) != len(shape):
        reason = f"{type(module).__name__} runs on an unbatched value of shape {shape}"
    return Refusal(reason, (node.name,)) if reason else None


def _side_reason(node: fx.Node) -> str:
    """A join that is an op of one map: what its other operands are."""
    whole = next(v for v in operands_of(node) if shape_of(v) == shape_of(node))
    shapes = ", ".join(str(shape_of(v)) for v in operands_of(node) if v is not whole)
    verb, tail = {"add": ("adds", "to"), "sub": ("subtracts", "at"), "mul": ("multiplies by", "at")}[str(join_of(node))]
    return f"{op_name(node)} {verb} a side input of shape {shapes} {tail} the map of {whole.name}"


def _mesh_refusal(item: Branching) -> Refusal:
    """Why a mesh is no series of layers: what in it takes several values."""
    mixing = [n for n in item.nodes if len({v for v in operands_of(n) if is_floating(v)}) > 1] or [item.node]
    names = ", ".join(dict.fromkeys(op_name(n) or n.name for n in mixing))
    return Refusal(f"values meet in {names} in a way that is no series of layers", tuple(n.name for n in mixing))


def _series(gm: fx.GraphModule, name: str, entry: fx.Node, items: list[Item], fine: bool, edges: Edges) -> Series:
    layers: list[Layer] = []
    at = entry.name  # the value that enters the layer being collected
    nodes: list[fx.Node] = []
    conv: str | None = None
    parallel: Parallel | None = None

    def close(activation: fx.Node | None = None, opaque: Refusal | None = None) -> None:
        nonlocal at, conv, parallel
        if activation is not None:
            nodes.append(activation)
        if not nodes:
            return
        act = activation.name if activation is not None else None
        layers.append(Layer(tuple(n.name for n in nodes), at, nodes[-1].name, conv, act, parallel, opaque))
        at, conv, parallel = nodes[-1].name, None, None
        nodes.clear()

    for item in items:
        if fine:
            close()
        if isinstance(item, Branching):
            close()
            prefix = f"{name}/{len(layers)}"
            if item.join == "mesh" and not item.branches:
                nodes.extend(item.nodes)
                close(opaque=_mesh_refusal(item))
                continue
            branches = tuple(
                _series(gm, f"{prefix}.{b}", edge.source, edge.items, fine, edges)
                for b, edge in enumerate(item.branches)
            )
            inner = tuple(n.name for n in item.nodes if n is not item.node)
            refusal = _mesh_refusal(item) if item.join == "mesh" else None
            parallel = Parallel(item.join, item.node.name, branches, inner, refusal)
            nodes.extend(item.nodes or (item.node,))
            continue
        kind = node_kind(gm, item)
        if item in edges.begin:
            close()
        alone = item.op == "call_module" and isinstance(gm.get_submodule(str(item.target)), ops.ChannelSelect)
        if kind == "opaque" or alone:  # after a selection a span may start
            close()
            nodes.append(item)
            close(opaque=refusal_of(gm, item))
        elif kind == "activation":
            close(activation=item)
        else:
            if kind == "conv":
                if conv is not None or parallel is not None:
                    close()
                conv = item.name
            nodes.append(item)
            if item in edges.end:
                close()
    close()
    return Series(name, entry.name, at, tuple(layers))
