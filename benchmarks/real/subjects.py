"""What is asked of a network in this benchmark: its model, its images, and the judge of its outputs.

A `Subject` is made by a function of `classifiers`, `text_lines`, `text_boxes`, `mosaics`, `enlargements`, `faces`,
`pitches` or `drawn`. Judges see what an exported file gives, one input at a time, on inputs that calibration never saw.
A module, not a script.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

__all__ = ["Outputs", "Subject", "agreement", "divergence", "mean_psnr"]

Outputs = list[np.ndarray]  # what a network gives for all held-out inputs, an array an output


@dataclass(frozen=True)
class Subject:
    """A network to be made faster, and how one tells what is left of it.

    `images(kind, count, size)` gives "cal" (unlabelled, for calibration and recovery) or "held" inputs at a size;
    `judge(outputs, original)` the figures of a variant, beside what the original gives for the same inputs.
    """

    name: str
    what: str  # one line for the table
    model: Callable[[], nn.Module]
    images: Callable[[str, int, int], Tensor]
    judge: Callable[[Outputs, Outputs], dict[str, float]]
    figure: str  # of the judge's figures, the one that the table and the picture show
    size: int
    smaller: tuple[int, ...] = ()  # other sizes that the network takes, if any
    calibration: int = 256
    recovery: int = 1024
    held: int = 512
    unit: str = "%"  # "%" of a share from 0 to 1, or the figure's own unit
    pinned: tuple[str, ...] = ()  # modules whose outputs channel pruning must leave alone

    @property
    def example(self) -> Tensor:
        """One input, of the size and batch that latency is measured at."""
        return self.images("cal", 1, self.size)[:1]


def agreement(scores: np.ndarray, original: np.ndarray) -> float:
    """The share of rows whose largest score is the original's."""
    return float((scores.argmax(-1) == original.argmax(-1)).mean())


def divergence(logits: np.ndarray, original: np.ndarray) -> float:
    """Mean KL divergence from the original's softmax to that of `logits`, in nats."""
    p, q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (original.astype(float), logits.astype(float)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def mean_psnr(made: np.ndarray, truth: np.ndarray) -> float:
    """Mean over pictures `(n, c, h, w)` of the PSNR in dB; what was made is clipped to 0..1."""
    errors = ((made.clip(0, 1) - truth) ** 2).mean((1, 2, 3))
    return float((-10 * np.log10(np.maximum(errors, 1e-10))).mean())


def share(hits: Sequence[bool]) -> float:
    """How many of them are true, from 0 to 1."""
    return float(np.mean(np.asarray(hits, dtype=float)))
