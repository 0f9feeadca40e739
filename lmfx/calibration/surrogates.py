"""Fits affine surrogates: the best scale and bias of each channel for an activation or a norm that a span removes.

minimise over a, b   E (a x + b - act(x))^2        a = cov(act(x), x) / var(x)      b = E act(x) - a E x

Of a layer that is called several times the calls are taken together. The moments are taken about the mean of the
first batch, so that a channel far from 0 keeps its digits. A channel that varies by no more than its dtype can tell
from its size (whatever that is) never varies: a = 0, and it keeps its mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import batches_for, images_at_once, record
from lmfx.passes.graph.node_facts import tensor_dtype
from lmfx.passes.spans.layers import Network

__all__ = ["affine_surrogates"]

IMAGES = 32
BATCH = 8


@torch.no_grad()
def affine_surrogates(network: Network, calibration: Calibration) -> dict[str, tuple[Tensor, Tensor]]:
    """Activation node -> (scale, bias), each (channels,), for every activation and norm that a span may remove."""
    acts = [lay.activation for s in network.series.values() for lay in s.layers if lay.activation is not None]
    before = {name: str(network.nodes[name].args[0]) for name in acts}
    first = {name: calls[0] for calls in network.calls.activations() for name in calls}
    sums: dict[str, Tensor] = {}
    middle: dict[str, tuple[Tensor, Tensor]] = {}
    precise: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in batches_for(network.gm, calibration, images_at_once(network.gm, BATCH), IMAGES):
        values, _ = record(network.gm, batch, {*acts, *before.values()}, calibration.names)
        for name in acts:
            x, y = values[before[name]].double(), values[name].double()
            dims = [0, *range(2, x.dim())]
            shape = (1, -1, *[1] * (x.dim() - 2))
            precision = torch.finfo(values[before[name]].dtype).eps
            name = first.get(name, name)  # all calls of a layer together
            if name not in middle:
                middle[name] = x.mean(dims), y.mean(dims)
                precise[name] = precision
            x, y = (t - m.reshape(shape) for t, m in zip((x, y), middle[name], strict=True))
            moments = torch.stack([t.sum(dims) for t in (x, y, x * x, x * y)])
            sums[name] = sums[name] + moments if name in sums else moments
            counts[name] = counts.get(name, 0) + x.numel() // x.shape[1]
    lines = {
        name: _line(sums[name] / counts[name], *middle[name], precise[name], tensor_dtype(network.nodes[name]))
        for name in sums
    }
    return {name: lines[first.get(name, name)] for name in acts}


def _line(
    moments: Tensor, x_middle: Tensor, y_middle: Tensor, precise: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x, y, xx, xy = moments
    variance, covariance = xx - x * x, xy - x * y
    varies = variance > precise**2 * (variance + (x + x_middle).square())
    scale = torch.where(varies, covariance / torch.where(varies, variance, 1.0), 0.0)
    return scale.to(dtype), (y + y_middle - scale * (x + x_middle)).to(dtype)
