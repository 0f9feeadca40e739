"""Keeps the exponential moving average of a network's weights over the steps of its training.

    first step:   a <- w
    step n:       a <- d a + (1 - d) w        d = min(decay, (1 + n) / (10 + n))

Diffusion models sample from the average, not from what was trained last (Ho, Jain, Abbeel 2020, decay 0.9999). The
rising d is TensorFlow's: with 0.9999 from the start, the weights that a training began with would still be nine tenths
of the average after a thousand steps. Running statistics of norms are averaged as the weights are; counters are copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["moving_average"]


def moving_average(net: nn.Module, decay: float) -> AveragedModel:
    """A copy of `net` that `update_parameters(net)` after each step keeps at the moving average."""

    def update(averages: Any, values: Any, count: Tensor | int) -> None:
        if not torch.is_floating_point(averages[0]):
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)
            return
        n = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, values, n)

    return AveragedModel(net, multi_avg_fn=update, use_buffers=True)
