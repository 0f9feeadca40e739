"""Factors the convs of a network by what they read and give on calibration images.

The network runs over the images. The patches that a conv reads are summed to a Gram, which gives its depthwise and
pointwise factors at every multiplier (`passes.fit.factors`); what it gives, to a covariance, which gives those of every
rank (`passes.fit.low_rank`). They are those of the original network, so they serve every plan; a refit
(`lmfx.calibration.refitting`) sets the pointwise conv to what it reads in a plan's network.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from lmfx.calibration.fit_values import evenly_ordered
from lmfx.calibration.images import Calibration
from lmfx.calibration.layer_sums import in_parts, kept_with, sums_of, system_of
from lmfx.calibration.value_sums import ValueSums, value_sums
from lmfx.passes.fit.factors import first_factors, improved
from lmfx.passes.fit.low_rank import low_rank, principal
from lmfx.passes.fit.normal_equations import Sums, usual_damping
from lmfx.passes.ir import Candidate, Layer
from lmfx.passes.rewrite.factored import FactoredOp, conv_weight, dense_op, set_factored
from lmfx.passes.spans.layers import Network

__all__ = ["FactorFits"]


class FactorFits:
    """The factors of a network's convs at all multipliers and ranks that were asked for."""

    def __init__(self, network: Network, images: Calibration) -> None:
        self.network, self.images = network, evenly_ordered(images)
        self.ops: dict[str, FactoredOp] = {}  # by the candidate's key

    @classmethod
    def of(cls, network: Network, images: Calibration) -> FactorFits:
        """Those of a network on some images, which are made once."""
        return kept_with(network, cls, images)

    def op(self, c: Candidate) -> FactoredOp:
        """What a candidate puts in the place of its conv."""
        self.prepare([c])
        return self.ops[c.key]

    def set(self, student: fx.GraphModule, name: str, c: Candidate) -> None:
        """Set the convs of a factored candidate of a student; `name` is that of the pointwise one."""
        set_factored(student, name, self.op(c))

    @torch.no_grad()
    def prepare(self, candidates: Iterable[Candidate]) -> None:
        """Factor all convs of some candidates."""
        left = [c for c in candidates if c.key not in self.ops]
        self._prepare_ranks([c for c in left if c.conv is not None and c.conv.rank])
        convs: dict[tuple[str, ...], list[Candidate]] = {}
        for c in left:
            if c.conv is not None and not c.conv.rank:
                convs.setdefault(self._nodes(c), []).append(c)
        for part in in_parts(list(convs), lambda names: [self.network.module(name) for name in names]):
            sums = sums_of(self.network, self.images, [name for names in part for name in names])
            for names in part:
                total = sums[names[0]].total
                for other in names[1:]:
                    total = total.plus(sums[other].total)
                self._factor(names[0], convs[names], total)

    def _factor(self, name: str, candidates: list[Candidate], sums: Sums) -> None:
        layer = self.network.module(name)
        system = system_of(sums, layer)
        op = dense_op(self.network, candidates[0])
        weight = conv_weight(op)
        _, channels, taps = weight.shape
        gram = system.matrix[0].view(taps, channels, taps, channels).permute(1, 0, 3, 2)
        mean: Tensor = system.mean[0].view(taps, channels).T
        damping = max(usual_damping(channels * taps, max(sums.n, 1.0)), float((system.least / system.scale).max()))
        for c in candidates:
            assert c.conv is not None
            found = improved(first_factors(weight, c.conv.multiplier), weight, gram, damping)
            shift = ((weight - found.product) * mean).sum((1, 2))
            self.ops[c.key] = FactoredOp.of(op, found, shift)

    def _prepare_ranks(self, candidates: list[Candidate]) -> None:
        outputs: dict[tuple[str, ...], list[Candidate]] = {}
        for c in candidates:
            outputs.setdefault(tuple(self.network.affine_nodes(la)[-1] for la in self._layers(c)), []).append(c)
        if not outputs:
            return
        sums = value_sums(self.network, self.images, {name for names in outputs for name in names})
        for names, found in outputs.items():
            total = sums[names[0]]
            for other in names[1:]:
                total = total.plus(sums[other])
            self._rank(found, total)

    def _rank(self, candidates: list[Candidate], sums: ValueSums) -> None:
        op = dense_op(self.network, candidates[0])
        weight = conv_weight(op)
        directions = principal(sums.covariance, weight)
        moved = sums.mean - op.bias.double()
        for c in candidates:
            assert c.conv is not None
            found = low_rank(weight, c.conv.rank, directions)
            self.ops[c.key] = FactoredOp.of(op, found, moved - found.pointwise @ (found.pointwise.T @ moved))

    def _layers(self, c: Candidate) -> list[Layer]:
        """The layer of the conv at each call."""
        return [self.network.series[s.series].layers[s.start] for s in c.spans]

    def _nodes(self, c: Candidate) -> tuple[str, ...]:
        """The node of the conv at each call."""
        return tuple(layer.conv for layer in self._layers(c) if layer.conv is not None)
