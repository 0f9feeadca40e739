"""Affine surrogates: the best scale and bias a channel for an activation or a norm that a composed span removes.

minimise over a, b   E (a x + b - act(x))^2        a = cov(act(x), x) / var(x)      b = E act(x) - a E x
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmfx.calibration import Calibration
from lmfx.passes.layers import Network
from lmfx.values import batches_for, record

__all__ = ["affine_surrogates"]

IMAGES = 32
BATCH = 8


@torch.no_grad()
def affine_surrogates(network: Network, calibration: Calibration) -> dict[str, tuple[Tensor, Tensor]]:
    """Activation node -> (scale, bias), each (channels,), for every activation and norm that a span may remove."""
    acts = [lay.activation for s in network.series.values() for lay in s.layers if lay.activation is not None]
    before = {name: str(network.nodes[name].args[0]) for name in acts}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for batch in batches_for(network.gm, calibration, BATCH, IMAGES):
        values, _ = record(network.gm, batch, {*acts, *before.values()}, calibration.names)
        for name in acts:
            x, y = values[before[name]].double(), values[name].double()
            dims = [0, *range(2, x.dim())]
            moments = torch.stack([t.sum(dims) for t in (x, y, x * x, x * y)])
            sums[name] = sums[name] + moments if name in sums else moments
            counts[name] = counts.get(name, 0) + x.numel() // x.shape[1]
    return {name: _line(sums[name] / counts[name], network.nodes[name].meta["dtype"]) for name in acts}


def _line(moments: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y, xx, xy = moments
    variance, covariance = xx - x * x, xy - x * y
    # A channel that never varies keeps its mean.
    scale = torch.where(variance > 1e-12, covariance / variance.clamp_min(1e-12), torch.zeros_like(variance))
    return scale.to(dtype), (y - scale * x).to(dtype)
