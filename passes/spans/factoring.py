"""Finds the convs that can be factored into a depthwise and a pointwise one, and the multipliers worth trying.

    x ─ pad ─ conv k x k ─ norm ─ y            x ─ pad ─ depthwise k x k ─ pointwise 1 x 1 ─ y

A dense conv of `taps` taps makes  in x out x taps  multiply-adds a pixel, its factors with m filters a channel
m x in x (taps + out).  The norm after it goes into the pointwise conv.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from ..graph import ops
from ..ir import ConvConfig, Layer
from .pruning import side_inputs

if TYPE_CHECKING:
    from .layers import Network

__all__ = ["factorable", "multipliers_of"]

MULTIPLIERS = (1, 2)
LEAST_CHANNELS = 4  # of the input: with fewer there is little to gain, and much to lose
MOST_UNKNOWNS = 2500  # of the depthwise filters, which are found together: more take seconds
LEAST_SAVING = 0.8  # of the conv's multiply-adds that the factors have at most


def factorable(network: Network, layer: Layer) -> ConvConfig | None:
    """The conv of a layer as one configuration, if it is dense, with pads before it and norms after it; else None."""
    config = network.config(layer) if layer.conv is not None and layer.parallel is None else None
    if not isinstance(config, ConvConfig) or config.groups > 1 or config.upscale:
        return None
    own: Any = network.module(str(layer.conv))
    if not ops.plain_in(own, ops.CONVS) or tuple(own.kernel_size) != config.kernel_size:
        return None
    affine = network.affine_nodes(layer)
    at = affine.index(str(layer.conv))
    allowed = [(affine[:at], ops.PADS), (affine[at + 1 :], (*ops.BATCH_NORMS, ops.ChannelAffine, ops.ChannelSelect))]
    for names, kinds in allowed:
        if any(network.nodes[n].op != "call_module" or not ops.plain_in(network.module(n), kinds) for n in names):
            return None
    if side_inputs(network, (layer,), frozenset([str(layer.conv)])):
        return None
    return config


def multipliers_of(config: ConvConfig, limit: int | None = None) -> tuple[int, ...]:
    """How many depthwise filters a channel may have, so that the factors are cheaper and can be found in seconds."""
    taps, most = prod(config.kernel_size), MOST_UNKNOWNS if limit is None else min(limit, MOST_UNKNOWNS)
    if taps == 1 or config.in_channels < LEAST_CHANNELS:
        return ()
    dense = config.out_channels * taps
    return tuple(
        m
        for m in MULTIPLIERS
        if m * (taps + config.out_channels) <= LEAST_SAVING * dense and config.in_channels * m * taps <= most
    )
