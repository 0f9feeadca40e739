"""`compress`: trace, enumerate, measure, score, solve, search the budget, rewrite, fit, merge."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from torch import fx, nn

from lmfx import stages
from lmfx.budget import Budget
from lmfx.calibration.images import LEAST_JUDGED, Calibration, as_calibration
from lmfx.calibration.model_checks import check_run_options, span_options
from lmfx.calibration.refitting import refit as refit_layers
from lmfx.environment.caller_state import entry
from lmfx.importance import Estimator, ImportanceTable, Reconstruction, get_estimator
from lmfx.importance.on_demand import score_on_demand
from lmfx.importance.pool import ExecutorLike
from lmfx.importance.reconstruction import ReconstructionSession
from lmfx.latency import Backend, LatencyTable, get_backend
from lmfx.latency.carried_table import Predicted, check_table, predict_loss_free, predict_plan, runtime_of
from lmfx.latency.whole_times import time_wholes
from lmfx.made_of import made_of, set_made_of
from lmfx.passes.errors import BudgetError, InfeasibleBudget, OptionError, QualityError
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.ir import MergePlan, Realization, Surrogate
from lmfx.passes.model.trace_facts import note, noted
from lmfx.passes.rewrite.trainable import span_names
from lmfx.passes.spans.enumeration import Method, Norm, SpanSet
from lmfx.passes.trace.tracing import example_arguments, fingerprint
from lmfx.planning.frontier import Frontier
from lmfx.planning.judged import Judged
from lmfx.planning.keeping import fastest_that_keeps, parse_keep
from lmfx.planning.search import Found, find_loss_free, find_plan, measure_plan
from lmfx.quality import Choosing, Judge, Quality, QualityName, QualityWarning
from lmfx.quality.measures import NAMES
from lmfx.result import Result, result_of
from lmfx.training.recovery import recover as recover_student
from lmfx.training.recovery_clock import seconds_of

__all__ = ["compress"]

KEEP_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # budgets that are looked at where none is given
WIDTH, BELOW = 3, 0.93  # candidates a round of scoring on demand; the second budget that it looks at, of the first


@entry
def compress(
    model: nn.Module,
    example_input: Any,
    budget: Budget | float | str | None = None,
    *,
    keep: float | str | None = None,
    calibration: Any = None,
    latency: str | Backend | LatencyTable | None = None,
    importance: str | Estimator | ImportanceTable = "reconstruction",
    realize: tuple[Realization, ...] = ("compose", "fit"),
    max_kernel_size: int | None = 7,
    max_span_convs: int | None = 12,
    surrogate: Surrogate = "affine",
    method: Method = "layermerge",
    norm: Norm = "affine",
    activation_after: str | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    executor: ExecutorLike = None,
    cache_dir: str | os.PathLike[str] | None = None,
    merge: bool = True,
    quality: QualityName | None = "auto",
    refit: bool = True,
    recover: float | str | None = None,
    progress: bool = True,
) -> fx.GraphModule:
    """`model` with fewer, merged convolutions, whose *measured* latency is within `budget`. `model` is not changed.

    Args:
        model: any network that torch.fx or torch.export can trace, in eval mode.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments, with the batch size to optimise.
        budget: 0.6 or "60%" of the original's latency, "2x" as fast, or "4.5ms". A plan that loses nothing is taken
            wherever it is within the budget; 1.0 does that at most.
        keep: the share of what the original does that must be left, 0.98 or "98%" (agreement of the arg-max, or 1 -
            divergence where nothing is a score). In place of a budget: the fastest network that keeps it. With one: a
            network that keeps less is an error.
        calibration: unlabelled images, a tensor (images, ...) or a loader of batches; without it the example stands in.
        latency: backend to measure on, "onnxruntime" (default on a CPU), "torch" (default on a GPU), "tensorrt",
            "roofline", or a backend object; or a `LatencyTable` of `lmfx.profile` that was measured elsewhere: then
            nothing is measured here, and the budget is met by prediction.
        importance: "reconstruction", "magnitude", an estimator object like `Finetune(train, evaluate)`, or a table that
            `lmfx.score` or `lmfx.score_on_demand` gave for this network.
        realize: which realizations may be used: "compose" (tensor algebra), "fit" (closed-form least squares).
        max_kernel_size: of merged convs; None for no bound.
        max_span_convs: how many convs of the main path one merged conv may replace; None for no bound.
        surrogate: what a composed span has for the activations it removes: "affine" or "identity" (the paper).
        method: what may be done to a span: "layermerge" (all), "depth" (activations are removed, all convs are merged:
            Kim et al. 2023), "layeronly" (single convs are removed, nothing is merged), "exact" (what loses nothing).
        norm: what becomes of a norm inside a composed span whose statistics come from the map, like GroupNorm: "affine"
            (its average on the calibration images) or "post" (it moves to after the merged conv, as the paper has it).
        activation_after: an activation, like "relu6", after merged convs whose span ended without one.
        include, exclude: globs of module names that may, or may not, be touched; the name of a container covers what
            is in it, and a glob that covers nothing is an error.
        executor: runs the fits of different spans, or the rows of `Finetune`, side by side (or a function that makes
            an executor).
        cache_dir: where measurements are kept (default: the user's cache); a second budget reuses them.
        merge: False gives the trainable form; `lmfx.merge` makes the deploy form of it.
        quality: what plans are chosen by, on calibration images that no fit saw: "auto" (KL of scores, divergence of
            other outputs), "kl", "agreement" (of the arg-max), "psnr" (of maps) or "divergence"; None takes the plan
            of best importance, and judges none. Plans are judged with importance="reconstruction", from 16 images on.
        refit: set the layers that the plan keeps anew, in closed form, where judged images say that it helps; needs
            what `quality` needs.
        recover: minutes, or a text like "3min" or "90s", of label-free training on the calibration images
            (`lmfx.recover`); what judges the result is not trained on.
        progress: show progress bars on stderr.

    Returns an ordinary GraphModule in eval mode; `lmfx.report` tells what was done. Raises subclasses of `LmfxError`,
    `InfeasibleBudget` (with the fastest latency reached) if no plan is fast enough.
    """
    share = None if keep is None else parse_keep(keep)
    if budget is None and share is None:
        raise BudgetError("say how fast the network must be, budget=0.6, or what it must keep, keep=0.98")
    wanted = None if budget is None else Budget.parse(budget)
    if surrogate not in ("affine", "identity"):
        raise OptionError(f"surrogate={surrogate!r}: use 'affine' or 'identity'")
    if quality is not None and quality not in NAMES:
        raise OptionError(f"quality={quality!r}: use one of {', '.join(map(repr, NAMES))}, or None")
    if recover is not None:
        seconds_of(recover)  # said before anything is traced
    options: dict[str, Any] = {
        "realize": realize,
        "max_kernel_size": max_kernel_size,
        "max_span_convs": max_span_convs,
        "max_fit_convs": max_span_convs,
        "method": method,
        "norm": norm,
        "activation_after": activation_after,
        "include": include,
        "exclude": exclude,
    }
    span_options(**options)  # said before anything is traced
    check_run_options(executor, cache_dir)
    estimator = get_estimator(importance, **({"surrogate": surrogate} if importance == "reconstruction" else {}))

    graph = stages.trace(model, example_input)
    spans = stages.spans(graph, **options)
    source: Backend | LatencyTable  # of latencies: measured here, or elsewhere
    if isinstance(latency, LatencyTable):
        source = latency
        check_table(spans, source)
    else:
        source = get_backend(latency if latency is not None else stages.default_backend(graph))
    images = as_calibration(calibration, example_input)

    def profiled(some: SpanSet) -> LatencyTable:
        if isinstance(source, LatencyTable):
            return source
        return stages.profile(graph, source, spans=some, cache_dir=cache_dir, progress=progress, calibrate=False)

    session = None
    if quality is not None and isinstance(estimator, Reconstruction) and len(images) >= LEAST_JUDGED:
        session = estimator.session(spans, list(spans), images)

    if share is not None and session is None:
        raise OptionError(
            f"keep={keep!r} is measured, on at least {LEAST_JUDGED} calibration images (there are {len(images)}) and "
            "with importance='reconstruction' and a quality: pass calibration=, or a budget instead"
        )
    found = None if wanted is None else _loss_free(graph, spans, profiled, source, wanted, example_input)
    same = MergePlan((), fingerprint(graph))
    if found is None and wanted is not None and wanted.kind != "ms" and wanted.value == 1:
        return _finish(graph, stages.rewrite(graph, same, spans=spans), spans, wanted, source, merge, None, images)
    if not any(c.realization != "keep" for c in spans):
        raise _nothing_to_merge(type(model).__name__, spans, source, example_input)
    if found is None:
        table = profiled(spans)
        scores = _scores(graph, session or estimator, images, spans, table, wanted, cache_dir, executor, progress)
        frontier = stages.solve(graph, table, scores, spans=spans, surrogate=surrogate)
        judged = None
        if session is not None and quality is not None:
            judged = Judged(spans, table, scores, session, images, quality, surrogate, progress)
        if wanted is None:
            assert judged is not None and share is not None
            found = _that_keeps(judged, frontier, share, source, example_input)
        elif isinstance(source, LatencyTable):
            found = predict_plan(frontier, wanted)
            if judged is not None:
                found = judged.better_predicted(found, wanted.resolve(frontier.original))
        else:
            found = find_plan(graph, frontier, wanted, source, example_input, progress)
            if judged is not None:
                found = judged.better(found, source, example_input, wanted.resolve(found.original) / found.original)
    student = stages.rewrite(graph, found.plan, calibration=images.roles().fit, spans=spans, progress=progress)
    if refit and session is not None and quality is not None and any(not c.exact for c in found.plan.candidates):
        roles = images.roles()
        choosing = Choosing(Judge(graph, roles.choose), quality)
        student = refit_layers(student, graph, roles.fit, choosing, found.plan, progress)
    if recover is not None and any(not c.exact for c in found.plan.candidates):
        recover_student(student, graph, images, minutes=recover, progress=progress)
    net = stages.merge(student) if merge else student
    made = _finish(graph, net, spans, wanted, source, merge, found, images, share)
    _check_kept(made, share, wanted)
    return made


def _check_kept(net: fx.GraphModule, share: float | None, budget: Budget | None) -> None:
    """Raises `QualityError` for a network within a budget that keeps less than was asked for."""
    quality = result_of(net).quality
    assert quality is not None
    if share is not None and budget is not None and quality.kept < share:
        raise QualityError(
            f"within the budget {budget} the best network keeps {quality.kept:.1%} of what the original does, and "
            f"keep={share:g} was asked for ({quality}, on {quality.images} images): allow a larger budget, keep less, "
            "or leave budget= out for the fastest network that keeps so much"
        )


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


def _scores(
    graph: fx.GraphModule,
    estimator: Estimator,
    images: Calibration,
    spans: SpanSet,
    table: LatencyTable,
    budget: Budget | None,
    cache_dir: str | os.PathLike[str] | None,
    executor: ExecutorLike,
    progress: bool,
) -> ImportanceTable:
    """Importances of all candidates, or, of a network in which that takes long, of those that the budget depends on."""
    options: dict[str, Any] = {"calibration": images, "spans": spans, "cache_dir": cache_dir, "executor": executor}
    if not isinstance(estimator, ReconstructionSession) or not estimator.heavy:
        return stages.score(graph, estimator, latency=table, progress=progress, **options)
    free = {c.key: 0.0 for c in stages.worth_scoring(spans, table)}
    anything = stages.solve(graph, table, ImportanceTable(free, {}), spans=spans)
    fastest = float(anything.latency[0]) / anything.original
    share = 1.0 if budget is None else budget.resolve(anything.original) / anything.original
    asked = KEEP_SHARES if budget is None else (share, BELOW * share)
    shares = [s for s in asked if fastest <= s <= 1] or [fastest]
    # A fit from few pixels may be worse than the identity that it could be, so drops are not bounded by it.
    drops = [c for c in spans if c.realization == "drop"]
    found = score_on_demand(graph, estimator, table, shares, width=WIDTH, first=drops, progress=progress, **options)
    return found.table


def _that_keeps(
    judged: Judged, frontier: Frontier, share: float, source: Backend | LatencyTable, example_input: Any
) -> Found | Predicted:
    """The fastest plan that keeps a share, with its latency: measured, or predicted where nothing is measured."""
    kept = fastest_that_keeps(judged, frontier, share)
    predicted = frontier.line(kept.proposal.sum)
    plan = replace(kept.proposal.plan, latency=predicted)
    if isinstance(source, LatencyTable):
        return Predicted(len(frontier) - 1, plan, frontier, predicted, frontier.original)
    original = median(time_wholes(source, [bare(judged.analysis.graph, example_arguments(example_input))])[0])
    ratio = measure_plan(judged.analysis, plan, source, example_input, original)
    if ratio >= 1:  # what is not faster is not worth what it loses
        plan, ratio, predicted = MergePlan((), plan.fingerprint), 1.0, original
    return Found(len(frontier) - 1, plan, frontier, predicted, ratio * original, original, ratio)


def _quality(graph: fx.GraphModule, net: Any, images: Calibration) -> Quality:
    """What a network keeps of the original, on images that nothing else saw. Warns if that is little."""
    roles = images.roles()
    found = Judge(graph, roles.judge, held_out=not roles.seen)(net)
    if found.collapsed:
        warnings.warn(
            f"the compressed network no longer does what the original did ({found}, on {found.images} images): allow a "
            "larger budget, train it (lmfx.recover, lmfx.distill), or keep layers with exclude=",
            QualityWarning,
            stacklevel=5,  # the caller of compress
        )
    return found


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


def _finish(
    graph: fx.GraphModule,
    net: fx.GraphModule,
    spans: SpanSet,
    budget: Budget | None,
    source: Backend | LatencyTable,
    merged: bool,
    found: Found | Predicted | None,
    images: Calibration,
    keep: float | None = None,
) -> fx.GraphModule:
    """Attach the result, and drop what only the compiler needed."""
    made = made_of(net)
    assert made is not None
    plan = made.plan
    changed = {name for c in plan.candidates for name in c.all_convs}
    network = spans.network
    every = [n for r in network.regions for n in network.convs(r.series.layers)[1]]
    convs = [network.path(n) for n in every if not isinstance(network.module(n), nn.Linear)]
    result = Result(
        plan=plan,
        budget=budget,
        merged=merged,
        backend=runtime_of(source) if isinstance(source, LatencyTable) else dict(source.identity()),
        names=tuple(span_names(graph, plan)),
        refusals=spans.refusals,
        kept=tuple(name for name in dict.fromkeys(convs) if name not in changed),
        candidates=len(spans),
        images=len(images),
        predicted=found.predicted if found else None,
        measured=found.measured if found else None,
        original=found.original if found else None,
        ratio=found.ratio if found else None,
        line=found.frontier.line if found else None,
        inputs=noted(graph).inputs,
        frontier=found.frontier if found else None,
        quality=_quality(graph, net.train(False), images),
        keep=keep,
    )
    note(net, noted(graph).of_result())
    set_made_of(net, replace(made, result=result))
    return net
