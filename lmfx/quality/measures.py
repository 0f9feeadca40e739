"""Compares two networks in figures: divergence, agreement, KL, PSNR; y is the reference, y' the other.

    divergence   sum |y' - y|^2 / sum |y - mean of y|^2      0: equal; 1: as far off as the mean of the images would be
    agreement    share of rows whose arg-max is the same; of a sequence, of the steps at which either has another class
                 than the most frequent one (a blank would agree with itself); its standard error is over the images:
                 m rows of an image are counted, of which a agree, sqrt(sum (a - m agreement)^2) / sum m
    KL           mean of sum p (log p - log p'),  p = softmax(y), in nats, over the rows
    scaled KL    the least KL of softmax(y' / T) over some T: what is left of KL once the scale of the outputs is set
                 anew, as refits and training do. Without it a network that says nothing (all classes alike) beats one
                 that is often right and too sure
    PSNR         10 log10( (max y - min y)^2 / mean |y' - y|^2 ) in dB: 0 dB is an error as large as the picture's range

A loss, by which plans are compared, is lower for the better network, and 0 for the reference itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lmfx.calibration.recording import mean_square_distance
from lmfx.quality.outputs import Output

__all__ = [
    "NAMES",
    "Alternative",
    "OutputQuality",
    "Quality",
    "QualityName",
    "QualityWarning",
    "measure_output",
    "scaled_kl",
]

QualityName = Literal["auto", "kl", "agreement", "divergence", "psnr"]
NAMES = ("auto", "kl", "agreement", "divergence", "psnr")
# On the other side of which a network has collapsed; scores may be of another scale and still say the same.
LEAST_AGREEMENT, MOST_DIVERGENCE, MOST_OF_SCORES = 0.6, 0.5, 1.0
LEAST_KL = 0.01  # nats; scores that are less apart say the same, also where they hardly vary from image to image
LEAST_PROBABILITY = 1e-12
TEMPERATURES = (0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0)
MOST_KL = 1e3  # of one row; what is not finite counts as this


class QualityWarning(UserWarning):
    """What `compress` returns no longer does what the original did."""


@dataclass(frozen=True)
class OutputQuality:
    """One output against the reference's; what does not apply to its kind is None."""

    name: str
    kind: str  # scores, map, values
    divergence: float
    agreement: float | None = None
    kl: float | None = None
    psnr: float | None = None
    scaled_kl: float | None = None
    agreement_error: float | None = field(default=None, metadata={"optional": True})  # its standard error

    def __str__(self) -> str:
        parts = [] if self.agreement is None else [f"agreement {self.agreement:.1%}"]
        parts += [] if self.kl is None else [f"KL {self.kl:.3g}"]
        parts += [] if self.psnr is None else [f"PSNR {self.psnr:.1f} dB"]
        return ", ".join([*parts, f"divergence {self.divergence:.3g}"])


@dataclass(frozen=True)
class Quality:
    """What a network kept of the original, on `images` images; `held_out` if no fit saw them.

    From 16 calibration images on the choice of the plan did not see them either, but with `keep=` in place of a budget,
    which is measured on all that are held out.
    """

    outputs: tuple[OutputQuality, ...]
    images: int
    held_out: bool = True

    @property
    def agreement(self) -> float | None:
        """The lowest agreement of an output of scores, None where there is none."""
        return min((o.agreement for o in self.outputs if o.agreement is not None), default=None)

    @property
    def surely_kept(self) -> float:
        """The share that is left (`kept`), an agreement less its standard error."""
        lowest = min((o for o in self.outputs if o.agreement is not None), key=lambda o: o.agreement or 0, default=None)
        return self.kept - (0.0 if lowest is None else lowest.agreement_error or 0.0)

    @property
    def kl(self) -> float | None:
        """The sum of the KL over the outputs of scores, nats; None where there is none."""
        found = [o.kl for o in self.outputs if o.kl is not None]
        return sum(found) if found else None

    @property
    def psnr(self) -> float | None:
        """The lowest PSNR of an output that is a map, dB; None where there is none."""
        return min((o.psnr for o in self.outputs if o.psnr is not None), default=None)

    @property
    def divergence(self) -> float:
        """The mean of the outputs' divergences."""
        return sum(o.divergence for o in self.outputs) / max(len(self.outputs), 1)

    @property
    def kept(self) -> float:
        """The share of what the original did that is left: agreement, or 1 - divergence where nothing is a score."""
        return max(0.0, 1 - self.divergence) if self.agreement is None else self.agreement

    @property
    def collapsed(self) -> bool:
        """Whether an output no longer says what the original's did."""
        return any(
            o.divergence > MOST_DIVERGENCE
            if o.agreement is None
            else o.agreement < LEAST_AGREEMENT or (o.divergence > MOST_OF_SCORES and (o.kl is None or o.kl > LEAST_KL))
            for o in self.outputs
        )

    def loss(self, name: QualityName = "auto") -> float:
        """What a plan is chosen by, lower is better.

        "auto": scaled KL of scores, divergence of all other outputs, added up. "agreement" counts rows that disagree,
        and where two plans have as many, "auto" decides; "psnr" is the divergence of maps. A name that fits none of the
        outputs stands for "auto".
        """
        auto = sum(o.divergence if o.scaled_kl is None else o.scaled_kl for o in self.outputs)
        if name == "agreement" and self.agreement is not None:
            return (1 - self.agreement) + 1e-3 * auto / (1 + auto)
        if name == "kl" and self.kl is not None:
            return self.kl
        if name == "psnr" and self.psnr is not None:
            return sum(o.divergence for o in self.outputs if o.psnr is not None)
        return self.divergence if name == "divergence" else auto

    def __str__(self) -> str:
        if len(self.outputs) == 1:
            return str(self.outputs[0])
        return "; ".join(f"{o.name}: {o}" for o in self.outputs)


@dataclass(frozen=True)
class Alternative:
    """Another way to be as fast: what it is, its share of the original's latency, and what it keeps."""

    what: str
    ratio: float
    quality: Quality


def measure_output(output: Output, reference: Tensor, other: Tensor) -> OutputQuality:
    """One output of all images, in the layout that the network gives it, against the reference's."""
    assert output.rows is not None
    y, z = (t.movedim(output.rows, 0).double() for t in (reference, other))
    z = torch.nan_to_num(z, nan=1e30, posinf=1e30, neginf=-1e30)
    divergence = _divergence(y, z)
    if output.kind == "scores":
        a, b = (t.clamp_min(LEAST_PROBABILITY).log() if output.probabilities else t for t in (y, z))
        agreement, error = _agreement(y, z)
        return OutputQuality(output.name, "scores", divergence, agreement, _kl(a, b), None, scaled_kl(a, b), error)
    if output.kind == "map":
        return OutputQuality(output.name, "map", divergence, psnr=_psnr(y, z))
    return OutputQuality(output.name, output.kind, divergence)


def _divergence(y: Tensor, z: Tensor) -> float:
    """See the module's text. Of one image, or images that are all alike, it is relative to the mean square."""
    error = float((z - y).square().sum())
    if error == 0:
        return 0.0
    return error / (len(y) * mean_square_distance(y)) if math.isfinite(error) else math.inf


def _agreement(y: Tensor, z: Tensor) -> tuple[float, float]:
    """The agreement and its standard error."""
    a, b = y.argmax(-1), z.argmax(-1)
    counted = torch.ones_like(a, dtype=torch.bool)
    if a.dim() > 1:
        common = a.flatten().mode().values
        says = (a != common) | (b != common)
        counted = says if bool(says.any()) else counted
    rows = counted.reshape(len(a), -1).double().sum(1)
    same = ((a == b) & counted).reshape(len(a), -1).double().sum(1)
    agreement = same.sum() / rows.sum()
    return float(agreement), float((same - rows * agreement).square().sum().sqrt() / rows.sum())


def scaled_kl(y: Tensor, z: Tensor) -> float:
    """The least KL of `z` over some temperatures, 1 among them."""
    return min(_kl(y, z / t) for t in TEMPERATURES)


def _kl(y: Tensor, z: Tensor) -> float:
    p, q = y.log_softmax(-1), z.log_softmax(-1)
    rows = (p.exp() * (p - q)).sum(-1)
    return float(torch.nan_to_num(rows, nan=MOST_KL, posinf=MOST_KL).clamp(0, MOST_KL).mean())


def _psnr(y: Tensor, z: Tensor) -> float:
    span, error = float(y.max() - y.min()), float((z - y).square().mean())
    if error == 0:
        return math.inf
    return 10 * math.log10(span**2 / error) if span > 0 and math.isfinite(error) else -math.inf
