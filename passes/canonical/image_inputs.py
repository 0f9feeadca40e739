"""Rewrites the normalisation of an input image: channels first, then one shift, then one scale.

    %f = to(%x, float32)                    bytes, channels last        %p = permute(%x, 0, 3, 1, 2)
    %d = call_module[div](%f)               1 / 255                     %f = to(%p, float32)
    %s = sub(%d, %mean)                     one number a channel   ->   %s = call_module[sub](%f)      x - 255 mean
    %t = div(%s, %std)                                                  %t = call_module[mul](%s)      1 / (255 std)
    %p = permute(%t, 0, 3, 1, 2)                                        %c = call_module[conv](%t)
    %c = call_module[conv](%p)

    y = a x + b = a (x + b / a)

A permute and a cast change no number, so they may come first. The scale makes zero of zero, so that a conv after it
takes it in, zeros that it pads with included. The shift does not: the zeros are those of the normalised image, where
the image itself has its mean. So a conv that pads takes the scale in and leaves the shift, and one that does not takes
both (`spans.exact`). To pad the image with its mean instead would cost a runtime as much as the subtraction, and none
pads with one number a channel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import ops
from ..graph.graph_edit import place
from ..graph.node_facts import is_floating, note_like, note_shape, shape_of, tensor_dtype, tensor_shape
from ..graph.raw_nodes import op_name, tensor_of
from .arithmetic import SCALAR, scale_and_bias
from .layouts import leaves_channels_last

__all__ = ["normalised_inputs"]


@dataclass
class _Chain:
    """What is done to an input, one op after the other, each read by the next one only."""

    casts: list[fx.Node] = field(default_factory=list)
    permute: fx.Node | None = None
    affine: list[fx.Node] = field(default_factory=list)
    before: int = 0  # of the affine ops, those before the permute
    by_first: bool = False  # one number an entry of the second dimension, which is the channels only after the permute
    by_last: bool = False  # one number a channel that is last
    plain: bool = True  # shifts first, then scales
    scale: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))
    bias: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def take(self, gm: fx.GraphModule, node: fx.Node) -> bool:
        """Whether a node goes on the chain."""
        if op_name(node) in ops.CASTS and not self.affine and is_floating(node) and len(node.all_input_nodes) == 1:
            self.casts.append(node)
            return True
        if self.permute is None and not self.by_first and leaves_channels_last(gm, node):
            self.permute, self.before = node, len(self.affine)
            return True
        function = node.op != "call_module"
        found = _affine(gm, node)
        if found is None or (function and (self.permute is not None or self.by_first)):
            return False
        scale, bias = (v.double() for v in found)
        several = max(scale.numel(), bias.numel()) > 1 and self.permute is None
        if several and not function and self.by_last:
            return False
        self.by_last |= several and function
        self.by_first |= several and not function
        shifts, scales = bool(bias.any()), bool((scale != 1).any())
        self.plain &= not (shifts and (scales or bool((self.scale != 1).any())))
        self.scale, self.bias = scale * self.scale, scale * self.bias + bias
        self.affine.append(node)
        return True

    @property
    def worth_it(self) -> bool:
        """Whether anything would be another op, and the scale can be divided by."""
        fine = bool((self.scale != 0).all() and self.scale.isfinite().all() and self.bias.isfinite().all())
        moved = self.permute is not None and self.before > 0
        return fine and (moved or len(self.affine) > (2 if self.plain else 1)) and not (self.by_last and not moved)


def normalised_inputs(gm: fx.GraphModule) -> int:
    """Rewrite in place of `gm` (the caller's own copy), whose functions are modules; returns the number of inputs."""
    return sum(_rewrite(gm, node) for node in list(gm.graph.nodes) if node.op == "placeholder" and shape_of(node))


def _rewrite(gm: fx.GraphModule, source: fx.Node) -> bool:
    chain, last = _Chain(), source
    while len(last.users) == 1 and chain.take(gm, node := next(iter(last.users))):
        last = node
    if not chain.worth_it:
        return False
    end = last
    with gm.graph.inserting_before(next(iter(source.users))):
        value = source
        for op in (chain.permute, *chain.casts):
            if op is not None:
                value = _moved(gm, op, value)
    shape = tensor_shape(end)
    shift = (chain.bias / chain.scale).expand(max(chain.bias.numel(), chain.scale.numel()))
    dtype, device = tensor_dtype(end), _device(gm)
    for name, scale, bias in (
        ("sub", torch.ones_like(shift), shift),
        ("mul", chain.scale, torch.zeros_like(chain.scale)),
    ):
        if bool((scale == 1).all()) and not bool(bias.any()):
            continue
        module = ops.ChannelAffine(scale.to(device, dtype), bias.to(device, dtype)).requires_grad_(False)
        like = chain.affine[0]
        with gm.graph.inserting_before(end):
            holder = gm.graph.call_function(torch.clone, (value,))
        note_like(holder, like, shape=shape)
        value = place(gm, holder, module, name, value)
    end.replace_all_uses_with(value)
    return True


def _moved(gm: fx.GraphModule, node: fx.Node, value: fx.Node) -> fx.Node:
    """The same op on another value, which has its first operand's place."""
    new = gm.graph.node_copy(node, lambda n: value)
    note_like(new, node)
    shape, permuted = tensor_shape(value), op_name(node) not in ops.CASTS
    note_shape(new, (shape[0], shape[-1], *shape[1:-1]) if permuted else shape)
    return new


def _affine(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Scale and bias of a node, one number a channel or one for all; the channels are last until the permute."""
    if node.op == "call_module":
        module: Any = gm.get_submodule(str(node.target))
        frozen = type(module) is ops.ChannelAffine and not any(p.requires_grad for p in module.parameters())
        return (module.scale.detach(), module.bias.detach()) if frozen and len(node.all_input_nodes) == 1 else None
    found = scale_and_bias(gm, node, op_name(node), -1) if op_name(node) in SCALAR else None
    return None if found is None or any(_trained(gm, n) for n in node.all_input_nodes) else found[1:]


def _trained(gm: fx.GraphModule, node: fx.Node) -> bool:
    tensor = tensor_of(gm, node)
    return tensor is not None and tensor.requires_grad


def _device(gm: fx.GraphModule) -> torch.device:
    first = next(gm.parameters(), None)
    return torch.device("cpu") if first is None else first.device
