"""Decides which composed spans lose nothing: the merged conv is the same function as the layers, borders included.

Composing moves all padding to the front (`linear`). That is the span itself where no activation goes, no conv is pruned
and no later op pads. An op that pads what an earlier one gives sees its fill v where the merged conv sees what the
earlier ops, with W and b, would have given further out. Both are the same where, on each side that is padded,

    constant fill   the window lies outside of the map whole:  K < s + before,  K <= after       (K = d (k - 1))
                    and there the earlier ops give the fill:   sum(W) u + b = v                  (u: the merged fill)
    reflect         the earlier ops look at single pixels:     K = 0, s = 1, no padding yet
    replicate       the same, padded in this mode or not
    circular        the earlier ops keep the size:             s = 1, before + after = K

So a 1x1 conv before a padded 3x3 conv is exact without a bias (and without a norm that shifts), and only there.

An op that enlarges its map is a conv of the small map (`enlarging`), which pads what its pixels read beyond it: that is
the same question. An op that pads the enlarged map reads zeros where the merged op gives what was cropped: the same if
the enlarging op crops nothing on that side and adds no constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import linear
from ..algebra.linear_span import affine_op, without_padding
from ..algebra.side_vectors import side_vector
from ..errors import OptionError
from ..graph import ops
from ..graph.conv_configs import identity_config
from ..graph.enlarging import low, output_padding, reach
from ..ir import ConvConfig, Layer, Parallel, Refusal
from .layers import Network

__all__ = ["inexact"]


def inexact(network: Network, layers: tuple[Layer, ...], config: ConvConfig) -> Refusal | None:
    """Why the layers, with all their convs composed to `config`, are not exactly that conv; None if they are.

    The last layer's activation stays after the conv; any other goes.
    """
    for i, layer in enumerate(layers):
        lost = _activation_in(network, layer, inside=i < len(layers) - 1)
        if lost is not None:
            return Refusal(f"the activation {lost} would be removed", (lost,))
    shape = network.shape(layers[0].entry)
    fill = torch.full((shape[1],), config.padding_value, dtype=torch.float64)
    start = _Seen(identity_config(shape[1], len(shape) - 2), fill, True)
    try:
        _Walk(network, config).through(layers, start)
    except _LossyBorder as border:
        return border.refusal
    except OptionError as error:
        return Refusal(str(error), (layers[-1].exit,))
    return None


def _activation_in(network: Network, layer: Layer, inside: bool) -> str | None:
    """The first activation of a layer that composing removes; its own only if it is `inside` the span."""
    for branch in layer.parallel.branches if layer.parallel is not None else ():
        for own in branch.layers:
            found = _activation_in(network, own, inside=True)
            if found is not None:
                return found
    return layer.activation if inside else None


@dataclass(frozen=True)
class _Seen:
    """The ops so far: their configuration from the span's entry, what they give far outside of the map (None: that
    depends on the input), and whether there are none."""

    config: ConvConfig
    outside: Tensor | None
    nothing: bool = False


class _LossyBorder(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class _Walk:
    def __init__(self, network: Network, fill: ConvConfig) -> None:
        self.network = network
        self.fill = fill

    def through(self, layers: tuple[Layer, ...], seen: _Seen) -> _Seen:
        for layer in layers:
            if layer.parallel is not None:
                seen = self.join(layer.parallel, seen)
            for name in self.network.affine_nodes(layer):
                seen = self.op(name, seen)
        return seen

    def op(self, name: str, seen: _Seen) -> _Seen:
        step = self.network.step(name, seen.config)
        reason = self.border(step, seen)
        if reason is not None:
            raise _LossyBorder(
                Refusal(f"{self.network.path(name)} pads what is not its input any more: {reason}", (name,))
            )
        return _Seen(linear.compose_config(seen.config, step), self.outside(name, seen.outside))

    def outside(self, name: str, value: Tensor | None) -> Tensor | None:
        """What one op makes of a map that is `value` everywhere, in float64."""
        if value is None or side_vector(self.network.nodes[name]) is not None:
            return None
        module = self.network.module(name)
        if isinstance(module, ops.ChannelSelect):
            return value[list(module.index)]
        if isinstance(module, ops.TRANSPOSED):
            if bool(value.any()):
                return None  # each pixel of a block sees another number of taps
            conv: Any = module
            return value.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().double().cpu()
        if (blocks := ops.shuffled_blocks(module)) is not None:
            pixels = value.reshape(-1, prod(blocks))
            return pixels[:, 0] if torch.equal(pixels, pixels[:, :1].expand_as(pixels)) else None
        if isinstance(module, (*ops.PADS, *ops.MIRRORS, ops.PixelSlice)):
            return value
        if name not in self.network.sums:
            self.network.sums[name] = _sums(module, len(value), len(self.network.shape(name)) - 2)
        weight, bias = self.network.sums[name]
        groups = value.reshape(len(value) // weight.shape[1], 1, -1)
        return (weight.reshape(len(groups), -1, weight.shape[1]) * groups).sum(2).flatten() + bias

    def join(self, parallel: Parallel, seen: _Seen) -> _Seen:
        found = [self.through(branch.layers, seen) for branch in parallel.branches]
        enlarged = bool(seen.config.upscale)
        start = identity_config(seen.config.out_channels, len(seen.config.stride))
        configs = [self.alone(b.layers, start) for b in parallel.branches] if enlarged else [f.config for f in found]
        values = [f.outside for f in found if f.outside is not None]
        cat = parallel.join == "cat"
        config = linear.cat_configs(configs) if cat else linear.add_configs(configs)
        config = linear.compose_config(seen.config, config) if enlarged else config
        if len(values) < len(found):
            return _Seen(config, None)
        if cat:
            return _Seen(config, torch.cat(values))
        rest = torch.stack(values[1:]).sum(0) if len(values) > 1 else torch.zeros_like(values[0])
        return _Seen(config, values[0] - rest if parallel.join == "sub" else values[0] + rest)

    def alone(self, layers: tuple[Layer, ...], config: ConvConfig) -> ConvConfig:
        """`config`, then the layers, whatever was before."""
        for layer in layers:
            if layer.parallel is not None:
                start = identity_config(config.out_channels, len(config.stride))
                parts = [self.alone(branch.layers, start) for branch in layer.parallel.branches]
                whole = linear.cat_configs(parts) if layer.parallel.join == "cat" else linear.add_configs(parts)
                config = linear.compose_config(config, whole)
            for name in self.network.affine_nodes(layer):
                config = linear.compose_config(config, self.network.step(name, config))
        return config

    def border(self, step: ConvConfig, seen: _Seen) -> str | None:
        """Why an op that pads may not read what the ops before it would give further out; None if it may."""
        first, fill = seen.config, self.fill
        if step.upscale:
            step = replace(low(step), padding=reach(step))
        if not any(before > 0 or after > 0 for before, after in step.padding):
            return None
        if (step.padding_mode, step.padding_value) != (fill.padding_mode, fill.padding_value):
            return "the merged conv would pad in another way"
        if seen.nothing:
            return None
        if first.upscale and not self.unseen(step, first):
            return "the op that enlarges the map crops it, or looks at several pixels"
        for own, pads, stride, kernel, dilation in zip(
            step.padding, first.padding, first.stride, first.kernel_size, first.dilation, strict=True
        ):
            extent, same = dilation * (kernel - 1), True
            if first.upscale:
                continue
            if step.padding_mode == "zeros":
                same = (own[0] <= 0 or extent < stride + pads[0]) and (own[1] <= 0 or extent <= pads[1])
            elif max(own) > 0 and step.padding_mode == "circular":
                same = stride == 1 and sum(pads) == extent
            elif max(own) > 0:
                padded = any(pads) and (step.padding_mode == "reflect" or min(pads) < 0)
                same = extent == 0 and stride == 1 and not padded
            if not same:
                return "the ops before it look at several pixels"
        if step.padding_mode != "zeros":
            return None
        if seen.outside is None:
            return "what the ops before it give there depends on the input, or on the pixel"
        if not torch.allclose(seen.outside, torch.full_like(seen.outside, step.padding_value), rtol=1e-12, atol=0):
            return "there is a bias, or a norm that shifts, before it"
        return None

    def unseen(self, step: ConvConfig, first: ConvConfig) -> bool:
        """Whether what an op that enlarges its map gives outside of it is of no input, where `step` pads."""
        extra = output_padding(first) if first.window else (0,) * len(first.cut)
        for i, (before, after) in enumerate(step.padding):
            if first.window:
                padding = first.window[i][2]
                crops = padding > 0, padding > extra[i]
            else:
                (lo, hi), stride = first.padding[i], first.stride[i]
                extent = first.dilation[i] * (first.kernel_size[i] - 1)
                crops = extent >= stride + lo, extent > hi or first.cut[i] > 0
            if (before > 0 and crops[0]) or (after > 0 and crops[1]):
                return False
        return True


def _sums(module: nn.Module, channels: int, ndim: int) -> tuple[Tensor, Tensor]:
    """The sums of an op's kernels, (out, in / groups), and its bias: all that a constant map sees of it."""
    bare = without_padding(module)
    assert bare is not None
    with torch.no_grad():
        op = affine_op(bare, channels, ndim, None)
        weight = op.weight.to("cpu")
        return weight.flatten(2).sum(2) if op.ndim else weight, op.bias.to("cpu")
