"""Finds where a plan adds activations: after each merged conv whose span ended without one.

Kim et al. (ICML 2023) and LayerMerge (ICML 2024) give a merged conv an activation where the original block ended
linearly, since the network has lost those inside the span:

    before     x ─ conv ─ relu ─ conv ─ add          after     x ─ merged ─ add ─ relu6
               └──────────────────────── ┘                     └──────────── ┘

A span that ends a branch of a sum has its activation after the sum, as the published code has it. Where the network
has an activation there already, or the merged conv replaced a single layer, nothing is put.
"""

from __future__ import annotations

from torch import fx

from ..graph import ops
from ..ir import Candidate, MergePlan, Series
from ..spans.layers import Network

__all__ = ["activated"]


def activated(network: Network, plan: MergePlan) -> dict[str, list[str]]:
    """The nodes whose value gets the plan's activation, and the keys of the candidates that are the reason."""
    owner = {
        branch.name: (series, i)
        for series in network.series.values()
        for i, layer in enumerate(series.layers)
        if layer.parallel is not None and layer.parallel.join in ("add", "sub")
        for branch in layer.parallel.branches
    }
    found: dict[str, list[str]] = {}
    for candidate in plan.candidates:
        if not candidate.puts_conv or len(candidate.all_convs) < 2:
            continue
        for call in candidate.each():
            place = _place(network, call, owner)
            if place is not None:
                found.setdefault(place, []).append(candidate.key)
    return found


def _place(network: Network, candidate: Candidate, owner: dict[str, tuple[Series, int]]) -> str | None:
    """The node after which the activation goes, or None where there is one (a norm is none) or nothing follows."""
    span = candidate.span
    series, stop, node = network.series[span.series], span.stop, span.output
    activation = span.activation
    while True:
        if activation is not None and not ops.normalizes(network.module(activation), network.shape(activation)):
            return None
        if activation is not None:
            node = activation
        if stop < len(series.layers):
            # The next layer may be an activation alone: after a norm, say.
            following = series.layers[stop]
            plain = following.conv is None and following.parallel is None and following.opaque is None
            alone = plain and not network.affine_nodes(following)
            return None if alone and following.activation is not None else node
        if series.name not in owner:
            return node if _readers(network.nodes[node]) else None
        outer, index = owner[series.name]
        layer = outer.layers[index]
        series, stop, activation = outer, index + 1, layer.activation
        before = [n for n in layer.nodes if n != layer.activation]
        node = before[-1]


def _readers(node: fx.Node) -> bool:
    """Whether anything but the model's output reads a value: what leaves the network stays as it is."""
    return any(user.op != "output" for user in node.users)
