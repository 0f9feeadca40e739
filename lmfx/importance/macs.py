"""Counts the multiply-accumulates of a network, by which work is kept within bounds."""

from __future__ import annotations

from math import prod
from typing import Any

from lmfx.passes.spans.layers import Network

__all__ = ["multiply_accumulates"]


def multiply_accumulates(network: Network) -> float:
    """Multiply-accumulates of the convs in a network's regions, for one image."""
    total = 0.0
    for name in (c for region in network.regions for c in network.convs(region.series.layers)[1]):
        conv: Any = network.module(name)
        total += conv.weight.numel() * prod(network.shape(name)[2:])
    return total
