"""Uses a latency table that was measured on another machine, the one that is to run the network.

    there   lmfx profile MODEL -o table.json
    here    compress(model, x, budget, latency=table)        nothing is measured, the budget is met by prediction

A prediction is a sum of the table's rows through its calibration (`LatencyTable.calibration`), which says how far it
was off on whole networks there. Without a calibration it is the sum itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmfx.budget import Budget
from lmfx.latency import LatencyTable
from lmfx.latency.profiling import network_facts
from lmfx.passes.errors import TableError
from lmfx.passes.ir import MergePlan
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.planning.frontier import Frontier

__all__ = ["Predicted", "check_table", "predict_plan", "runtime_of"]

_REMEDY = {
    "batch": "profile again with an example of this batch size, or compress with one of that",
    "dtype": "profile again with a network of this dtype, or compress one of that",
    "graph": "profile this one",
    "activation_after": "profile with the spans of this one, lmfx.profile(graph, spans=lmfx.spans(graph, ...))",
}


@dataclass(frozen=True)
class Predicted:
    """The plan that holds by prediction; whole networks, ms. Nothing was measured: the fields are those of `Found`."""

    index: int
    plan: MergePlan
    frontier: Frontier
    predicted: float
    original: float
    measured: None = None
    ratio: None = None


def check_table(spans: SpanSet, table: LatencyTable) -> None:
    """Raises `TableError` for a table of another graph, batch or dtype, or one that lacks rows of kept layers."""
    facts = network_facts(spans)
    for name in (
        "batch",
        "dtype",
        "graph",
        "activation_after",
    ):  # the graph's digest would tell all three, but not which
        theirs = table.identity.get(name, facts[name])
        if theirs != facts[name]:
            what = "for another graph" if name == "graph" else f"with another {name}"
            raise TableError(f"the LatencyTable was made {what} ({theirs}, this one is {facts[name]}): {_REMEDY[name]}")
    missing = [c.key for c in spans if c.realization == "keep" and c.key not in table]
    if missing:
        raise TableError(
            f"the latency table has no row for {missing[0]!r} and {len(missing) - 1} more kept layers of this graph: "
            "it was measured for another graph or with other options; profile this one"
        )


def predict_plan(frontier: Frontier, budget: Budget) -> Predicted:
    """The best plan whose predicted latency is within `budget`; relative ones count from the predicted original.

    Raises `InfeasibleBudget` with the fastest prediction.
    """
    index = frontier.index_at(budget)
    plan = frontier.plan(index)
    return Predicted(index, plan, frontier, float(frontier.latency[index]), frontier.original)


def predict_loss_free(frontier: Frontier, budget: Budget) -> Predicted | None:
    """The fastest plan of a frontier of plans that all lose nothing, if its predicted latency is within `budget`."""
    if not frontier.plan(0).candidates or frontier.latency[0] > budget.resolve(frontier.original):
        return None
    return Predicted(0, frontier.plan(0), frontier, float(frontier.latency[0]), frontier.original)


def runtime_of(table: LatencyTable) -> dict[str, Any]:
    """The identity of the backend that a table was measured on."""
    return {k: v for k, v in table.identity.items() if k not in _REMEDY}
