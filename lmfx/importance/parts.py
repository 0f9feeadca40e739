"""Holds what scoring keeps of the network's run on one batch: values, gradients, and what depends on which node."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmfx.passes.graph.raw_nodes import dependents

__all__ = ["Part", "batch_statistics"]


@dataclass(frozen=True)
class Part:
    """One batch of the scoring images: values and gradients (one a probe) of nodes, and the output, (images, ...);
    `renewed` are outputs with the batch's statistics after a node."""

    values: dict[str, Tensor]
    gradients: dict[str, list[Tensor]]
    output: Tensor
    renewed: dict[str, Tensor] = field(default_factory=dict)

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
