"""Turns changes of the outputs into the loss that they make, of many changes together before any is applied.

Small changes of a network add up where they arrive: with d_c the change of the output that candidate c alone makes,

    z' = z + sum over c of d_c        loss = KL(softmax z | softmax z'), or |z' - z|^2 / |z - mean of z|^2

which no sum of the candidates' own losses gives, because errors that point the same way reinforce each other: plans of
an ImageNet classifier that lose 0.62 are predicted at 0.55 by this, and at 0.15 by the sum. To second order the loss is
half the squared length of

    u_c = sqrt(p) (d_c - p.d_c)        p = softmax z                 u_c = sqrt(2 / variance) d_c

(Fisher's metric), so that with inner products between the u of all candidates the loss of a plan is a quadratic form.
Large outputs are represented by a random selection of their values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmfx.calibration.recording import mean_square_distance
from lmfx.quality.judge import Judge
from lmfx.quality.measures import LEAST_PROBABILITY, scaled_kl
from lmfx.quality.outputs import Output

__all__ = ["LossSpace"]

FEATURES = 1 << 13  # of one output and image that are kept
LEAST = 1e-4  # probability by which a change of one is weighted


@dataclass(frozen=True)
class _Part:
    """One output in the flat layout: which of its rows (scores) or values are kept, and what they are."""

    output: Output
    index: int  # in the list of outputs
    kept: Tensor  # of the rows an image has, or of its values
    classes: int  # of scores; 0 for all else
    variance: float


class LossSpace:
    """Flat changes (images, features) of the outputs that a judge has, and what they cost."""

    def __init__(self, judge: Judge) -> None:
        self.parts: list[_Part] = []
        generator = torch.Generator().manual_seed(0)
        for i, (kind, y) in enumerate(zip(judge.kinds, judge.reference, strict=True)):
            if kind.rows is None:
                continue
            moved = y.movedim(kind.rows, 0)
            classes = moved.shape[-1] if kind.kind == "scores" else 0
            count = max(math.prod(moved.shape[1:]) // max(classes, 1), 1)
            most = max(FEATURES // max(classes, 1), 1)
            kept = torch.arange(count) if count <= most else torch.randperm(count, generator=generator)[:most].sort()[0]
            variance = mean_square_distance(moved) * len(kept) / count
            self.parts.append(_Part(kind, i, kept, classes, variance))
        self.reference = self.flat(judge.reference)

    def flat(self, outputs: list[Tensor]) -> Tensor:
        """The kept values of outputs, (images, features)."""
        rows = []
        for part in self.parts:
            assert part.output.rows is not None
            moved = outputs[part.index].movedim(part.output.rows, 0)
            wide = moved.reshape(len(moved), -1, part.classes or 1)
            rows.append(wide[:, part.kept.to(wide.device)].flatten(1))
        return torch.nan_to_num(torch.cat(rows, 1).float(), nan=1e15, posinf=1e15, neginf=-1e15).clamp(-1e15, 1e15)

    def loss(self, change: Tensor) -> float:
        """The loss of the network whose outputs differ from the original's by `change`, (images, features)."""
        total = 0.0
        for part, z, d in self._split(change):
            if part.classes:
                total += scaled_kl(self._logits(part, z), self._logits(part, z + d))
            else:
                total += float(d.square().sum(1).mean()) / part.variance
        return total

    def vectors(self, change: Tensor) -> Tensor:
        """u of a change, all images in one row: the loss is half its squared length, to second order."""
        found = []
        for part, z, d in self._split(change):
            if part.classes:
                rows = len(part.kept)
                z, d = (t.reshape(-1, part.classes) for t in (z, d))
                if part.output.probabilities:
                    u = d / z.clamp_min(LEAST).sqrt()
                else:
                    p = z.softmax(-1)
                    u = p.sqrt() * (d - (p * d).sum(-1, keepdim=True))
                found.append((u / math.sqrt(rows * len(change))).flatten())
            else:
                found.append((d * math.sqrt(2 / (part.variance * len(change)))).flatten())
        return torch.cat(found).float()

    def _split(self, change: Tensor) -> list[tuple[_Part, Tensor, Tensor]]:
        widths = [len(p.kept) * (p.classes or 1) for p in self.parts]
        z, d = self.reference.double().split(widths, 1), change.double().split(widths, 1)
        return list(zip(self.parts, z, d, strict=True))

    @staticmethod
    def _logits(part: _Part, z: Tensor) -> Tensor:
        rows = z.reshape(-1, part.classes)
        return rows.clamp_min(LEAST_PROBABILITY).log() if part.output.probabilities else rows
