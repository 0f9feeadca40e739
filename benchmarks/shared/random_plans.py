"""Random plans and random BatchNorm statistics, for exactness checks in the tests and in `exactness.py`."""

from __future__ import annotations

import random

import torch
from torch import nn

from lmfx.passes.ir import Candidate, MergePlan, Series
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.trace.tracing import fingerprint

__all__ = ["random_plan", "randomise_norms"]


def randomise_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics and parameters of a trained network's size, in place; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            continue
        for name, low, high in (
            ("running_mean", -0.5, 0.5),
            ("running_var", 0.5, 2.0),
            ("weight", 0.5, 1.5),
            ("bias", -0.5, 0.5),
        ):
            tensor = getattr(module, name)
            if tensor is not None:
                values = torch.rand(tensor.shape, generator=generator) * (high - low) + low
                tensor.data.copy_(values)
    return model


def random_plan(
    spans: SpanSet, rng: random.Random, realizations: tuple[str, ...] = ("compose", "fit", "drop", "narrow")
) -> MergePlan:
    """A plan that walks each series from cut to cut and picks one of the candidates at every step, long ones too."""
    starts: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in spans:
        starts.setdefault((candidate.span.series, candidate.span.start), []).append(candidate)
    chosen: list[Candidate] = []

    def walk(series: Series) -> None:
        at = 0
        while at < len(series.layers):
            options = starts[series.name, at]
            kinds = sorted({c.realization for c in options if c.realization in realizations} | {"keep"})
            kind = rng.choice(kinds)
            candidate = rng.choice([c for c in options if c.realization == kind])
            if candidate.realization == "keep":
                parallel = series.layers[at].parallel
                for branch in parallel.branches if parallel else ():
                    walk(branch)
            else:
                chosen.append(candidate)
            at = candidate.span.stop

    for region in spans.network.regions:
        walk(region.series)
    order = {name: i for i, name in enumerate(spans.network.nodes)}
    chosen.sort(key=lambda c: order[c.span.exit])
    return MergePlan(tuple(chosen), fingerprint(spans.network.gm))
