"""Chooses the channels that stay at the cuts of a network, and sets what reads them, from calibration images.

For every cut the network runs once over the images, and the pixels that its reader reads are summed to a Gram; one
elimination (`passes.fit.elimination`) then gives the channels and the reader's weight at every width. A gate beside the
reader reads the same channels, one pixel an image: its weight is made up for what is gone by a Gram of its own.

The damping is the one with which half of the channels do best on images that it was not made from.

Where a kernel has so many unknowns that its Gram would take long, each tap makes up for what is gone by itself, from
the channels of one pixel, which are few.

    y = W'x + b   ->   W_S'x_S + b_S        b_S = b + W'm - W_S'm_S        m: the mean of what is read

All this is of the original network, so it serves every plan; a refit (`lmfx.calibration.refitting`) sets the same
layers to what they read in a plan's network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.fit_values import evenly_ordered
from lmfx.calibration.images import Calibration
from lmfx.calibration.layer_sums import PartSums, by_pixel, can_search, in_parts, kept_with, sums_of, system_of
from lmfx.calibration.narrowed_span import NarrowedSpan
from lmfx.passes.fit import feature_rows
from lmfx.passes.fit.changes import GRID
from lmfx.passes.fit.closed_form import search_damping
from lmfx.passes.fit.elimination import compensated, eliminate
from lmfx.passes.fit.normal_equations import Sums, System, usual_damping
from lmfx.passes.graph.graph_edit import is_attribute
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.narrowed import chosen_units, narrowed, with_units
from lmfx.passes.spans.layers import Network
from lmfx.passes.spans.narrowing import PrivateCut

__all__ = ["NarrowFits"]

LOSSLESS = 1e-16  # of a variance, below which channels are linear combinations of others


@dataclass(frozen=True)
class _Refitted:
    """What a reader or gate is with fewer channels: columns (rows that stay, out) and bias (out,)."""

    columns: Tensor
    bias: Tensor


class NarrowFits:
    """The channels and weights of a network's cuts at all their widths."""

    def __init__(self, network: Network, images: Calibration) -> None:
        self.network, self.images = network, evenly_ordered(images)
        self.units: dict[tuple[str, int], frozenset[int]] = {}  # (reader, width) -> the units that stay
        self.layers: dict[tuple[str, str, int], _Refitted] = {}  # (reader, reader or gate, width)

    @classmethod
    def of(cls, network: Network, images: Calibration) -> NarrowFits:
        """Those of a network on some images, which are made once."""
        return kept_with(network, cls, images)

    def completed(self, plan: MergePlan) -> MergePlan:
        """The plan with the channels of its narrowed candidates chosen."""
        lacking = [c for c in plan.candidates if any(not cut.channels for cut in c.cuts)]
        if not lacking:
            return plan
        self.prepare(lacking)
        return replace(plan, candidates=tuple(self.chosen(c) for c in plan.candidates))

    def prepare(self, candidates: Iterable[Candidate]) -> None:
        """Choose for all cuts of some candidates, at all of their widths."""
        cuts = {cut.space.reader: cut for c in candidates for cut in self._cuts(c)}
        todo = [cut for reader, cut in cuts.items() if (reader, cut.widths[0]) not in self.units]
        for part in in_parts(todo, lambda cut: [self.network.module(cut.space.reader)]):
            self._choose(part)

    def chosen(self, c: Candidate) -> Candidate:
        """A candidate with its channels."""
        if not c.cuts or all(cut.channels for cut in c.cuts):
            return c
        found = zip(c.cuts, self._cuts(c), strict=True)
        cuts = (with_units(private, cut, self.units[private.space.reader, cut.width]) for cut, private in found)
        return replace(c, cuts=tuple(cuts))

    def span(self, c: Candidate) -> NarrowedSpan:
        """A narrowed candidate with its channels and its readers' weights."""
        self.prepare([c])
        c = self.chosen(c)
        found = narrowed(self.network, c)
        modules = {name: found.module(name) for name in found.changed}
        for name, layer, rows in self._set_layers(c):
            _set(modules[name], layer, rows)
        return NarrowedSpan(self.network, c, modules)

    def set(self, student: fx.GraphModule, c: Candidate) -> None:
        """Set the readers of a narrowed candidate of a student, whichever channels it keeps."""
        for name, layer, rows in self._set_layers(c):
            path = str(self.network.nodes[name].target)
            if is_attribute(student, path):  # else another change of the plan left out what read it
                _set(student.get_submodule(path), layer, rows)

    def _set_layers(self, c: Candidate) -> list[tuple[str, _Refitted, list[int] | None]]:
        """(node of a reader or gate, what it is, its outputs that stay) of a candidate."""
        outputs = narrowed(self.network, c).channels
        found = []
        for cut, private in zip(c.cuts, self._cuts(c), strict=True):
            space, units = private.space, chosen_units(self.network, private, cut)
            if self.units.get((space.reader, cut.width)) == units:
                layers = {n: self.layers[space.reader, n, cut.width] for n in (space.reader, *space.gates)}
            else:
                layers = self._fit(private, units)
            found += [(name, layer, outputs.get(name)) for name, layer in layers.items()]
        return found

    def _cuts(self, c: Candidate) -> list[PrivateCut]:
        found = [self.network.narrowing.of(cut) for cut in c.cuts]
        assert all(f is not None for f in found)
        return [f for f in found if f is not None]

    # --- one run of the network --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _choose(self, cuts: Sequence[PrivateCut]) -> None:
        sums = sums_of(self.network, self.images, [n for cut in cuts for n in _readers(cut)])
        for cut in cuts:
            space = cut.space
            reader = _CutReader.of(self.network, cut, space.reader, sums)
            counts = [w // space.per_unit for w in cut.widths]
            stay = space.indispensable(reader.worth(space.units))
            found = eliminate(reader.system.matrix[0], reader.columns, reader.labels, counts, reader.usual, stay)
            half = frozenset(found[len(found) // 2].units)
            for name in (space.reader, *space.gates):
                one = reader if name == space.reader else _CutReader.of(self.network, cut, name, sums)
                damping = one.damping(one.stays(half))
                for width, left in zip(cut.widths, found, strict=True):
                    self.layers[space.reader, name, width] = one.fitted(frozenset(left.units), damping)
            for width, left in zip(cut.widths, found, strict=True):
                self.units[space.reader, width] = frozenset(left.units)

    @torch.no_grad()
    def _fit(self, cut: PrivateCut, units: frozenset[int]) -> dict[str, _Refitted]:
        """The reader and the gates of a cut for other units than would be chosen."""
        sums = sums_of(self.network, self.images, _readers(cut))
        readers = [_CutReader.of(self.network, cut, name, sums) for name in _readers(cut)]
        return {one.name: one.fitted(units, one.damping(one.stays(units))) for one in readers}


@dataclass(frozen=True)
class _CutReader:
    """A conv that reads a cut: its columns, the unit of each row of them, and the sums over what it reads."""

    name: str
    module: Any
    columns: Tensor
    labels: Tensor
    sums: PartSums
    system: System
    taps: int  # that are outputs of their own

    @classmethod
    def of(cls, network: Network, cut: PrivateCut, name: str, sums: Mapping[str, PartSums]) -> _CutReader:
        module: Any = network.module(name)
        source = network.nodes[name].all_input_nodes[0].name
        columns = feature_rows.columns_of(module)[0]
        labels = torch.tensor(cut.space.labels[source])
        taps = 1
        if by_pixel(module):
            taps, out = len(columns) // len(labels), columns.shape[1]
            columns = columns.reshape(taps, -1, out).transpose(0, 1).reshape(-1, taps * out)
        labels = labels.repeat(len(columns) // len(labels))
        return cls(name, module, columns, labels, sums[name], system_of(sums[name].total, module), taps)

    def stays(self, units: frozenset[int]) -> Tensor:
        """The rows of some units (bool)."""
        return torch.isin(self.labels, torch.tensor(sorted(units))).to(self.columns.device)

    def worth(self, units: int) -> list[float]:
        """What each unit adds to the variance of what the layer gives, were it alone."""
        added = self.columns.square().sum(1) * self.system.matrix[0].diagonal()
        return torch.zeros(units, dtype=added.dtype, device=added.device).index_add_(0, self.labels, added).tolist()

    @property
    def usual(self) -> float:
        """The damping where none is searched."""
        return max(usual_damping(len(self.columns), max(self.system.sums.n, 1.0)), self.least)

    @property
    def least(self) -> float:
        """The least damping: of the rounding of the sums."""
        return float((self.system.least / self.system.scale).max())

    def fitted(self, units: frozenset[int], damping: float) -> _Refitted:
        """The layer that reads some units only."""
        stays = self.stays(units)
        return self.layer(compensated(self.system.matrix[0], self.columns, stays, damping), stays)

    def damping(self, stays: Tensor) -> float:
        """With which these rows, fitted to the whole layer on the other images, do best on held-out ones."""
        if self.sums.held is None or self.sums.rest is None or not can_search(len(self.columns)):
            return self.usual
        if self.lost(stays, self.least) < LOSSLESS:
            return self.least
        rows = tuple(stays.nonzero()[:, 0].tolist())
        rest, held = (system_of(_aimed(s, self.columns), self.module, rows) for s in (self.sums.rest, self.sums.held))
        return max(search_damping(rest, held, "", self.columns[stays][None], GRID), self.least)

    def lost(self, stays: Tensor, damping: float) -> float:
        """Of the variance of what the layer gives on held-out images, the share that these rows, fitted to the others,
        do not make up for."""
        assert self.sums.held is not None and self.sums.rest is not None
        rest, held = (system_of(s, self.module).matrix[0] for s in (self.sums.rest, self.sums.held))
        change = self.columns.clone()
        change[stays] -= compensated(rest, self.columns, stays, damping)
        whole = float((self.columns * (held @ self.columns)).sum())
        return float((change * (held @ change)).sum()) / whole if whole > 0 else 1.0

    def layer(self, after: Tensor, stays: Tensor) -> _Refitted:
        """The layer with other columns on the rows that stay."""
        mean = self.system.mean[0]
        bias = mean @ self.columns - mean[stays] @ after
        if self.taps > 1:
            bias = bias.reshape(self.taps, -1).sum(0)
            after = after.reshape(len(after), self.taps, -1).transpose(0, 1).flatten(0, 1)
        if self.module.bias is not None:
            bias = bias + self.module.bias.detach().double()
        return _Refitted(after.to(self.module.weight.dtype), bias.to(self.module.weight.dtype))


def _aimed(sums: Sums, columns: Tensor) -> Sums:
    """The sums with what the columns make of their features as a target."""
    whole = sums.xx[0].triu() + sums.xx[0].triu(1).T
    wide = torch.nn.functional.pad(columns, (0, 0, 0, 1))
    xy = whole @ wide
    return replace(sums, xy={"": xy[None]}, yy={"": (wide * xy).sum(0)})


def _set(module: Any, layer: _Refitted, rows: list[int] | None) -> None:
    columns, bias = layer.columns, layer.bias
    if rows is not None:
        index = torch.tensor(rows, device=columns.device)
        columns, bias = columns[:, index], bias[index]
    with torch.no_grad():
        module.weight = nn.Parameter(
            feature_rows.weight_of(module, columns[None]).to(module.weight).contiguous(), module.weight.requires_grad
        )
        module.bias = nn.Parameter(bias.to(module.weight), module.weight.requires_grad)


def _readers(cut: PrivateCut) -> tuple[str, ...]:
    """The nodes that read a cut: its conv, and gates."""
    return cut.space.reader, *cut.space.gates
