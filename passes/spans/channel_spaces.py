"""Follows channels through a graph: which channels of which values are the same, so that they only go together.

    x ─ A ─ norm ─ relu ─ depthwise ─ mul ─ B ─ y         one space: what A makes and B reads, and all values between
                              └─ pool ─ C ─ relu ─ D ─┘   the gate C, D reads and makes channels of it, too

A conv makes channels and reads others. In between, ops keep them apart, and each channel of each value gets a label:

    norm, activation, pool, pad       the labels of their input
    grouped conv, GroupNorm           those of a group become one: its channels stay or go together
    sum, product of two maps          the labels of both become one, channel by channel
    concatenation, selection          labels side by side, or some of them in another order

Labels that meet in one value belong to one *space*. A space can be cut where nothing else sees it: no output, no op
that mixes channels without being a conv, one conv that reads it (the `reader`), and beside that gates only, which read
one pixel of it and make a factor for its channels. Nor may anything work with how many channels there are
(`raw_nodes.count_uses`), but for `view(b, c, 1, 1)` of a value that loses the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx, nn

from ..graph import ops
from ..graph.node_facts import shape_of, tensor_shape
from ..graph.raw_nodes import argument, count_uses, dependents, op_name, reshape_sizes, sizes_of
from ..graph.reduction import join_of, operands_of
from ..graph.union_find import UnionFind
from ..ir import Refusal

__all__ = ["Space", "find_spaces"]

_SAME = (
    *(*ops.BATCH_NORMS, *ops.INSTANCE_NORMS, *ops.AVG_POOLS, *ops.MAX_POOLS, *ops.PADS, *ops.MIRRORS),
    *(*ops.ACTIVATIONS, *ops.IDENTITIES, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample),
)
_OWN = (ops.ChannelAffine, ops.PixelSlice)
_REDUCTIONS = frozenset({"mean", "amax", "amin", "sum"})
_POOLS = frozenset({"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "upsample"})
_RESHAPES = frozenset({"flatten", "squeeze", "unsqueeze", "view", "reshape"})
_SIZES = frozenset({"size", "getattr", "dim", "sym_size"})


@dataclass(frozen=True)
class Space:
    """Channels that only go together. `labels` has for each node with such channels the unit of each of them, counted
    from 0 in the order of what `reader` reads; `per_unit` is how many of the reader's channels a unit has. Nodes are in
    the order of the graph; `producers` are convs that make the channels, `gates` those that read them beside the
    reader."""

    producers: tuple[str, ...]
    reader: str
    gates: tuple[str, ...]
    labels: dict[str, tuple[int, ...]]
    source: str  # the node whose value the reader reads
    units: int
    per_unit: int

    @property
    def of(self) -> int:
        """The channels that the reader reads."""
        return self.units * self.per_unit

    @property
    def nodes(self) -> tuple[str, ...]:
        """All that sees the channels, in the order of the graph but for the convs that read them."""
        return (*self.labels, self.reader, *self.gates)

    @property
    def parts(self) -> tuple[frozenset[int], ...]:
        """The units of each value that has only some of them, as the operands of a concatenation do. One of each part
        must stay, or a conv would make nothing."""
        every = {frozenset(units) for units in self.labels.values()}
        return tuple(sorted((p for p in every if len(p) < self.units), key=min))

    def indispensable(self, worth: Sequence[float]) -> frozenset[int]:
        """One unit of each part: of those that are worth most, as few as are in all parts."""
        found: set[int] = set()
        for part in sorted(self.parts, key=len):
            if not found & part:
                found.add(max(part, key=lambda unit: worth[unit]))
        return frozenset(found)

    def kept(self, name: str, units: frozenset[int]) -> list[int]:
        """The channels of a node's value that stay with these units."""
        return [i for i, unit in enumerate(self.labels[name]) if unit in units]


def find_spaces(gm: fx.GraphModule) -> tuple[list[Space], list[Refusal]]:
    """The spaces of a graph that can be cut, and why others, that a conv makes and a conv reads, cannot."""
    finder = _SpaceFinder(gm)
    for node in gm.graph.nodes:
        finder.visit(node)
    return finder.result()


class _SpaceFinder:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.labels: dict[fx.Node, list[int]] = {}
        self.units, self.spaces = UnionFind[int](), UnionFind[int]()
        self.count = 0  # of channels that were made
        self.made: dict[fx.Node, list[int]] = {}  # convs that make channels
        self.reads: list[tuple[fx.Node, fx.Node]] = []  # (conv, what it reads)
        self.blocked: list[tuple[int, Refusal]] = []

    # --- one node ----------------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> None:
        sources = [v for v in node.all_input_nodes if v in self.labels]
        if node.op == "output":
            self.block(sources, Refusal("the network returns these channels", (node.name,)))
        elif node.op == "call_module":
            self.module(node, self.gm.get_submodule(str(node.target)), sources)
        elif sources and not (op_name(node) in _SIZES and shape_of(node) is None):
            self.function(node, sources)

    def module(self, node: fx.Node, module: Any, sources: list[fx.Node]) -> None:
        shape = shape_of(node)
        single = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
        source = node.args[0] if single else None
        labels = self.labels.get(source) if isinstance(source, fx.Node) else None
        if shape is None or len(shape) < 2 or not isinstance(source, fx.Node):
            return self.mixed(node, sources)
        linear = ops.plain_in(module, (nn.Linear,)) and len(shape) == 2
        if linear or ops.plain_in(module, (*ops.CONVS, *ops.TRANSPOSED)):
            return self.conv(node, module, source, labels)
        if labels is None:
            return None
        if isinstance(module, ops.ChannelSelect):
            return self.give(node, [labels[i] for i in module.index])
        if isinstance(module, nn.GroupNorm) and not ops.has_hooks(module):
            self.together(labels, module.num_groups)
            return self.give(node, labels)
        if ops.plain_in(module, (nn.Flatten,)):
            return self.reshaped(node, source, labels)
        if (ops.plain_in(module, _SAME) or isinstance(module, _OWN)) and shape[1] == len(labels):
            return self.give(node, labels)
        return self.mixed(node, sources)

    def conv(self, node: fx.Node, module: Any, source: fx.Node, labels: list[int] | None) -> None:
        groups = getattr(module, "groups", 1)
        if groups > 1:
            if labels is None:
                return
            self.together(labels, groups)
            size, each = len(labels) // groups, tensor_shape(node)[1] // groups
            self.give(node, [labels[g * size] for g in range(groups) for _ in range(each)])
            return
        if labels is not None:
            self.reads.append((node, source))
        first, self.count = self.count, self.count + tensor_shape(node)[1]
        self.made[node] = list(range(first, self.count))
        self.give(node, self.made[node])

    def function(self, node: fx.Node, sources: list[fx.Node]) -> None:
        name, shape = op_name(node), shape_of(node)
        if shape is None or len(shape) < 2:
            return self.mixed(node, sources)
        join = join_of(node)
        if join == "cat":
            return self.cat(node, sources)
        if join is not None:
            return self.joined(node, sources)
        if len(node.all_input_nodes) != 1 and name not in _RESHAPES:
            return self.mixed(node, sources)
        (source, *others) = sources
        labels = self.labels[source]
        if others or node.args[:1] != (source,):
            return self.mixed(node, sources)
        if name in ops.JOINS and name != "cat" and shape[1] == len(labels):
            return self.give(node, labels)  # with a number
        if name in _POOLS and shape[1] == len(labels) and len(shape) == len(tensor_shape(source)):
            return self.give(node, labels)
        if name in _REDUCTIONS and self.over_pixels(node, source) and shape[1] == len(labels):
            return self.give(node, labels)
        if name in _RESHAPES:
            return self.reshaped(node, source, labels)
        return self.mixed(node, sources)

    @staticmethod
    def over_pixels(node: fx.Node, source: fx.Node) -> bool:
        """Whether a reduction leaves the batch and the channels alone."""
        dims = argument(node, 1, "dim")
        rank = len(tensor_shape(source))
        listed = [dims] if isinstance(dims, int) else dims
        if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(d, int) for d in listed):
            return False
        return all(d % rank >= 2 for d in listed)

    def reshaped(self, node: fx.Node, source: fx.Node, labels: list[int]) -> None:
        """A reshape that only adds or takes off dimensions of one pixel, or that lays the pixels of each channel side
        by side. A number of channels that is written in it would be wrong with fewer."""
        before, after = tensor_shape(source), tensor_shape(node)
        name = op_name(node) if node.op != "call_module" else "flatten"
        written: list[Any] = []
        if name in ("view", "reshape"):
            written = reshape_sizes(node) or []
            if len(written) < 2 or (isinstance(written[1], int) and written[1] != -1):
                return self.mixed(node, [source])
            if isinstance(written[1], fx.Node) and (sizes_of(written[1]) or (None, None))[1] != 1:
                return self.mixed(node, [source])  # a size that is the number of channels by chance
        elif name == "squeeze" and len(node.args) < 2:
            return self.mixed(node, [source])  # it would take a single channel that is left for a dimension to go
        elif node.kwargs and name != "flatten":
            return self.mixed(node, [source])
        if after[0] != before[0] or after[1] % max(before[1], 1) or prod(after) != prod(before):
            return self.mixed(node, [source])
        each = after[1] // before[1]
        flat = name == "flatten" or (len(written) == 2 and written[1] == -1)
        if each != 1 and (len(after) != 2 or each != prod(before[2:]) or not flat):
            return self.mixed(node, [source])
        if each == 1 and name != "flatten" and before[2:] != after[2:] and prod(before[2:]) != 1:
            return self.mixed(node, [source])
        return self.give(node, [u for u in labels for _ in range(each)])

    def joined(self, node: fx.Node, sources: list[fx.Node]) -> None:
        shape = tensor_shape(node)
        found: list[list[int]] = []
        for value in operands_of(node):
            seen = tensor_shape(value)
            labels = self.labels.get(value)
            if len(seen) != len(shape):
                return self.mixed(node, sources)
            if seen[1] == 1 and shape[1] > 1:
                continue  # one factor for all channels
            if labels is None or len(labels) != shape[1]:
                reason = f"{op_name(node)} joins the channels with those of {value.name}, which no conv here makes"
                return self.mixed(node, sources, reason)
            found.append(labels)
        for row in zip(*found, strict=True):
            _unite(self.units, row)
            _unite(self.spaces, row)
        if found:
            self.give(node, found[0])
        return None

    def cat(self, node: fx.Node, sources: list[fx.Node]) -> None:
        values = operands_of(node)
        dim = argument(node, 1, "dim", 0)
        if dim not in (1, 1 - len(tensor_shape(node))) or any(v not in self.labels for v in values):
            return self.mixed(node, sources, "cat joins the channels with those of a value that no conv here makes")
        return self.give(node, [u for v in values for u in self.labels[v]])

    # --- labels ------------------------------------------------------------------------------------------------------

    def give(self, node: fx.Node, labels: list[int]) -> None:
        self.labels[node] = labels
        _unite(self.spaces, labels)

    def together(self, labels: list[int], groups: int) -> None:
        size = len(labels) // groups
        for g in range(groups):
            _unite(self.units, labels[g * size : (g + 1) * size])

    def mixed(self, node: fx.Node, sources: list[fx.Node], reason: str = "") -> None:
        what = type(self.gm.get_submodule(str(node.target))).__name__ if node.op == "call_module" else op_name(node)
        self.block(sources, Refusal(reason or f"{what} does not keep channels apart", (node.name,)))

    def block(self, sources: list[fx.Node], refusal: Refusal) -> None:
        self.blocked += [(self.labels[v][0], refusal) for v in sources if self.labels[v]]

    def check_counts(self) -> None:
        """Blocks channels whose number is read where it would be wrong with fewer of them. Of what reads it, only a
        reshape has channels of its own."""
        for value, node in count_uses(self.gm):
            seen, made = (sorted(self.units.root(u) for u in self.labels.get(v, ())) for v in (value, node))
            if seen != made:
                reason = f"{op_name(node)} works with how many channels {value.name} has"
                self.block([v for v in (value, node) if v in self.labels], Refusal(reason, (node.name,)))

    # --- spaces ------------------------------------------------------------------------------------------------------

    def result(self) -> tuple[list[Space], list[Refusal]]:
        self.check_counts()
        reasons: dict[int, Refusal] = {}
        for unit, refusal in self.blocked:
            reasons.setdefault(self.spaces.root(unit), refusal)
        nodes: dict[int, list[fx.Node]] = {}
        for node, labels in self.labels.items():
            if labels:
                nodes.setdefault(self.spaces.root(labels[0]), []).append(node)
        readers: dict[int, list[tuple[fx.Node, fx.Node]]] = {}
        for reader, source in self.reads:
            readers.setdefault(self.spaces.root(self.labels[source][0]), []).append((reader, source))
        found, refusals = [], []
        for root, seen in nodes.items():
            if root not in readers:
                continue
            space = reasons.get(root) or self.space(seen, readers[root])
            if isinstance(space, Refusal):
                made = next((n.name for n in seen if n in self.made), seen[0].name)
                refusals.append(Refusal(f"not narrowed: {space.reason}", tuple(dict.fromkeys((made, *space.nodes)))))
            else:
                found.append(space)
        return found, refusals

    @staticmethod
    def feeds(node: fx.Node, targets: list[fx.Node]) -> bool:
        """Whether one of some nodes depends on another node."""
        return not dependents(node.users).isdisjoint(targets)

    def space(self, seen: list[fx.Node], reads: list[tuple[fx.Node, fx.Node]]) -> Space | Refusal:
        producers = [n for n in seen if n in self.made]
        gates = [(r, s) for r, s in reads if prod(tensor_shape(s)[2:]) == 1 and self.feeds(r, producers)]
        main = [(r, s) for r, s in reads if (r, s) not in gates]
        if len(main) != 1:
            names = tuple(dict.fromkeys(r.name for r, _ in main or reads))
            return Refusal(f"{len(main)} convs read the channels, and one can be refitted", names)
        ((reader, source),) = main
        roots = [self.units.root(u) for u in self.labels[source]]
        order = {u: i for i, u in enumerate(dict.fromkeys(roots))}
        counts = [roots.count(u) for u in order] if len(order) < len(roots) else [1]
        if len(set(counts)) > 1:
            return Refusal("groups of channels of different sizes go together", (reader.name,))
        labels: dict[str, tuple[int, ...]] = {}
        for node in seen:
            units = [self.units.root(u) for u in self.labels[node]]
            if any(u not in order for u in units):
                return Refusal("some of the channels are not read", (reader.name, node.name))
            labels[node.name] = tuple(order[u] for u in units)
        if len(order) < 2:
            return Refusal("all of the channels go together", (reader.name,))
        return Space(
            tuple(n.name for n in producers),
            reader.name,
            tuple(r.name for r, _ in gates),
            labels,
            source.name,
            len(order),
            counts[0],
        )


def _unite(classes: UnionFind[int], numbers: Sequence[int]) -> None:
    """Make one class of all of them."""
    for number in numbers[1:]:
        classes.unite(number, numbers[0])
