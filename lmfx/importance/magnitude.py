"""`magnitude`: weights only, no data. What a candidate loses is the L1 norm of the convs that it prunes or replaces.

Each conv's norm is relative to the mean of all, and each activation that goes costs `activation`; a fit is taken to
lose only its activations, a narrowed span the weights of the conv that reads the channels that go. An op that is not
understood costs the norm of all weights in it and one activation, whatever replaces it, and so does every op of a mesh
that is replaced whole: nothing says that a conv can do the same.
It is the cheapest baseline, and a poor one: prefer `reconstruction` with any data at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmfx.calibration.images import Calibration
from lmfx.environment.caller_state import entry
from lmfx.importance.base import ImportanceTable
from lmfx.importance.pool import ExecutorLike
from lmfx.latency.profiling import digest
from lmfx.passes.fit import feature_rows
from lmfx.passes.ir import Candidate, Cut
from lmfx.passes.rewrite.factored import conv_weight, dense_op, nearest
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.spans.layers import Network
from lmfx.store.rows import Store

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude:
    """Minus the share of the weights' L1 norm that is pruned, and minus `activation` for each activation removed."""

    activation: float = 0.1
    name: str = "magnitude"

    @entry
    def score(
        self,
        spans: SpanSet,
        candidates: Sequence[Candidate],
        calibration: Calibration | None = None,
        store: Store | None = None,
        progress: bool = False,
        executor: ExecutorLike = None,
    ) -> ImportanceTable:
        """See `Estimator.score`; needs no calibration and is too cheap to store."""
        network = spans.network
        norms = {network.path(n): network.l1(n) for n in _convs(network)}
        mean = sum(norms.values()) / max(len(norms), 1) or 1.0
        rows = {}
        for c in candidates:
            if c.realization == "factor":
                lost = norms.get(c.all_convs[0], 0.0) / mean * _not_factored(network, c)
                rows[c.key] = -lost - self.activation * 0.01
                continue
            if c.cuts:
                rows[c.key] = -sum(_cut_off(network, cut) for cut in c.cuts) / mean
                continue
            pruned = [p for p in c.all_convs if p not in c.kept] if c.realization != "fit" else []
            lost = sum(norms.get(p, 0.0) for p in pruned) / mean
            if c.realization in ("fit", "drop"):
                opaque = _opaque(network, c)
                lost += sum(_weights(network, n) for n in opaque) / mean + self.activation * len(opaque)
            rows[c.key] = (
                0.0
                if c.realization == "keep" or c.exact
                else -lost - self.activation * (_activations(network, c) + 0.01)
            )
        return ImportanceTable(
            rows, {"estimator": self.name, "activation": self.activation, "graph": digest(network.gm)}
        )


def _not_factored(network: Network, c: Candidate) -> float:
    """The share of a conv's L1 norm that its factors leave."""
    assert c.conv is not None
    weight = conv_weight(dense_op(network, c))
    left = weight - nearest(weight, c.conv).product
    return float(left.abs().sum() / weight.abs().sum().clamp(min=torch.finfo(weight.dtype).tiny))


def _cut_off(network: Network, cut: Cut) -> float:
    """The L1 norm of the weights that read the channels which go, if those of the largest weights stay."""
    reader: Any = network.gm.get_submodule(cut.reader)
    norms = feature_rows.columns_of(reader)[0].abs().sum(1).reshape(-1, cut.of).sum(0)
    return float(norms.sort().values[: cut.of - cut.width].sum())


def _convs(network: Network) -> list[str]:
    return [c for region in network.regions for c in network.convs(region.series.layers)[1]]


def _activations(network: Network, candidate: Candidate) -> int:
    """How many activations a candidate removes: all in its span but the one that is kept."""
    span = candidate.span
    layers = network.series[span.series].layers[span.start : span.stop]
    inside = [s for lay in layers if lay.parallel for b in lay.parallel.branches for s in b.walk()]
    every = [lay.activation for lay in layers] + [lay.activation for s in inside for lay in s.layers]
    return sum(a is not None for a in every) - (span.activation is not None)


def _opaque(network: Network, candidate: Candidate) -> list[str]:
    """The nodes that a candidate removes without anybody knowing what they compute, but for convs."""
    span = candidate.span
    layers = list(network.series[span.series].layers[span.start : span.stop])
    found: list[str] = []
    while layers:
        layer = layers.pop(0)
        known = set(network.convs((layer,))[1]) | {layer.activation}
        if layer.opaque is not None:
            found += [n for n in layer.nodes if n not in known]
        if layer.parallel is not None:
            if layer.parallel.join == "mesh":
                found += [n for n in (*layer.parallel.inner, layer.parallel.node) if n not in known]
            elif layer.parallel.join == "mul":
                found.append(layer.parallel.node)
            layers += [inner for branch in layer.parallel.branches for inner in branch.layers]
    return [n for n in found if network.nodes[n].op != "get_attr"]


def _weights(network: Network, name: str) -> float:
    """The L1 norm of all weights of a node's module, and of the parameters that the node reads."""
    node = network.nodes[name]
    held = list(network.module(name).parameters()) if node.op == "call_module" else []
    return sum(float(p.detach().abs().sum()) for p in held if p.dim() > 1)
