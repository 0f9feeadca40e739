"""Keeps the values that fits are made from: of each node on as many images as its fits need samples of, and no more.

A fit reads sampled output pixels. A large map has many in one image, so a few images serve it; a map of 7 x 7 needs
hundreds. Memory goes with (images) x (pixels), so it is about the same for each node,

    images(group) = samples / output pixels,  at least LEAST_IMAGES (of `fitting`), at most all

and the network runs once for all groups whose values fit into `limit` bytes together. The images come in an order of
which each beginning is spread evenly over all of them: data are often sorted by class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lmfx.calibration.fitting import FitGroup
from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import batches_for, images_at_once, record
from lmfx.passes.fit.normal_equations import power_of_two
from lmfx.passes.spans.layers import Network

__all__ = ["FitValues", "evenly_ordered"]

HELD_BYTES = 1 << 30
BATCH = 16  # images that run at once
LARGEST_HALF = 3e4
GOLDEN = (math.sqrt(5) - 1) / 2


def evenly_ordered(images: Calibration) -> Calibration:
    """The same images in an order of which each beginning is spread over the whole."""
    order = ((torch.arange(len(images), dtype=torch.float64) * GOLDEN) % 1).argsort()
    return Calibration(tuple(t[order.to(t.device)] for t in images.tensors), images.names)


class FitValues:
    """Values of a network's nodes for groups of fits; `groups` are those that may be asked for, in graph order."""

    def __init__(
        self, network: Network, images: Calibration, groups: Sequence[FitGroup], quick: bool, limit: int = HELD_BYTES
    ) -> None:
        self.network, self.images, self.groups, self.limit = network, evenly_ordered(images), list(groups), limit
        self.quick = quick
        self.held: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.units: dict[str, Tensor] = {}  # of what is held in half precision

    def of(self, group: FitGroup) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """What enters the group's span, the values at all its other nodes, and what enters its other calls."""
        count = self.count(group)
        if any(self.counts.get(n, 0) < count for n in group.names):
            self.record(group)
        values = {n: self.taken(n, count) for n in group.names}
        return values[group.entry], values, [values[n] for n in group.calls]

    def taken(self, name: str, count: int) -> Tensor:
        """The value on the first `count` images; what no image changes as it is."""
        value = self.held[name]
        value = value[:count] if len(value) >= count else value
        return value.float() * self.units[name] if value.dtype == torch.float16 else value

    def count(self, group: FitGroup) -> int:
        """The number of images that a group's fits are made from."""
        return group.images(self.network, self.quick, len(self.images))

    def record(self, first: FitGroup) -> None:
        """Runs the network for `first`, and for what comes after it as long as there is room."""
        self.held, self.counts = {}, {}
        at = next((i for i, g in enumerate(self.groups) if g.names >= first.names), len(self.groups))
        counts: dict[str, int] = {}
        for group in [first, *self.groups[at:]]:
            more = {n: max(self.count(group), counts.get(n, 0)) for n in group.names}
            if counts and self.bytes({**counts, **more}) > self.limit:
                break
            counts.update(more)
        self.counts = counts
        self.held, self.units = record_some(self.network, self.images, counts, self.quick)

    def bytes(self, counts: Mapping[str, int]) -> int:
        """What the values of nodes on so many images take."""
        shapes = {n: self.network.shape(n) for n in counts}
        return sum(2 * count * int(torch.Size(shapes[n][1:]).numel()) for n, count in counts.items())


@torch.no_grad()
def record_some(
    network: Network, images: Calibration, counts: Mapping[str, int], quick: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The value of each node on its number of images, the first ones; (images, channels, size...).

    Where `quick`, float32 is kept in half precision, each channel over a unit of its own (a power of two, of the first
    batch), which stands beside it: the rounding is far below the damping of quick fits. A node of which a later batch
    does not fit into the unit is kept as it is.
    """
    parts: dict[str, list[Tensor]] = {n: [] for n in counts}
    units: dict[str, Tensor] = {}
    done = 0
    for batch in batches_for(network.gm, images, images_at_once(network.gm, BATCH)):
        left = {n: count - done for n, count in counts.items() if count > done}
        if not left:
            break
        rows = len(batch[0])
        values, _ = record(network.gm, batch, set(left), images.names)
        for name, value in values.items():
            if len(value) != rows:  # no image changes it
                parts[name] = parts[name] or [value]
                continue
            kept = value[: left[name]]
            if quick and kept.dtype == torch.float32 and name not in units and not parts[name]:
                units[name] = power_of_two(kept.abs().amax([0, *range(2, kept.dim())], keepdim=True)).to(kept.dtype)
            parts[name].append(_held(kept, units.get(name), len(kept) < rows))
        done += rows
        del values
    found = {name: _joined(parts, units, name) for name in list(parts)}
    return found, {n: u for n, u in units.items() if found[n].dtype == torch.float16}


def _held(value: Tensor, unit: Tensor | None, part: bool) -> Tensor:
    """A value over its unit in half precision, if that holds it; a part of a tensor as a copy."""
    if unit is not None:
        scaled = value / unit
        if bool(scaled.abs().amax() < LARGEST_HALF):
            return scaled.half()
    return value.clone() if part else value


def _joined(parts: dict[str, list[Tensor]], units: Mapping[str, Tensor], name: str) -> Tensor:
    """All images of one node, which is taken out: one at a time, nothing is held twice."""
    found = parts.pop(name)
    if len({t.dtype for t in found}) > 1:
        found = [t.float() * units[name] if t.dtype == torch.float16 else t for t in found]
    return torch.cat(found)
