"""Compresses one model for one input size: the stages of `lmfx` one after the other.

trace ─▶ spans ─▶ profile ─▶ score ─▶ solve ─▶ search the budget, or what is to be kept ─▶ judge plans
      ─▶ rewrite, fit ─▶ refit what is kept ─▶ recover ─▶ merge ─▶ judge the result
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from torch import fx, nn

from lmfx import stages
from lmfx.budget import Budget
from lmfx.calibration.images import LEAST_JUDGED, Calibration, as_calibration
from lmfx.calibration.refitting import refit as refit_layers
from lmfx.environment.effort import StageClock
from lmfx.importance import Estimator, ImportanceTable, Reconstruction
from lmfx.importance.macs import multiply_accumulates
from lmfx.importance.on_demand import score_on_demand
from lmfx.importance.pool import ExecutorLike
from lmfx.importance.reconstruction import ReconstructionSession
from lmfx.int8.compressed import Int8Keeps
from lmfx.latency import Backend, LatencyTable
from lmfx.latency.cache_state import suited
from lmfx.latency.carried_table import Predicted, check_table, predict_loss_free, predict_plan, runtime_of
from lmfx.latency.chosen_backend import chosen_backend, precision_of
from lmfx.latency.whole_times import time_wholes
from lmfx.made_of import made_of
from lmfx.passes.errors import InfeasibleBudget, OptionError
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.ir import MergePlan, Surrogate
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.spans.globs import Globs
from lmfx.passes.trace.tracing import example_arguments, fingerprint
from lmfx.planning.finals import best_measured, best_predicted
from lmfx.planning.finishing import finished
from lmfx.planning.frontier import Frontier
from lmfx.planning.judged import Judged
from lmfx.planning.keeping import fastest_that_keeps, keeping_judge
from lmfx.planning.search import Found, find_loss_free, find_plan, measure_plan
from lmfx.planning.several_shapes import OverShapes
from lmfx.planning.smaller_input import smaller_input
from lmfx.quality import Choosing, Judge, Quality, QualityName
from lmfx.quality.output_scale import set_scale
from lmfx.training.recovery import recover as recover_student

KEEP_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # budgets that are looked at where none is given
# More than one plan is refitted: two, three where a network has at most so many multiply-adds on the images of its
# fits, and so many parameters.
MOST_REFITTED = ((2e11, 6e6), (4e10, 1e6))
Keeps = Callable[[fx.GraphModule], Quality]  # how much of the original a network keeps
WIDTH, BELOW = 3, 0.93  # candidates a round of scoring on demand; the second budget that it looks at, of the first


@dataclass(frozen=True)
class _Case:
    """What is compressed: a traced model, its spans, where latencies come from, and the images."""

    graph: fx.GraphModule
    spans: SpanSet
    source: Backend | LatencyTable
    images: Calibration
    example: Any
    judging: QualityName | None  # what plans are judged by; None where they are not
    clock: StageClock


@dataclass(frozen=True)
class Compression:
    """What `compress` was asked for, but for the model, its images and the budget; `options` are those of spans."""

    estimator: Estimator
    options: dict[str, Any]
    latency: str | Backend | LatencyTable | None
    surrogate: Surrogate
    executor: ExecutorLike
    cache_dir: str | os.PathLike[str] | None
    merge: bool
    quality: QualityName | None
    refit: bool
    recover: float | str | None
    progress: bool
    precision: str | None = None  # that of the backend
    beside: bool = True  # whether a smaller input alone is looked at as well

    def run(
        self, model: nn.Module, example_input: Any, wanted: Budget | None, share: float | None, calibration: Any
    ) -> fx.GraphModule:
        """The compressed network with its result; `share` is what it must keep, where it takes the budget's place."""
        estimator, quality, clock = self.estimator, self.quality, StageClock(say=self.progress)
        with clock.stage("trace", "tracing the network"):
            graph = stages.trace(model, example_input)
        with clock.stage("spans", "looking for what can be merged"):
            spans = stages.spans(graph, **self.options)
        source: Backend | LatencyTable  # of latencies: measured here, or elsewhere
        if isinstance(self.latency, LatencyTable):
            source = self.latency
            chosen_backend(source, "", self.precision)
            check_table(spans, source)
        else:
            source = suited(chosen_backend(self.latency, stages.default_backend(graph), self.precision), graph)
        images = as_calibration(calibration, example_input)

        def profiled(some: SpanSet) -> LatencyTable:
            if isinstance(source, LatencyTable):
                return source
            if isinstance(source, OverShapes):
                return source.table(some, self.cache_dir, self.progress)
            return stages.profile(
                graph, source, spans=some, cache_dir=self.cache_dir, progress=self.progress, calibrate=False
            )

        # What plans are judged by; None where they are not.
        judging = quality if isinstance(estimator, Reconstruction) and len(images) >= LEAST_JUDGED else None
        if share is not None and judging is None:
            raise OptionError(
                f"keep={share:g} is measured, on at least {LEAST_JUDGED} calibration images (there are {len(images)}), "
                "with importance='reconstruction' and a quality: pass calibration=, or a budget instead"
            )
        keeps: Keeps | None = None  # what says how much is kept, where that chose the plan
        with clock.stage("profile", f"the original on {_named(source)}, and the merges that lose nothing"):
            found = None if wanted is None else _loss_free(graph, spans, profiled, source, wanted, example_input)
        same = MergePlan((), fingerprint(graph))
        if found is None and wanted is not None and wanted.kind != "ms" and wanted.value == 1:
            unchanged = stages.rewrite(graph, same, spans=spans)
            return finished(graph, unchanged, spans, wanted, source, self.merge, None, images, share, clock)
        if not any(c.realization != "keep" for c in spans):
            raise _nothing_to_merge(type(model).__name__, spans, source, example_input)
        case = _Case(graph, spans, source, images, example_input, judging, clock)
        options: Sequence[Found | Predicted]
        if found is None:
            count = sum(c.realization != "keep" for c in spans)
            with clock.stage("profile", f"latencies of {count} candidates on {_named(source)}"):
                table = profiled(spans)
            options, keeps = self.planned(case, table, wanted, share)
        else:
            options = [found]
        found, student = self.best(case, options, share, keeps)
        lossy = any(not c.exact for c in found.plan.candidates)
        if self.recover is not None and lossy:
            with clock.stage("recover", f"training without labels for {self.recover}"):
                recover_student(student, graph, images, minutes=self.recover, progress=self.progress)
        with clock.stage("merge"):
            net = stages.merge(student) if self.merge else student
        other = None
        if self.beside and lossy and judging is not None and isinstance(found, Found) and _takes_other_sizes(source):
            assert not isinstance(source, LatencyTable)
            with clock.stage("smaller input", "what a smaller input alone would keep"):
                judge_on = images.roles().judge
                other = smaller_input(model, graph, example_input, judge_on, source, found.ratio, found.original)
        return finished(graph, net, spans, wanted, source, self.merge, found, images, share, clock, other)

    def planned(
        self, case: _Case, table: LatencyTable, wanted: Budget | None, share: float | None
    ) -> tuple[Sequence[Found | Predicted], Keeps | None]:
        """Plans of which one will be the best, and what says how much of the original is kept where that chose them."""
        session, judged = None, None
        with case.clock.stage("score", f"what candidates would cost in quality, on {len(case.images)} images"):
            if case.judging is not None and isinstance(self.estimator, Reconstruction):
                session = self.estimator.session(case.spans, stages.worth_scoring(case.spans, table), case.images)
            scores = self.scores(case.graph, session or self.estimator, case.images, case.spans, table, wanted)
        with case.clock.stage("solve"):
            frontier = stages.solve(case.graph, table, scores, spans=case.spans, surrogate=self.surrogate)
        with case.clock.stage("judge plans", "building plans, measuring and judging them"):
            if session is not None and case.judging is not None:
                judged = Judged(
                    case.spans, table, scores, session, case.images, case.judging, self.surrogate, self.progress
                )
            if wanted is None:
                assert judged is not None and share is not None
                keeps = self.judging(case, keeping_judge(judged))
                return [_that_keeps(judged, frontier, share, case.source, case.example, keeps)], keeps
            if isinstance(case.source, LatencyTable):
                known = predict_plan(frontier, wanted)
                limit = wanted.resolve(frontier.original)
                return [known] if judged is None else best_predicted(judged, known, limit), None
            found = find_plan(case.graph, frontier, wanted, case.source, case.example, self.progress)
            part = wanted.resolve(found.original) / found.original
            if judged is None:
                return [found], None
            return best_measured(judged, found, case.source, case.example, part), None

    def judging(self, case: _Case, judge: Judge) -> Keeps:
        """What judges students in the precision that they will run in."""
        if precision_of(case.source) == "int8" and self.merge:
            return Int8Keeps(judge, case.images, case.example, case.source)
        return judge

    def best(
        self, case: _Case, options: Sequence[Found | Predicted], share: float | None, keeps: Keeps | None
    ) -> tuple[Found | Predicted, fx.GraphModule]:
        """The plan whose student loses least once it is refitted, and that student."""
        roles = case.images.roles()
        work = multiply_accumulates(case.spans.network) * len(roles.fit)
        size = sum(p.numel() for p in case.graph.parameters())
        refits = 1 + sum(work <= macs and size <= most for macs, most in MOST_REFITTED)
        if not self.refit or case.judging is None:
            refits = 1
        options = options[:refits]
        judge = self.judging(case, Judge(case.graph, roles.comparing())) if len(options) > 1 else None
        best: tuple[float, Found | Predicted, fx.GraphModule] | None = None
        for found in options:
            with case.clock.stage("rewrite", "fitting a plan"):
                student = stages.rewrite(
                    case.graph, found.plan, calibration=roles.fit, spans=case.spans, progress=self.progress
                )
            if self.refit and case.judging is not None and any(not c.exact for c in found.plan.candidates):
                with case.clock.stage("refit", "refitting the layers that it keeps"):
                    student = self.refitted(case, student, share, keeps)
            if judge is None or case.judging is None:
                return found, student
            loss = judge(student).loss(case.judging)
            if best is None or loss < best[0]:
                best = loss, found, student
        assert best is not None
        return best[1:]

    def refitted(
        self, case: _Case, student: fx.GraphModule, share: float | None, keeps: Keeps | None
    ) -> fx.GraphModule:
        """The student with its layers refitted; as it was where a promised share would be lost."""
        roles, made, options = case.images.roles(), made_of(student), case.spans.options
        assert made is not None and case.judging is not None  # its plan says which channels stay
        choosing = Choosing(judge := Judge(case.graph, roles.choose), case.judging)
        globs = Globs(case.graph, options.include, options.exclude)
        mended = refit_layers(student, case.graph, roles.fit, choosing, made.plan, self.progress, globs)
        set_scale(mended, judge, lambda name: not globs.leaves(name))
        # A lower loss may come with another arg-max here and there, and the share was promised.
        if share is None or keeps is None or keeps(mended).kept >= min(share, keeps(student).kept):
            return mended
        return student

    def scores(
        self,
        graph: fx.GraphModule,
        estimator: Estimator,
        images: Calibration,
        spans: SpanSet,
        table: LatencyTable,
        budget: Budget | None,
    ) -> ImportanceTable:
        """Importances of all candidates; of a network in which that takes long, of those that the budget depends on."""
        options: dict[str, Any] = {
            "calibration": images,
            "spans": spans,
            "cache_dir": self.cache_dir,
            "executor": self.executor,
        }
        if not isinstance(estimator, ReconstructionSession) or not estimator.heavy:
            return stages.score(graph, estimator, latency=table, progress=self.progress, **options)
        free = {c.key: 0.0 for c in stages.worth_scoring(spans, table)}
        anything = stages.solve(graph, table, ImportanceTable(free, {}), spans=spans)
        fastest = float(anything.latency[0]) / anything.original
        share = 1.0 if budget is None else budget.resolve(anything.original) / anything.original
        asked = KEEP_SHARES if budget is None else (share, BELOW * share)
        shares = [s for s in asked if fastest <= s <= 1] or [fastest]
        # A fit from few pixels may be worse than the identity that it could be, so drops are not bounded by it.
        drops = [c for c in spans if c.realization == "drop"]
        found = score_on_demand(
            graph, estimator, table, shares, width=WIDTH, first=drops, progress=self.progress, **options
        )
        return found.table


def _takes_other_sizes(source: Backend | LatencyTable) -> bool:
    """Whether a network for images of another size can be measured as this one is."""
    return not isinstance(source, (LatencyTable, OverShapes)) and precision_of(source) != "int8"


def _loss_free(
    graph: fx.GraphModule,
    spans: SpanSet,
    profiled: Callable[[SpanSet], LatencyTable],
    source: Backend | LatencyTable,
    budget: Budget,
    example_input: Any,
) -> Found | Predicted | None:
    """The fastest plan that loses nothing, if it is within the budget: nothing has to be scored for it."""
    if not any(c.exact for c in spans):
        return None
    free = replace(spans, candidates=tuple(c for c in spans if c.exact or c.realization == "keep"))
    frontier = stages.solve(graph, profiled(free), ImportanceTable({}, {}), spans=free)
    if isinstance(source, LatencyTable):
        return predict_loss_free(frontier, budget)
    return find_loss_free(graph, frontier, budget, source, example_input)


def _that_keeps(
    judged: Judged,
    frontier: Frontier,
    share: float,
    source: Backend | LatencyTable,
    example_input: Any,
    keeps: Keeps,
) -> Found | Predicted:
    """The fastest plan that keeps a share, with its latency: measured, or predicted where nothing is measured."""
    kept = fastest_that_keeps(judged, frontier, share, keeps)
    predicted = frontier.line(kept.proposal.sum)
    plan = replace(kept.proposal.plan, latency=predicted)
    if isinstance(source, LatencyTable):
        return Predicted(len(frontier) - 1, plan, frontier, predicted, frontier.original)
    original = median(time_wholes(source, [bare(judged.analysis.graph, example_arguments(example_input))])[0])
    ratio = measure_plan(judged.analysis, plan, source, example_input, original)
    if ratio >= 1:  # what is not faster is not worth what it loses
        plan, ratio, predicted = MergePlan((), plan.fingerprint), 1.0, original
    return Found(len(frontier) - 1, plan, frontier, predicted, ratio * original, original, ratio)


def _nothing_to_merge(
    name: str, spans: SpanSet, source: Backend | LatencyTable, example_input: Any
) -> InfeasibleBudget:
    if isinstance(source, LatencyTable):
        reached = source.total() if source.calibration is None else source.predict()
    else:
        network = bare(spans.network.gm, example_arguments(example_input))
        reached = median(time_wholes(source, [network])[0])
    reasons = "; ".join(str(r) for r in spans.refusals[:3])
    return InfeasibleBudget(
        f"nothing in {name} can be merged, so it stays at {reached:.4g} ms (100.0%): {reasons}. "
        "See lmfx.spans(graph).refusals",
        reached,
        reached,
    )


def _named(source: Backend | LatencyTable) -> str:
    return f"a table of {runtime_of(source).get('backend')}" if isinstance(source, LatencyTable) else source.name
