"""Finds runs of layers that are called several times: a head on pyramid levels, an encoder of two images, a refinement.

    a ─ conv1 ─ relu ─ conv2 ─ ...           one Run of two layers at two places: a merged conv that stands for it at
    b ─ conv1 ─ relu ─ conv2 ─ ...           one place stands for it at all of them, and stays one module

Layers at several places are *the same* if they have the same ops, wired alike, with the same weights (the same tensors,
not equal ones); the image size may differ. A run is a longest row of such layers in which every conv is called at
exactly these places. What its first place becomes, all become: the solver chooses at the first, with the latencies of
all calls added up, and passes the others by. So no span may hold a part of a run and something else. One that holds all
calls of what it touches may: nothing of the module is left.

    first      inside a run, at its first place: candidates are made here, for all calls
    other      inside a run, elsewhere: decided at the first place
    whole      holds all calls of every run that it touches, or touches none
    torn       holds some calls, or parts of them, and something else
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from torch import fx

from ..graph import ops
from ..graph.node_facts import dtype_of, shape_of
from ..ir import Layer, Series
from .same_layers import module_text

if TYPE_CHECKING:
    from .layers import Network

__all__ = ["Calls", "Run"]

Role = Literal["first", "other", "whole", "torn"]
Place = tuple[str, int]  # series, layer


@dataclass(frozen=True)
class Run:
    """`length` layers that are the same at each of `places`, in the order of the graph."""

    places: tuple[Place, ...]
    length: int


class Calls:
    """The runs of a network, and how each span relates to them."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.runs: list[Run] = []
        self._at: dict[Place, tuple[int, int]] = {}  # layer -> its run, and which place of it
        self._texts: dict[Place, Hashable] = {}
        if network.shared:
            self._find()

    # --- questions ---------------------------------------------------------------------------------------------------

    def role(self, series: str, start: int, stop: int) -> Role:
        """How the span of these layers relates to the runs."""
        if not self.runs:
            return "whole"
        here = {self._at.get((series, i)) for i in range(start, stop)}
        if len(here) == 1 and None not in here:
            (found,) = here
            assert found is not None
            return "first" if found[1] == 0 else "other"
        counts: dict[int, int] = {}
        for i in range(start, stop):
            for run, count in self._touched[series][i].items():
                counts[run] = counts.get(run, 0) + count
        whole = all(len(self.runs[r].places) * self.runs[r].length == n for r, n in counts.items())
        return "whole" if whole else "torn"

    def others(self, series: str, start: int, stop: int) -> tuple[tuple[str, int, int], ...]:
        """(series, start, stop) at all places but the first, for a span inside a run at its first place."""
        if self.role(series, start, stop) != "first":
            return ()
        run = self.runs[self._at[series, start][0]]
        name, first = run.places[0]
        assert name == series
        return tuple((s, at + start - first, at + stop - first) for s, at in run.places[1:])

    def passed(self, series: str) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the runs in a series that are decided elsewhere."""
        found = [(at, at + run.length) for run in self.runs for name, at in run.places[1:] if name == series]
        return tuple(sorted(found))

    def torn(self, series: str, start: int, stop: int) -> tuple[str, ...]:
        """The convs, at all places, of the runs that a span touches."""
        touched = {run for i in range(start, stop) for run in self._touched[series][i]}
        return tuple(n for r in sorted(touched) for n in self._convs(self.runs[r]))

    def activations(self) -> Iterator[tuple[str, ...]]:
        """The nodes of each activation in a run, one a place."""
        for run in self.runs:
            for offset in range(run.length):
                found = [self._layer((name, at + offset)).activation for name, at in run.places]
                if found[0] is not None:
                    yield tuple(str(name) for name in found)

    @cached_property
    def convs(self) -> frozenset[str]:
        """The nodes of all convs in runs."""
        return frozenset(n for run in self.runs for n in self._convs(run))

    def _convs(self, run: Run) -> Iterator[str]:
        for name, at in run.places:
            yield from self.network.convs(self.network.series[name].layers[at : at + run.length])[1]

    @cached_property
    def _touched(self) -> dict[str, list[dict[int, int]]]:
        """Of every layer: how many layers of which runs are in it. Those inside of a layer of a run do not count."""
        found: dict[str, list[dict[int, int]]] = {}
        for series in reversed(self.network.series.values()):  # inner before outer
            found[series.name] = rows = []
            for i, layer in enumerate(series.layers):
                own = self._at.get((series.name, i))
                counts: dict[int, int] = {}
                if own is not None:
                    counts[own[0]] = 1
                for branch in layer.parallel.branches if own is None and layer.parallel is not None else ():
                    for row in found[branch.name]:
                        for run, count in row.items():
                            counts[run] = counts.get(run, 0) + count
                rows.append(counts)
        return found

    # --- runs --------------------------------------------------------------------------------------------------------

    def _find(self) -> None:
        groups: dict[Hashable, list[Place]] = {}
        for series in self.network.series.values():
            for i, layer in enumerate(series.layers):
                if self.network.shared.keys() & set(self.network.convs((layer,))[1]):
                    groups.setdefault(self._text((series.name, i)), []).append((series.name, i))
        for places in groups.values():  # in the order of the graph, outer before inner
            if places[0] not in self._at and self._complete(places):
                self._grow(places, groups)

    def _complete(self, places: list[Place]) -> bool:
        """Whether the convs at these places are called there, and nowhere else."""
        if len(places) < 2:
            return False
        rows = [self.network.convs((self._layer(p),))[1] for p in places]
        return all(set(calls) == set(self.network.shared.get(calls[0], ())) for calls in zip(*rows, strict=True))

    def _grow(self, places: list[Place], groups: dict[Hashable, list[Place]]) -> None:
        """A run from layers that are the same at these places and what follows and precedes them."""
        taken = set(places)

        def same(offset: int) -> bool:
            moved = [(name, i + offset) for name, i in places]
            if not all(0 <= i < len(self.network.series[name].layers) for name, i in moved):
                return False
            if taken.intersection(moved) or any(p in self._at for p in moved):
                return False
            if len({self._text(p) for p in moved}) > 1:
                return False
            convs = self.network.convs((self._layer(moved[0]),))[1]
            return not convs or (groups.get(self._text(moved[0])) == moved and self._complete(moved))

        ends = []
        for step in (1, -1):
            end, offset = 0, step
            while same(offset):
                taken.update((name, i + offset) for name, i in places)
                # What has no weights is a part of a run only between layers that have some.
                end = offset if self._weighs((places[0][0], places[0][1] + offset)) else end
                offset += step
            ends.append(end)
        last, first = ends
        self._add([(name, i + first) for name, i in places], last - first + 1)

    def _add(self, places: list[Place], length: int) -> None:
        number = len(self.runs)
        self.runs.append(Run(tuple(places), length))
        for which, (name, at) in enumerate(places):
            for i in range(at, at + length):
                self._at[name, i] = number, which
        for offset in range(length):
            rows = [_branches(self._layer((name, at + offset))) for name, at in places]
            for branches in zip(*rows, strict=True):
                if branches[0].layers:
                    self._add([(b.name, 0) for b in branches], len(branches[0].layers))

    def _layer(self, place: Place) -> Layer:
        return self.network.series[place[0]].layers[place[1]]

    def _weighs(self, place: Place) -> bool:
        called = [n for n in _nodes(self._layer(place)) if self.network.nodes[n].op == "call_module"]
        return any(next(self.network.module(n).parameters(), None) is not None for n in called)

    # --- whether layers are the same ---------------------------------------------------------------------------------

    def _text(self, place: Place) -> Hashable:
        """All that a layer is: equal for layers that are the same."""
        if place not in self._texts:
            layer = self._layer(place)
            ids: dict[str, object] = {layer.entry: "entry"}
            order = {name: i for i, name in enumerate(self.network.nodes)} if layer.parallel is not None else {}
            names = sorted(_nodes(layer), key=lambda n: order.get(n, 0))
            for name in names:
                ids[name] = len(ids)
            inside = tuple(self._node(self.network.nodes[n], ids) for n in names)
            self._texts[place] = (self._value(self.network.nodes[layer.entry]), inside, _shape_of(layer, ids))
        return self._texts[place]

    def _node(self, node: fx.Node, ids: dict[str, object]) -> Hashable:
        def plain(value: Any) -> Hashable:
            if isinstance(value, fx.Node):
                if value.op == "get_attr":
                    return "tensor", id(operator.attrgetter(str(value.target))(self.network.gm))
                return "node", ids.get(value.name, value.name)  # what comes from elsewhere differs from call to call
            if isinstance(value, (tuple, list)):
                return type(value).__name__, tuple(plain(v) for v in value)
            if isinstance(value, dict):
                return tuple((k, plain(v)) for k, v in value.items())
            return type(value).__name__, repr(value)

        what: Hashable = node.target if node.op == "call_function" else str(node.target)
        if node.op == "call_module":
            module = self.network.module(node.name)
            shape = shape_of(node)
            what = module_text(module), shape is not None and ops.normalizes(module, shape)
        return node.op, what, plain(node.args), plain(node.kwargs), self._value(node)

    def _value(self, node: fx.Node) -> Hashable:
        """What of a value is the same at every call: batch, channels, rank and dtype."""
        shape = shape_of(node)
        return None if shape is None else (len(shape), *shape[:2]), str(dtype_of(node))


def _branches(layer: Layer) -> tuple[Series, ...]:
    return layer.parallel.branches if layer.parallel is not None else ()


def _nodes(layer: Layer) -> list[str]:
    """The nodes of a layer, those inside of its branches and between them."""
    found = [n for branch in _branches(layer) for inner in branch.layers for n in _nodes(inner)]
    return list(dict.fromkeys([*found, *(layer.parallel.inner if layer.parallel else ()), *layer.nodes]))


def _shape_of(layer: Layer, ids: dict[str, object]) -> Hashable:
    """How a layer is made of its nodes."""
    parallel = layer.parallel
    inside: Hashable = None
    if parallel is not None:
        branches = tuple((ids.get(b.entry), tuple(_shape_of(lay, ids) for lay in b.layers)) for b in parallel.branches)
        inside = parallel.join, ids[parallel.node], branches
    act, conv = layer.activation, layer.conv
    return len(layer.nodes), act and ids[act], conv and ids[conv], layer.opaque is None, inside
