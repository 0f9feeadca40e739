"""Brings what last layers read to what the original has there, channel by channel: for images of another size.

    min over s, t of  sum |s x + t - x0|^2  +  RIDGE v (s - 1)^2          W' = W s,   b' = b + W t

x is a channel of what the layer reads in a network for smaller images, x0 the same in the original on the images at
their own size, v the mean variance of all channels. Averages over a smaller map, with more border in it, vary more and
about another mean; two numbers a channel can be learned from few images, where a matrix cannot. See "A smaller input"
in docs/quality.md for what this gives and what was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import record_batches
from lmfx.quality.judge import Judge
from lmfx.quality.last_layers import last_layers
from lmfx.quality.output_scale import set_scale

__all__ = ["fit_last_layers"]

RIDGE = 0.3
LEAST_IMAGES = 8


@dataclass(frozen=True)
class _Pair:
    """The last layer of an output in two networks: its module here, and the nodes that it reads here and there."""

    layer: nn.Linear
    ours: fx.Node
    theirs: fx.Node


@torch.no_grad()
def fit_last_layers(
    net: fx.GraphModule,
    graph: fx.GraphModule,
    scaled: Calibration,
    images: Calibration,
    judge: Judge,
    outputs: Callable[[fx.GraphModule], Sequence[Tensor]],
    free: Callable[[str], bool] = lambda name: True,
) -> None:
    """Set the Linear layers that give scores anew, in place, where that lowers the judge's loss; then their scale.

    `net` takes images at another size than `graph`, the original: `scaled` are the images of its fit, `images` the same
    at the original's own size. `outputs` says what a network for the other size gives for the judge's images. `free`
    says of a node's name whether its layer may be changed.
    """
    if not any(kind.kind == "scores" for kind in judge.kinds):
        return
    for pair in _pairs(net, graph, judge, free) if len(images) >= LEAST_IMAGES else []:
        here = record_batches(net, scaled, {pair.ours.name})[pair.ours.name]
        there = record_batches(graph, images, {pair.theirs.name})[pair.theirs.name]
        if here.shape != there.shape:
            continue
        scale, shift = _affine(here.double().flatten(0, -2), there.double().flatten(0, -2))
        before = judge.of(list(outputs(net))).loss()
        weight, bias = pair.layer.weight.clone(), pair.layer.bias.clone()
        pair.layer.bias.add_((weight.double() @ shift).to(bias))
        pair.layer.weight.mul_(scale.to(weight))
        if not judge.of(list(outputs(net))).loss() < before:
            pair.layer.weight.copy_(weight)
            pair.layer.bias.copy_(bias)
    set_scale(net, judge, free, outputs(net))


def _affine(x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(s, t) for rows of channels."""
    mean, other = x.mean(0), wanted.mean(0)
    covariance, variance = ((x - mean) * (wanted - other)).mean(0), (x - mean).square().mean(0)
    ridge = (RIDGE * variance.mean()).clamp_min(torch.finfo(x.dtype).tiny)
    scale = (covariance + ridge) / (variance + ridge)
    return scale, other - scale * mean


def _pairs(net: fx.GraphModule, graph: fx.GraphModule, judge: Judge, free: Callable[[str], bool]) -> list[_Pair]:
    """The last layers of scores that can be set: Linear with a bias, of as many channels, that read one value."""
    ours, theirs = last_layers(net), last_layers(graph)
    found: list[_Pair] = []
    if not len(ours) == len(theirs) == len(judge.kinds):
        return found
    for kind, a, b in zip(judge.kinds, ours, theirs, strict=True):
        if kind.kind != "scores" or a is None or b is None or not free(b.name):
            continue
        layer, original = net.get_submodule(str(a.target)), graph.get_submodule(str(b.target))
        if isinstance(layer, nn.Linear) and isinstance(original, nn.Linear) and layer.bias is not None:
            found.append(_Pair(layer, a.all_input_nodes[0], b.all_input_nodes[0]))
    return found
