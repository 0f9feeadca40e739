"""Builds the students of one graph, plan after plan, on the same calibration images.

    Students ─ analysis      of the graph: nothing of it is analysed twice
             ├ surrogates    what stands for removed activations: they depend on the original alone
             ├ values        what the original has on the images, where some fit aims at it
             └ ops           what was fitted: a fit depends on what the plan changes before it, and on nothing else

Of a fit that nobody reads any more (another change of the plan left its only reader out) no module is left to be set.

A student shares the tensors of all that is unchanged with the graph unless it is asked for its own, so that building
and judging many costs little more than the fits that differ. What is kept is bounded (`HELD_BYTES`); the least recently
used goes first, and is made again when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import cached_property

from torch import Tensor, fx

from lmfx.calibration.bounded import Bounded
from lmfx.calibration.factor_fits import FactorFits
from lmfx.calibration.fit_values import evenly_ordered
from lmfx.calibration.fitting import FittedOp
from lmfx.calibration.images import Calibration
from lmfx.calibration.narrow_fits import NarrowFits
from lmfx.calibration.narrowed_span import NarrowedSpan
from lmfx.calibration.plan_fits import fit_student, set_fitted
from lmfx.calibration.recording import batches_for, record_batches
from lmfx.calibration.surrogates import affine_surrogates
from lmfx.environment.progress import progress as progress_bar
from lmfx.passes.algebra.linear import LinearOp
from lmfx.passes.graph.graph_edit import is_attribute, set_submodule
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.passes.rewrite.factored import FactoredOp, set_factored
from lmfx.passes.rewrite.span_modules import span_sides
from lmfx.passes.rewrite.trainable import rewrite, span_names
from lmfx.passes.spans.layers import Network

__all__ = ["Students"]

HELD_BYTES = 2**30  # of recorded values, and of fitted ops


class Students:
    """The trainable forms of one graph under plans, set from the same calibration images."""

    def __init__(self, analysis: Analysis, calibration: Calibration) -> None:
        self.analysis, self.images = analysis, calibration
        self.calibration = evenly_ordered(calibration)  # so that a beginning of it stands for all
        self._surrogates: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}  # by the network's id, which analysis holds
        self._values: Bounded[Tensor] = Bounded(lambda v: v.numel() * v.element_size(), HELD_BYTES)
        self._ops: Bounded[FittedOp] = Bounded(lambda op: op.bytes, HELD_BYTES)

    def completed(self, plan: MergePlan) -> MergePlan:
        """The plan with all that these images choose: the channels that stay in what it narrows."""
        if not any(c.cuts for c in plan.candidates):
            return plan
        return NarrowFits.of(self.analysis.network(plan), self.images).completed(plan)

    def student(self, plan: MergePlan, *, share_tensors: bool = True, progress: bool = False) -> fx.GraphModule:
        """The trainable form under `plan`, its surrogates and fitted convs set.

        With `share_tensors` what is unchanged shares its parameters with the graph: to be judged, not to be trained.
        Raises `PlanError` if the plan was made for another graph.
        """
        network, plan = self.analysis.network(plan), self.completed(plan)
        composed = any(c.realization == "compose" for c in plan.candidates)
        surrogates = self.surrogates(network) if composed and plan.surrogate == "affine" else None
        student = rewrite(self.analysis, plan, surrogates, share_tensors)
        if thinner := [c for c in plan.candidates if c.cuts]:
            fits = NarrowFits.of(network, self.images)
            fits.prepare(thinner)
            for c in thinner:
                fits.set(student, c)
        names = zip(span_names(network.gm, plan), plan.candidates, strict=True)
        if factored := [(name, c) for name, c in names if c.realization == "factor" and is_attribute(student, name)]:
            factors = FactorFits.of(network, self.images)
            factors.prepare([c for _, c in factored])
            for name, c in factored:
                factors.set(student, name, c)
        self._fit(network, student, plan, progress)
        return student

    def sketch(self, plan: MergePlan, op: Callable[[Candidate], LinearOp | NarrowedSpan | None]) -> fx.GraphModule:
        """The trainable form under `plan` with fits from elsewhere: to be judged, and not to be kept."""
        network = self.analysis.network(plan)
        ops = {c.key: op(c) for c in plan.candidates if c.realization in ("fit", "narrow", "factor")}
        chosen = (found.candidate if isinstance(found := ops.get(c.key), NarrowedSpan) else c for c in plan.candidates)
        plan = replace(plan, candidates=tuple(chosen))
        composed = any(c.realization == "compose" for c in plan.candidates)
        surrogates = self.surrogates(network) if composed and plan.surrogate == "affine" else None
        student = rewrite(self.analysis, plan, surrogates, share_tensors=True)
        for name, c in zip(span_names(network.gm, plan), plan.candidates, strict=True):
            found = ops.get(c.key)
            if isinstance(found, NarrowedSpan):
                for node, module in found.modules.items():
                    set_submodule(student, str(network.nodes[node].target), module)
            elif found is not None and not is_attribute(student, name):
                continue  # nothing reads it
            elif isinstance(found, FactoredOp):
                set_factored(student, name, found)
            elif found is not None:
                set_fitted(student.get_submodule(name), found)
        return student

    def surrogates(self, network: Network) -> dict[str, tuple[Tensor, Tensor]]:
        """The affine surrogates of all activations of a form of the graph."""
        if id(network) not in self._surrogates:
            self._surrogates[id(network)] = affine_surrogates(network, self.calibration)
        return self._surrogates[id(network)]

    @cached_property
    def _batches(self) -> list[tuple[Tensor, ...]]:
        return list(batches_for(self.analysis.graph, self.calibration))

    def _fit(self, network: Network, student: fx.GraphModule, plan: MergePlan, progress: bool) -> None:
        names = dict(zip(span_names(network.gm, plan), plan.candidates, strict=True))
        fits = {name: c for name, c in names.items() if c.realization == "fit" and is_attribute(student, name)}
        if not fits:
            return
        causes = {name: _causes(network, c, plan) for name, c in fits.items()}
        todo = {}
        for name, c in fits.items():
            known = self._ops.get(causes[name])
            if known is None:
                todo[name] = c
            else:
                set_fitted(student.get_submodule(name), known)
        if not todo:
            return
        targets = self._targets(network, todo.values())
        with progress_bar(len(todo), "fitting", progress) as bar:
            for name, op in fit_student(network, student, todo, targets, self._batches, self.calibration.names):
                self._ops.put(causes[name], op)
                bar.update(1)

    def _targets(self, network: Network, candidates: Iterable[Candidate]) -> dict[str, Tensor]:
        """What the original has where fits aim, and where their other calls enter."""
        wanted = {n for c in candidates for s in c.spans for n in ([s.output, s.entry] if c.calls else [s.output])}
        # A form with sums in another order has nodes of its own.
        keys: dict[str, Hashable] = {n: (id(network), n) for n in sorted(wanted)}
        found = {n: v for n, key in keys.items() if (v := self._values.get(key)) is not None}
        if missing := wanted - set(found):
            recorded = record_batches(network.gm, self.calibration, missing)
            for name, value in recorded.items():
                self._values.put(keys[name], value)
            found |= recorded
        return found


def _causes(network: Network, candidate: Candidate, plan: MergePlan) -> Hashable:
    """All that a fit depends on but for the images: itself, and what the plan changes before what it reads."""
    queue = [network.nodes[name] for name in (*(s.entry for s in candidate.spans), *span_sides(network, candidate))]
    before: set[str] = set()
    while queue:
        node = queue.pop()
        if node.name not in before:
            before.add(node.name)
            queue += node.all_input_nodes
    changed = tuple(c for c in plan.candidates if any(s.output in before for s in c.spans))
    return candidate, changed, plan.sums, plan.fine, plan.surrogate, plan.activation_after
