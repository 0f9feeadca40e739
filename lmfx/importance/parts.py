"""Holds what scoring keeps of the network's run on one batch: values, gradients, and what depends on which node."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmfx.calibration.derivatives import has_no_derivative
from lmfx.passes.errors import ModelError
from lmfx.passes.graph.raw_nodes import dependents
from lmfx.passes.trace.tracers import first_line

__all__ = ["Part", "batch_statistics", "gradients_of"]


@dataclass(frozen=True)
class Part:
    """One batch of the scoring images: values and gradients (one a probe) of nodes, and the output, (images, ...);
    `renewed` are outputs with the batch's statistics after a node."""

    values: dict[str, Tensor]
    gradients: dict[str, list[Tensor]]
    output: Tensor
    renewed: dict[str, Tensor] = field(default_factory=dict)

    def products(self, error: Tensor, gradient: Tensor) -> Tensor:
        """The scalar product of each image's error at a node with its gradient, (images,); added up in float64.

        A node that has the frames of each image as images of its own has several rows an image, one after the other.
        In another order these are sums of other frames: as large on average where each changes the output by itself.
        """
        if error.dtype in (torch.float16, torch.bfloat16):
            error = error.float()
        rows = (error * gradient).flatten(1).sum(1, dtype=torch.float64)
        return rows.reshape(len(self.output), -1).sum(1) if len(rows) % len(self.output) == 0 else rows

    def beside(self, nodes: Mapping[str, fx.Node], outputs: Iterable[fx.Node]) -> dict[fx.Node, Any]:
        """The values that stay as they are when those of `outputs` change."""
        changed = dependents(outputs)
        held = ((nodes[name], value) for name, value in self.values.items())
        return {node: value for node, value in held if node not in changed and node.op != "output"}


@contextlib.contextmanager
def batch_statistics(gm: nn.Module) -> Iterator[None]:
    """Batch norms in eval mode use the statistics of their batch within, and have their own again afterwards."""
    held = [(m, m.running_mean, m.running_var) for m in gm.modules() if isinstance(m, _BatchNorm)]
    try:
        for module, _, _ in held:
            module.running_mean = module.running_var = None
        yield
    finally:
        for module, mean, variance in held:
            module.running_mean, module.running_var = mean, variance


def gradients_of(z: Tensor, values: list[Tensor], v: Tensor, keep: bool) -> tuple[Tensor | None, ...]:
    """The gradients of `v . z` at some values. Raises `ModelError` for an op that has no derivative."""
    try:
        return torch.autograd.grad(z, values, v, retain_graph=keep, allow_unused=True)
    except RuntimeError as error:
        if not has_no_derivative(error):
            raise
        raise ModelError(
            f"an op of the model has no derivative ({first_line(error)}), which the second-order estimate needs: pass "
            "lmfx.importance.Reconstruction(exact=True), which runs the network instead"
        ) from error
