"""Narrows a span: which channels of which values stay, and the modules that have only these.

    before   x ─ A (n out) ─ norm ─ depthwise ─ B (n in) ─ y        after   the same nodes and names, m channels between

What the conv that reads a cut makes of fewer channels is set by a fit; without one it has its columns of the channels
that stay. Which channels stay is decided by data (`passes/fit/elimination.py`); a plan that does not say it keeps those
of the largest weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import PlanError
from ..fit import feature_rows
from ..graph.cut_modules import cut_module
from ..graph.graph_edit import set_submodule
from ..graph.node_facts import note_shape
from ..ir import Candidate, Cut
from ..spans.layers import Network
from ..spans.narrowing import PrivateCut

__all__ = ["Narrowed", "chosen_units", "narrowed", "put_narrowed", "with_units"]


@dataclass(frozen=True)
class Narrowed:
    """`channels` of each node's value that stay (nodes without are whole); of the convs that read a cut (`reads`) the
    input channels that stay. `makers` are the convs that make the channels of a cut."""

    network: Network
    channels: dict[str, list[int]]
    reads: dict[str, list[int]]
    makers: frozenset[str]

    def module(self, name: str) -> nn.Module:
        """The module of a node with the channels that stay; the network's own where none go."""
        module = self.network.module(name)
        inputs, outputs = self.reads.get(name), self.channels.get(name)
        if inputs is None and outputs is not None and name not in self.makers:
            inputs = self.channels.get(self.network.nodes[name].all_input_nodes[0].name)
        cut: Any = cut_module(module, _index(inputs), _index(outputs))
        if name in self.reads and cut.bias is None:  # what is gone has a mean, for which the others make up
            cut.bias = nn.Parameter(cut.weight.new_zeros(self.shape(name)[1]), cut.weight.requires_grad)
        return cut

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a node's value."""
        shape = self.network.shape(name)
        return (shape[0], len(self.channels[name]), *shape[2:]) if name in self.channels else shape

    @property
    def changed(self) -> tuple[str, ...]:
        """The nodes that call a module that changes, in the order of the graph."""
        names = {n for n in (*self.channels, *self.reads) if self.network.nodes[n].op == "call_module"}
        return tuple(n for n in self.network.nodes if n in names)


def _index(channels: list[int] | None) -> Tensor | None:
    return None if channels is None else torch.tensor(channels, dtype=torch.long)


def narrowed(network: Network, candidate: Candidate) -> Narrowed:
    """What a candidate makes of its span. Raises `PlanError` for cuts or channels that the network does not have."""
    channels: dict[str, list[int]] = {}
    reads: dict[str, list[int]] = {}
    makers: set[str] = set()
    for cut in candidate.cuts:
        private = _private(network, candidate, cut)
        space, units = private.space, chosen_units(network, private, cut)
        for name in space.labels:
            channels[name] = space.kept(name, units)
        for name in (space.reader, *space.gates):
            source = network.nodes[name].all_input_nodes[0].name
            reads[name] = space.kept(source, units)
        makers |= set(space.producers)
    return Narrowed(network, channels, reads, frozenset(makers))


def _private(network: Network, candidate: Candidate, cut: Cut) -> PrivateCut:
    found = network.narrowing.of(cut)
    span = candidate.span
    if found is None or found.series != span.series or not span.start <= found.start < found.stop <= span.stop:
        raise PlanError(
            f"the plan narrows what {cut.reader} reads ({cut.of} channels) in {candidate.key}, and this graph has no "
            "such cut: solve again"
        )
    return found


def chosen_units(network: Network, private: PrivateCut, cut: Cut) -> frozenset[int]:
    """The units that stay. A plan may come from a file: `PlanError` if its channels are not whole units of the cut."""
    space, whole = private.space, cut.width // private.space.per_unit
    if not 0 < cut.width <= space.of or cut.width % space.per_unit:
        raise PlanError(f"the plan keeps {cut.width} of the {space.of} channels that {cut.reader} reads: solve again")
    if not cut.channels:
        return _largest(network, private, whole)
    labels = space.labels[space.source]
    sound = list(cut.channels) == sorted(set(cut.channels)) and cut.channels[0] >= 0 and cut.channels[-1] < space.of
    units = frozenset(labels[c] for c in cut.channels) if sound else frozenset()
    if len(cut.channels) != cut.width or len(units) != whole or space.kept(space.source, units) != list(cut.channels):
        raise PlanError(
            f"the plan's channels for {cut.reader} are not {cut.width} of its {space.of} in order and in whole groups: "
            "restore the plan from a copy, or solve again"
        )
    if any(not units & part for part in space.parts):
        raise PlanError(f"the plan leaves a layer before {cut.reader} no channels: solve again")
    return units


def with_units(private: PrivateCut, cut: Cut, units: frozenset[int]) -> Cut:
    """The cut with the channels of these units."""
    return replace(cut, channels=tuple(private.space.kept(private.space.source, units)))


def _largest(network: Network, private: PrivateCut, count: int) -> frozenset[int]:
    reader: Any = network.module(private.space.reader)
    columns = feature_rows.columns_of(reader)[0].square().sum(1)
    labels = torch.tensor(private.space.labels[private.space.source], device=columns.device)
    norms = torch.zeros(private.space.units, dtype=torch.float64, device=columns.device)
    norms.index_add_(0, labels.repeat(len(columns) // len(labels)), columns)
    stay = private.space.indispensable(norms.tolist())
    others = [u for u in norms.argsort(descending=True, stable=True).tolist() if u not in stay]
    return stay | frozenset(others[: count - len(stay)])


def put_narrowed(gm: fx.GraphModule, nodes: dict[str, fx.Node], network: Network, candidate: Candidate) -> None:
    """Put the modules of a narrowed span into a copy of the network's graph, under their own names."""
    found = narrowed(network, candidate)
    for name in found.changed:
        module = found.module(name)
        if module is not network.module(name):
            set_submodule(gm, str(network.nodes[name].target), _own(module))
    for name in found.channels:
        note_shape(nodes[name], found.shape(name))


def _own(module: nn.Module) -> nn.Module:
    """The module with tensors of its own."""
    for owner in module.modules():
        for name, value in owner._parameters.items():
            if value is not None:
                owner._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.clone()
    return module
