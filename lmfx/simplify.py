"""`simplify`: every merge that loses nothing, chosen by count; no budget, no calibration and no measurement.

trace          the network in canonical form, of layers of one op each (`MergePlan.fine`)
spans          composed candidates that are the same function as their span (`passes/exact.py`)
solve          the set of them that costs least (`passes/costs.py`), by the exact dynamic program
rewrite        merged, its nodes named as a new trace names them: simplified again, it is the same graph
check          in float64, against the model on the example, and against the trace at another size where that runs
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lmfx.caller_state import entry
from lmfx.checks import span_options
from lmfx.passes.copies import eval_copy
from lmfx.passes.costs import kept_cost, layer_cost, merged_cost, merged_ops, span_ops
from lmfx.passes.errors import OptionError, VerifyError
from lmfx.passes.interface import plain_output
from lmfx.passes.ir import Candidate, MergePlan, Refusal, Series
from lmfx.passes.layers import Network
from lmfx.passes.rewrite import merge, rewrite, span_names
from lmfx.passes.solve import Chain, Entry, solve_chains
from lmfx.passes.spans import SpanSet, enumerate_spans
from lmfx.passes.trace import example_arguments, fingerprint
from lmfx.result import Result
from lmfx.stages import trace

__all__ = ["simplify"]

GROWN = 13  # pixels that the second size of the check has more
RELATIVE = 1e-9  # of the largest output, in float64
INSIDE = 1e-12  # of the largest value anywhere in the network
SINGLE = 1e-3  # of the largest output, where the network can not be run in float64


@entry
def simplify(
    model: nn.Module,
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
        growth: a merge is made if it takes fewer ops, and the merged conv's multiply-adds and weights (of one image)
            are at most this many times those of all that it replaces. Of all sets of merges the cheapest is taken. So
            1x1 convs of a bottleneck that would grow stay apart; math.inf merges them too.

    Returns an ordinary GraphModule in eval mode, that can be reported, saved, exported, trained and compressed;
    `lmfx.report` says what was merged, and what not and why. Simplified again it is the same graph.

    Merging has been checked in float64, with an error below 1e-9 of the largest output, on the example and at another
    size where the model takes it: `VerifyError` if it differs. Raises other subclasses of `LmfxError` as `compress`
    does.
    """
    if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not growth > 0:
        raise OptionError(f"growth={growth!r}: use a number above 0, like 1.0, or math.inf for no bound")
    options = span_options(realize=("compose",), method="exact", max_kernel_size=None, include=include, exclude=exclude)
    graph = trace(model, example_input)
    spans = enumerate_spans(Network(graph, fine=True), options)
    chosen = cheapest(spans, float(growth))
    plan = MergePlan(tuple(chosen), fingerprint(graph), fine=True)
    net = _named_anew(merge(rewrite(graph, plan)))
    _check(model, example_input, graph, plan, net)
    meta = graph.meta["lmfx"]
    result = Result(
        plan=plan,
        budget=None,
        merged=True,
        backend={},
        names=tuple(span_names(graph, plan)),
        refusals=_refusals(spans, chosen, float(growth)),
        kept=_untouched(spans.network, chosen),
        candidates=sum(c.realization != "keep" for c in spans),
        inputs={"positional": meta["positional"], "keyword": meta["keyword"]},
    )
    net.train(False)
    net.meta["lmfx"] = {"result": result, "tracer": meta["tracer"], "opaque": meta["opaque"]}
    return net


# --- what is merged ---------------------------------------------------------------------------------------------------


def cheapest(spans: SpanSet, growth: float = 1.0) -> list[Candidate]:
    """The composed candidates of the set that costs least, in the order of the graph."""
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
            elif merged_ops(network, c) < span_ops(network, layers):
                # Half an op more: of two sets that cost the same the one of fewer changes.
                cost = sum(merged_cost(network, one) for one in c.each()) / growth + 0.5
                entries.append(Entry(c.span.start, c.span.stop, cost, 0.0, c))
        return Chain(entries, len(series.layers))

    found = solve_chains([chain(region.series) for region in network.regions])
    order = {name: i for i, name in enumerate(network.nodes)}
    chosen = [c for c in found.choice(0) if isinstance(c, Candidate) and c.realization != "keep"]
    return sorted(chosen, key=lambda c: order[c.span.exit])


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
        new[node].meta = dict(node.meta)
    gm.graph = graph
    gm.recompile()
    return gm


# --- the check --------------------------------------------------------------------------------------------------------


def _check(model: nn.Module, example_input: Any, graph: fx.GraphModule, plan: MergePlan, net: fx.GraphModule) -> None:
    """Raises `VerifyError` if the merged network is not the model's function."""
    if not plan.candidates:
        return  # the trace, which has been compared already
    example = example_arguments(example_input)
    doubled, traced = eval_copy(model).double(), _double(graph)
    merged = merge(rewrite(traced, replace(plan, fingerprint="")))
    _same_weights(merged, net)
    try:
        expected = _run(doubled, _cast(example))
    except Exception:  # a model with float32 written into it: it can only be run as it is
        expected, actual, relative = _run(eval_copy(model), example), _run(net, example), SINGLE
        _compare(expected, actual, relative * _largest(expected), "the example")
        return
    amplitude = _Amplitude(traced)
    amplitude.run(*_values(traced, _cast(example)), enable_io_processing=False)
    limit = RELATIVE * _largest(expected) + INSIDE * amplitude.largest
    _compare(expected, _run(merged, _cast(example)), limit, "the example")
    for growth in (GROWN, 1):
        other = _grown(_cast(example), growth)
        try:
            expected = _run(traced, other)
        except Exception:  # the network, or its trace, takes the example's size only
            continue
        _compare(expected, _run(merged, other), limit + RELATIVE * _largest(expected), f"{growth} pixels more")
        return


def _double(graph: fx.GraphModule) -> fx.GraphModule:
    """A float64 copy of a traced graph, whose nodes keep what the trace noted."""
    made = copy.deepcopy(graph).double()
    for old, new in zip(graph.graph.nodes, made.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    made.meta = {**graph.meta}
    return made


def _same_weights(merged: fx.GraphModule, net: fx.GraphModule) -> None:
    """Whether the network to return is the checked one, rounded."""
    left, right = merged.state_dict(), net.state_dict()
    if left.keys() != right.keys():
        raise VerifyError(f"the merged networks differ in {sorted(left.keys() ^ right.keys())[:4]}: please report this")
    for name, value in left.items():
        if not value.is_floating_point():
            continue
        error = float((value - right[name].double()).abs().max()) if value.numel() else 0.0
        allowed = 4 * torch.finfo(right[name].dtype).eps * float(value.abs().max()) if value.numel() else 0.0
        if not error <= allowed + torch.finfo(right[name].dtype).tiny:
            raise VerifyError(
                f"merging loses the weight {name} to rounding ({error:.2e} of {float(value.abs().max()):.2e} in "
                f"{right[name].dtype}): leave its layer out with exclude="
            )


class _Amplitude(fx.Interpreter):
    """Runs a graph and keeps the largest number in it, which its rounding errors go with."""

    largest = 0.0

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        if n.op != "output" and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            self.largest = max(self.largest, float(value.detach().abs().max()))
        return value


def _values(graph: fx.GraphModule, example: Any) -> list[Any]:
    args, kwargs = example
    names = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [given.get(name) for name in names]


def _cast(example: Any) -> Any:
    return pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, example)


def _grown(example: Any, pixels: int) -> Any:
    """Noise of the same batch with maps that are larger; the rest stays."""
    generator = torch.Generator().manual_seed(0)

    def grown(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 3:
            return value
        shape = (*value.shape[:2], *(n + pixels for n in value.shape[2:]))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(value)

    return pytree.tree_map(grown, example)


def _run(module: nn.Module, example: Any) -> list[Tensor]:
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)
    with torch.no_grad():
        output = module(*args, **kwargs)
    return [v for v in pytree.tree_leaves(plain_output(output)) if isinstance(v, Tensor)]


def _largest(values: list[Tensor]) -> float:
    return max((float(v.abs().max()) for v in values if v.is_floating_point() and v.numel()), default=0.0)


def _compare(expected: list[Tensor], actual: list[Tensor], limit: float, where: str) -> None:
    if [v.shape for v in expected] != [v.shape for v in actual]:
        raise VerifyError(
            f"merging changes the output's shape from {[tuple(v.shape) for v in expected]} to "
            f"{[tuple(v.shape) for v in actual]} ({where}): leave layers out with exclude=, and please report this"
        )
    for a, b in zip(expected, actual, strict=True):
        error = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        if not error <= limit and not (math.isnan(error) and torch.equal(a.isnan(), b.isnan())):
            raise VerifyError(
                f"merging changes the output by {error:.2e}, more than {limit:.2e} ({where}): leave layers out with "
                "exclude=, and please report this"
            )
