"""Holds what every rewrite of one graph asks for, so that many plans are built without analysing the graph anew.

    Analysis ─ fingerprint                       is the plan of this graph?
             └ network(plan) ─ sums, fine        regions, layers and configurations, once for each order of sums

A plan may add up sums in another order first (`MergePlan.sums`) and may count layers of one op each (`MergePlan.fine`):
each such form of the graph is made and analysed when the first plan needs it. The graph must not change meanwhile.
"""

from __future__ import annotations

from functools import cached_property

from torch import fx

from ..errors import PlanError
from ..identity.fingerprint import fingerprint, is_of
from ..ir import MergePlan
from ..spans.layers import Network
from .regrouped_sums import Sums, regrouped

__all__ = ["Analysis"]


class Analysis:
    """A traced graph, its fingerprint, and the `Network` of each form of it that plans are made for."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self._networks: dict[tuple[Sums, bool], Network] = {}

    @classmethod
    def of(cls, network: Network) -> Analysis:
        """That of a network's graph, which is not analysed again."""
        made = cls(network.gm)
        made._networks[(), network.fine] = network
        return made

    @cached_property
    def fingerprint(self) -> str:
        """That of the graph."""
        return fingerprint(self.graph)

    def network(self, plan: MergePlan) -> Network:
        """The graph that the plan's spans are in. Raises `PlanError` for sums that it does not have."""
        key = plan.sums, plan.fine
        if key not in self._networks:
            self._networks[key] = Network(regrouped(self.graph, plan.sums), fine=plan.fine)
        return self._networks[key]

    def check(self, plan: MergePlan) -> None:
        """Raises `PlanError` if the plan was made for another graph."""
        wanted = plan.fingerprint
        if not wanted or wanted == self.fingerprint or is_of(wanted, self.graph):
            return
        raise PlanError(
            f"the plan was made for graph {wanted}, this one is {self.fingerprint}: "
            "trace the same model with an example of the same rank, or solve again"
        )
