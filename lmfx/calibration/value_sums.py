"""Sums up what some nodes of a network give: the mean and the covariance of their channels on calibration images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from lmfx.calibration.images import Calibration
from lmfx.calibration.layer_sums import BATCH, LEAST_IMAGES, LEAST_SAMPLES, MOST_SAMPLES
from lmfx.calibration.recording import arguments_of, batches_for, images_at_once
from lmfx.passes.errors import InputError
from lmfx.passes.fit.gram import sample_positions
from lmfx.passes.spans.layers import Network

__all__ = ["ValueSums", "value_sums"]

SAMPLES_A_CHANNEL = 8


@dataclass
class ValueSums:
    """Over `count` samples, in float64: `total` (channels,), `products` (channels, channels)."""

    total: Tensor
    products: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, channels: int, device: torch.device) -> ValueSums:
        """Of no samples."""
        total = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(total, torch.zeros(channels, channels, dtype=torch.float64, device=device))

    def add(self, rows: Tensor) -> None:
        """Add samples (count, channels)."""
        rows = rows.double()
        self.total += rows.sum(0)
        self.products.addmm_(rows.T, rows)
        self.count += len(rows)

    def plus(self, other: ValueSums) -> ValueSums:
        """Those of both."""
        return ValueSums(self.total + other.total, self.products + other.products, self.count + other.count)

    @property
    def mean(self) -> Tensor:
        """Of each channel."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(channels, channels), of the deviations from the mean."""
        return self.products / self.count - torch.outer(self.mean, self.mean)


class _Summing(fx.Interpreter):
    """Runs the graph and sums up some of its values."""

    def __init__(self, network: Network, names: Iterable[str]) -> None:
        super().__init__(network.gm)
        self.generator = torch.Generator().manual_seed(0)
        self.sums: dict[str, ValueSums] = {}
        self.images: dict[str, int] = {}
        self.each: dict[str, int] = {}
        self.done = 0  # images that have run
        for name in names:
            shape = network.shape(name)
            want = min(max(SAMPLES_A_CHANNEL * shape[1], LEAST_SAMPLES), MOST_SAMPLES)
            self.images[name] = max(LEAST_IMAGES, -(-want // max(prod(shape[2:]), 1)))
            self.each[name] = -(-want // self.images[name])

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.done < self.images.get(n.name, 0):
            self.add(n.name, value)
        return value

    def add(self, name: str, value: Tensor) -> None:
        positions = sample_positions(value.shape[2:], len(value), self.each[name], self.generator).to(value.device)
        image = torch.arange(len(value), device=value.device)[:, None].expand_as(positions)
        rows = value.flatten(2).transpose(1, 2)[image.flatten(), positions.flatten()]
        if not bool(rows.isfinite().all()):
            raise InputError("values on the calibration images are NaN or infinite; check the model and its input")
        if name not in self.sums:
            self.sums[name] = ValueSums.zeros(rows.shape[1], rows.device)
        self.sums[name].add(rows)


@torch.no_grad()
def value_sums(network: Network, images: Calibration, names: Iterable[str]) -> dict[str, ValueSums]:
    """The sums over the values (images, channels, size...) of some nodes, at sampled pixels."""
    summing = _Summing(network, names)
    for batch in batches_for(network.gm, images, images_at_once(network.gm, BATCH)):
        if summing.done >= max(summing.images.values()):
            break
        summing.run(*arguments_of(network.gm, batch, images.names), enable_io_processing=False)
        summing.done += len(batch[0])
    return summing.sums
