"""`simplify`: every merge that loses nothing, chosen by count; no budget, no calibration and no measurement.

trace          the network in canonical form, of layers of one op each (`MergePlan.fine`)
spans          composed candidates that are the same function as their span (`passes/spans/exact.py`), with sums added
up in
               another order where that costs less (`passes/rewrite/regrouped_sums.py`)
solve          the set of them that costs least (`passes/spans/costs.py`), by the exact dynamic program
rewrite        merged in float64 and rounded, its nodes named as a new trace names them: simplified again, it is the
               same graph
check          in float64, against the model on the example and at another size (`lmfx/planning/equality.py`)
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lmfx.calibration.model_checks import span_options
from lmfx.environment.caller_state import entry
from lmfx.made_of import MadeOf, set_made_of
from lmfx.passes.errors import OptionError
from lmfx.passes.graph.node_facts import note_like
from lmfx.passes.identity.fingerprint import Origin
from lmfx.passes.ir import Candidate, MergePlan, Refusal, Series
from lmfx.passes.model.memory_format import like
from lmfx.passes.model.trace_facts import note, noted
from lmfx.passes.rewrite.regrouped_sums import groups, regrouped
from lmfx.passes.rewrite.trainable import span_names
from lmfx.passes.solve.dynamic_program import Chain, Entry, solve_chains
from lmfx.passes.spans.costs import adds_convs, kept_cost, layer_cost, merged_cost, merged_ops, span_ops
from lmfx.passes.spans.enumeration import SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.programs import Model, as_module
from lmfx.passes.trace.tracing import fingerprint
from lmfx.planning.equality import check_equal, in_double, merged_form, rounded
from lmfx.result import Evidence, Result
from lmfx.stages import trace

__all__ = ["simplify"]


@entry
def simplify(
    model: Model,
    example_input: Any,
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    growth: float = 1.0,
) -> fx.GraphModule:
    """`model` with all convolutions merged that can be without any loss: the same function, and fewer ops.

    Branches that meet in a sum or a concatenation (blocks made to be re-parameterised, asymmetric kernels), convs one
    after the other without an activation between, norms, scales, biases, pads and average pools around them. Nothing
    is measured, and nothing but the model and the example is needed. `model` is not changed.

    Args:
        model, example_input: as in `lmfx.compress`. The example's batch size does not matter, its image size may.
        include, exclude: globs of module names that may, or may not, be touched.
        growth: a merge is made if it takes fewer ops and no more convs, and the merged conv's multiply-adds and weights
            (of one image) are at most this many times those of all that it replaces. Of all sets of merges the cheapest
            is taken. So 1x1 convs of a bottleneck that would grow stay apart; math.inf merges them too.

    Returns an ordinary GraphModule in eval mode, that can be reported, saved, exported, trained and compressed;
    `lmfx.report` says what was merged, and what not and why. Simplified again it is the same graph (with a growth
    between 1 and infinity what has grown may grow again).

    Merging has been checked in float64, with an error below 1e-9 of the largest output, on the example and at another
    size where the model takes it: `VerifyError` if it differs. A model that only runs in its own dtype is compared in
    that, within 1e-3; the report, and `result_of(net).checked`, say which it was. Raises other subclasses of
    `LmfxError` as `compress` does.
    """
    if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not growth > 0:
        raise OptionError(f"growth={growth!r}: use a number above 0, like 1.0, or math.inf for no bound")
    options = span_options(realize=("compose",), method="exact", max_kernel_size=None, include=include, exclude=exclude)
    model = as_module(model)
    graph = trace(model, example_input)
    spans = enumerate_spans(Network(graph, fine=True), options)
    cost, chosen = cheapest(spans, float(growth))
    sums = groups(spans.network)
    if sums:
        others = enumerate_spans(Network(regrouped(graph, sums), fine=True), options)
        less, better = cheapest(others, float(growth))
        spans, chosen, sums = (others, better, sums) if less < cost else (spans, chosen, ())
    plan = MergePlan(tuple(chosen), fingerprint(graph), fine=True, sums=sums)
    doubled = in_double(graph)
    merged = merged_form(doubled, plan)
    net = _named_anew(rounded(merged, graph, plan))
    checked = check_equal(model, example_input, doubled, merged, net, plan)
    result = Result(
        plan=plan,
        budget=None,
        merged=True,
        backend={},
        names=tuple(span_names(graph, plan)),
        evidence=Evidence(spans, type(graph).__name__, (_size(graph), _size(net))),
        refusals=_refusals(spans, chosen, float(growth)),
        kept=_untouched(spans.network, chosen),
        candidates=sum(c.realization != "keep" for c in spans),
        inputs=noted(graph).inputs,
        checked=checked,
    )
    like(net.train(False), graph)
    note(net, noted(graph).of_result())
    set_made_of(net, MadeOf(plan, Origin.of(graph), result))
    return net


def _size(gm: fx.GraphModule) -> int:
    return sum(p.numel() for p in gm.parameters())


# --- what is merged ---------------------------------------------------------------------------------------------------


def cheapest(spans: SpanSet, growth: float = 1.0) -> tuple[float, list[Candidate]]:
    """The cost of the set of composed candidates that costs least, and the set in the order of the graph."""
    network = spans.network
    by_series: dict[str, list[Candidate]] = {}
    for c in spans:
        by_series.setdefault(c.span.series, []).append(c)

    calls = network.calls

    def chain(series: Series) -> Chain:
        # A run that is called before is decided there, with the cost of all calls.
        entries = [Entry(start, stop, 0.0, 0.0, None) for start, stop in calls.passed(series.name)]
        for c in by_series.get(series.name, []):
            if calls.role(series.name, c.span.start, c.span.stop) == "other":
                continue
            layers = series.layers[c.span.start : c.span.stop]
            if c.realization == "keep":
                parallel = layers[0].parallel
                branches = tuple(chain(b) for b in parallel.branches) if parallel else ()
                others = calls.others(series.name, c.span.start, c.span.stop)
                every = [layers[0], *(network.series[name].layers[i] for name, i, _ in others)]
                cost = sum(layer_cost(network, layer) for layer in every)
                entries.append(Entry(c.span.start, c.span.stop, cost, 0.0, c, branches))
            elif merged_ops(network, c) < span_ops(network, layers) and not adds_convs(network, c):
                # Half an op more: of two sets that cost the same the one of fewer changes.
                cost = sum(merged_cost(network, one) for one in c.each()) / growth + 0.5
                entries.append(Entry(c.span.start, c.span.stop, cost, 0.0, c))
        return Chain(entries, len(series.layers))

    found = solve_chains([chain(region.series) for region in network.regions])
    order = {name: i for i, name in enumerate(network.nodes)}
    chosen = [c for c in found.choice(0) if isinstance(c, Candidate) and c.realization != "keep"]
    return float(found.latency[0]), sorted(chosen, key=lambda c: order[c.span.exit])


def _refusals(spans: SpanSet, chosen: list[Candidate], growth: float) -> tuple[Refusal, ...]:
    """Why spans were not merged: what enumeration says, and those that would cost more."""
    network = spans.network
    taken = {name for c in chosen for name in c.all_convs}
    found = [r for r in spans.refusals if not r.reason.startswith("nothing to merge")]
    for c in spans:
        if c.realization == "keep" or (c.all_convs and taken.issuperset(c.all_convs) and len(c.all_convs) == 1):
            continue
        layers = network.series[c.span.series].layers[c.span.start : c.span.stop]
        ratio = merged_cost(network, c) / max(kept_cost(network, layers), 1.0)
        if ratio > growth:
            reason = f"one conv would cost {ratio:.1f} times its parts (multiply-adds and weights; growth={growth:g})"
            found.append(Refusal(reason, (c.span.entry, c.span.output)))
    return tuple(dict.fromkeys(found))


def _untouched(network: Network, chosen: list[Candidate]) -> tuple[str, ...]:
    changed = {name for c in chosen for name in c.all_convs}
    every = [n for r in network.regions for n in network.convs(r.series.layers)[1]]
    convs = [network.path(n) for n in every if not isinstance(network.module(n), nn.Linear)]
    return tuple(name for name in dict.fromkeys(convs) if name not in changed)


def _named_anew(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with the names that its nodes get in a new trace."""
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    graph._codegen = gm.graph._codegen
    new: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: new[n])
        kind, name = node.type, node.name if node.op in ("placeholder", "output") else None
        new[node] = graph.create_node(node.op, node.target, args, kwargs, name, kind)
        note_like(new[node], node)
    gm.graph = graph
    gm.recompile()
    return gm
