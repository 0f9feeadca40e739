"""GraphModule -> regions: series-parallel reduction of the value graph (Valdes, Tarjan, Lawler 1982), linear time.

Values are vertices. A single-input op is an edge that carries itself; a join (add, sub, mul, cat) is a vertex with one
in-edge for each operand. Reduce until nothing changes:

    parallel   all in-edges of a join leave the same vertex  ->  one edge that carries Parallel(join, branches)
    series     a vertex with one in-edge and one out-edge, read by nobody else  ->  one edge that carries both in order

    x ─conv1─bn1─relu─conv2─bn2─┐
    └───────────────────────────add─relu      ->     x ─ Parallel(add, [conv1 bn1 relu conv2 bn2], []) ─ relu

Nodes come in topological order, so one pass is enough: when a join is reached its in-edges are final. Each surviving
edge that carries a convolution is a region. A value with an extra reader (a long skip, a model output, a feature hook)
is pinned and never reduced away, so nothing else has to be said about skips.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from . import ops
from .canonical import op_name
from .ir import Join, Layer, Parallel, Refusal, Region, Series

__all__ = ["find_regions", "node_kind", "refusal_of"]

Kind = Literal["conv", "affine", "activation", "opaque"]


@dataclass(eq=False)
class _Branching:
    """A reduced parallel element before its branches are grouped into layers."""

    join: Join
    node: fx.Node
    branches: list[list[_Item]]


_Item = fx.Node | _Branching


@dataclass(eq=False)
class _Edge:
    source: fx.Node
    target: fx.Node
    items: list[_Item] = field(default_factory=list)


def find_regions(gm: fx.GraphModule) -> tuple[Region, ...]:
    """All regions of a canonical graph, in the order of their exits. `gm` must come from `trace`."""
    found = [e for e in _reduce(gm.graph) if any(_carries_conv(gm, item) for item in e.items)]
    return tuple(Region(_series(gm, str(i), e.source, e.items)) for i, e in enumerate(found))


def _reduce(graph: fx.Graph) -> list[_Edge]:
    into: dict[fx.Node, list[_Edge]] = {}
    out: dict[fx.Node, list[_Edge]] = {node: [] for node in graph.nodes}
    pins: dict[fx.Node, int] = dict.fromkeys(graph.nodes, 0)

    def connect(edge: _Edge) -> None:
        into.setdefault(edge.target, []).append(edge)
        out[edge.source].append(edge)

    def try_series(node: fx.Node) -> None:
        if pins[node] or len(out[node]) != 1 or len(into.get(node, ())) != 1:
            return
        (before,), (after,) = into[node], out[node]
        before.items.extend(after.items)
        before.target = after.target
        into[after.target] = [before if e is after else e for e in into[after.target]]
        into[node], out[node] = [], []

    readers = {node: _operands(node) for node in graph.nodes}
    for node in graph.nodes:
        operands = readers[node]
        join = _join(node)
        if join is not None:
            for operand in operands:
                connect(_Edge(operand, node))
        elif node.op != "output" and len(operands) == 1 and _is_map(node) and _is_map(operands[0]):
            connect(_Edge(operands[0], node, [node]))
        else:
            for operand in operands:
                pins[operand] += 1
    for node in graph.nodes:
        join, incoming = _join(node), into.get(node, [])
        if join is not None and incoming and all(e.source is incoming[0].source for e in incoming):
            source = incoming[0].source
            whole = _Edge(source, node, [_Branching(join, node, [e.items for e in incoming])])
            out[source] = [e for e in out[source] if e not in incoming] + [whole]
            into[node] = [whole]
            try_series(source)
        try_series(node)
    return [edge for node in graph.nodes for edge in into.get(node, []) if edge.items]


def _operands(node: fx.Node) -> list[fx.Node]:
    """The values a node reads, with multiplicity, without parameters."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) if n.op != "get_attr" else None)
    return found


def _is_map(node: fx.Node) -> bool:
    shape = node.meta.get("shape")
    return shape is not None and len(shape) >= 2 and bool(node.meta.get("floating"))


def _join(node: fx.Node) -> Join | None:
    """The join that a node is, if it is one over whole values."""
    if node.op != "call_function" or not _is_map(node) or node.kwargs:  # torch.add(x, y, alpha=2) is not a plain sum
        return None
    name = ops.JOINS.get(op_name(node))
    values = _operands(node)
    if name is None or len(values) < 2 or not all(_is_map(v) for v in values):
        return None
    listed = node.args[0] if name == "cat" else node.args
    return name if isinstance(listed, (list, tuple)) and len(values) == len(listed) else None  # type: ignore[return-value]


def _carries_conv(gm: fx.GraphModule, item: _Item) -> bool:
    if isinstance(item, _Branching):
        return any(_carries_conv(gm, i) for branch in item.branches for i in branch)
    if item.op != "call_module":
        return False
    return any(isinstance(m, ops.CONVS) for m in gm.get_submodule(str(item.target)).modules())


def node_kind(gm: fx.GraphModule, node: fx.Node) -> Kind:
    """What a single-input node is to the compiler."""
    if refusal_of(gm, node) is not None:
        return "opaque"
    module = gm.get_submodule(str(node.target))
    if ops.plain_in(module, ops.ACTIVATIONS):
        return "activation"
    return "conv" if ops.plain_in(module, ops.CONVS) else "affine"


def refusal_of(gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
    """Why a single-input node is opaque, or None if it is understood."""
    if node.op != "call_module":
        return Refusal(f"{op_name(node) or node.op} is not an affine op of a feature map", (node.name,))
    reasons: dict[str, str] = gm.meta.get("lmfx", {}).get("opaque", {})
    if str(node.target) in reasons:
        return Refusal(reasons[str(node.target)], (node.name,))
    module = gm.get_submodule(str(node.target))
    shape = node.meta.get("shape")
    if shape is None or len(shape) < 3:
        return Refusal(f"{type(module).__name__} works on a vector, not on a feature map", (node.name,))
    if ops.plain_in(module, ops.ACTIVATIONS):
        return None
    reason = ops.affine_refusal(module)
    ranked = ops.plain_in(module, (*ops.CONVS, *ops.BATCH_NORMS, *ops.AVG_POOLS, *ops.PADS))
    if reason is None and ranked and ops.rank(module) != len(shape):
        reason = f"{type(module).__name__} runs on an unbatched value of shape {shape}"
    return Refusal(reason, (node.name,)) if reason else None


def _series(gm: fx.GraphModule, name: str, entry: fx.Node, items: list[_Item]) -> Series:
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
        if isinstance(item, _Branching):
            close()
            prefix, start = f"{name}/{len(layers)}", _node(gm, at)
            branches = tuple(_series(gm, f"{prefix}.{b}", start, inner) for b, inner in enumerate(item.branches))
            parallel = Parallel(item.join, item.node.name, branches)
            nodes.append(item.node)
            continue
        kind = node_kind(gm, item)
        if kind == "opaque":
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
    close()
    return Series(name, entry.name, at, tuple(layers))


def _node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)
