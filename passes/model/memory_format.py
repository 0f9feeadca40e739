"""Keeps the memory format of a network: what is made of a channels-last model is channels last.

A weight of one channel or one tap has both formats, so only the others say which one a model is in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["is_channels_last", "like"]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(model: nn.Module) -> bool:
    """Whether all weights of a model that can tell are channels last."""
    told = list(_telling(model))
    return bool(told) and all(w.is_contiguous(memory_format=_FORMATS[w.dim()]) for w in told)


def like(net: nn.Module, model: nn.Module) -> nn.Module:
    """`net` itself, its weights channels last where those of `model` are."""
    if is_channels_last(model):
        for weight in _telling(net):
            weight.data = weight.data.contiguous(memory_format=_FORMATS[weight.dim()])
    return net


def _telling(model: nn.Module) -> Iterator[Tensor]:
    for weight in model.parameters():
        if weight.dim() in _FORMATS and weight.shape[1] > 1 and weight[0, 0].numel() > 1:
            yield weight
