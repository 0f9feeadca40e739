"""Finds the cuts at which a span can become narrower, and the widths that are worth trying.

    x ─ [ A ─ norm ─ relu ─ B ] ─ y          the channels between A and B, which nothing outside of the span sees
          └── private ──┘

A cut is a space of channels (`channel_spaces`) that lies within one span: the shortest run of layers that holds all
that sees it. Cuts that share a conv (the second and third conv of a bottleneck: one reads what the other makes) are
offered one by one, and together at widths that are about alike.

Widths are eighths of the channels on a grid that runtimes like: 8 channels, fewer where there are fewer than 32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING

from ..graph.cut_modules import is_cut
from ..ir import Cut, Refusal, Series
from .channel_spaces import Space, find_spaces

if TYPE_CHECKING:
    from .layers import Network

__all__ = ["Narrowing", "PrivateCut", "widths_of"]

GRID = 8
EIGHTHS = range(1, 8)


@dataclass(frozen=True)
class PrivateCut:
    """A space, and the layers `(start, stop]` of the series that see it."""

    space: Space
    series: str
    start: int
    stop: int
    widths: tuple[int, ...]  # channels of the reader, ascending


def widths_of(channels: int, per_unit: int = 1) -> tuple[int, ...]:
    """The widths below `channels` that are tried, ascending: eighths, on the grid, in whole units."""
    grid = GRID
    while grid > 1 and grid * 4 > channels:
        grid //= 2
    grid = lcm(grid, per_unit)
    found = {round(channels * i / 8 / grid) * grid for i in EIGHTHS}
    return tuple(sorted(w for w in found if 0 < w < channels))


class Narrowing:
    """The cuts of a network, by the node of the conv that reads the channels."""

    def __init__(self, network: Network) -> None:
        self.network = network
        spaces, self.refusals = find_spaces(network.gm)
        self._places = dict(_places(network))
        self._calls = Counter(str(n.target) for n in network.nodes.values() if n.op == "call_module")
        self.cuts: dict[str, PrivateCut] = {}
        for space in spaces:
            cut = self._cut(space)
            if isinstance(cut, Refusal):
                self.refusals.append(cut)
            else:
                self.cuts[space.reader] = cut
        self._readers = {network.path(name): name for name in self.cuts}

    def _cut(self, space: Space) -> PrivateCut | Refusal:
        names = space.nodes
        ends = (space.producers[0], space.reader)
        changed = [n for n in names if self._changes(n)]
        for name in changed:
            if name in self.network.shared or self._calls[str(self.network.nodes[name].target)] > 1:
                return Refusal("not narrowed: a module is called elsewhere as well", (*ends, name))
        if any(n not in self._places for n in names):
            return Refusal("not narrowed: the channels leave the layers of their region", ends)
        series, start, stop = self._enclosing(names)
        if not series:
            return Refusal("not narrowed: the channels are seen in several regions", ends)
        role = self.network.calls.role(series, start, stop)
        if role != "whole":
            return Refusal("not narrowed: the layers are called elsewhere as well", ends)
        least = max(1, len(space.parts))
        widths = tuple(w for w in widths_of(space.of, space.per_unit) if w >= least * space.per_unit)
        if not widths:
            return Refusal(f"not narrowed: {space.units} groups of channels are too few", ends)
        return PrivateCut(space, series, start, stop, widths)

    def _changes(self, name: str) -> bool:
        node = self.network.nodes[name]
        return node.op == "call_module" and is_cut(self.network.module(name))

    def _enclosing(self, names: tuple[str, ...]) -> tuple[str, int, int]:
        """The innermost series with all of these nodes, and the layers that hold them."""
        common: set[str] | None = None
        for name in names:
            here = {series for series, _ in self._places[name]}
            common = here if common is None else common & here
        inner = next((s for s, _ in self._places[names[0]] if s in (common or ())), "")
        at = [i for name in names for s, i in self._places[name] if s == inner]
        return (inner, min(at), max(at) + 1) if inner else ("", 0, 0)

    def pairs(self) -> Iterator[tuple[PrivateCut, PrivateCut]]:
        """Cuts of one series of which the second begins with the conv that reads the first."""
        makes = {p: cut for cut in self.cuts.values() for p in cut.space.producers}
        for cut in self.cuts.values():
            after = makes.get(cut.space.reader)
            if after is not None and after.series == cut.series:
                yield cut, after

    def made(self, cut: PrivateCut, width: int) -> Cut:
        """What a candidate says of a cut."""
        space = cut.space
        return Cut(self.network.path(space.producers[0]), self.network.path(space.reader), space.of, width)

    def of(self, cut: Cut) -> PrivateCut | None:
        """The cut of this network that a candidate's names; None if it has none."""
        found = self.cuts.get(self._readers.get(cut.reader, ""))
        return found if found is not None and found.space.of == cut.of else None


def _places(network: Network) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """For each node in a layer: the series and layers that hold it, inner before outer."""
    found: dict[str, list[tuple[str, int]]] = {}

    def walk(series: Series, outer: list[tuple[str, int]]) -> None:
        for i, layer in enumerate(series.layers):
            here = [(series.name, i), *outer]
            parallel = layer.parallel
            for name in (*layer.nodes, *(parallel.inner if parallel is not None else ())):
                found.setdefault(name, here)
            for branch in parallel.branches if parallel is not None else ():
                walk(branch, here)

    for region in network.regions:
        walk(region.series, [])
    yield from found.items()
