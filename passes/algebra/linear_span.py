"""`LinearSpan`: the trainable form of a merged conv.

It holds the kept convs and norms of a span, pads once at its entry, and runs everything inside without padding; where
branches meet, each is given the crop of its input that its own padding would have meant. That is exactly the algebra of
`linear`, so `reparameterize()` is the same function as one conv.

    x ─ pad ─┬─ crop ─ conv1 ─ bn1 ─ conv2 ─ bn2 ─ add ─ ...
             └─ crop ───────────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph import ops
from ..graph.shapes import Pads
from ..ir import ConvConfig
from ..model.model_copy import leaf_copy
from . import linear
from .enlarged import raised, small_op, to_modules
from .linear import LinearOp
from .side_vectors import Maps, SideAdd, SideConv, merge_maps, side_conv, through

__all__ = [
    "AffineChain",
    "Branches",
    "Crop",
    "EnlargingSpan",
    "LinearSpan",
    "affine_op",
    "fill_pad",
    "pad_module",
    "without_padding",
]


class AffineChain(nn.Sequential):
    """Affine modules and selections one after the other, none of which pads. Empty: the identity."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__(*modules)

    def forward(self, x: Tensor, *sides: Tensor) -> Tensor:
        for module in self:
            x = module(x, *sides) if isinstance(module, _SIDED) else module(x)
        return x

    def side_maps(self, channels: int, ndim: int, device: torch.device | None) -> Maps:
        """The matrix by which each side input is multiplied on its way to the end of this chain, in float64."""
        maps: Maps = {}
        for module in self:
            own: Maps = {}
            if isinstance(module, (SideAdd, SideConv)):
                own = module.maps(device)
            elif isinstance(module, ops.ChannelSelect):
                maps, channels = {i: m[list(module.index)] for i, m in maps.items()}, len(module.index)
            else:
                if isinstance(module, (AffineChain, Branches)):
                    own = module.side_maps(channels, ndim, device)
                op = affine_op(module, channels, ndim, device)
                maps, channels = through(maps, op), op.out_channels
            maps = merge_maps([maps, own], [channels, channels], "add", (1.0, 1.0))
        return maps

    def linear_op(self, channels: int, ndim: int, device: torch.device | None = None) -> LinearOp:
        """This chain as one op, in float64, on `device` where no parameter says another."""
        op: LinearOp | None = None
        chosen: tuple[int, ...] | None = None  # the channels of the input that the first op reads
        for module in self:
            if isinstance(module, (SideAdd, SideConv)):
                continue  # see `side_maps`
            if isinstance(module, ops.ChannelSelect) and op is None:
                chosen = module.index if chosen is None else tuple(chosen[i] for i in module.index)
            elif isinstance(module, ops.ChannelSelect) and op is not None:
                op = linear.select(op, module.index)
            elif op is None:
                op = affine_op(module, channels if chosen is None else len(chosen), ndim, device)
                op = op if chosen is None else linear.spread(op, chosen, channels)
            else:
                op = linear.compose(op, affine_op(module, op.out_channels, ndim, device))
        if op is None:
            op = linear.identity(channels, ndim, device)
            return op if chosen is None else linear.select(op, chosen)
        return op


class Crop(nn.Module):
    """Drops `before` and `after` pixels of each spatial dimension."""

    def __init__(self, amounts: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.amounts = tuple(amounts)

    def forward(self, x: Tensor) -> Tensor:
        for i, (before, after) in enumerate(self.amounts):
            dim = i + 2
            if before or after:
                x = x.narrow(dim, before, x.shape[dim] - before - after)
        return x

    def extra_repr(self) -> str:
        return str(self.amounts)


class Branches(nn.Module):
    """Chains that read crops of one value and meet in a join."""

    def __init__(self, join: str, chains: Sequence[AffineChain], crops: Sequence[Crop], signs: Sequence[float]) -> None:
        super().__init__()
        self.join = join
        self.signs = tuple(signs)
        self.chains = nn.ModuleList(chains)
        self.crops = nn.ModuleList(crops)

    def forward(self, x: Tensor, *sides: Tensor) -> Tensor:
        values = [chain(crop(x), *sides) for chain, crop in zip(self.chains, self.crops, strict=True)]
        if self.join == "cat":
            return torch.cat(values, 1)
        total = values[0] if self.signs[0] > 0 else -values[0]
        for value, sign in zip(values[1:], self.signs[1:], strict=True):
            total = total + value if sign > 0 else total - value
        return total

    def linear_op(self, channels: int, ndim: int, device: torch.device | None = None) -> LinearOp:
        """The join as one op, in float64. Each branch's padding is what its crop stands for."""
        found = []
        starts = [max(before) for before in zip(*([b for b, _ in c.amounts] for c in self._crops()), strict=True)]
        ends = [max(after) for after in zip(*([a for _, a in c.amounts] for c in self._crops()), strict=True)]
        for chain, crop in zip(self.chains, self._crops(), strict=True):
            assert isinstance(chain, AffineChain)
            op = chain.linear_op(channels, ndim, device)
            pads = tuple((s - b, e - a) for (b, a), s, e in zip(crop.amounts, starts, ends, strict=True))
            found.append(LinearOp(op.weight, op.bias, op.stride, pads, op.dilation, op.groups))
        # Only the alignment matters here: the span pads once, at its entry.
        whole = linear.cat(found) if self.join == "cat" else linear.add(found, self.signs)
        none = ((0, 0),) * ndim
        return LinearOp(whole.weight, whole.bias, whole.stride, none, whole.dilation, whole.groups)

    def side_maps(self, channels: int, ndim: int, device: torch.device | None) -> Maps:
        """The matrix by which each side input is multiplied on its way through the join, in float64."""
        chains = [c for c in self.chains if isinstance(c, AffineChain)]
        parts = [c.side_maps(channels, ndim, device) for c in chains]
        if not any(parts):
            return {}
        widths = [c.linear_op(channels, ndim, device).out_channels for c in chains]
        return merge_maps(parts, widths, self.join, self.signs)

    def _crops(self) -> list[Crop]:
        return [c for c in self.crops if isinstance(c, Crop)]

    def extra_repr(self) -> str:
        return f"{self.join}, signs={self.signs}"


_SIDED = (AffineChain, Branches, SideAdd, SideConv)


def affine_op(module: nn.Module, channels: int, ndim: int, device: torch.device | None) -> LinearOp:
    """One affine module as an op in float64, without its padding where it is one of a span."""
    if isinstance(module, (AffineChain, Branches)):
        return module.linear_op(channels, ndim, device)
    if isinstance(module, ops.CONVS):
        return linear.from_conv(module)
    if isinstance(module, nn.Linear):
        return linear.from_linear(module)
    if isinstance(module, ops.BATCH_NORMS):
        return linear.from_batch_norm(module, ndim)
    if isinstance(module, ops.AVG_POOLS):
        return linear.from_avg_pool(module, channels, device)
    if isinstance(module, ops.ChannelAffine):
        return linear.diagonal(module.scale.double().expand(channels), module.bias.double().expand(channels), ndim)
    if isinstance(module, ops.PixelSlice):
        return linear.from_slice(module.amounts, module.steps, channels, device)
    if isinstance(module, ops.SpaceToDepth):
        return linear.from_space_to_depth(module.factors, channels, device)
    if isinstance(module, ops.TRANSPOSED):
        return linear.from_transposed(module)
    if (factors := ops.shuffled_blocks(module)) is not None:
        return linear.from_shuffle(factors, channels, device)
    raise TypeError(f"{type(module).__name__} in a LinearSpan is not affine")


def without_padding(module: nn.Module) -> nn.Module | None:
    """A copy that shares nothing with the original, and neither pads nor crops; None if nothing else is left of it."""
    if isinstance(module, (*ops.PADS, *ops.MIRRORS)):
        return None
    if isinstance(module, ops.PixelSlice):
        none = ((0, 0),) * len(module.steps)
        return ops.PixelSlice(none, module.steps) if any(s > 1 for s in module.steps) else None
    if isinstance(module, nn.PixelUnshuffle):
        return ops.SpaceToDepth((module.downscale_factor,) * 2)  # of what is no whole block it leaves out the rest
    clone = leaf_copy(module)
    if isinstance(clone, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        clone.padding = (0,) * len(clone.kernel_size)
        clone.padding_mode = "zeros"
        clone._reversed_padding_repeated_twice = [0, 0] * len(clone.kernel_size)
    elif isinstance(clone, ops.AVG_POOLS):
        clone.padding = 0  # type: ignore[assignment]
    return clone


def fill_pad(x: Tensor, config: ConvConfig) -> Tensor:
    """`x` padded as a convolution of this configuration pads it."""
    if not config.pads:
        return x
    flat = [p for pair in reversed(config.padding) for p in pair]
    if config.padding_mode == "zeros":
        return F.pad(x, flat, value=config.padding_value)
    return F.pad(x, flat, mode=config.padding_mode)


_PADS = {
    "zeros": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def pad_module(config: ConvConfig) -> nn.Module:
    """The torch.nn module that pads as a convolution of this configuration does."""
    flat = tuple(p for pair in reversed(config.padding) for p in pair)
    make: Any = _PADS[config.padding_mode][len(config.padding) - 1]
    module: nn.Module = make(flat, config.padding_value) if config.padding_mode == "zeros" else make(flat)
    return module


class LinearSpan(nn.Module):
    """A span whose activations are gone: affine, trainable, and equal to one conv.

    `config` is the merged conv's configuration, `padding` its zeros before and after in each spatial dimension, `sides`
    the names of the graph's nodes whose vectors it takes beside its input (`side_vectors`).
    """

    def __init__(
        self, body: AffineChain, padding: Sequence[tuple[int, int]], config: ConvConfig, sides: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.body = body
        self.padding = tuple(padding)
        self.config = config
        self.sides = tuple(sides)

    def forward(self, x: Tensor, *sides: Tensor) -> Tensor:
        value: Tensor = self.body(fill_pad(x, self.config), *sides)
        return value

    def linear_op(self) -> LinearOp:
        """The span as one op in float64, padding included."""
        like = next(self.parameters(), None)
        op = self.body.linear_op(self.config.in_channels, len(self.padding), None if like is None else like.device)
        return LinearOp(op.weight, op.bias, op.stride, self.padding, op.dilation, op.groups)

    def reparameterize(self) -> nn.Module:
        """The single conv that computes what this span computes (after a pad where left and right differ)."""
        like = next((p for p in self.parameters() if p.is_floating_point()), None)
        to = (None, None) if like is None else (like.dtype, like.device)
        with torch.no_grad():
            op = self.linear_op()
        if self.config.padding_mode == "zeros" and self.config.padding_value == 0:
            return linear.to_conv(op, *to)
        bare = LinearOp(op.weight, op.bias, op.stride, ((0, 0),) * op.ndim, op.dilation, op.groups)
        return nn.Sequential(pad_module(self.config), linear.to_conv(bare, *to))

    def side_convs(self) -> list[nn.Module]:
        """For each of `sides` the 1 x 1 convolution of its vector that is added to the merged conv's output."""
        if not self.sides:
            return []
        like = next((p for p in self.parameters() if p.is_floating_point()), None)
        ndim = len(self.padding)
        with torch.no_grad():
            device = None if like is None else like.device
            maps = self.body.side_maps(self.config.in_channels, ndim, device)
            return [side_conv(maps[i], ndim, like) for i in range(len(self.sides))]

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"{c.in_channels}, {c.out_channels}, kernel_size={c.kernel_size}, stride={c.stride}, padding={self.padding}"
        )


class EnlargingSpan(LinearSpan):
    """A span with a transposed conv or a pixel shuffle in it.

    Its body's modules have no padding of their own where convs have none in a span; `pads` says what each of them, or
    a pad or a crop in the place of an `nn.Identity`, pads. There is no padding in front that would stand for all of
    it, so the span always runs as the merged op, computed anew from its modules: as trainable as they are, with norms
    that keep their statistics.
    """

    def __init__(self, body: AffineChain, pads: Sequence[Pads], config: ConvConfig) -> None:
        super().__init__(body, config.padding, config)
        self.pads = tuple(pads)

    def forward(self, x: Tensor, *sides: Tensor) -> Tensor:
        op = self.linear_op()
        return replace(op, weight=op.weight.to(x.device, x.dtype), bias=op.bias.to(x.device, x.dtype))(x)

    def linear_op(self) -> LinearOp:
        """The span as one op in float64, padding included."""
        like = next(self.parameters(), None)
        device = None if like is None else like.device
        op = linear.identity(self.config.in_channels, len(self.padding), device)
        for module, pads in zip(self.body, self.pads, strict=True):
            if isinstance(module, ops.ChannelSelect):
                op = _selected(op, module.index)
                continue
            if isinstance(module, nn.Identity):
                step = linear.identity(op.out_channels, op.ndim, device)
            else:
                step = affine_op(module, op.out_channels, op.ndim, device)
            if not ops.enlarges(module):
                step = replace(step, padding=pads)
            op = linear.compose(op, step)
        return replace(op, window=self.config.window)

    def reparameterize(self) -> nn.Module:
        """The merged op: a transposed conv, or a conv with a shuffle after it, beside a pad or a slice it may need."""
        if not self.config.upscale:
            return super().reparameterize()
        like = next((p for p in self.parameters() if p.is_floating_point()), None)
        to = (None, None) if like is None else (like.dtype, like.device)
        with torch.no_grad():
            modules = to_modules(self.linear_op(), *to)
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _selected(op: LinearOp, index: Sequence[int]) -> LinearOp:
    """The op, then channels of the map that it gives."""
    pixels = prod(op.upscale)
    if pixels == 1:
        return linear.select(op, index)
    rows = [c * pixels + r for c in index for r in range(pixels)]
    return raised(linear.select(small_op(op), rows), op.config)
