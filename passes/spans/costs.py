"""Counts what an op costs, without a clock: multiply-adds, weights that are read, and one for the op itself.

    conv, Linear       out_pixels out (in / groups) k + weights + 1           each image's, batch size left out
    transposed conv    the same, of the small map's conv that it is without the zeros in it (`enlarging`)
    average pool       out_pixels channels k + 1
    norm, scale        one a number of its output, its own numbers, + 1
    pad, sum, select   one a number of its output + 1;  a conv that pads other than by zeros counts as a pad and a conv

The two kinds of numbers that a runtime moves or computes weigh the same: the weights keep a pool of many pixels, which
costs a small conv nothing in multiply-adds, from becoming a kernel of many pixels. Activations and ops that are not
understood cost nothing, because no choice between loss-free plans changes them.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

from ..algebra.side_vectors import side_vector
from ..graph import ops
from ..ir import Candidate, ConvConfig, Layer
from .layers import Network
from .pruning import side_inputs

__all__ = ["adds_convs", "kept_cost", "layer_cost", "merged_cost", "merged_ops", "span_ops"]


def layer_cost(network: Network, layer: Layer) -> float:
    """What a layer costs as it is; of a parallel element the join and what follows it, without the branches."""
    if layer.opaque is not None:
        return 0.0
    total = sum(_op_cost(network, name) for name in network.affine_nodes(layer))
    if layer.parallel is not None and layer.parallel.join != "mesh":
        total += _numbers(network.shape(layer.parallel.node)) * (len(layer.parallel.branches) - 1) + 1
    return float(total)


def kept_cost(network: Network, layers: tuple[Layer, ...]) -> float:
    """What layers cost as they are, with all that is in their branches."""
    inside = (kept_cost(network, b.layers) for lay in layers if lay.parallel for b in lay.parallel.branches)
    return sum(layer_cost(network, lay) for lay in layers) + sum(inside)


def merged_cost(network: Network, candidate: Candidate) -> float:
    """What the merged conv of a candidate costs, with the pad and the side inputs that it needs beside it."""
    config = candidate.conv
    assert config is not None
    shape = network.shape(candidate.span.output)
    total = _conv(config, shape) + config.out_channels + (_numbers(shape) + 1) * _ops_after(config)
    if pads_apart(config):
        total += _numbers(network.shape(candidate.span.entry)) + 1
    for name in _sides(network, candidate):
        total += network.shape(name)[1] * config.out_channels * 2 + _numbers(shape) + 2
    return float(total)


def span_ops(network: Network, layers: tuple[Layer, ...]) -> int:
    """The affine ops and joins of layers, with those of their branches. A conv that pads from its map is two."""
    inside = sum(span_ops(network, b.layers) for lay in layers if lay.parallel for b in lay.parallel.branches)
    names = [n for lay in layers for n in network.affine_nodes(lay) if network.nodes[n].op == "call_module"]
    mirrored = sum(_mirrors(network.module(n)) for n in names)
    return inside + mirrored + sum(len(network.affine_nodes(lay)) + (lay.parallel is not None) for lay in layers)


def _mirrors(module: nn.Module) -> bool:
    """Whether a conv pads from its map, which is an op of its own; one that pads nothing only says how it would."""
    padding: Any = getattr(module, "padding", 0)
    pads = padding == "same" if isinstance(padding, str) else any(padding) if isinstance(padding, tuple) else padding
    return getattr(module, "padding_mode", "zeros") != "zeros" and bool(pads)


def adds_convs(network: Network, candidate: Candidate) -> bool:
    """Whether there are more convs after a merge than before it: a side input gets one of its own."""
    return len(_sides(network, candidate)) >= max(len(candidate.all_convs), 1)


def merged_ops(network: Network, candidate: Candidate) -> int:
    """The ops that stand for a composed span: its conv, a pad where the conv cannot do it, two for a side input."""
    assert candidate.conv is not None
    return 1 + pads_apart(candidate.conv) + _ops_after(candidate.conv) + 2 * len(_sides(network, candidate))


def pads_apart(config: ConvConfig) -> bool:
    """Whether a merged conv has its padding in an op of its own."""
    return not config.even


def _ops_after(config: ConvConfig) -> int:
    """The ops that make blocks of pixels of a merged conv's channels, and cut what is too much of them."""
    return 0 if config.window or not config.upscale else 1 + any(config.cut)


def _sides(network: Network, candidate: Candidate) -> tuple[str, ...]:
    if not network.vectors:
        return ()
    span = candidate.span
    layers = network.series[span.series].layers[span.start : span.stop]
    return side_inputs(network, layers, frozenset(network.convs(layers)[1]))


def _op_cost(network: Network, name: str) -> int:
    node, shape = network.nodes[name], network.shape(name)
    if node.op != "call_module" or side_vector(node) is not None:
        return _numbers(shape) + 1
    module: Any = network.module(name)
    own = sum(p.numel() for p in module.parameters(recurse=False))
    source = network.shape(node.all_input_nodes[0].name) if node.all_input_nodes else shape
    config = network.step(name, _entering(source))
    if isinstance(network.module(name), (*ops.CONVS, *ops.TRANSPOSED, nn.Linear)):
        apart = _numbers(source) + 1 if config.pads and config.padding_mode != "zeros" else 0
        bias = 0 if module.bias is None else len(module.bias)
        return _conv(config, shape) + bias + apart
    if isinstance(network.module(name), ops.AVG_POOLS):
        return _numbers(shape) * prod(config.kernel_size) + 1
    return _numbers(shape) + own + 1


def _entering(shape: tuple[int, ...]) -> ConvConfig:
    ones = (1,) * (len(shape) - 2)
    return ConvConfig(shape[1], shape[1], ones, ones, tuple((0, 0) for _ in ones), ones, shape[1])


def _conv(config: ConvConfig, shape: tuple[int, ...]) -> int:
    """The last is the shape of what it gives, after blocks of pixels were made of channels."""
    pairs = config.out_channels * (config.in_channels // config.groups)
    weights = pairs * prod(config.written) * (1 if config.window else prod(config.upscale))
    return round(pairs * config.taps * prod(shape[2:])) + weights + 1


def _numbers(shape: tuple[int, ...]) -> int:
    """Of one image."""
    return prod(shape[1:])
