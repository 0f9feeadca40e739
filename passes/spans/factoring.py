"""Finds the convs that can be factored into two, and which pairs are worth trying.

    x ─ pad ─ conv k x k ─ norm ─ y            x ─ pad ─ depthwise k x k ─ pointwise 1 x 1 ─ y
                                               x ─ pad ─ conv k x k to r channels ─ pointwise 1 x 1 ─ y

A dense conv of `taps` taps makes  in x out x taps  multiply-adds a pixel. Its factors make  m x in x (taps + out)  with
m depthwise filters a channel, r x (in x taps + out)  through r channels. The norm after it goes into the pointwise one.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from ..graph import ops
from ..ir import ConvConfig, Layer
from .pruning import side_inputs

if TYPE_CHECKING:
    from .layers import Network

__all__ = ["factorable", "factored_ways"]

MULTIPLIERS = (1, 2)
LEAST_CHANNELS = 4  # of the input: with fewer there is little to gain, and much to lose
MOST_UNKNOWNS = 2500  # of the depthwise filters, which are found together: more take seconds
SHARES = (1, 2, 3, 4)  # eighths of the outputs that a rank is
MULTIPLE = 8  # of which ranks are whole numbers: runtimes like those
LEAST_OUTPUTS = (64, 256)  # that a conv of k x k, and of 1 x 1, has at least (and inputs, of 1 x 1) to be given a rank
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


def factored_ways(config: ConvConfig, limit: int | None = None) -> tuple[ConvConfig, ...]:
    """The configurations of two convs that may take the place of a dense one: cheaper, and found in seconds.

    `limit` is the most unknowns that a system of equations may have.
    """
    made = [replace(config, multiplier=m) for m in _multipliers(config, limit)]
    made += [replace(config, rank=r) for r in _ranks(config, limit)]
    return tuple(c for c in made if c.taps <= LEAST_SAVING * config.taps)


def _multipliers(config: ConvConfig, limit: int | None) -> tuple[int, ...]:
    taps, most = prod(config.kernel_size), MOST_UNKNOWNS if limit is None else min(limit, MOST_UNKNOWNS)
    if taps == 1 or config.in_channels < LEAST_CHANNELS:
        return ()
    return tuple(m for m in MULTIPLIERS if config.in_channels * m * taps <= most)


def _ranks(config: ConvConfig, limit: int | None) -> tuple[int, ...]:
    out, pointwise = config.out_channels, prod(config.kernel_size) == 1
    if min(out, config.in_channels if pointwise else out) < LEAST_OUTPUTS[pointwise]:
        return ()
    if limit is not None and out > limit:
        return ()
    return tuple(sorted({max(out * share // 8 // MULTIPLE * MULTIPLE, MULTIPLE) for share in SHARES}))
