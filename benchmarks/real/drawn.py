"""A small ResNet and a small MobileNetV2 on drawn characters: networks that are trained here, by seed.

`accuracy` on 1,800 characters that neither training nor calibration saw; calibration and recovery see no label. The
original is trained once, in about two CPU minutes, and kept in `out/real/originals`. A module, not a script.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.real.subjects import Outputs, Subject, agreement, divergence
from benchmarks.shared import characters

__all__ = ["drawn"]

HELD, EPOCHS = 1800, 6


def drawn(network: str, seed: int = 0, folder: Path = Path("out/real/originals"), epochs: int = EPOCHS) -> Subject:
    """ "resnet" or "mobilenet" of `benchmarks/shared/small_networks.py`, 32 px, 36 classes."""

    def judge(outputs: Outputs, original: Outputs) -> dict[str, float]:
        labels = _images("held", len(outputs[0]), seed)[1].numpy()
        return {
            "accuracy": float((outputs[0].argmax(-1) == labels).mean()),
            "agreement": agreement(outputs[0], original[0]),
            "kl": divergence(outputs[0], original[0]),
        }

    def images(kind: str, count: int, size: int) -> Tensor:
        found = _images(kind, count, seed)[0]
        if size == found.shape[-1]:
            return found
        return nn.functional.interpolate(found, size=(size, size), mode="bilinear", antialias=True)

    return Subject(
        name=f"drawn-{network}" + (f"-{seed}" if seed else ""),
        what=f"small {network} on drawn characters of 32 px: accuracy",
        model=lambda: _model(network, seed, folder, epochs),
        images=images,
        judge=judge,
        figure="accuracy",
        size=32,
        pinned=("classifier",),
        smaller=(30, 28, 26, 24, 22, 20, 18, 16),
        held=HELD,
    )


@lru_cache(4)
def _images(kind: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    images, labels = characters.draw(count, seed, split={"cal": "held", "held": "test"}[kind])
    return characters.normalised(images), labels


def _model(network: str, seed: int, folder: Path, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = characters.NETWORKS[network](16, 36)
    file = folder / f"{network}-{seed}.safetensors"
    if not file.exists():
        characters.train(model, characters.load(seed), epochs=epochs, seed=seed, progress=False)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(model.state_dict(), file)
    model.load_state_dict(safetensors.torch.load_file(file))
    return model.eval()
