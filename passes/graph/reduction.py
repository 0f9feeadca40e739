"""Reduces the graph of a network's values to edges that carry nested series, parallels and meshes.

Values are vertices. An op of one map is an edge that carries itself; a join (add, sub, mul, cat) is a vertex with one
in-edge for each operand; any other op is a vertex that depends on its operands. Nodes come in topological order, so one
pass is enough: when a vertex is reached, its in-edges are final. At each vertex, in this order:

    parallel   all in-edges of a join leave one vertex  ->  one edge that carries Branching(join, branches)
    side       a join of one map and of values that broadcast over it, from elsewhere (a time embedding)
                   ->  the map's edge carries the join; the side inputs end there
    mesh       everything between a vertex and its immediate dominator is read nowhere else
                   ->  one edge that carries the whole part, and the edges inside of it that hold convolutions
    series     a vertex with one in-edge and one out-edge, read by nobody else  ->  one edge that carries both in order

parallel and series are the reduction of Valdes, Tarjan, Lawler (1982). A mesh is what is left of a part with one entry
and one exit (attention, a cell whose branches exchange values): nothing is known of it but its ends, so it may be
replaced whole or stay, while the series inside are regions of their own.

A value that the network returns is pinned and never reduced away. What is computed from constants alone is a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from ..ir import Join
from . import ops
from .node_facts import is_floating, shape_of, tensor_shape
from .raw_nodes import op_name

__all__ = ["Branching", "Edge", "Item", "Reduction", "is_map", "join_of", "operands_of"]


@dataclass(eq=False)
class Branching:
    """A reduced element with several branches. For a mesh `nodes` are those of its nodes that no branch holds."""

    join: Join
    node: fx.Node
    branches: list[Edge]
    nodes: tuple[fx.Node, ...] = ()


Item = fx.Node | Branching


@dataclass(eq=False)
class Edge:
    """Consecutive items from one value to another; `depends` marks an operand of an op that is no edge itself."""

    source: fx.Node
    target: fx.Node
    items: list[Item] = field(default_factory=list)
    depends: bool = False


class Reduction:
    """Reduces a graph once; `edges` are those that survive and carry something, in the order of the graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.constants = _constants(gm.graph)
        self.operands = {n: [v for v in operands_of(n) if v not in self.constants] for n in gm.graph.nodes}
        self.dominator = _dominators(gm.graph, self.operands)
        self.joins = {n: join for n in gm.graph.nodes if (join := self._join(n)) is not None}
        self.into: dict[fx.Node, list[Edge]] = {}
        self.out: dict[fx.Node, list[Edge]] = {node: [] for node in gm.graph.nodes}
        self.sides: dict[fx.Node, list[Edge]] = {}  # edges that end as a side input of a vertex
        self.pinned: set[fx.Node] = set()
        for node in gm.graph.nodes:
            self._connect(node)
        for node in gm.graph.nodes:
            if node.op != "output" and node not in self.constants:
                self._reduce(node)
        found = [e for node in gm.graph.nodes for e in (*self.into.get(node, ()), *self.sides.get(node, ()))]
        self.edges = [e for e in found if e.items]

    def _join(self, node: fx.Node) -> Join | None:
        join = join_of(node)
        return join if join is not None and len(self.operands[node]) == len(operands_of(node)) else None

    def _connect(self, node: fx.Node) -> None:
        values = self.operands[node]
        if node.op == "output":
            self.pinned.update(values)
            return
        joins = node in self.joins
        alone = not joins and len(values) == 1 and is_map(node) and is_map(values[0])
        for value in values:
            edge = Edge(value, node, [node] if alone else [], depends=not joins and not alone)
            self.into.setdefault(node, []).append(edge)
            self.out[value].append(edge)

    def _reduce(self, node: fx.Node) -> None:
        incoming = self.into.get(node, [])
        join = self.joins.get(node)
        if join is not None and incoming and all(e.source is incoming[0].source for e in incoming):
            self._replace(incoming, Edge(incoming[0].source, node, [Branching(join, node, incoming)]))
        elif (len(incoming) > 1 or any(e.depends for e in incoming)) and not self._mesh(node) and join is not None:
            self._side(node, join)
        self._series(node)

    def _replace(self, old: list[Edge], whole: Edge) -> None:
        """Put one edge in the place of those between the same two vertices."""
        source, target = whole.source, whole.target
        self.out[source] = [e for e in self.out[source] if e not in old] + [whole]
        self.into[target] = [whole]
        self._series(source)

    def _series(self, node: fx.Node) -> None:
        if node in self.pinned or len(self.out[node]) != 1 or len(self.into.get(node, ())) != 1:
            return
        (before,), (after,) = self.into[node], self.out[node]
        if before.depends or after.depends or self._is_side(after):
            return
        before.items.extend(after.items)
        before.target = after.target
        self.into[after.target] = [before if e is after else e for e in self.into[after.target]]
        self.into[node], self.out[node] = [], []

    def _is_side(self, edge: Edge) -> bool:
        return edge in self.sides.get(edge.target, ())

    # --- side inputs -------------------------------------------------------------------------------------------------

    def _side(self, node: fx.Node, join: Join) -> None:
        """A join of one map with values that broadcast over it becomes an op of that map."""
        incoming = self.into[node]
        whole = [e for e, v in zip(incoming, self.operands[node], strict=True) if shape_of(v) == shape_of(node)]
        if join == "cat" or len(whole) != 1 or (join == "sub" and whole[0] is not incoming[0]):
            return
        whole[0].items.append(node)
        self.sides[node] = [e for e in incoming if e is not whole[0]]
        self.into[node] = whole

    # --- meshes ------------------------------------------------------------------------------------------------------

    def _mesh(self, node: fx.Node) -> bool:
        """Collapse what lies between a vertex and its closest dominator that is a map, if nothing else reads it."""
        entry = self.dominator[node]
        while entry is not None and not is_map(entry):
            entry = self.dominator[entry]
        if entry is None or not is_map(node):
            return False
        inside: set[fx.Node] = set()
        todo = [node]
        while todo:
            for value in self.operands[todo.pop()]:
                if value is not entry and value not in inside:
                    inside.add(value)
                    todo.append(value)
        closed = inside | {node}
        if any(value in self.pinned or any(user not in closed for user in value.users) for value in inside):
            return False
        edges = [e for n in closed for e in (*self.into.get(n, ()), *self.sides.get(n, ()))]
        edges.sort(key=lambda e: (self.order[e.target], self.order[e.source]))
        branches = [e for e in edges if any(carries_conv(self.gm, item) for item in e.items)]
        held = {n for e in branches for item in e.items for n in _nodes(item)}
        own = tuple(sorted(closed - held, key=self.order.__getitem__))
        for value in inside:
            self.into[value], self.out[value], self.sides[value] = [], [], []
        self.sides[node] = []
        self._replace(edges, Edge(entry, node, [Branching("mesh", node, branches, own)]))
        return True


def _nodes(item: Item) -> set[fx.Node]:
    if isinstance(item, fx.Node):
        return {item}
    return {item.node, *item.nodes, *(n for branch in item.branches for i in branch.items for n in _nodes(i))}


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Parameters, buffers, and what is computed from nothing else."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op in ("call_function", "call_method") and all(v in found for v in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _dominators(graph: fx.Graph, operands: dict[fx.Node, list[fx.Node]]) -> dict[fx.Node, fx.Node | None]:
    """The last value, if any, that everything a node is computed from passes through."""
    depth: dict[fx.Node | None, int] = {None: 0}
    above: dict[fx.Node, fx.Node | None] = {}
    for node in graph.nodes:
        common: fx.Node | None = operands[node][0] if operands[node] else None
        for other in operands[node][1:]:
            at: fx.Node | None = other
            while at is not common:
                if depth[at] >= depth[common]:
                    assert at is not None
                    at = above[at]
                else:
                    assert common is not None
                    common = above[common]
        above[node] = common
        depth[node] = depth[common] + 1
    return above


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The values a node reads, with multiplicity, without parameters."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) if n.op != "get_attr" else None)
    return found


def is_map(node: fx.Node) -> bool:
    """Whether a value is a floating-point tensor with a batch and a channel dimension."""
    shape = shape_of(node)
    return shape is not None and len(shape) >= 2 and is_floating(node)


def join_of(node: fx.Node) -> Join | None:
    """The join that a node is, if it is one over whole values."""
    if node.op != "call_function" or not is_map(node) or node.kwargs:  # torch.add(x, y, alpha=2) is not a plain sum
        return None
    name = ops.JOINS.get(op_name(node))
    values = operands_of(node)
    if name is None or len(values) < 2 or not all(is_map(v) for v in values):
        return None
    listed = node.args[0] if name == "cat" else node.args
    return name if isinstance(listed, (list, tuple)) and len(values) == len(listed) else None  # type: ignore[return-value]


def carries_conv(gm: fx.GraphModule, item: Item) -> bool:
    """Whether an item is, or holds, a convolution, or a Linear of vectors."""
    if isinstance(item, Branching):
        return any(carries_conv(gm, i) for branch in item.branches for i in branch.items)
    if item.op != "call_module":
        return False
    module = gm.get_submodule(str(item.target))
    if isinstance(module, nn.Linear):
        return len(tensor_shape(item)) == 2
    return any(isinstance(m, (*ops.CONVS, *ops.TRANSPOSED)) for m in module.modules())
