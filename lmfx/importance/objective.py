"""Turns performances into a table that the solver maximises, in two objectives.

P is the performance of the original, P(c) that of the network with only candidate c applied and shortly trained (with
baseline="trained", P is that of the original after the same training):

    d(c) = (P(c) - P) / scale        metric="accuracy"        I(c) = exp d(c)
    d(c) = -(P(c) - P) / P           metric="loss"

(LayerMerge, ICML 2024, section 3.3; its code takes accuracies in percent and scale = 100.) A plan cuts the network into
spans; each is a candidate c that replaces the layers U(c), or a layer u that is kept. The paper maximises

    sum over all spans of I  =  sum over kept u of I(u) + sum over chosen c of I(c)
                             =  sum over all u of I(u)  + sum over chosen c of ( I(c) - sum over u in U(c) of I(u) )

and the first sum is the same for every plan. So with w(c) = I(c) - sum of I(u) the solver, in which keeping a layer is
worth 0, maximises the paper's objective exactly. That is objective="paper". As I is about 1, it pays about 1 for each
span: a merge of m layers costs m - 1 whatever the network loses by it, and among plans with as many spans it takes the
one with the largest sum of exp d, which is nearly the largest sum of d.

objective="change" maximises what that leaves once the number of spans is not paid for, the sum of log I:

    w(c) = d(c) - sum over u in U(c) of d(u)

0 is the network as it is, and the sum predicts (to first order) how much the performance of a plan differs from it. It
is the default.

I(u) is that of a kept layer: I = 1 and d = 0 as the layer does not change (keep="unchanged"), or its own row (keep=
"retrained": the published code initialises a single layer anew and trains the network as it does for all others, so
that a merge is compared with what a training of the same length makes of the layer). U(c) are the convolutions of c's
main path, as in the paper; a span without any counts as one layer that is not changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import exp, isfinite, log
from typing import Literal

from lmfx.passes.errors import InputError, OptionError
from lmfx.passes.ir import Candidate

__all__ = ["Metric", "Objective", "ObjectiveName", "importances"]

Metric = Literal["accuracy", "loss"]
ObjectiveName = Literal["change", "paper"]
LARGEST_EXPONENT, SMALLEST_EXPONENT = 100.0, 700.0


@dataclass(frozen=True)
class Objective:
    """How performances become importances. `scale` is what an accuracy's difference is divided by: 100 for percent."""

    metric: Metric = "accuracy"
    name: ObjectiveName = "change"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.metric not in ("accuracy", "loss"):
            raise OptionError(f"metric={self.metric!r}: use 'accuracy' (more is better) or 'loss' (less is better)")
        if self.name not in ("change", "paper"):
            raise OptionError(f"objective={self.name!r}: use 'change' or 'paper'")
        if not isinstance(self.scale, (int, float)) or not 0 < self.scale < float("inf"):
            raise OptionError(f"scale={self.scale!r}: use a positive number, like 100 for accuracies in percent")

    def importance(self, performance: float, original: float) -> float:
        """The paper's I of one performance, 1 for no change; NaN where the performance is no finite number.

        Raises `InputError` if a relative difference to the original cannot be told.
        """
        if self.metric == "loss":
            if not original > 0:
                raise InputError(
                    f"evaluate(model) gives {original} for the original network, and a loss is compared by its "
                    "relative difference: return a positive number, or use metric='accuracy' and its negative"
                )
            change = (original - performance) / original
        else:
            change = (performance - original) / self.scale
        if not isfinite(performance):
            return float("nan")
        if change > LARGEST_EXPONENT:
            raise InputError(
                f"the performance went from {original} to {performance}: exp of the difference overflows. Use a larger "
                "scale=, like 100 for accuracies in percent"
            )
        # A change that underflows is worth as little as can be told apart from nothing.
        return exp(max(change, -SMALLEST_EXPONENT))


def importances(
    objective: Objective,
    candidates: Iterable[Candidate],
    performances: Mapping[str, float],
    original: float,
    layers: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """w of each candidate of which the performance is a finite number, 0 for `keep` and what loses nothing; see the
    module's text.

    `performances` by candidate key, `layers` those of kept convolutions by their names (None: they do not change). A
    layer whose own performance is no number counts as unchanged.
    """
    unchanged = 1.0
    kept = {name: objective.importance(p, original) for name, p in (layers or {}).items()}
    kept = {name: value if isfinite(value) else unchanged for name, value in kept.items()}
    rows = {}
    for c in candidates:
        if c.realization == "keep" or c.exact:
            rows[c.key] = 0.0
            continue
        value = objective.importance(performances[c.key], original)
        if not isfinite(value):
            continue
        replaced = [kept.get(name, unchanged) for name in c.convs] or [unchanged]
        if objective.name == "paper":
            rows[c.key] = value - sum(replaced)
        else:
            rows[c.key] = log(value) - sum(map(log, replaced))
    return rows
