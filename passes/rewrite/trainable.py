"""Rewrites a network under a plan: MergePlan -> trainable GraphModule -> merged GraphModule.

    before     x ─ conv1 ─ bn1 ─ relu ─ conv2 ─ bn2 ─┐                    trainable  x ─ LinearSpan ─ relu
               └──────────────────────────────────── add ─ relu           merged     x ─ conv ─ relu

`rewrite` works on a copy. Each composed span becomes a `LinearSpan`, each fitted one a plain conv, a dropped one
nothing; a narrowed one keeps its nodes, and its modules have fewer channels (`narrowed`); a factored one is two plain
convs (`factored`). A norm that moves to after
the merged conv (`moved_norms`), or an activation added after it (`added_activations`), is a module of its own in both
forms. `merge` replaces every `LinearSpan` by its single conv. Names of untouched modules stay, dead modules and
parameters go, and both results are ordinary GraphModules.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from ..algebra.linear_span import LinearSpan
from ..errors import PlanError
from ..graph import ops
from ..graph.graph_edit import drop_dead, free_name, is_attribute, set_submodule
from ..graph.node_facts import note_like, note_shape
from ..graph.verify import check_graph, drop_unread
from ..ir import Candidate, ConvConfig, MergePlan, Span
from ..model.model_copy import deep_copy
from ..model.size_limits import limits_of, set_limits
from ..spans.layers import Network
from ..spans.moved_norms import moved_norm
from .added_activations import activated
from .analysis import Analysis
from .factored import put_factored
from .narrowed import put_narrowed
from .one_pixel_vectors import vector_limits
from .span_modules import build_span

__all__ = ["merge", "rewrite", "span_names"]


def rewrite(
    graph: fx.GraphModule | Analysis,
    plan: MergePlan,
    surrogates: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    share_tensors: bool = False,
) -> fx.GraphModule:
    """The trainable form of `graph` under `plan`; `graph` is not changed. Who rewrites one graph under many plans gives
    its `Analysis`, which is then made once.

    `surrogates` maps activation nodes to (scale, bias) of shape (channels,) that linearize them; without it every
    linearized activation is the identity, and every linearized norm its own scale and bias. Fitted convs have values
    drawn as torch draws those of a new conv, so the result computes nothing useful until a fit has set them:
    `lmfx.rewrite` with calibration data does, and this function never.

    With `share_tensors` what is not touched shares its parameters with `graph`, which saves a copy of a large network
    that only is to be timed. Raises `PlanError` if the plan was made for another graph.
    """
    analysis = graph if isinstance(graph, Analysis) else Analysis(graph)
    analysis.check(plan)
    network = analysis.network(plan)
    graph = network.gm
    gm = _copy(graph, share_tensors)
    nodes = {n.name: n for n in gm.graph.nodes}
    placed: dict[str, str] = {}
    like = next(graph.parameters(), None)
    vectors: set[str] = set()
    for candidate, name in zip(plan.candidates, span_names(graph, plan), strict=True):
        _check(network, candidate)
        if candidate.realization == "keep":
            continue
        if candidate.realization == "narrow":
            put_narrowed(gm, nodes, network, candidate)
            continue
        if candidate.realization == "factor":
            put_factored(gm, nodes, network, candidate, name)
            placed[name] = candidate.key
            continue
        sides: tuple[fx.Node, ...] = ()
        norm: str | None = None
        if candidate.puts_conv:
            module = build_span(network, candidate, surrogates)
            sides = tuple(nodes[n] for n in module.sides) if isinstance(module, LinearSpan) else ()
            vectors |= set(module.sides) if isinstance(module, LinearSpan) else set()
            set_submodule(gm, name, module.train(graph.training) if like is None else module.to(like.device))
            placed[name] = candidate.key
        for number, span in enumerate(candidate.spans):
            entry, output = nodes[span.entry], nodes[span.output]
            if candidate.realization == "drop":
                output.replace_all_uses_with(entry)
                nodes[span.output] = entry  # the next span may begin here
                continue
            with gm.graph.inserting_after(output):
                new = gm.graph.create_node("call_module", name, (entry, *sides), {}, name=name.replace(".", "_"))
            note_like(new, output, path=name, call=number)
            output.replace_all_uses_with(new)
            if candidate.post_norm is not None and norm is None:
                new = _append(gm, new, f"{name}_norm", _post_norm(network, candidate).train(graph.training))
                norm = str(new.target)
            elif norm is not None:
                new = _call_after(gm, new, norm)
            nodes[span.output] = new
    if plan.activation_after is not None:
        for place, keys in activated(network, plan).items():
            name = next(n for n, key in placed.items() if key in keys)
            _append(gm, nodes[place], f"{name}_act", ops.activation_of(plan.activation_after))
    _clean(gm)
    limits = [limit for limit in vector_limits(graph, vectors) if limit not in limits_of(gm)]
    if limits:
        set_limits(gm, (*limits_of(gm), *limits))
    gm.meta["lmfx_spans"] = placed
    check_graph(gm)
    return gm


def _append(gm: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> fx.Node:
    """A call of `module` after `node`, which all readers of `node` read instead."""
    name = free_name(gm, name)
    set_submodule(gm, name, module)
    return _call_after(gm, node, name)


def _kind(part: nn.Module) -> str:
    """What a module beside a merged conv is called."""
    return "slice" if isinstance(part, ops.PixelSlice) else "shuffle" if ops.enlarges(part) else "pad"


def _call_after(gm: fx.GraphModule, node: fx.Node, name: str) -> fx.Node:
    """A call of the module `name` after `node`, which all readers of `node` read instead."""
    with gm.graph.inserting_after(node):
        new = gm.graph.create_node("call_module", name, (), {}, name=name.replace(".", "_"))
    node.replace_all_uses_with(new)
    new.args = (node,)
    note_like(new, node, path=name)
    return new


def _post_norm(network: Network, candidate: Candidate) -> nn.Module:
    name, conv = candidate.post_norm, candidate.conv
    known = name is not None and name in network.nodes and network.nodes[name].op == "call_module"
    norm = moved_norm(network.module(str(name)), conv.out_channels) if known and conv is not None else None
    if norm is None:
        raise PlanError(f"the plan moves the norm {name} after {candidate.key}, and the graph has no such norm")
    return norm


def span_names(graph: fx.GraphModule, plan: MergePlan) -> list[str]:
    """The module name that each candidate's merged conv gets, `layer1.0.merged` beside the span's first conv.

    In a plan of single ops a conv that only takes in what is beside it keeps its name.
    """
    taken: set[str] = set()
    names = []
    for candidate in plan.candidates:
        if candidate.cuts:
            names.append(candidate.cuts[0].conv)
            continue
        if plan.fine and len(candidate.all_convs) == 1:
            names.append(candidate.all_convs[0])
            taken.add(names[-1])
            continue
        parent = candidate.convs[0].rpartition(".")[0] if candidate.convs else ""
        base = f"{parent}.merged" if parent else "merged"
        if candidate.realization == "factor":
            base = f"{candidate.all_convs[0]}_pointwise"
        name, i = base, 0
        while name in taken or is_attribute(graph, name):
            i += 1
            name = f"{base}_{i}"
        taken.add(name)
        names.append(name)
    return names


def merge(module: fx.GraphModule, share_tensors: bool = False) -> fx.GraphModule:
    """The deploy form: a copy in which every `LinearSpan` is one conv (after a pad node if its padding is uneven, and
    before a shuffle where it enlarges its map and is no transposed conv).

    `share_tensors` as in `rewrite`.
    """
    gm = _copy(module, share_tensors)
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), LinearSpan):
            calls.setdefault(str(node.target), []).append(node)
    for name, nodes in calls.items():
        span = gm.get_submodule(name)
        assert isinstance(span, LinearSpan)
        conv = span.reparameterize().train(module.training)
        _merge_sides(gm, nodes, span)
        if isinstance(conv, nn.Sequential):
            parts = list(conv)
            main = next(i for i, part in enumerate(parts) if isinstance(part, _ConvNd))
            names = {part: free_name(gm, f"{name}_{_kind(part)}") for part in parts[:main] + parts[main + 1 :]}
            for part, own in names.items():
                set_submodule(gm, own, part.train(module.training))
            for node in nodes:
                for part in reversed(parts[main + 1 :]):
                    note_shape(_call_after(gm, node, names[part]), None)
                for part in parts[:main]:
                    own = names[part]
                    with gm.graph.inserting_before(node):
                        pad = gm.graph.create_node("call_module", own, node.args, {}, name=own.replace(".", "_"))
                    note_like(pad, node, shape=None, path=own)
                    node.args = (pad,)
            conv = parts[main]
        set_submodule(gm, name, conv)
    _clean(gm)
    check_graph(gm)
    return gm


def _merge_sides(gm: fx.GraphModule, nodes: list[fx.Node], span: LinearSpan) -> None:
    """Add the 1 x 1 convolution of each vector from the side after the merged conv's nodes."""
    names = []
    for i, conv in enumerate(span.side_convs()):
        names.append(f"{nodes[0].target}_side{i}")
        set_submodule(gm, names[-1], conv.train(gm.training))
    for node in nodes:
        value, sides = node.args[0], node.args[1:]
        node.args = (value,)
        last = node
        for name, vector in zip(names, sides, strict=True):
            with gm.graph.inserting_after(last):
                seen = gm.graph.create_node("call_module", name, (vector,), {}, name=name.replace(".", "_"))
            with gm.graph.inserting_after(seen):
                total = gm.graph.call_function(torch.add, (last, seen))
            for user in [u for u in last.users if u is not total]:
                user.replace_input_with(last, total)
            note_like(seen, node, shape=None, path=name)
            note_like(total, node)
            last = total


def _check(network: Network, candidate: Candidate) -> None:
    for span in candidate.spans:
        series = network.series.get(span.series)
        found = series.layers[span.start : span.stop] if series is not None else ()
        whole = 0 <= span.start < span.stop and len(found) == span.stop - span.start
        if not whole or (found[0].entry, found[-1].exit) != (span.entry, span.exit):
            raise PlanError(f"the plan's span {candidate.key} ({span.entry} to {span.exit}) is not in this graph")
        if candidate.conv is not None and candidate.puts_conv:
            _check_conv(network, candidate.key, span, candidate.conv)
    own = candidate.span
    calls = network.calls.others(own.series, own.start, own.stop) if candidate.calls else ()
    if tuple((s.series, s.start, s.stop) for s in candidate.calls) != calls:
        raise PlanError(
            f"the calls of the plan's span {candidate.key} are not those of one run of layers in this graph"
        )


def _check_conv(network: Network, key: str, span: Span, conv: ConvConfig) -> None:
    """A plan may come from a file, and says how much memory its convs take: as much as the span's shapes ask for."""
    before, after = network.shape(span.entry), network.shape(span.output)
    expected = (before[1], after[1], len(before) - 2)
    seen = (conv.in_channels, conv.out_channels, len(conv.kernel_size))
    if seen != expected:
        raise PlanError(
            f"the plan has a conv of {seen[0]} to {seen[1]} channels in {seen[2]}d for {key}, and the span has "
            f"{expected[0]} to {expected[1]} in {expected[2]}d: solve again"
        )


def _copy(gm: fx.GraphModule, share_tensors: bool) -> fx.GraphModule:
    tensors = [*gm.parameters(), *gm.buffers()] if share_tensors else []
    copied: fx.GraphModule = deep_copy(gm, {id(t): t for t in tensors})
    return copied


def _clean(gm: fx.GraphModule) -> None:
    """Remove what is dead, and activations that repeat the one right before them."""
    drop_dead(gm)
    for node in list(gm.graph.nodes):
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        here, before = gm.get_submodule(str(node.target)), gm.get_submodule(str(source.target))
        if type(here) is type(before) and type(here) in ops.IDEMPOTENT and here.extra_repr() == before.extra_repr():
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
    drop_unread(gm)
    gm.graph.lint()
    gm.recompile()
