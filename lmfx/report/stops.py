"""The points of a frontier that a page's slider stops at, and what there is to say of each.

All of them where there are few. A large frontier has thousands of points that nobody can tell apart: then the best one
in each of `MOST` equal steps of latency, and always the fastest and the slowest. The line that takes sums of rows to
networks may predict nothing, or less, where it is far from all networks that were measured: no network is so fast, and
such points are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmfx.passes.ir import MergePlan
from lmfx.planning.frontier import Frontier
from lmfx.report.changes import KINDS
from lmfx.report.charts import number

__all__ = ["MOST", "counts_of", "stop_indices", "stop_of"]

MOST = 120


def stop_indices(frontier: Frontier, most: int = MOST) -> list[int]:
    """The points that are shown, fastest first."""
    latency = frontier.latency
    first = min(int(np.searchsorted(latency, 0.0, side="right")), len(frontier) - 1)
    if len(frontier) - first <= most:
        return list(range(first, len(frontier)))
    limits = np.linspace(float(latency[first]), float(latency[-1]), most)
    found = np.searchsorted(latency, limits, side="right") - 1
    return sorted({first, len(frontier) - 1, *(int(i) for i in found)})


def stop_of(frontier: Frontier, index: int, number_of: Mapping[str, int]) -> dict[str, Any]:
    """One point as plain values: its figures, and the changes of its plan by their numbers."""
    plan = frontier.plan(index)
    ms, original = float(frontier.latency[index]), frontier.original
    loss = 0.0 - float(frontier.importance[index])
    return {
        "point": index,
        "ms": ms,
        "share": ms / original if original else 1.0,
        "loss": loss,
        "changes": [number_of[c.key] for c in plan.candidates if c.key in number_of],
        "say": say(ms, original, loss, plan),
    }


def say(ms: float, original: float | None, loss: float | None, plan: MergePlan) -> dict[str, str]:
    """The figures of a plan as texts; no speed where the line predicts nothing that is left, far from what it saw."""
    share = ms / original if original else 1.0
    return {
        "ms": f"{number(ms, 4)} ms",
        "share": f"{share:.1%}",
        "speed": f"{1 / share:.2f}×" if share > 0 else "–",
        "loss": "–" if loss is None else number(loss),
        "plan": counts_of(plan),
    }


def counts_of(plan: MergePlan) -> str:
    """How many spans are changed in which way."""
    parts = [f"{count} {KINDS[way]}" for way, count in plan.ways.items() if count]
    return ", ".join(parts) or "nothing is changed"
