"""Refits what a plan keeps: each linear layer of a student, in closed form, to what the original has at the same place.

A layer that was kept has the weights of the original, made for the original's values, and the layers before it no
longer give those. In the order of the graph, each layer is set anew:

    min over W, b of  |clamp(place) - clamp(goal)|^2  +  lambda |W - W0|^2         place = A + s ((W - W0) x + b - b0)

W0 is its own weight, `place` and `goal` are where student and original are compared (`places`), the clamp is that of a
ReLU after it (`passes.fit.changes`), lambda is found on held-out images. A fit that is better at its place can still
make the network worse, so the student as a whole is judged on images that no fit saw, and a layer stays as it was
unless its divergence falls.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.images import Calibration
from lmfx.calibration.lockstep import Lockstep
from lmfx.calibration.places import Site, find_sites
from lmfx.calibration.recording import flat_output, output_rows
from lmfx.environment.progress import progress as progress_bar
from lmfx.made_of import made_of
from lmfx.passes.fit import feature_rows
from lmfx.passes.fit.changes import Rows, fit_rows
from lmfx.passes.ir import MergePlan
from lmfx.passes.model.model_copy import deep_copy
from lmfx.passes.rewrite.regrouped_sums import regrouped

__all__ = ["JUDGED", "LEAST_IMAGES", "Divergence", "Judging", "refit"]

JUDGED = 64  # images, at most
LEAST_IMAGES = 8
SAMPLES_AN_UNKNOWN, LEAST_SAMPLES, MOST_SAMPLES = 16, 4096, 20000
ROW_BYTES = 100 << 20  # of features
MOST_UNKNOWNS = 2500
HOLD_OUT_EVERY = 4  # of the fitting images, to choose damping by


class Judging(Protocol):
    """Says how far a network is from the original, on images that no fit saw."""

    @property
    def images(self) -> Calibration: ...
    def loss(self, outputs: list[Any]) -> float:
        """What a graph gave on the images, batch by batch -> a number, lower is better; any size of batches."""


class Divergence:
    """Sum of |z' - z|^2 over sum of |z - mean z|^2 of all outputs together."""

    def __init__(self, graph: fx.GraphModule, images: Calibration) -> None:
        self.images = images
        self.rows = output_rows(graph, images)
        run = Lockstep(graph, images)
        self.sizes = run.images
        self.wanted = self._flat(run.outputs()).double()

    def _flat(self, outputs: list[Any]) -> Tensor:
        parts = [flat_output(o, n, self.rows) for o, n in zip(outputs, self.sizes, strict=True)]
        return torch.cat(parts)

    def loss(self, outputs: list[Any]) -> float:
        """The divergence of outputs."""
        error = (self._flat(outputs).double() - self.wanted).square().sum()
        return float(error / (self.wanted - self.wanted.mean(0)).square().sum().clamp_min(1e-300))


@torch.no_grad()
def refit(
    student: fx.GraphModule,
    graph: fx.GraphModule,
    calibration: Calibration,
    judge: Judging | None = None,
    plan: MergePlan | None = None,
    progress: bool = False,
) -> fx.GraphModule:
    """A copy of `student`, the trainable form of a plan for `graph`, whose layers fit the values that they now get.

    `judge` has images apart from those of `calibration`; without one, each fourth image of `calibration` judges. With
    fewer than eight images nothing is changed. `plan` is that of the student, if its `meta` does not have it.
    """
    made = made_of(student)
    plan = made.plan if plan is None and made is not None else plan
    student = deep_copy(student)
    if len(calibration) < LEAST_IMAGES:
        return student
    graph = graph if plan is None else regrouped(graph, plan.sums)
    if judge is None:
        calibration, held = calibration.split(JUDGED)
        judge = Divergence(graph, held)
    _Refit(student, graph, calibration, judge, plan).run(progress)
    return student


class _Refit:
    """One pass over a student, which is changed."""

    def __init__(
        self,
        student: fx.GraphModule,
        graph: fx.GraphModule,
        calibration: Calibration,
        judge: Judging,
        plan: MergePlan | None,
    ) -> None:
        self.sites = find_sites(student, graph, plan)
        self.ours, self.theirs = Lockstep(student, calibration), Lockstep(graph, calibration)
        self.judged, self.judge = Lockstep(student, judge.images), judge
        self.generator = torch.Generator().manual_seed(0)

    def run(self, progress: bool) -> None:
        best = self.judge.loss(self.judged.outputs())
        with progress_bar(len(self.sites), "refitting", progress) as bar:
            for i, site in enumerate(self.sites):
                undo = self.fit(site)
                if undo is not None:
                    loss = self.judge.loss(self.judged.outputs())
                    if loss <= best:
                        best = loss
                    else:
                        undo()
                if i + 1 < len(self.sites):
                    self.hold(self.sites[i + 1 :])
                bar.update(1)

    def hold(self, left: list[Site]) -> None:
        """Go on to where the next of the sites that are left can be computed from."""
        self.ours.hold(self.ours.index[left[0].node])
        self.judged.hold(self.judged.index[left[0].node])
        self.theirs.hold(min(self.theirs.index[s.goal] for s in left))

    def fit(self, site: Site) -> Callable[[], None] | None:
        """Set the layer of a site anew; what takes that back, or None if it stays as it is."""
        if feature_rows.unknowns_of(site.layer) > MOST_UNKNOWNS:
            return None
        rows = self.rows(site)
        change = None if rows is None else fit_rows(rows)
        if change is None or not isfinite(float(change.columns.abs().sum() + change.bias.abs().sum())):
            return None
        return _apply(site, change.columns, change.bias)

    def rows(self, site: Site) -> Rows | None:
        """Samples of a site, held-out images first; None where there is nothing to gain or too little to learn from."""
        layer, images = site.layer, sum(self.ours.images)
        blocks, unknowns = feature_rows.blocks_of(layer), feature_rows.unknowns_of(layer)
        want = min(max(SAMPLES_AN_UNKNOWN * unknowns, LEAST_SAMPLES), MOST_SAMPLES)
        want = min(want, ROW_BYTES // (4 * blocks * (unknowns + 1)))
        rest: list[tuple[Tensor, ...]] = []
        held: list[tuple[Tensor, ...]] = []
        seen = 0
        for chunk, count in enumerate(self.ours.images):
            values = self.ours.values(chunk, {*site.node.all_input_nodes, site.place})
            goal: Tensor = self.theirs.values(chunk, [site.goal])[site.goal]
            x, place = site.entering(values), values[site.place]
            if place.shape != goal.shape or not feature_rows.takes(layer, x) or len(x) % count:
                return None
            if not chunk and _error(place, goal) <= _rounding(place):
                return None  # what the original has there already
            repeated = len(x) // count  # windows and steps of one image lie side by side
            pixels = feature_rows.pixels_of(layer, place.shape)
            each = min(max(-(-want // (images * repeated)), 1), pixels)
            order = torch.rand(len(x), pixels, generator=self.generator).topk(each).indices.to(x.device)
            apart = (torch.arange(len(x)) // repeated + seen) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
            seen += count
            for chosen, part in ((apart, held), (~apart, rest)):
                if bool(chosen.any()):
                    own = chosen.nonzero()[:, 0].to(x.device)
                    inputs = feature_rows.features(layer, x[own], order[own])
                    both = [feature_rows.values_at(layer, v[own], order[own]) for v in (place, goal)]
                    part.append((_wide(inputs), *map(_wide, both)))
        if not rest or not held:
            return None
        every = [*held, *rest]
        features = torch.nn.functional.pad(torch.cat([p[0] for p in every], 1), (0, 1), value=1.0)
        now, goal = torch.cat([p[1] for p in every]), torch.cat([p[2] for p in every])
        if not bool(features.isfinite().all() & now.isfinite().all() & goal.isfinite().all()):
            return None
        return Rows(features, now, goal, site.scale, sum(len(p[1]) for p in held))


def _wide(values: Tensor) -> Tensor:
    """In a dtype that sums can be made of."""
    return values if values.dtype == torch.float64 else values.float()


def _error(place: Tensor, goal: Tensor) -> float:
    error = (place.double() - goal.double()).square().mean()
    return float(error / goal.double().square().mean().clamp_min(1e-300))


def _rounding(values: Tensor) -> float:
    return (10 * torch.finfo(values.dtype).eps) ** 2


def _apply(site: Site, columns: Tensor, bias: Tensor) -> Callable[[], None]:
    """Add a change to a layer; what takes it back.

    A bias that the layer does not have is left to the norm after it, or else the layer gets one.
    """
    layer, norm = site.layer, site.norm
    weight = layer.weight.detach().clone()
    layer.weight.copy_(weight.double() + feature_rows.weight_of(layer, columns))
    shifted: Any = None
    if layer.bias is not None:
        shifted = layer.bias
        added = shifted.double() + bias
    elif norm is not None:
        shifted = norm.running_mean
        added = shifted.double() - bias
    before = None if shifted is None else shifted.detach().clone()
    if shifted is None:
        layer.bias = nn.Parameter(bias.to(weight), requires_grad=layer.weight.requires_grad)
    else:
        shifted.copy_(added)

    def undo() -> None:
        layer.weight.copy_(weight)
        if shifted is None:
            layer.bias = None
        else:
            shifted.copy_(before)

    return undo
