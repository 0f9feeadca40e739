"""Finds the values that a student's graph shares with the original's: what it should compute at the same place.

    original   x ─ conv1 ─ bn1 ─ relu ─ conv2 ─ bn2 ─ add ─ relu1 ─ conv3 ─ ...
    student    x ─ merged ─────────────────────────── add ─ relu1 ─ conv3 ─ ...
                     └ bn2's value                     └ add's        └ conv3's

A node that the plan left alone keeps its name, and a merged conv stands for its span's output. Of all shared values
those are taken that say most for their price: where branches join, what merged convs give, and the last map before the
head. The original is run as its traced graph, so values between modules can be compared too, and a module that is
called several times is no obstacle.

A value is read by a `Tap`, a module that hands on what it is given and keeps it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from lmfx.made_of import made_of
from lmfx.passes.graph.node_facts import is_floating, shape_of

__all__ = ["Tap", "Tapped", "shared_values"]


class Tap(nn.Module):
    """The identity; `value` is what it was given last."""

    def __init__(self, clone: bool = False) -> None:
        super().__init__()
        self.clone = clone  # what reads the value may write into it
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.value = x.clone() if self.clone else x
        return x


class Tapped(nn.Module):
    """A graph that shares all its modules with `graph`, and besides its output gives the values of some nodes."""

    def __init__(self, graph: fx.GraphModule, names: Sequence[str]) -> None:
        super().__init__()
        self.graph = fx.GraphModule(graph, copy.deepcopy(graph.graph))
        self.taps: list[Tap] = []
        nodes = {n.name: n for n in self.graph.graph.nodes}
        for number, name in enumerate(names):
            node, tap = nodes[name], Tap(any(_writes(graph, user) for user in nodes[name].users))
            self.graph.add_submodule(f"lmfx_tap_{number}", tap)
            self.taps.append(tap)
            with self.graph.graph.inserting_after(node):
                read = self.graph.graph.call_module(f"lmfx_tap_{number}", ())
            node.replace_all_uses_with(read)
            read.args = (node,)
        self.graph.recompile()

    def forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
        output = self.graph(*args, **kwargs)
        values = [tap.value for tap in self.taps]
        for tap in self.taps:
            tap.value = None
        return output, values  # type: ignore[return-value]


def _writes(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and getattr(graph.get_submodule(str(node.target)), "inplace", False) is True


def shared_values(student: fx.GraphModule, original: fx.GraphModule) -> list[tuple[str, str]]:
    """(student's node, original's node) of the values to compare, in the student's order; empty if there are none."""
    theirs = {n.name: n for n in original.graph.nodes}
    exits = _exits(student)
    pairs: list[tuple[str, str]] = []
    last: tuple[str, str] | None = None
    for node in student.graph.nodes:
        name = exits.get(node.name, node.name)
        other = theirs.get(name)
        if other is None or not node.users or not _alike(node, other, node.name in exits):
            continue
        if node.name in exits or (node.op != "call_module" and len(node.all_input_nodes) > 1):
            pairs.append((node.name, name))
        last = (node.name, name)
    if last is not None and last not in pairs:
        pairs.append(last)
    return pairs


def _exits(student: fx.GraphModule) -> dict[str, str]:
    """The node of the original whose value each node of a merged conv stands for."""
    made, keys = made_of(student), student.meta.get("lmfx_spans", {})
    if made is None or not keys:
        return {}
    spans = {c.key: c.spans for c in made.plan.candidates if c.post_norm is None}
    calls: dict[str, int] = {}
    found = {}
    for node in student.graph.nodes:
        if node.op != "call_module" or str(node.target) not in keys:
            continue
        number = calls.get(str(node.target), 0)
        calls[str(node.target)] = number + 1
        own = spans.get(keys[str(node.target)], ())
        if number < len(own):
            found[node.name] = own[number].output
    return found


def _alike(node: fx.Node, other: fx.Node, merged: bool) -> bool:
    """Whether two nodes may give the same map: of one kind, and floating, with more than (images, features)."""
    if not merged and (node.op, str(node.target)) != (other.op, str(other.target)):
        return False
    shape, theirs = shape_of(node), shape_of(other)
    maps = shape is not None and theirs is not None and len(shape) > 2 and tuple(shape[1:]) == tuple(theirs[1:])
    return bool(maps and is_floating(node, unknown=True) and is_floating(other, unknown=True))
