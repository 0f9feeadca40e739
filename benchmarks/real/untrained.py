"""torchvision's classifiers with random weights on photographs: their latency is real, what is left of them is not.

No package that can be reached ships their ImageNet weights. Norms have the statistics of 32 photographs, and the last
layer is shifted and scaled so that the logits of photographs differ from image to image (mean 0, deviation 3 over
images): without that, one class wins for all images, and every variant agrees. Random layers merge worse than trained
ones, so figures here only compare variants of one network with each other.
A module, not a script.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.real.classifiers import judge
from benchmarks.real.packages import photographs
from benchmarks.real.subjects import Subject

__all__ = ["UNTRAINED", "settle", "untrained"]

UNTRAINED = ("resnet18", "resnet34", "resnet50", "mobilenet_v2")
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
DEVIATION = 3.0  # of a logit over images, about that of a trained classifier


def untrained(name: str) -> Subject:
    """A torchvision classifier at 224 px, 32 photographs for calibration."""
    return Subject(
        name=f"torchvision-{name}",
        what=f"{name} with random weights, photographs of 224 px: same class as the original",
        model=lambda: _model(name),
        images=_images,
        judge=judge,
        figure="agreement",
        size=224,
        calibration=32,
        held=256,
    )


def settle(model: nn.Module, images: Tensor) -> nn.Module:
    """Gives norms the statistics of these images, and the last Linear logits that tell images apart; in place."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over batches
    with torch.no_grad():
        model.eval()
        for norm in norms:
            norm.train()
        model(images)
        model.eval()
        logits = model(images)
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        last.bias.sub_(logits.mean(0))
        scale = DEVIATION / logits.std(0).clamp_min(1e-6)
        last.weight.mul_(scale[:, None])
        last.bias.mul_(scale)
    return model


def _model(name: str) -> nn.Module:
    from lmfx.cli.models import load_model

    torch.manual_seed(0)
    return settle(load_model(f"torchvision:{name}"), _images("cal", 32, 224)).requires_grad_(False)


def _images(kind: str, count: int, size: int) -> Tensor:
    return (photographs(kind, count, size) / 255 - MEAN) / STD
