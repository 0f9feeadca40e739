"""Finds the linear layers of a student that can be refitted, and the places where they are compared with the original.

    x ─ conv ─ bn ─ add ─ relu ─          the place of conv is the add: its scale there is that of bn, and what the
                    s ───┘                other branch lacks (s is the student's as well) conv can make up for

From a layer on, the way leads through what scales channels, moves values about or adds others, to the last node that
the original has as well. Nodes of a student have the names of the original's; a merged conv stands for the output of
its span. Where spans were dropped, the value that they read stands for what they gave as well, and is better aimed at
that:

    original  x ─ conv ─ add ─ [block] ─ next         student  x ─ conv ─ add ─ next         aim of conv: block's output
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.passes.algebra.linear_span import LinearSpan, fill_pad
from lmfx.passes.graph import ops
from lmfx.passes.graph.node_facts import call_of, shape_of
from lmfx.passes.graph.reduction import join_of, operands_of
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.narrowed import narrowed
from lmfx.passes.rewrite.trainable import span_names
from lmfx.passes.spans.layers import Network

__all__ = ["Site", "find_sites"]

PLAIN = (*ops.CONVS, *ops.TRANSPOSED, nn.Linear)


@dataclass(frozen=True)
class Site:
    """A layer to refit: `layer` in the module that `node` calls. The value at `place` should be the original's at
    `goal`."""

    node: fx.Node
    path: str
    layer: Any
    before: tuple[nn.Module, ...]  # modules of the same span that run before the layer
    norm: nn.Module | None  # a norm right after the layer, which takes up its bias
    scale: Tensor  # (out,) from the layer's output to the place, float64
    place: fx.Node
    goal: fx.Node
    channels: Tensor | None = None  # of the goal that the place has, where it is narrower; None for all

    def wanted(self, goal: Tensor) -> Tensor:
        """What the place should be, given the value at the goal."""
        return goal if self.channels is None else goal.index_select(1, self.channels.to(goal.device))

    def entering(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """What enters the layer, given what enters the node."""
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        x: Tensor = values[source]
        owner = self.module
        if isinstance(owner, LinearSpan):
            x = fill_pad(x, owner.config)
            for module in self.before:
                x = module(x)
        return x

    @property
    def module(self) -> nn.Module:
        gm = self.node.graph.owning_module
        assert gm is not None
        return gm.get_submodule(str(self.node.target))


class Names:
    """Which node of the original a student's node stands for."""

    def __init__(self, student: fx.GraphModule, original: fx.GraphModule, plan: MergePlan | None) -> None:
        self.original = {n.name: n for n in original.graph.nodes}
        self.merged: dict[tuple[str, int], str] = {}
        self.dropped: dict[str, str] = {}  # a value's name -> the output of the last dropped span that it stands for
        for candidate, name in zip(plan.candidates, span_names(original, plan), strict=True) if plan else ():
            for i, span in enumerate(candidate.spans):
                if candidate.realization == "drop":
                    self.dropped[span.entry] = span.output
                elif candidate.puts_conv and candidate.post_norm is None:
                    self.merged[name, i] = span.output
        self.kept: dict[str, list[int]] = {}  # the channels that narrowed values have of the original's
        if plan and any(c.cuts for c in plan.candidates):
            network = Network(original, fine=plan.fine)
            for candidate in plan.candidates:
                self.kept.update(narrowed(network, candidate).channels)

    def of(self, node: fx.Node) -> fx.Node | None:
        """The original's node, None if it has none."""
        key = str(node.target), call_of(node)
        if node.op == "call_module" and key in self.merged:
            return self.original.get(self.merged[key])
        found = self.original.get(node.name)
        return found if found is not None and found.op == node.op else None

    def after_drops(self, node: fx.Node) -> fx.Node:
        """What the value of an original's node is used as, where spans that read it were dropped."""
        name, seen = node.name, {node.name}
        while name in self.dropped and self.dropped[name] not in seen:
            name = self.dropped[name]
            seen.add(name)
        return self.original.get(name, node)


def find_sites(student: fx.GraphModule, original: fx.GraphModule, plan: MergePlan | None) -> list[Site]:
    """The layers of a student that can be refitted, in the order of its graph."""
    names = Names(student, original, plan)
    calls = Counter(str(n.target) for n in student.graph.nodes if n.op in ("call_module", "get_attr"))
    owners = Counter(id(p) for m in _distinct(student) for p in m._parameters.values() if p is not None)
    read = {id(_attribute(student, str(n.target))) for n in student.graph.nodes if n.op == "get_attr"}
    found = []
    for node in student.graph.nodes:
        if node.op != "call_module" or calls[str(node.target)] > 1 or not node.args or node.kwargs:
            continue
        module = student.get_submodule(str(node.target))
        parts = list(module.body) if type(module) is LinearSpan else [module]
        at = max((i for i, m in enumerate(parts) if ops.plain_in(m, PLAIN)), default=None)
        if at is None:
            continue
        layer: Any = parts[at]
        tensors = [p for p in layer._parameters.values() if p is not None]
        if any(owners[id(p)] > 1 or id(p) in read for p in tensors) or not layer.weight.is_floating_point():
            continue
        if len(list(layer.parameters())) != len(tensors) or "weight" not in layer._parameters:
            continue
        site = _site(student, names, node, layer, parts, at, calls)
        if site is not None:
            found.append(site)
    return found


def _distinct(gm: nn.Module) -> Iterator[nn.Module]:
    yield from gm.modules()  # each once


def _attribute(gm: nn.Module, name: str) -> Any:
    return operator.attrgetter(name)(gm)


def _site(
    gm: fx.GraphModule,
    names: Names,
    node: fx.Node,
    layer: Any,
    parts: list[nn.Module],
    at: int,
    calls: Mapping[str, int],
) -> Site | None:
    linear = isinstance(layer, nn.Linear)
    out = layer.out_features if linear else layer.out_channels
    scale = torch.ones(out, dtype=torch.float64, device=layer.weight.device)
    norm: nn.Module | None = None
    for i, module in enumerate(parts[at + 1 :]):
        own = _scale_of(module, out)
        if own is None:
            return None
        if i == 0 and isinstance(module, ops.BATCH_NORMS):
            norm = module
        scale = scale * own
    shape = shape_of(node)
    channel = len(shape) - 1 if linear and shape else 1
    place, goal = node, names.of(node)
    best = None if goal is None else (place, goal, scale)
    while len(place.users) == 1:
        (after,) = place.users
        factor = _factor(gm, place, after, out, channel)
        if factor is None:
            break
        if place is node and at == len(parts) - 1 and calls[str(after.target)] == 1 and after.op == "call_module":
            module = gm.get_submodule(str(after.target))
            norm = module if isinstance(module, ops.BATCH_NORMS) else None
        scale, place, goal = scale * factor, after, names.of(after)
        if goal is not None:
            best = place, goal, scale
    if best is None:
        return None
    place, goal, scale = best
    goal = _target(gm, names, place, goal)
    kept = names.kept.get(goal.name)
    channels = None if kept is None else torch.tensor(kept)
    return Site(node, str(node.target), layer, tuple(parts[:at]), norm, scale, place, goal, channels)


def _target(gm: fx.GraphModule, names: Names, place: fx.Node, goal: fx.Node) -> fx.Node:
    """What a place is aimed at: that of the original, or what it is used as where spans were dropped after it.

    That may be after an activation that does nothing more to what it gave.
    """
    found = _aim(names, goal, place)
    if found is goal and len(place.users) == 1:
        (after,) = place.users
        seen = names.of(after)
        activation = gm.get_submodule(str(after.target)) if after.op == "call_module" else None
        if seen is not None and type(activation) in ops.IDEMPOTENT and list(seen.all_input_nodes) == [goal]:
            found = _aim(names, seen, after)
            found = goal if found is seen else found
    return found if shape_of(found) == shape_of(goal) else goal


def _aim(names: Names, goal: fx.Node, place: fx.Node) -> fx.Node:
    """What the value at `place` is used as: that of dropped spans, unless others read it as what it was."""
    others = {u.name for u in goal.users} & {u.name for u in place.users}
    return goal if others else names.after_drops(goal)


def _scale_of(module: nn.Module, channels: int) -> Tensor | None:
    """The factors (channels,) of a module that is affine and keeps channels apart and pixels where they are."""
    if ops.plain_in(module, ops.IDENTITIES):
        return torch.ones((), dtype=torch.float64)  # of no device
    if ops.plain_in(module, ops.BATCH_NORMS) and getattr(module, "running_var", None) is not None:
        norm: Any = module
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        return scale if norm.weight is None else scale * norm.weight.detach().double()
    if isinstance(module, ops.ChannelAffine):
        return module.scale.detach().double().expand(channels)
    return None


def _factor(gm: fx.GraphModule, node: fx.Node, after: fx.Node, channels: int, channel: int) -> Tensor | float | None:
    """By what one node multiplies the value, (channels,) or a number; None if it does anything else to it."""
    if after.op == "call_module":
        module = gm.get_submodule(str(after.target))
        if channel != 1 and not ops.plain_in(module, ops.IDENTITIES):
            return None
        return _scale_of(module, channels)
    join, operands = join_of(after), operands_of(after)
    if join not in ("add", "sub") or len(operands) != 2 or operands.count(node) != 1:
        return None
    if shape_of(node) is None or shape_of(after) != shape_of(node):
        return None
    return -1.0 if join == "sub" and operands[1] is node else 1.0
