"""Predicts the loss of whole plans from what each candidate alone does to the outputs (`lmfx.quality.loss_space`).

    D_P = sum over c of P of d_c        loss(P) = loss of outputs that differ from the original's by D_P

The change of a candidate is taken once, by running the network with only that candidate applied. A plan then costs a
sum of vectors, and the loss seen from a plan P is linear in what is exchanged, so that the solver can go on from there:

    w(c | P) = 1/2 |u_c|^2 + u_c . sum of u_d over d of P that do not overlap c        importance = -w
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import batches_for, floating_outputs
from lmfx.importance.change import Scorer
from lmfx.importance.dominance import places
from lmfx.importance.macs import multiply_accumulates
from lmfx.importance.parts import Part
from lmfx.passes.ir import Candidate
from lmfx.quality.judge import Judge
from lmfx.quality.loss_space import LossSpace

__all__ = ["JointLoss"]

CHANGE_MACS = 1e10  # of one candidate, about half a second of a core
LEAST_IMAGES = 4


class JointLoss:
    """The changes of candidates and the losses of plans, on the images that plans are chosen by."""

    def __init__(self, scorer: Scorer, candidates: Sequence[Candidate]) -> None:
        """`candidates` are all that a plan may have."""
        self.scorer = scorer
        images = scorer.choosing
        cost = multiply_accumulates(scorer.network) / 2
        count = min(len(images), max(LEAST_IMAGES, int(CHANGE_MACS / max(cost, 1.0))))
        images = Calibration(tuple(t[:count] for t in images.tensors), images.names)
        self.judge = Judge(scorer.gm, images)
        self.space = LossSpace(self.judge)
        parts = scorer.judged_parts[0]
        if not scorer.options.exact or count != len(scorer.judged):
            changing = [c for c in candidates if c.realization != "keep" and not c.exact]
            names = set().union(*(scorer.reads([c]) | scorer.crossing(c) for c in changing))
            parts = [scorer.exact_part(batch, names) for batch in batches_for(scorer.gm, images)]
        self.parts: list[Part] = parts
        self.changes: dict[str, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}
        self.candidates: dict[str, Candidate] = {}
        self._alone: dict[str, float] = {}

    def change(self, c: Candidate) -> Tensor:
        """What candidate c alone adds to the outputs, (images, features)."""
        if c.key not in self.changes:
            self.candidates[c.key] = c
            if c.exact:
                self.changes[c.key] = torch.zeros_like(self.space.reference)
            else:
                outputs = [floating_outputs(self.scorer.outputs(c, part)) for part in self.parts]
                joined = self.judge.joined(outputs)
                self.changes[c.key] = self.space.flat(joined) - self.space.reference
            self.vectors[c.key] = self.space.vectors(self.changes[c.key])
        return self.changes[c.key]

    def alone(self, key: str) -> float:
        """What a candidate whose change is known loses alone."""
        if key not in self._alone:
            self._alone[key] = self.space.loss(self.changes[key])
        return self._alone[key]

    def loss(self, candidates: Iterable[Candidate]) -> float:
        """The predicted loss of a plan."""
        total = torch.zeros_like(self.space.reference)
        for c in candidates:
            total += self.change(c)
        return self.space.loss(total)

    def seen_from(self, plan: Iterable[Candidate]) -> dict[str, float]:
        """Importances of all candidates whose change is known, in the context of a plan."""
        chosen = list(plan)
        for c in chosen:
            self.change(c)
        names = list(self.vectors)
        us = torch.stack([self.vectors[n] for n in names]).double()
        inner = us @ us.T  # of all pairs
        found: dict[str, float] = {}
        index = {n: i for i, n in enumerate(names)}
        for name in names:
            i, c = index[name], self.candidates[name]
            value = 0.5 * float(inner[i, i])
            value += sum(float(inner[i, index[d.key]]) for d in chosen if d.key != name and not overlap(c, d))
            found[name] = -value
        return found


def overlap(c: Candidate, d: Candidate) -> bool:
    """Whether no plan can have both: they share a layer, or one lies in a branch of a layer of the other's."""
    return any(_crossing(places(a), places(b)) for a in c.spans for b in d.spans)


def _crossing(first: list[tuple[str, int, int]], second: list[tuple[str, int, int]]) -> bool:
    return any(_cross(first[0], other) for other in second) or any(_cross(second[0], other) for other in first)


def _cross(a: tuple[str, int, int], b: tuple[str, int, int]) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
