"""Sums up what some layers of a network read, in one run over calibration images.

A layer's features are the patches that it reads; where these would be too many, the channels of single pixels, and
each of its taps is then an output of its own. Every fourth image is summed apart, to choose damping by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import arguments_of, batches_for, images_at_once
from lmfx.passes.errors import InputError
from lmfx.passes.fit import feature_rows
from lmfx.passes.fit.closed_form import AUTO_UNKNOWNS
from lmfx.passes.fit.gram import sample_positions
from lmfx.passes.fit.normal_equations import Sums, System
from lmfx.passes.spans.layers import Network

__all__ = ["PartSums", "by_pixel", "can_search", "in_parts", "kept_with", "rows_of", "sums_of", "system_of"]

SAMPLES_AN_UNKNOWN, LEAST_SAMPLES, MOST_SAMPLES, LEAST_IMAGES = 8, 4096, 20000, 96
BATCH = 16
HOLD_OUT_EVERY = 4  # images
GRAM_BYTES = 1 << 29  # of the sums that are made at the same time
FLOAT32_ROUNDING = 1e-6  # see `Gram`


class _Fits(Protocol):
    def __init__(self, network: Network, images: Calibration) -> None: ...


Fits = TypeVar("Fits", bound=_Fits)
Item = TypeVar("Item")


@dataclass
class PartSums:
    """Sums over what a layer reads: of every fourth image apart, if there are four."""

    rest: Sums | None = None
    held: Sums | None = None

    @property
    def total(self) -> Sums:
        """Of all images."""
        parts = [s for s in (self.rest, self.held) if s is not None]
        return parts[0] if len(parts) == 1 else parts[0].plus(parts[1])


def by_pixel(layer: Any) -> bool:
    """Whether a layer has so many unknowns that its taps are outputs of their own, of the channels of one pixel."""
    taps = 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)
    return taps > 1 and feature_rows.unknowns_of(layer) > AUTO_UNKNOWNS


def can_search(rows: int) -> bool:
    """Whether a Gram of so many rows is cheap enough to search damping with."""
    return rows <= AUTO_UNKNOWNS


def rows_of(layer: Any) -> int:
    """The rows of a layer's Gram."""
    unknowns = feature_rows.unknowns_of(layer)
    return unknowns // math.prod(layer.kernel_size) if by_pixel(layer) else unknowns


def system_of(sums: Sums, layer: Any, rows: tuple[int, ...] | None = None) -> System:
    """The centred sums of a layer's rows, or of some of them."""
    rounding = 0.0 if layer.weight.dtype == torch.float64 else FLOAT32_ROUNDING
    return System.of(sums, 1, tuple(range(sums.xx.shape[1] - 1)) if rows is None else rows, True, True, rounding)


def in_parts(items: Sequence[Item], layers: Callable[[Item], Sequence[Any]]) -> Iterator[list[Item]]:
    """Items in runs whose layers' sums, with what is made of them, fit into memory; each run has one at least."""
    part: list[Item] = []
    held = 0
    for item in items:
        size = sum(16 * rows_of(layer) ** 2 for layer in layers(item))
        if part and held + size >= GRAM_BYTES:
            yield part
            part, held = [], 0
        part.append(item)
        held += size
    if part:
        yield part


def kept_with(network: Network, make: type[Fits], images: Calibration) -> Fits:
    """What one class makes of a network and some images, which is made once."""
    key = make, images.digest() if images.certain() else id(images)
    if key not in network.held:
        network.held[key] = make(network, images)
    found = network.held[key]
    assert isinstance(found, make)
    return found


class _Reading(fx.Interpreter):
    """Runs the graph and sums up what some layers read."""

    def __init__(self, network: Network, counts: Mapping[str, int], each: Mapping[str, int]) -> None:
        super().__init__(network.gm)
        self.network, self.counts, self.each = network, counts, each
        self.sums: dict[str, PartSums] = {}
        self.done, self.images = 0, 0  # images that have run, and that run now
        self.generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.counts and self.done < self.counts[n.name]:
            self.add(n.name, self.env[n.all_input_nodes[0]])
        return super().run_node(n)

    def add(self, name: str, x: Tensor) -> None:
        layer: Any = self.network.module(name)
        if len(x) == self.images:
            x = x[: self.counts[name] - self.done]
        whole = not by_pixel(layer)
        sizes = () if isinstance(layer, nn.Linear) else self.network.shape(name)[2:] if whole else x.shape[2:]
        positions = sample_positions(sizes, len(x), self.each[name], self.generator).to(x.device)
        rows = (
            feature_rows.features(layer, x, positions) if whole else feature_rows.values_at(layer, x, positions)[None]
        )
        rows = torch.nn.functional.pad(rows if rows.dtype == torch.float64 else rows.float(), (0, 1), value=1.0)
        if not bool(rows.isfinite().all()):
            raise InputError("calibration features have NaN or infinite values; check the model and its input")
        images = (torch.arange(len(x)) * self.images // len(x) + self.done).repeat_interleave(positions.shape[1])
        apart = images % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        parts = self.sums.setdefault(name, PartSums())
        for part, mask in (("rest", ~apart), ("held", apart)):
            if bool(mask.any()):
                self._add(parts, part, rows[:, mask.to(rows.device)], len(images[mask].unique()))

    @staticmethod
    def _add(parts: PartSums, part: str, rows: Tensor, images: int) -> None:
        sums = getattr(parts, part)
        if sums is None:
            sums = Sums.zeros(1, rows.shape[2], {}, rows.device)
            setattr(parts, part, sums)
        sums.add(rows, {})
        sums.n += float(rows.shape[1])
        sums.images += images


def sums_of(network: Network, images: Calibration, readers: Iterable[str]) -> dict[str, PartSums]:
    """The sums over what some layers read, by their nodes' names."""
    counts: dict[str, int] = {}
    each: dict[str, int] = {}
    for name in readers:
        layer: Any = network.module(name)
        want = min(max(SAMPLES_AN_UNKNOWN * rows_of(layer), LEAST_SAMPLES), MOST_SAMPLES)
        pixels = max(feature_rows.pixels_of(layer, network.shape(name)), 1)
        counts[name] = min(len(images), max(LEAST_IMAGES, -(-want // pixels)))
        each[name] = -(-want // counts[name])
    reading = _Reading(network, counts, each)
    for batch in batches_for(network.gm, images, images_at_once(network.gm, BATCH)):
        if reading.done >= max(counts.values()):
            break
        reading.images = len(batch[0])
        reading.run(*arguments_of(network.gm, batch, images.names), enable_io_processing=False)
        reading.done += len(batch[0])
    return reading.sums
