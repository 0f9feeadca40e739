"""Judges one candidate after the activation that a plan adds to it (`lmfx.passes.rewrite.added_activations`).

    x ─ merged ─ add ─ norm ─ relu6 ─ ...        the error is taken after relu6, not after the merged conv
            span.output     place

What lies between the candidate's value and the place is run again, with the values that the rest of the network has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from lmfx.passes.graph import ops
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.added_activations import activated
from lmfx.passes.spans.enumeration import SpanSet

__all__ = ["After"]


@dataclass(frozen=True)
class Way:
    """From a candidate's value to the place of its activation: the nodes on the way, and what they read besides."""

    place: str
    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]


class After:
    """The ways of one set of spans; without `activation_after` no candidate has one."""

    def __init__(self, spans: SpanSet) -> None:
        self.network, self.name = spans.network, spans.options.activation_after
        self._ways: dict[str, Way | None] = {}

    def way(self, c: Candidate) -> Way | None:
        """The way of a candidate, or None if nothing is added after it."""
        if self.name is None:
            return None
        if c.key not in self._ways:
            found = activated(self.network, MergePlan((c,), activation_after=self.name))
            self._ways[c.key] = self._to(c.span.output, next(iter(found))) if found else None
        return self._ways[c.key]

    def names(self, c: Candidate) -> set[str]:
        """The nodes whose values are needed to judge a candidate, besides those of its span."""
        way = self.way(c)
        return set() if way is None else {way.place, *(n.name for n in way.reads if n.op != "get_attr")}

    def value(self, way: Way, start: str, new: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The value after the activation, where `start` has the value `new`."""
        nodes, runner = self.network.nodes, fx.Interpreter(self.network.gm, garbage_collect_values=False)
        runner.env = {n: runner.run_node(n) if n.op == "get_attr" else values[n.name] for n in way.reads}
        runner.env[nodes[start]] = new
        for node in way.nodes:
            runner.env[node] = runner.run_node(node)
        result: Tensor = self.activation()(runner.env[nodes[way.place]])
        return result

    def activation(self) -> nn.Module:
        """The activation that is added after merged convs."""
        return ops.activation_of(str(self.name))

    def _to(self, start: str, place: str) -> Way:
        nodes = self.network.nodes
        before = set(_before(nodes[place], nodes[start]))
        path: set[fx.Node] = set()
        for node in self.network.gm.graph.nodes:  # in order: what reads the start, or what does
            if node in before and any(n is nodes[start] or n in path for n in node.all_input_nodes):
                path.add(node)
        way = tuple(n for n in self.network.gm.graph.nodes if n in path)
        reads = dict.fromkeys(i for n in way for i in n.all_input_nodes if i not in path and i is not nodes[start])
        return Way(place, way, tuple(reads))


def _before(node: fx.Node, stop: fx.Node) -> Iterator[fx.Node]:
    """The node and all that it depends on, not beyond `stop`."""
    seen, queue = {stop}, [node]
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            queue += current.all_input_nodes
            yield current
