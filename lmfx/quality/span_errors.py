"""Measures how far off a compressed network is at the end of each span that was changed.

    error   sum |y' - y|^2 / sum |y - mean of y|^2     y what the original has there, y' what stands for it

0: the same; 1: as far off as the mean over the images would be. The errors of earlier spans are in it, because y' is
what the compressed network computes. What stands for a value of the original is found by names: a node that is left
keeps its name, and what was put in a span's place is called as the span, with what belongs to it (`merged_side0`,
`merged_norm`, ...) right after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import batches_for, images_at_once, record
from lmfx.passes.ir import Candidate, MergePlan

__all__ = ["span_errors", "stands_for"]

MOST_IMAGES = 32


@torch.no_grad()
def span_errors(
    graph: fx.GraphModule, net: fx.GraphModule, plan: MergePlan, names: Sequence[str], images: Calibration
) -> tuple[float | None, ...]:
    """The error at the end of each span of a plan, on at most 32 images; None where nothing in `net` stands for it.

    `names` are the module names of the spans, as `span_names` gives them.
    """
    places = [stands_for(net, c, name) for c, name in zip(plan.candidates, names, strict=True)]
    known = {c.span.exit: place.name for c, place in zip(plan.candidates, places, strict=True) if place is not None}
    sums: dict[str, _Sums] = {}
    limit = MOST_IMAGES
    size = images_at_once(graph)
    pairs = zip(batches_for(graph, images, size, limit), batches_for(net, images, size, limit), strict=False)
    for ours, theirs in pairs:
        before, _ = record(graph, ours, known, images.names)
        after, _ = record(net, theirs, known.values(), images.names)
        for node, place in known.items():
            y, z = before.get(node), after.get(place)
            if y is not None and z is not None and y.shape == z.shape:
                sums.setdefault(node, _Sums()).add(y.double(), z.double())
    return tuple(sums[c.span.exit].error() if c.span.exit in sums else None for c in plan.candidates)


def stands_for(net: fx.GraphModule, candidate: Candidate, name: str) -> fx.Node | None:
    """The node of `net` whose value is what the span's end was; None where a name does not tell."""
    nodes = {n.name: n for n in net.graph.nodes}
    span = candidate.span
    if span.exit in nodes and (span.activation == span.exit or candidate.realization == "narrow"):
        return nodes[span.exit]
    if candidate.realization == "drop":
        return nodes.get(span.entry)
    node = next((n for n in net.graph.nodes if n.op == "call_module" and n.target == name), None)
    while node is not None and (after := _part_after(node, name)) is not None:
        node = after
    return node


def _part_after(node: fx.Node, name: str) -> fx.Node | None:
    """What belongs to the same span and reads `node`: a norm, a shuffle, the sum with a vector from the side."""
    for user in node.users:
        if user.op == "call_module" and str(user.target).startswith(f"{name}_"):
            return user
        if user.target is torch.add and any(str(a.target).startswith(f"{name}_side") for a in user.all_input_nodes):
            return user
    return None


class _Sums:
    """Adds up |z - y|^2, |y|^2 and y over images, of which the mean is taken."""

    def __init__(self) -> None:
        self.wrong = self.squares = 0.0
        self.count = 0
        self.total: Tensor | None = None

    def add(self, y: Tensor, z: Tensor) -> None:
        self.wrong += float((z - y).square().sum())
        self.squares += float(y.square().sum())
        total = y.sum(0)
        self.total = total if self.total is None else self.total + total
        self.count += len(y)

    def error(self) -> float:
        assert self.total is not None
        varies = self.squares - float(self.total.square().sum()) / self.count
        least = 1e-9 * self.squares  # one image, or the same one again: against its size instead
        base = varies if varies > least else self.squares
        return self.wrong / base if base > 0 else float(self.wrong > 0)
