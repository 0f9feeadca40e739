"""Refits what a plan keeps: each linear layer of a student, in closed form, to what the original has at the same place.

A layer that was kept has the weights of the original, made for the original's values, and the layers before it no
longer give those. In the order of the graph, each layer is set anew:

    min over W, b of  |place - goal|^2  +  lambda |W - W0|^2         place = now + s ((W - W0) x + b - b0)

W0 is its own weight, `place` and `goal` are where student and original are compared (`places`), lambda is found on
held-out images (`passes.fit.changes`). A fit that is better at its place can still make the network worse, so the
student as a whole is judged on images that no fit saw, and a layer stays as it was where its loss would rise. At the
end the layers are set together (`joint_fit`): as many of the last ones as `MOST_WORK` allows, in a small network all,
in a large one none. So many unknowns would learn a few hundred images by heart, so they see mixtures of them as well
(`shown_images`): what is wanted of those the original says.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.derivatives import has_no_derivative
from lmfx.calibration.divergence import Divergence, Judging
from lmfx.calibration.images import Calibration
from lmfx.calibration.joint_fit import AT_ONCE, PASSES, JointFit, metric_of
from lmfx.calibration.lockstep import CHUNK, Lockstep
from lmfx.calibration.places import Site, find_sites
from lmfx.calibration.recording import images_at_once
from lmfx.calibration.shown_images import shown
from lmfx.environment.progress import progress as progress_bar
from lmfx.made_of import made_of
from lmfx.passes.fit import feature_rows
from lmfx.passes.fit.changes import Rows, fit_rows
from lmfx.passes.graph import ops
from lmfx.passes.graph.node_facts import shape_of
from lmfx.passes.ir import MergePlan
from lmfx.passes.model.model_copy import deep_copy
from lmfx.passes.rewrite.regrouped_sums import regrouped
from lmfx.passes.spans.globs import Globs

__all__ = ["LEAST_IMAGES", "refit", "split_to_judge"]

LEAST_IMAGES = 8
SAMPLES_AN_UNKNOWN, LEAST_SAMPLES, MOST_SAMPLES = 16, 4096, 20000
ROW_BYTES = 100 << 20  # of features
MOST_UNKNOWNS = 2500
HOLD_OUT_EVERY = 4  # of the fitting images, to choose damping by
LEAST_STEPS, MOST_STEPS = 2, 5  # joint ones
LEAST_GAIN = 0.01  # the share by which a step must lower the loss for there to be another
MOST_WORK = 4e11  # multiply-adds of all joint steps
MIXED, MOST_MIXED = 3, 1024  # images that are made of each for joint steps, and with how many in all there are enough
MOVED = 8  # pixels by multiples of which they are moved, so that strides and mosaics stay in phase


def split_to_judge(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """(images to fit on, others to judge on): each fourth judges, and of many images fewer, down to each eighth."""
    every = min(max(len(calibration) // 64, 4), 8)
    apart = torch.arange(len(calibration)) % every == every - 1
    rest, judged = (tuple(t[mask] for t in calibration.tensors) for mask in (~apart, apart))
    return Calibration(rest, calibration.names), Calibration(judged, calibration.names)


@torch.no_grad()
def refit(
    student: fx.GraphModule,
    graph: fx.GraphModule,
    calibration: Calibration,
    judge: Judging | None = None,
    plan: MergePlan | None = None,
    progress: bool = False,
    globs: Globs | None = None,
) -> fx.GraphModule:
    """A copy of `student`, the trainable form of a plan for `graph`, whose layers fit the values that they now get.

    `judge` has images apart from those of `calibration`; without one, a part of `calibration` judges
    (`split_to_judge`), by the divergence. With fewer than eight images nothing is changed. `plan` is that of the
    student, if its `meta` does not have it. What `globs` exclude or do not include stays as it is.
    """
    made = made_of(student)
    plan = made.plan if plan is None and made is not None else plan
    student = deep_copy(student)
    if len(calibration) < LEAST_IMAGES:
        return student
    graph = graph if plan is None else regrouped(graph, plan.sums)
    if judge is None:
        calibration, held = split_to_judge(calibration)
        judge = Divergence(graph, held)
    _Refit(student, graph, calibration, judge, plan, globs).run(progress)
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
        globs: Globs | None = None,
    ) -> None:
        self.sites = [s for s in find_sites(student, graph, plan) if globs is None or not globs.leaves(s.node.name)]
        chunk = self.chunk = images_at_once(graph, CHUNK)
        self.ours, self.theirs = Lockstep(student, calibration, chunk), Lockstep(graph, calibration, chunk)
        self.judged, self.judge = Lockstep(student, judge.images, chunk), judge
        self.generator = torch.Generator().manual_seed(0)
        self.student, self.graph, self.images = student, graph, calibration
        self.first = self.first_joint()  # index of the node from which on layers are set together
        self.metrics: list[tuple[Site, Tensor]] = []
        self.differs = False  # whether any place has not what the original has there

    def first_joint(self) -> int:
        """The first node after which little enough is computed that joint steps can be made; none of them where fewer
        than half of the layers come after it: that gains little, and has to run both networks once more."""
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.student.parameters())
        left = 0.0 if half else MOST_WORK / (LEAST_STEPS * PASSES * max(sum(self.ours.images), 1))
        for i, node in reversed(list(enumerate(self.ours.nodes))):
            left -= _work(self.student, node)
            if left < 0:
                within = sum(self.ours.index[s.node] > i for s in self.sites)
                return i + 1 if 2 * within >= len(self.sites) else len(self.ours.nodes)
        return 0

    def run(self, progress: bool) -> None:
        best = self.layers(progress)
        if not self.metrics or not self.differs:
            return
        first = self.ours.index[self.metrics[0][0].node]
        images = mixed(self.images)
        size = images_at_once(self.graph, AT_ONCE)
        start, judged = Lockstep(self.student, images, size), Lockstep(self.student, self.judge.images, self.chunk)
        start.hold(first)
        judged.hold(first)
        work = sum(_work(self.student, n) for n in start.nodes[start.at :]) * PASSES * sum(start.images)
        steps = min(max(int(MOST_WORK / work), LEAST_STEPS), MOST_STEPS) if work else MOST_STEPS
        joint = JointFit(self.student, start, Divergence(self.graph, images, size), self.metrics)
        with progress_bar(steps, "setting layers together", progress) as bar:
            for _ in range(steps):
                before = best
                try:
                    best = joint.step(best, lambda: self.judge.loss(judged.outputs()))
                except RuntimeError as error:  # before anything was set: the layers stay as each was set alone
                    if not has_no_derivative(error):
                        raise
                    break
                bar.update(1)
                if not best < before * (1 - LEAST_GAIN):
                    break
        joint.close()

    def layers(self, progress: bool) -> float:
        """Set one layer after another; the judged loss after it."""
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
        return best

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
        if rows is not None and self.ours.index[site.node] >= self.first:
            self.metrics.append((site, metric_of(rows.x)))
        change = None if rows is None or _error(rows.now, rows.goal) <= _rounding(rows.now) else fit_rows(rows)
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
            goal = site.wanted(self.theirs.values(chunk, [site.goal])[site.goal])
            x, place = site.entering(values), values[site.place]
            if place.shape != goal.shape or not feature_rows.takes(layer, x) or len(x) % count:
                return None
            if not chunk and _error(place, goal) <= _rounding(place):  # what the original has there already
                if self.ours.index[site.node] < self.first:
                    return None
            else:
                self.differs = True
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


def mixed(images: Calibration) -> Calibration:
    """The images and, where they are few, some more that are made of them; themselves where they cannot be mixed."""
    count, more = len(images), min(MIXED * len(images), MOST_MIXED - len(images))
    if more <= 0 or count < 2 or not all(t.is_floating_point() for t in images.tensors):
        return images
    random = torch.Generator().manual_seed(0)
    parts = [shown(images.tensors, random, move=MOVED) for _ in range(-(-more // count))]
    made = Calibration(tuple(torch.cat(ts)[:more] for ts in zip(*parts, strict=True)), images.names)
    return Calibration.joined(images, made)


def _work(gm: fx.GraphModule, node: fx.Node) -> float:
    """Multiply-adds of a node, an image."""
    shape = shape_of(node)
    if node.op != "call_module" or shape is None:
        return 0.0
    kinds = (*ops.CONVS, *ops.TRANSPOSED, nn.Linear)
    layers: list[Any] = [m for m in gm.get_submodule(str(node.target)).modules() if isinstance(m, kinds)]
    return float(sum(prod(shape[1:]) * feature_rows.unknowns_of(m) for m in layers))


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
