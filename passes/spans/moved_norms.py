"""Moves norms whose statistics come from the map to after the merged conv.

    x ─ conv1 ─ norm ─ act ─ conv2 ─ add       trainable   x ─ LinearSpan ─ norm ─ add
                                               merged      x ─ conv ─────── norm ─ add

Such a norm is not affine, so it cannot stay between two convs that become one. With `norm="affine"` its
calibration-average affine stands for it. With `norm="post"` nothing stands for it, and one norm of its kind follows
the merged conv, in the trainable form as in the merged one, so that merging is exact. Of several removed norms the last
is kept: its statistics would undo the scale and shift of those before it. LayerMerge (ICML 2024) does this for its
denoising network, with a freshly initialised norm; here the moved norm keeps its weights where the number of channels
allows it.
"""

from __future__ import annotations

import copy
from math import prod
from typing import Any

from torch import nn

from ..graph import ops
from ..ir import Layer
from .layers import Network

__all__ = ["last_norm", "moved_norm"]


def last_norm(network: Network, layers: tuple[Layer, ...]) -> str | None:
    """The last norm node that a span of these layers would remove and that can follow its conv, or None.

    None too where the span ends in a norm that is kept: it follows the merged conv already.
    """
    end = layers[-1].activation
    if end is not None and ops.normalizes(network.module(end), network.shape(end)):
        return None
    found = _norms(network, layers, end)
    _, channels, *size = network.shape(layers[-1].exit)
    moved = moved_norm(network.module(found[-1]), channels) if found else None
    alone = isinstance(moved, ops.INSTANCE_NORMS) or getattr(moved, "num_groups", 0) == channels
    # One pixel of one channel is no statistic, and torch refuses it.
    return None if moved is None or (alone and prod(size) == 1) else found[-1]


def _norms(network: Network, layers: tuple[Layer, ...], end: str | None) -> list[str]:
    found = []
    for layer in layers:
        if layer.parallel is not None:
            for branch in layer.parallel.branches:
                found += _norms(network, branch.layers, None)
        act = layer.activation
        if act is not None and act != end and ops.normalizes(network.module(act), network.shape(act)):
            found.append(act)
    return found


def moved_norm(module: nn.Module, channels: int) -> nn.Module | None:
    """A norm like `module` for maps of `channels` channels, with its weights where it has as many channels itself.

    None for a class of norm that cannot be made for another number of channels. A GroupNorm keeps its number of
    groups, or has one group a channel where that does not divide the channels (as the published code does).
    """
    own = getattr(module, "num_channels", None) or getattr(module, "num_features", None)
    if own is None:
        own = getattr(module, "normalized_shape", (None,))[-1]
    if own == channels:
        return copy.deepcopy(module)
    weight = next(iter(module.parameters()), None)
    like: dict[str, Any] = {} if weight is None else {"dtype": weight.dtype, "device": weight.device}
    if isinstance(module, nn.GroupNorm) and ops.is_plain(module, nn.GroupNorm):
        groups = module.num_groups if channels % module.num_groups == 0 else channels
        return nn.GroupNorm(groups, channels, module.eps, module.affine, **like)
    if isinstance(module, ops.INSTANCE_NORMS) and ops.plain_in(module, ops.INSTANCE_NORMS):
        return type(module)(channels, module.eps, module.momentum, module.affine, module.track_running_stats, **like)
    if isinstance(module, ops.ChannelLayerNorm):
        return ops.ChannelLayerNorm(channels, module.eps, module.elementwise_affine, **like)
    return None
