"""Makes the module that stands for a span: a `LinearSpan` of what a composed candidate keeps, or a conv to be fitted.

span          layers ── chain of their affine modules without padding ── LinearSpan, which pads once
              pruned convs are left out, with their norms and activations; an affine surrogate linearizes
fitted conv   a plain conv of the candidate's configuration, or a `LinearSpan` where it takes vectors from the side
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..algebra import linear
from ..algebra.linear_span import AffineChain, Branches, Crop, EnlargingSpan, LinearSpan, without_padding
from ..algebra.side_vectors import SideAdd, SideConv, side_vector
from ..errors import PlanError
from ..graph import ops
from ..graph.conv_configs import identity_config
from ..graph.shapes import Pads
from ..ir import Candidate, ConvConfig, Layer, Parallel
from ..spans.layers import Network
from ..spans.pruning import is_dropped, side_inputs

__all__ = ["build_span", "fitted_conv", "kept_nodes", "span_sides"]


def build_span(
    network: Network, candidate: Candidate, surrogates: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
) -> nn.Module:
    """The trainable module of a composed or fitted candidate, with copies of the network's weights."""
    layers = network.series[candidate.span.series].layers[candidate.span.start : candidate.span.stop]
    assert candidate.conv is not None
    if candidate.realization == "compose":
        bare = candidate.post_norm is not None  # the norm after the conv undoes a scale: nothing stands for what goes
        kept = kept_nodes(network, candidate)
        return _Builder(network, kept, None if bare else surrogates or {}).span(layers, candidate.conv)
    return fitted_conv(network, candidate.conv, span_sides(network, candidate))


def span_sides(network: Network, candidate: Candidate) -> tuple[str, ...]:
    """The nodes whose vectors a composed or fitted candidate takes from the side, in the order of the graph."""
    if not candidate.puts_conv or not network.vectors:
        return ()
    layers = network.series[candidate.span.series].layers[candidate.span.start : candidate.span.stop]
    kept = kept_nodes(network, candidate) if candidate.realization == "compose" else network.convs(layers)[1]
    return side_inputs(network, layers, frozenset(kept))


def kept_nodes(network: Network, candidate: Candidate) -> frozenset[str]:
    """The conv nodes that a composed candidate keeps."""
    layers = network.series[candidate.span.series].layers[candidate.span.start : candidate.span.stop]
    every, kept = network.convs(layers)[1], set(candidate.kept)
    if len(every) != len(candidate.all_convs):
        raise PlanError(
            f"the plan's span {candidate.key} has {len(candidate.all_convs)} convs, and in this graph {len(every)}: "
            "solve again"
        )
    return frozenset(node for node, name in zip(every, candidate.all_convs, strict=True) if name in kept)


def fitted_conv(network: Network, config: ConvConfig, sides: tuple[str, ...] = ()) -> nn.Module:
    """A conv (or Linear) of this configuration in the network's dtype, initialised as torch does it.

    Where `sides` are nodes of vectors it is a `LinearSpan`, which adds each of them by a matrix that begins as zeros.
    """
    like = next(p for p in network.gm.parameters() if p.is_floating_point())
    if not config.kernel_size:
        return nn.Linear(config.in_channels, config.out_channels, dtype=like.dtype, device=like.device)
    symmetric = config.even and not sides
    make: Any = ops.conv_class(len(config.kernel_size))
    conv: nn.Module = make(
        config.in_channels,
        config.out_channels,
        config.kernel_size,
        config.stride,
        tuple(lo for lo, _ in config.padding) if symmetric else 0,
        config.dilation,
        config.groups,
        dtype=like.dtype,
        device=like.device,
    )
    if symmetric:
        return conv
    op = linear.from_conv(conv)
    added = [SideConv(i, network.shape(n)[1], config.out_channels, op.bias.to(like)) for i, n in enumerate(sides)]
    return LinearSpan(
        AffineChain([conv, *added]),
        config.padding,
        linear.LinearOp(op.weight, op.bias, op.stride, config.padding, op.dilation, op.groups).config,
        sides,
    )


class _Builder:
    def __init__(
        self, network: Network, kept: frozenset[str], surrogates: dict[str, tuple[torch.Tensor, torch.Tensor]] | None
    ) -> None:
        self.network = network
        self.kept = kept
        self.surrogates = surrogates
        self.sides: tuple[str, ...] = ()
        self.enlarging = False
        self.pads: list[Pads] = []  # of the modules of the outermost chain, which is made last

    def span(self, layers: tuple[Layer, ...], config: ConvConfig) -> LinearSpan:
        self.sides = side_inputs(self.network, layers, self.kept)
        self.enlarging = self.network.enlarging(layers) is not None
        chain, seen = self.chain(layers, linearize_last=False)
        if self.enlarging:
            if replace(seen, window=config.window) != config or config.window not in ((), seen.window):
                raise PlanError(f"the plan's conv {config} is not what this graph gives, {seen}: solve again")
            return EnlargingSpan(chain, self.pads, config)
        return LinearSpan(chain, seen.padding, seen, self.sides)

    def chain(self, layers: tuple[Layer, ...], linearize_last: bool) -> tuple[AffineChain, ConvConfig]:
        modules: list[nn.Module] = []
        pads: list[Pads] = []
        shape = self.network.shape(layers[0].entry)
        none = ((0, 0),) * (len(shape) - 2)
        config = identity_config(shape[1], len(shape) - 2)
        for i, layer in enumerate(layers):
            if layer.conv is not None and layer.conv not in self.kept:
                continue  # pruned with its norms and its activation: the identity
            if layer.parallel is not None:
                branches, joined = self.branches(layer.parallel)
                config = linear.compose_config(config, joined)
                if branches is not None:
                    modules.append(branches)
                    pads.append(joined.padding)
            for name in self.network.affine_nodes(layer):
                step = self.network.step(name, config)
                config = linear.compose_config(config, step)
                side = side_vector(self.network.nodes[name])
                if side is not None:
                    vector, sign = side
                    modules.append(SideAdd(self.sides.index(vector.name), config.out_channels, sign))
                    pads.append(none)
                    continue
                module = self.network.module(name)
                bare = without_padding(module)
                if bare is None and self.enlarging and not linearize_last:
                    bare = nn.Identity()  # in the place of what it pads
                if bare is not None:
                    modules.append(bare)
                    pads.append(step.padding)
            last = i == len(layers) - 1 and not linearize_last
            surrogate = None if last or layer.activation is None else self.surrogate(layer.activation)
            if surrogate is not None:
                modules.append(surrogate)
                pads.append(none)
        self.pads = pads
        return AffineChain(modules), config

    def surrogate(self, activation: str) -> nn.Module | None:
        """What stands for an activation inside the span; without a fitted one a norm keeps its own scale and bias.

        Without surrogates at all nothing stands for it.
        """
        if self.surrogates is None:
            return None
        if activation in self.surrogates:
            return ops.ChannelAffine(*self.surrogates[activation])
        module: Any = self.network.module(activation)
        scale, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not ops.normalizes(module, self.network.shape(activation)) or scale is None:
            return None
        return ops.ChannelAffine(scale, torch.zeros_like(scale) if bias is None else bias)

    def branches(self, parallel: Parallel) -> tuple[nn.Module | None, ConvConfig]:
        chains, configs, signs = [], [], []
        for i, branch in enumerate(parallel.branches):
            if is_dropped(self.network, parallel, self.kept, i):
                continue
            if branch.layers:
                chain, config = self.chain(branch.layers, linearize_last=True)
            else:
                shape = self.network.shape(branch.entry)
                chain, config = AffineChain([]), identity_config(shape[1], len(shape) - 2)
            chains.append(chain)
            configs.append(config)
            signs.append(-1.0 if parallel.join == "sub" and i > 0 else 1.0)
        if len(chains) == 1 and parallel.join != "cat":
            return (chains[0] if len(chains[0]) else None), configs[0]
        crops = [Crop(c) for c in linear.branch_crops(configs)]
        whole = linear.cat_configs(configs) if parallel.join == "cat" else linear.add_configs(configs)
        return Branches(parallel.join, chains, crops, signs), whole
