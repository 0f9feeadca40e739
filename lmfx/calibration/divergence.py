"""Measures how far outputs are from the original's: squared differences, each output in its own unit.

    divergence = mean over outputs of  sum |z' - z|^2 / sum |z - mean of z over the images|^2

`Divergence` is a judge (`Judging`): it has images and says how good what a graph gave on them is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from lmfx.calibration.images import Calibration
from lmfx.calibration.lockstep import Lockstep
from lmfx.calibration.recording import flat_output, floating_outputs, mean_square_distance, output_rows

__all__ = ["Divergence", "Judging"]


class Judging(Protocol):
    """Says how far a network is from the original, on images that no fit saw."""

    @property
    def images(self) -> Calibration: ...
    def loss(self, outputs: list[Any]) -> float:
        """What a graph gave on the images, batch by batch as `Lockstep` has them -> a number, lower is better."""


class Divergence:
    """The divergence from a graph on some images."""

    def __init__(self, graph: fx.GraphModule, images: Calibration, size: int | None = None) -> None:
        """`size` images are a chunk, as for `Lockstep`."""
        self.images = images
        self._rows = output_rows(graph, images)
        self._units: list[float] = []
        run = Lockstep(graph, images, size)
        given, self.sizes = run.outputs(), run.images
        columns = [torch.cat(c).double() for c in zip(*map(self._leaves, given, self.sizes), strict=True)]
        for whole in columns:
            self._units.append((mean_square_distance(whole) * len(whole) * len(columns)) ** 0.5)
        self.wanted = [self.flat(o, n) for o, n in zip(given, self.sizes, strict=True)]

    def _leaves(self, output: Any, images: int) -> list[Tensor]:
        """The floating tensors that have rows, each as (images, values)."""
        pairs = zip(floating_outputs(output), self._rows, strict=True)
        return [flat_output([v], images, (dim,)) for v, dim in pairs if dim is not None]

    def flat(self, output: Any, images: int) -> Tensor:
        """The output of one batch, (images, values), in units in which the squared error is the divergence."""
        return torch.cat([v / u for v, u in zip(self._leaves(output, images), self._units, strict=True)], 1)

    def loss(self, outputs: Sequence[Any]) -> float:
        """The divergence of what a graph gave; infinite if that is not finite."""
        pairs = zip(outputs, self.sizes, self.wanted, strict=True)
        error = sum(float((self.flat(o, n).double() - w.double()).square().sum()) for o, n, w in pairs)
        return error if error == error else float("inf")
