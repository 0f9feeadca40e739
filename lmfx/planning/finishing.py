"""Finishes a compression: judges the network, in 8 bits where it runs so, and attaches its result.

merged network ─▶ Q/DQ form, where it runs in 8 bits ─▶ quality on images that nothing saw ─▶ errors of its spans
               ─▶ `Result`, with all that a report and a saved folder need
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx, nn

from lmfx.budget import Budget
from lmfx.calibration.images import Calibration
from lmfx.environment.effort import StageClock
from lmfx.int8.compressed import Int8Form, Int8Judge, int8_form
from lmfx.latency import Backend, LatencyTable
from lmfx.latency.carried_table import Predicted, runtime_of
from lmfx.latency.chosen_backend import precision_of
from lmfx.made_of import made_of, set_made_of
from lmfx.passes.errors import ModelError
from lmfx.passes.model.memory_format import like
from lmfx.passes.model.trace_facts import note, noted
from lmfx.passes.rewrite.trainable import span_names
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.planning.search import Found
from lmfx.quality import Judge, Quality
from lmfx.quality.measures import Alternative
from lmfx.quality.span_errors import span_errors
from lmfx.result import Evidence, Result

__all__ = ["finished"]


def _quality(
    graph: fx.GraphModule, net: Any, images: Calibration, form: Int8Form | None = None, feeds: Any = None
) -> Quality | None:
    """What a network, or its 8-bit form, keeps of the original, on images that nothing else saw; None if its output is
    none by image."""
    roles = images.roles()
    try:
        judge = Judge(graph, roles.judge, held_out=not roles.seen)
    except ModelError:
        return None
    return judge(net) if form is None else judge.of(Int8Judge(judge).outputs(form.model, feeds))


def finished(
    graph: fx.GraphModule,
    net: fx.GraphModule,
    spans: SpanSet,
    budget: Budget | None,
    source: Backend | LatencyTable,
    merged: bool,
    found: Found | Predicted | None,
    images: Calibration,
    keep: float | None,
    clock: StageClock,
    other: Alternative | None = None,
) -> fx.GraphModule:
    """Attach the result, and drop what only the compiler needed. `other` is another way to be as fast."""
    made = made_of(net)
    assert made is not None
    plan = made.plan
    changed = {name for c in plan.candidates for name in c.all_convs}
    network = spans.network
    every = [n for r in network.regions for n in network.convs(r.series.layers)[1]]
    convs = [network.path(n) for n in every if not isinstance(network.module(n), nn.Linear)]
    int8, form, feeds = None, None, None
    if merged and precision_of(source) == "int8":
        with clock.stage("quantize", "quantizing it"):
            form, int8, feeds = int8_form(net.train(False), images, noted(graph).example, source, graph)
    with clock.stage("judge the result", "judging the result"):
        quality = _quality(graph, net.train(False), images, form, feeds)
    names = tuple(span_names(graph, plan))
    line = found.frontier.line if found else None
    with clock.stage("look at the spans"):
        errors = span_errors(graph, net, plan, names, images.roles().judge) if plan.candidates else ()
    evidence = Evidence(
        spans=spans,
        model=type(graph).__name__,
        parameters=(sum(p.numel() for p in graph.parameters()), sum(p.numel() for p in net.parameters())),
        errors=errors,
        measured=tuple((line(s), whole) for s, whole in found.seen) if line and isinstance(found, Found) else (),
    )
    result = Result(
        plan=plan,
        budget=budget,
        merged=merged,
        backend=runtime_of(source) if isinstance(source, LatencyTable) else dict(source.identity()),
        names=names,
        refusals=spans.refusals,
        kept=tuple(name for name in dict.fromkeys(convs) if name not in changed),
        candidates=len(spans),
        images=len(images),
        predicted=found.predicted if found else None,
        measured=found.measured if found else None,
        original=found.original if found else None,
        ratio=found.ratio if found else None,
        line=line,
        inputs=noted(graph).inputs,
        frontier=found.frontier if found else None,
        quality=quality,
        alternatives=() if other is None else (other,),
        keep=keep,
        int8=int8,
        effort=clock.effort(),
        evidence=evidence,
    )
    like(net, graph)
    note(net, noted(graph).of_result())
    set_made_of(net, replace(made, result=result, int8=form))
    return net
