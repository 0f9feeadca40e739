"""The stages of `compress` as functions of a traced graph: spans, profile, score, solve, rewrite, merge."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from lmfx.calibration.divergence import Divergence
from lmfx.calibration.images import as_calibration
from lmfx.calibration.model_checks import check_batched, check_model, check_run_options, check_traced, span_options
from lmfx.calibration.refitting import LEAST_IMAGES, split_to_judge
from lmfx.calibration.refitting import refit as refit_student
from lmfx.calibration.students import Students
from lmfx.environment.caller_state import entry, ordinary
from lmfx.importance import Estimator, ImportanceTable, get_estimator
from lmfx.importance.base import check_made_for
from lmfx.importance.pool import ExecutorLike
from lmfx.latency import Backend, LatencyTable, Store, get_backend
from lmfx.latency.cache_state import suited
from lmfx.latency.carried_table import check_table
from lmfx.latency.profiling import profile_spans
from lmfx.latency.whole_networks import calibrate_table
from lmfx.made_of import MadeOf, made_of, set_made_of
from lmfx.passes.errors import InputError, PlanError, TableError
from lmfx.passes.identity.fingerprint import Origin
from lmfx.passes.ir import Candidate, MergePlan, Surrogate
from lmfx.passes.model.trace_facts import note, noted
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.passes.rewrite.siblings import merge_siblings as merge_sibling_convs
from lmfx.passes.rewrite.trainable import merge as merge_spans
from lmfx.passes.spans.enumeration import SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.programs import Model, as_module
from lmfx.passes.trace.tracing import trace as trace_graph
from lmfx.planning.frontier import Frontier, solve_spans

__all__ = [
    "default_backend",
    "merge",
    "merge_siblings",
    "profile",
    "rewrite",
    "score",
    "solve",
    "spans",
    "trace",
    "worth_scoring",
]


@entry
def rewrite(
    graph: fx.GraphModule,
    plan: MergePlan,
    *,
    calibration: Any = None,
    spans: SpanSet | None = None,
    refit: bool = False,
    progress: bool = False,
) -> fx.GraphModule:
    """The trainable form of a traced graph under a plan; `graph` is not changed, `lmfx.merge` makes the deploy form.

    Fitted convs and affine surrogates are set from `calibration` (a tensor of images or a loader; without it the
    example that the graph was traced with stands in). `spans` of this graph save analysing it again. With `refit` every
    layer is fitted to what it reads in the student, judged by a fourth of the images or less, of which no fit sees any;
    it takes eight images or more. Raises `PlanError` if the plan was made for another graph.
    """
    if not isinstance(plan, MergePlan):
        raise PlanError(f"rewrite takes a MergePlan, like frontier.at(0.6), not a {type(plan).__name__}")
    check_traced(graph, "rewrite")
    images = as_calibration(calibration, noted(graph).example)
    same = spans is not None and spans.network.gm is graph
    analysis = Analysis.of(spans.network) if spans is not None and same else Analysis(graph)
    apart = refit and len(images) >= LEAST_IMAGES
    fitted, held = split_to_judge(images) if apart else (images, None)
    students = Students(analysis, fitted)
    plan = students.completed(plan)
    student = students.student(plan, share_tensors=False, progress=progress)
    if held is not None:
        student = refit_student(student, graph, fitted, Divergence(graph, held), plan, progress)
    set_made_of(student, MadeOf(plan, Origin.of(graph)))
    return student


@entry
def merge(student: fx.GraphModule) -> fx.GraphModule:
    """The deploy form of a trainable network: every `LinearSpan` becomes its single conv. `student` is not changed.

    Raises `InputError` for anything but a GraphModule.
    """
    if not isinstance(student, fx.GraphModule):
        raise InputError(
            f"merge takes the trainable form from lmfx.compress(..., merge=False) or lmfx.rewrite, not a "
            f"{type(student).__name__}"
        )
    net = merge_spans(student)
    made = made_of(student)
    if made is not None and made.result is not None:
        # From the student itself: a copy of its result has neither the frontier nor the table.
        set_made_of(net, replace(made, result=replace(made.result, merged=True)))
    return net


@entry
def merge_siblings(net: fx.GraphModule) -> fx.GraphModule:
    """A copy of a traced or compressed network in which convolutions that read one value are one, its output split.

    The function stays the same. Whether it is faster depends on the runtime: measure it. It is the last step before
    export: the copy is no longer the network of a plan, so `lmfx.save` takes `net`, not the copy. Raises `InputError`
    for anything but a GraphModule.
    """
    if not isinstance(net, fx.GraphModule):
        raise InputError(f"merge_siblings takes a network from lmfx.compress or lmfx.trace, not a {type(net).__name__}")
    merged = merge_sibling_convs(net)
    note(merged, None)
    set_made_of(merged, None)
    return merged


@entry
def trace(model: Model, example_input: Any) -> fx.GraphModule:
    """`model` as a GraphModule in canonical form, checked against it on the example; `model` is not changed.

    `example_input` is a tensor, a tuple of positional or a dict of keyword arguments. Raises `ModelError`,
    `InputError` or `DeviceError` for what cannot be compressed, `TraceError` if no tracer gives an equal graph.
    """
    model = as_module(model)
    example_input = ordinary(example_input)
    check_model(model, example_input)
    graph = trace_graph(model, example_input)
    check_batched(graph)
    note(graph, replace(noted(graph), example=example_input))
    return graph


@entry
def spans(graph: fx.GraphModule, **options: Any) -> SpanSet:
    """Every candidate and every refusal of a traced graph. `options` are the fields of `SpanOptions`."""
    check_traced(graph, "spans")
    return enumerate_spans(Network(graph), span_options(**options))


def _candidates(graph: fx.GraphModule, given: SpanSet | None) -> SpanSet:
    """What the argument `spans` of a stage stands for: the one given, or all of the graph."""
    return spans(graph) if given is None else given


def default_backend(graph: nn.Module) -> str:
    """`torch` for a network on a GPU, else `onnxruntime`."""
    first = next(graph.parameters(), None)
    return "torch" if first is not None and first.device.type == "cuda" else "onnxruntime"


@entry
def profile(
    graph: fx.GraphModule,
    backend: str | Backend | None = None,
    *,
    spans: SpanSet | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    calibrate: bool = True,
    **options: Any,
) -> LatencyTable:
    """A latency (ms) for every candidate that may pay on `backend`; rows that the store has are not measured again.

    With `calibrate` some random plans are measured as whole networks, so that `LatencyTable.predict` and the frontier
    of `lmfx.solve` speak of whole networks; `LatencyTable.calibration` says how far they are off.
    `options` go to the backend (`threads=1`, ...). Each row is committed to `cache_dir` as it is made, so a run that is
    stopped goes on where it was.
    """
    check_traced(graph, "profile")
    check_run_options(cache_dir=cache_dir)
    candidates = _candidates(graph, spans)
    made = suited(get_backend(backend if backend is not None else default_backend(graph), **options), graph)
    with Store.open(cache_dir) as store:
        table = profile_spans(candidates, made, store, progress)
        whole = calibrate and made.name != "roofline"  # whose networks are sums by definition
        return calibrate_table(candidates, table, made, store, progress) if whole else table


def worth_scoring(spans: SpanSet, latency: LatencyTable) -> list[Candidate]:
    """The candidates that a plan could choose: those with a latency, of a composed and a fitted conv of one
    configuration only the fit, which costs the same and reconstructs at least as well, and none that is no faster than
    one of the same span that loses nothing."""
    present = [c for c in spans if c.key in latency]
    fitted = {_twin(c) for c in present if c.realization == "fit"}
    free: dict[tuple[str, int, int], float] = {}  # the fastest of each span that loses nothing
    for c in present:
        if c.exact:
            place = c.span.series, c.span.start, c.span.stop
            free[place] = min(free.get(place, math.inf), latency.ms(c.key))

    def worth(c: Candidate) -> bool:
        if c.exact or c.realization == "keep":
            return True
        if latency.ms(c.key) >= free.get((c.span.series, c.span.start, c.span.stop), math.inf):
            return False
        return c.realization != "compose" or _twin(c) not in fitted

    return [c for c in present if worth(c)]


def _twin(c: Candidate) -> tuple[Any, ...]:
    assert c.conv is not None
    return c.span.series, c.span.start, c.span.stop, c.conv.kernel_size, c.conv.dilation, c.conv.groups


@entry
def score(
    graph: fx.GraphModule,
    estimator: str | Estimator = "reconstruction",
    *,
    calibration: Any = None,
    spans: SpanSet | None = None,
    latency: LatencyTable | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    executor: ExecutorLike = None,
    progress: bool = True,
    **options: Any,
) -> ImportanceTable:
    """An importance for every candidate (higher is better, 0 keeps the network as it is).

    With `latency` only candidates that could be chosen are scored. `calibration` is a tensor of images or a loader;
    without it the example that the graph was traced with stands in. `executor` runs rows side by side: any executor of
    concurrent.futures, or a function that makes one. `options` go to the estimator.
    """
    check_traced(graph, "score")
    check_run_options(executor, cache_dir)
    candidates = _candidates(graph, spans)
    chosen: Sequence[Candidate] = candidates.candidates if latency is None else worth_scoring(candidates, latency)
    made = get_estimator(estimator, **options)
    data = as_calibration(calibration, noted(graph).example)
    with Store.open(cache_dir) as store:
        return made.score(candidates, chosen, data, store, progress, executor)


@entry
def solve(
    graph: fx.GraphModule,
    latency: LatencyTable,
    score: ImportanceTable,
    *,
    spans: SpanSet | None = None,
    surrogate: Surrogate = "identity",
) -> Frontier:
    """Every Pareto-optimal plan from one exact solve; `.at(budget)`, `len()`, iteration, `.plot()`.

    `surrogate` is what `lmfx.rewrite` puts in place of the activations that the plans' composed spans remove.
    """
    check_traced(graph, "solve")
    for table, kind, stage in ((latency, LatencyTable, "profile"), (score, ImportanceTable, "score")):
        if not isinstance(table, kind):
            raise TableError(f"solve needs a table of lmfx.{stage}, not a {type(table).__name__}")
    candidates = _candidates(graph, spans)
    check_table(candidates, latency)
    check_made_for(score.identity, candidates)
    return solve_spans(candidates, latency, score, surrogate=surrogate)
