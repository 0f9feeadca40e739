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

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.fit_values import evenly_ordered
from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import arguments_of, batches_for
from lmfx.passes.errors import InputError
from lmfx.passes.fit import feature_rows
from lmfx.passes.fit.changes import GRID
from lmfx.passes.fit.closed_form import AUTO_UNKNOWNS, search_damping
from lmfx.passes.fit.elimination import compensated, eliminate
from lmfx.passes.fit.gram import sample_positions
from lmfx.passes.fit.normal_equations import Sums, System, usual_damping
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.narrowed import chosen_units, narrowed, with_units
from lmfx.passes.spans.layers import Network
from lmfx.passes.spans.narrowing import PrivateCut

__all__ = ["NarrowFits", "NarrowedSpan"]

SAMPLES_AN_UNKNOWN, LEAST_SAMPLES, MOST_SAMPLES, LEAST_IMAGES = 8, 4096, 20000, 96
BATCH = 16
HOLD_OUT_EVERY = 4  # images, to choose damping by
GRAM_BYTES = 1 << 29  # of the sums that are made at the same time
FLOAT32_ROUNDING = 1e-6  # see `Gram`


@dataclass(frozen=True)
class _Refitted:
    """What a reader or gate is with fewer channels: columns (rows that stay, out) and bias (out,)."""

    columns: Tensor
    bias: Tensor


@dataclass(frozen=True)
class NarrowedSpan:
    """A narrowed candidate, its channels chosen, with the modules of the nodes that change."""

    network: Network
    candidate: Candidate
    modules: Mapping[str, nn.Module]

    @torch.no_grad()
    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """The value at the end of the span, before the kept activation, from what enters it (by node name)."""
        span, nodes = self.candidate.span, self.network.nodes
        runner = fx.Interpreter(self.network.gm, garbage_collect_values=False)
        env: dict[fx.Node, Any] = {}
        for node in span_nodes(self.network, self.candidate):
            for source in node.all_input_nodes:
                if source not in env:
                    env[source] = runner.run_node(source) if source.op == "get_attr" else values[source.name]
            if node.name in self.modules:
                (source,) = node.all_input_nodes
                env[node] = self.modules[node.name](env[source])
            else:
                runner.env = env
                env[node] = runner.run_node(node)
        result: Tensor = env[nodes[span.output]]
        return result


def span_nodes(network: Network, candidate: Candidate) -> list[fx.Node]:
    """What is computed between the ends of a span, in the order of the graph."""
    span = candidate.span
    layers = network.series[span.series].layers[span.start : span.stop]
    inside = {n for layer in layers for n in layer.all_nodes()}
    inside |= {n for layer in layers if layer.parallel is not None for n in layer.parallel.inner}
    wanted, queue = set[fx.Node](), [network.nodes[span.output]]
    while queue:
        node = queue.pop()
        if node not in wanted and node.name in inside:
            wanted.add(node)
            queue += node.all_input_nodes
    return [n for n in network.nodes.values() if n in wanted]


def span_reads(network: Network, candidate: Candidate) -> set[str]:
    """The nodes outside of a narrowed span whose values it reads."""
    inside = span_nodes(network, candidate)
    reads = {v for n in inside for v in n.all_input_nodes if v.op != "get_attr"}
    return {v.name for v in reads.difference(inside)}


class NarrowFits:
    """The channels and weights of a network's cuts at all their widths."""

    def __init__(self, network: Network, images: Calibration) -> None:
        self.network, self.images = network, evenly_ordered(images)
        self.units: dict[tuple[str, int], frozenset[int]] = {}  # (reader, width) -> the units that stay
        self.layers: dict[tuple[str, str, int], _Refitted] = {}  # (reader, reader or gate, width)

    @classmethod
    def of(cls, network: Network, images: Calibration) -> NarrowFits:
        """Those of a network on some images, which are made once."""
        key = "narrow", images.digest() if images.certain() else id(images)
        if key not in network.held:
            network.held[key] = cls(network, images)
        found = network.held[key]
        assert isinstance(found, cls)
        return found

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
        while todo:
            part, held = [todo.pop(0)], 0
            while todo and (held := held + _bytes(self.network, todo[0])) < GRAM_BYTES:
                part.append(todo.pop(0))
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
            _set(student.get_submodule(str(self.network.nodes[name].target)), layer, rows)

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
        sums = _sums_of(self.network, self.images, cuts)
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
        sums = _sums_of(self.network, self.images, [cut])
        readers = [_CutReader.of(self.network, cut, name, sums) for name in (cut.space.reader, *cut.space.gates)]
        return {one.name: one.fitted(units, one.damping(one.stays(units))) for one in readers}


@dataclass(frozen=True)
class _CutReader:
    """A conv that reads a cut: its columns, the unit of each row of them, and the sums over what it reads."""

    name: str
    module: Any
    columns: Tensor
    labels: Tensor
    sums: _Parts
    system: System
    taps: int  # that are outputs of their own

    @classmethod
    def of(cls, network: Network, cut: PrivateCut, name: str, sums: Mapping[str, _Parts]) -> _CutReader:
        module: Any = network.module(name)
        source = network.nodes[name].all_input_nodes[0].name
        columns = feature_rows.columns_of(module)[0]
        labels = torch.tensor(cut.space.labels[source])
        taps = 1
        if _by_pixel(module):
            taps, out = len(columns) // len(labels), columns.shape[1]
            columns = columns.reshape(taps, -1, out).transpose(0, 1).reshape(-1, taps * out)
        labels = labels.repeat(len(columns) // len(labels))
        return cls(name, module, columns, labels, sums[name], _system(sums[name].total, module), taps)

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
        if self.sums.held is None or self.sums.rest is None or len(self.columns) > AUTO_UNKNOWNS:
            return self.usual
        rows = tuple(stays.nonzero()[:, 0].tolist())
        rest, held = (_system(_aimed(s, self.columns), self.module, rows) for s in (self.sums.rest, self.sums.held))
        return max(search_damping(rest, held, "", self.columns[stays][None], GRID), self.least)

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


@dataclass
class _Parts:
    """Sums over what a layer reads: of every fourth image apart, if there are four."""

    rest: Sums | None = None
    held: Sums | None = None

    @property
    def total(self) -> Sums:
        """Of all images."""
        parts = [s for s in (self.rest, self.held) if s is not None]
        return parts[0] if len(parts) == 1 else parts[0].plus(parts[1])


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


def _bytes(network: Network, cut: PrivateCut) -> int:
    return 16 * _rows_of(network.module(cut.space.reader)) ** 2


def _by_pixel(layer: Any) -> bool:
    """Whether a layer has so many unknowns that its taps are outputs of their own, of the channels of one pixel."""
    taps = 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)
    return taps > 1 and feature_rows.unknowns_of(layer) > AUTO_UNKNOWNS


def _rows_of(layer: Any) -> int:
    """The rows of a layer's Gram."""
    unknowns = feature_rows.unknowns_of(layer)
    return unknowns // math.prod(layer.kernel_size) if _by_pixel(layer) else unknowns


def _system(sums: Sums, layer: Any, rows: tuple[int, ...] | None = None) -> System:
    rounding = 0.0 if layer.weight.dtype == torch.float64 else FLOAT32_ROUNDING
    return System.of(sums, 1, tuple(range(sums.xx.shape[1] - 1)) if rows is None else rows, True, True, rounding)


class _Reading(fx.Interpreter):
    """Runs the graph and sums up what some layers read."""

    def __init__(self, network: Network, counts: Mapping[str, int], each: Mapping[str, int]) -> None:
        super().__init__(network.gm)
        self.network, self.counts, self.each = network, counts, each
        self.sums: dict[str, _Parts] = {}
        self.done, self.images = 0, 0  # images that have run, and that run now
        self.generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.counts and self.done < self.counts[n.name]:
            self.add(n.name, self.env[n.all_input_nodes[0]])
        return super().run_node(n)

    def add(self, name: str, x: Tensor) -> None:
        layer: Any = self.network.module(name)
        if len(x) == self.images:
            x = x[: self.counts[name] - self.done]
        whole = not _by_pixel(layer)
        sizes = () if isinstance(layer, nn.Linear) else self.network.shape(name)[2:] if whole else x.shape[2:]
        positions = sample_positions(sizes, len(x), self.each[name], self.generator).to(x.device)
        rows = (
            feature_rows.features(layer, x, positions) if whole else feature_rows.values_at(layer, x, positions)[None]
        )
        rows = torch.nn.functional.pad(rows if rows.dtype == torch.float64 else rows.float(), (0, 1), value=1.0)
        if not bool(rows.isfinite().all()):
            raise InputError("calibration features have NaN or infinite values; check the model and its input")
        images = (torch.arange(len(x)) * self.images // len(x) + self.done).repeat_interleave(positions.shape[1])
        apart = images % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        parts = self.sums.setdefault(name, _Parts())
        for part, mask in (("rest", ~apart), ("held", apart)):
            if bool(mask.any()):
                self._add(parts, part, rows[:, mask.to(rows.device)], len(images[mask].unique()))

    @staticmethod
    def _add(parts: _Parts, part: str, rows: Tensor, images: int) -> None:
        sums = getattr(parts, part)
        if sums is None:
            sums = Sums.zeros(1, rows.shape[2], {}, rows.device)
            setattr(parts, part, sums)
        sums.add(rows, {})
        sums.n += float(rows.shape[1])
        sums.images += images


def _sums_of(network: Network, images: Calibration, cuts: Sequence[PrivateCut]) -> dict[str, _Parts]:
    """The sums over what the readers and gates of some cuts read."""
    counts: dict[str, int] = {}
    each: dict[str, int] = {}
    for name in (n for cut in cuts for n in (cut.space.reader, *cut.space.gates)):
        layer: Any = network.module(name)
        want = min(max(SAMPLES_AN_UNKNOWN * _rows_of(layer), LEAST_SAMPLES), MOST_SAMPLES)
        pixels = max(feature_rows.pixels_of(layer, network.shape(name)), 1)
        counts[name] = min(len(images), max(LEAST_IMAGES, -(-want // pixels)))
        each[name] = -(-want // counts[name])
    reading = _Reading(network, counts, each)
    for batch in batches_for(network.gm, images, BATCH):
        if reading.done >= max(counts.values()):
            break
        reading.images = len(batch[0])
        reading.run(*arguments_of(network.gm, batch, images.names), enable_io_processing=False)
        reading.done += len(batch[0])
    return reading.sums
