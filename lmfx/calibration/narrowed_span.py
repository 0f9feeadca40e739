"""Runs a narrowed span on values of the original network: what leaves it when its modules have fewer channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.passes.ir import Candidate
from lmfx.passes.spans.layers import Network

__all__ = ["NarrowedSpan", "span_reads"]


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
