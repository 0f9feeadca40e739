"""Chooses the channels that stay at the cuts of a network, and sets what reads them, from calibration images.

For every cut the network runs once over the images, and the pixels that its reader reads are summed to a Gram; one
elimination (`passes.fit.elimination`) then gives the channels and the reader's weight at every width. A gate beside the
reader reads the same channels, one pixel an image: its weight is made up for what is gone by a Gram of its own.

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

from lmfx.calibration.fit_values import spread
from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import batches_for, placeholder_values
from lmfx.passes.errors import InputError
from lmfx.passes.fit import feature_rows
from lmfx.passes.fit.elimination import compensated, eliminate
from lmfx.passes.fit.gram import sample_positions
from lmfx.passes.fit.normal_equations import Sums, System, usual_damping
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.narrowed import narrowed, with_units
from lmfx.passes.spans.layers import Network
from lmfx.passes.spans.narrowing import PrivateCut

__all__ = ["NarrowFits", "NarrowedSpan"]

SAMPLES_AN_UNKNOWN, LEAST_SAMPLES, MOST_SAMPLES, LEAST_IMAGES = 8, 4096, 20000, 96
BATCH = 16
GRAM_BYTES = 1 << 29  # of the sums that are made at the same time
FLOAT32_ROUNDING = 1e-6  # see `Gram`


@dataclass(frozen=True)
class _Layer:
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
        self.network, self.images = network, spread(images)
        self.units: dict[tuple[str, int], frozenset[int]] = {}  # (reader, width) -> the units that stay
        self.layers: dict[tuple[str, str, int], _Layer] = {}  # (reader, reader or gate, width)

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
        """Set the readers of a narrowed candidate of a student; of other channels than were chosen here, nothing."""
        self.prepare([c])
        if self.chosen(replace(c, cuts=tuple(replace(cut, channels=()) for cut in c.cuts))) != c:
            return
        for name, layer, rows in self._set_layers(c):
            _set(student.get_submodule(str(self.network.nodes[name].target)), layer, rows)

    def _set_layers(self, c: Candidate) -> list[tuple[str, _Layer, list[int] | None]]:
        """(node of a reader or gate, what it is, its outputs that stay) of a candidate."""
        outputs = narrowed(self.network, c).channels
        found = []
        for cut, private in zip(c.cuts, self._cuts(c), strict=True):
            space = private.space
            for name in (space.reader, *space.gates):
                layer = self.layers.get((space.reader, name, cut.width))
                if layer is not None:
                    found.append((name, layer, outputs.get(name)))
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
            reader: Any = self.network.module(space.reader)
            system = _system(sums[space.reader], reader)
            columns, labels = feature_rows.columns_of(reader)[0], _labels(cut, space.reader, self.network)
            counts = [w // space.per_unit for w in cut.widths]
            damping = usual_damping(len(columns), max(system.sums.n, 1.0))
            gates: list[tuple[str, Any, System]] = []
            for name in space.gates:
                gates.append((name, self.network.module(name), _system(sums[name], self.network.module(name))))
            for width, left in zip(
                cut.widths, eliminate(system.matrix[0], columns, labels, counts, damping), strict=True
            ):
                units = frozenset(left.units)
                self.units[space.reader, width] = units
                stays = _stays(labels, units)
                self.layers[space.reader, space.reader, width] = _layer(reader, system, columns, left.columns, stays)
                for name, gate, own in gates:
                    before, rows = feature_rows.columns_of(gate)[0], _stays(_labels(cut, name, self.network), units)
                    after = compensated(
                        own.matrix[0], before, rows, usual_damping(len(before), max(own.sums.images, 1))
                    )
                    self.layers[space.reader, name, width] = _layer(gate, own, before, after, rows)


def _labels(cut: PrivateCut, name: str, network: Network) -> Tensor:
    """The unit of each row of a reader's columns."""
    source = network.nodes[name].all_input_nodes[0].name
    layer: Any = network.module(name)
    labels = torch.tensor(cut.space.labels[source])
    return labels.repeat(feature_rows.unknowns_of(layer) // len(labels))


def _stays(labels: Tensor, units: frozenset[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(sorted(units)))


def _layer(module: Any, system: System, before: Tensor, after: Tensor, stays: Tensor) -> _Layer:
    mean = system.mean[0]
    bias = mean @ before - mean[stays.to(mean.device)] @ after
    if module.bias is not None:
        bias = bias + module.bias.detach().double()
    return _Layer(after.to(module.weight.dtype), bias.to(module.weight.dtype))


def _set(module: Any, layer: _Layer, rows: list[int] | None) -> None:
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
    return 8 * feature_rows.unknowns_of(network.module(cut.space.reader)) ** 2


def _system(sums: Sums, layer: Any) -> System:
    rounding = 0.0 if layer.weight.dtype == torch.float64 else FLOAT32_ROUNDING
    return System.of(sums, 1, tuple(range(sums.xx.shape[1] - 1)), True, True, rounding)


class _Reading(fx.Interpreter):
    """Runs the graph and sums up what some layers read."""

    def __init__(self, network: Network, counts: Mapping[str, int], each: Mapping[str, int]) -> None:
        super().__init__(network.gm)
        self.network, self.counts, self.each = network, counts, each
        self.sums: dict[str, Sums] = {}
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
        shape = self.network.shape(name)
        sizes = () if isinstance(layer, nn.Linear) else shape[2:]
        positions = sample_positions(sizes, len(x), self.each[name], self.generator).to(x.device)
        rows = feature_rows.features(layer, x, positions)
        rows = torch.nn.functional.pad(rows if rows.dtype == torch.float64 else rows.float(), (0, 1), value=1.0)
        if not bool(rows.isfinite().all()):
            raise InputError("calibration features have NaN or infinite values; check the model and its input")
        if name not in self.sums:
            self.sums[name] = Sums.zeros(1, rows.shape[2], {}, x.device)
        self.sums[name].add(rows, {})
        self.sums[name].n += float(rows.shape[1])
        self.sums[name].images += len(x)


def _sums_of(network: Network, images: Calibration, cuts: Sequence[PrivateCut]) -> dict[str, Sums]:
    """The sums over what the readers and gates of some cuts read."""
    counts: dict[str, int] = {}
    each: dict[str, int] = {}
    for name in (n for cut in cuts for n in (cut.space.reader, *cut.space.gates)):
        layer: Any = network.module(name)
        want = min(max(SAMPLES_AN_UNKNOWN * feature_rows.unknowns_of(layer), LEAST_SAMPLES), MOST_SAMPLES)
        pixels = max(feature_rows.pixels_of(layer, network.shape(name)), 1)
        counts[name] = min(len(images), max(LEAST_IMAGES, -(-want // pixels)))
        each[name] = -(-want // counts[name])
    reading = _Reading(network, counts, each)
    for batch in batches_for(network.gm, images, BATCH):
        if reading.done >= max(counts.values()):
            break
        reading.images = len(batch[0])
        reading.run(*placeholder_values(network.gm, batch, images.names), enable_io_processing=False)
        reading.done += len(batch[0])
    return reading.sums
