"""Makes the workloads of candidates: each in the form in which the runtime will execute it.

    merged span     conv + bias + moved norm + kept activation                 x ─ conv ─ relu
    at a join       the sum that ends the main branch goes with its last span  x ─ conv ─ add ─ relu
                                                                               y ──────────┘
    kept layer      its own ops as they are                                    x ─ conv ─ bn ─ relu
    kept mesh       its ops outside of the branches; every value that a branch reads is an output
    narrowed span   the workload of each of its layers as it is kept, with the channels that stay: as many workloads
    activation_after  a merged span with the activation that its plan adds after it
    (`lmfx.passes.rewrite.added_activations`), at its end

Runtimes fuse a residual sum and the activation after it into the conv that ends the branch, so that branch's last
candidates carry both, and the join's own row is zero.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from lmfx.latency.workload import Original, Workload
from lmfx.passes.algebra.enlarged import blank
from lmfx.passes.algebra.linear_span import pad_module
from lmfx.passes.algebra.side_vectors import side_conv
from lmfx.passes.graph import ops
from lmfx.passes.graph.node_facts import tensor_dtype
from lmfx.passes.identity.content import Describer, is_foreign
from lmfx.passes.identity.fingerprint import node_text
from lmfx.passes.ir import Candidate, ConvConfig, Layer, MergePlan, Series, Span
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.rewrite.added_activations import activated
from lmfx.passes.rewrite.factored import blank_factors
from lmfx.passes.rewrite.narrowed import Narrowed, narrowed
from lmfx.passes.rewrite.span_modules import span_sides
from lmfx.passes.spans.layers import Network
from lmfx.passes.spans.moved_norms import moved_norm

__all__ = ["Workloads"]


class Workloads:
    """The workloads of one network's candidates; equal ones are the same object."""

    def __init__(self, network: Network, activation_after: str | None = None) -> None:
        self.network = network
        self.activation_after = activation_after
        self._volatile = noted(network.gm).volatile
        self._cache: dict[tuple[object, ...], Workload] = {}
        self._layers: dict[tuple[object, ...], Workload | None] = {}  # of narrowed spans
        self._known: dict[str, object] = {}
        self._carrier: dict[str, tuple[Layer, int]] = {}  # series name -> the layer of the join that it ends with
        for series in network.series.values():
            for layer in series.layers:
                branch = self._main_branch(layer)
                if branch is not None:
                    self._carrier[branch.name] = (layer, self._operand(layer, branch))

    def __call__(self, candidate: Candidate) -> Workload | None:
        """What to time for a candidate, or None if it costs nothing by itself."""
        join = self._join_of(candidate)
        conv = candidate.conv if candidate.puts_conv else None
        body: tuple[str, ...] = ()
        if candidate.realization == "keep":
            layer = self.network.series[candidate.span.series].layers[candidate.span.start]
            body = self._body(layer)
        elif candidate.span.activation is not None:
            body = (candidate.span.activation,)
            if candidate.realization == "drop" and join is None and self._repeats(candidate):
                body = ()  # the kept activation repeats the one before the span, and goes
        if conv is None and not body and join is None:
            return None
        if candidate.realization == "keep":
            return self._build(candidate, conv, body, join)
        joined = None if join is None else (join[1], *self._texts(self._fused(join[0])))
        sides = tuple(self.network.shape(n) for n in span_sides(self.network, candidate))
        post = None if candidate.post_norm is None else self._texts((candidate.post_norm,))
        after = self._puts_activation(candidate)
        key = (conv, self.network.shape(candidate.span.entry), self._texts(body), joined, sides, post, after)
        if key not in self._cache:
            self._cache[key] = self._build(candidate, conv, body, join)
        return self._cache[key]

    def each(self, candidate: Candidate) -> list[Workload]:
        """All that is to be timed for a candidate: one workload a call, and one a layer of a narrowed span."""
        if not candidate.cuts:
            return [w for w in map(self, candidate.each()) if w is not None]
        series = self.network.series[candidate.span.series]
        cuts = [cut for cut in (self.network.narrowing.of(cut) for cut in candidate.cuts) if cut is not None]
        seen = {name: cut.width for cut, found in zip(candidate.cuts, cuts, strict=True) for name in found.space.nodes}
        result: list[Workload] = []
        thinner: Narrowed | None = None
        for name, at in _layers(series, candidate.span.start, candidate.span.stop):
            layer = self.network.series[name].layers[at]
            key = name, at, tuple(sorted((n, seen[n]) for n in self._touched(layer) if n in seen))
            if key not in self._layers:
                thinner = thinner or narrowed(self.network, candidate)
                span = Span(name, at, at + 1, layer.entry, layer.exit, layer.exit, layer.activation)
                kept = Candidate(span, "keep")
                join, body = self._join_of(kept), self._body(layer)
                made = None if not body and join is None else self._build(kept, None, body, join, thinner)
                self._layers[key] = made
            found_layer = self._layers[key]
            if found_layer is not None:
                result.append(found_layer)
        return result

    def _touched(self, layer: Layer) -> list[str]:
        """The nodes of a layer and those whose values it reads."""
        own = [self.network.nodes[n] for n in layer.nodes]
        return [*(n.name for n in own), *(v.name for n in own for v in n.all_input_nodes)]

    def _body(self, layer: Layer) -> tuple[str, ...]:
        """The nodes that are timed with a kept layer."""
        if layer.parallel is not None and self._main_branch(layer) is not None:
            fused = self._fused(layer)
            return tuple(n for n in layer.nodes if n not in fused)
        return layer.nodes

    # --- joins -------------------------------------------------------------------------------------------------------

    def _main_branch(self, layer: Layer) -> Series | None:
        """The branch whose last span carries the join: the first that ends in a conv layer without an activation."""
        if layer.parallel is None or layer.parallel.join not in ("add", "sub"):
            return None
        for branch in layer.parallel.branches:
            if branch.layers and branch.layers[-1].parallel is None and branch.layers[-1].conv is not None:
                return branch if branch.layers[-1].activation is None else None
        return None

    def _operand(self, layer: Layer, branch: Series) -> int:
        assert layer.parallel is not None
        return layer.parallel.branches.index(branch)

    def _join_of(self, candidate: Candidate) -> tuple[Layer, int] | None:
        series = self.network.series[candidate.span.series]
        at_end = candidate.span.stop == len(series.layers)
        return self._carrier.get(series.name) if at_end else None

    def _rest(self, layer: Layer) -> bool:
        """Whether affine ops follow the join, which then is timed by itself."""
        return bool(self.network.affine_nodes(layer))

    def _fused(self, layer: Layer) -> tuple[str, ...]:
        assert layer.parallel is not None
        act = () if layer.activation is None or self._rest(layer) else (layer.activation,)
        return (layer.parallel.node, *act)

    def _repeats(self, candidate: Candidate) -> bool:
        act, entry = candidate.span.activation, self.network.nodes[candidate.span.entry]
        if act is None or entry.op != "call_module":
            return False
        here, before = self.network.module(act), self.network.module(candidate.span.entry)
        same = type(here) is type(before) and here.extra_repr() == before.extra_repr()
        return same and isinstance(here, ops.IDEMPOTENT)

    # --- building ----------------------------------------------------------------------------------------------------

    def _puts_activation(self, candidate: Candidate) -> bool:
        """Whether a plan of this candidate has an activation after it that the network does not have."""
        if self.activation_after is None:
            return False
        return bool(activated(self.network, MergePlan((candidate,), activation_after=self.activation_after)))

    def _texts(self, nodes: Iterable[str]) -> tuple[object, ...]:
        """What nodes are, for the cache; one that cannot be told from others is only equal to itself."""
        return tuple(self._text(n) for n in nodes)

    def _text(self, name: str) -> object:
        if name not in self._known:
            describer = Describer("types", code=True, timing=True, volatile=self._volatile)
            node = self.network.nodes[name]
            foreign = node.op == "call_module" and is_foreign(self.network.module(name))
            text = node_text(self.network.gm, node, describer, lambda n: "")
            self._known[name] = (text, name) if foreign or describer.unsure else text
        return self._known[name]

    def _build(
        self,
        candidate: Candidate,
        conv: ConvConfig | None,
        body: tuple[str, ...],
        join: tuple[Layer, int] | None,
        thinner: Narrowed | None = None,
    ) -> Workload:
        """A graph of its own: conv, then `body`, then the join; every value from outside is an input. With `thinner`
        values and modules are what that says."""
        known = self.network if thinner is None else thinner
        net, root, graph = self.network, nn.Module(), fx.Graph()
        specs: list[tuple[tuple[int, ...], torch.dtype]] = []
        values: dict[str, fx.Node] = {}
        originals: dict[str, Original] = {}

        def outside(name: str) -> fx.Node:
            specs.append((known.shape(name), tensor_dtype(net.nodes[name])))
            return graph.placeholder(f"x{len(specs)}")

        def read(node: fx.Node) -> fx.Node:
            if node.name not in values:
                values[node.name] = (
                    self._copy(graph, root, originals, node, read) if node.op == "get_attr" else outside(node.name)
                )
            return values[node.name]

        span, last = candidate.span, None
        if candidate.realization == "keep":
            for name in body:
                last = values[name] = self._copy(graph, root, originals, net.nodes[name], read, thinner=thinner)
        else:
            last, dtype = outside(span.entry), tensor_dtype(net.nodes[span.entry])
            if conv is not None:
                for i, module in enumerate(_meta_conv(conv, dtype)):
                    root.add_module(f"conv{i}", module)
                    last = graph.call_module(f"conv{i}", (last,))
            for i, name in enumerate(span_sides(net, candidate)):
                assert conv is not None
                matrix = torch.empty(conv.out_channels, net.shape(name)[1], dtype=dtype, device="meta")
                root.add_module(f"side{i}", side_conv(matrix, len(conv.kernel_size), None))
                last = graph.call_function(torch.add, (last, graph.call_module(f"side{i}", (outside(name),))))
            if candidate.post_norm is not None and conv is not None:
                norm = moved_norm(net.module(candidate.post_norm), conv.out_channels)
                assert norm is not None
                originals["norm"] = (candidate.post_norm, copy.deepcopy(norm))
                root.add_module("norm", norm.to("meta"))
                last = graph.call_module("norm", (last,))
            for name in body:
                last = self._copy(graph, root, originals, net.nodes[name], _always(last), values=conv is None)
        if join is not None and join[0].parallel is not None:
            node, *after = (net.nodes[n] for n in self._fused(join[0]))
            branches = join[0].parallel.branches
            operands = [last if i == join[1] else outside(b.exit) for i, b in enumerate(branches)]
            last = graph.call_function(node.target, tuple(operands))  # type: ignore[arg-type]
            for act in after:
                last = self._copy(graph, root, originals, act, _always(last), conv is None, thinner)
        if self._puts_activation(candidate):
            root.add_module("after", ops.activation_of(str(self.activation_after)))
            last = graph.call_module("after", (last,))
        read_outside = [values[n] for n in body if n in values and any(u.name not in body for u in net.nodes[n].users)]
        results = list(dict.fromkeys([*read_outside, last])) if candidate.realization == "keep" and not join else [last]
        graph.output(tuple(results) if len(results) > 1 else last)
        made = fx.GraphModule(root, graph)
        return Workload.of(made, *specs, originals=originals, volatile=self._volatile)

    def _copy(
        self,
        graph: fx.Graph,
        root: nn.Module,
        originals: dict[str, Original],
        node: fx.Node,
        read: Callable[[fx.Node], fx.Node],
        values: bool = True,
        thinner: Narrowed | None = None,
    ) -> fx.Node:
        """A copy of a node with its module; without `values` on the meta device, like the conv before it."""
        if node.op in ("call_module", "get_attr"):
            item: nn.Module | torch.Tensor = operator.attrgetter(str(node.target))(self.network.gm)
            if thinner is not None and node.op == "call_module":
                item = thinner.module(node.name)
            name = str(node.target).replace(".", "_")
            if isinstance(item, nn.Module):
                originals[name] = (str(node.target), item)
                root.add_module(name, item if values else copy.deepcopy(item).to("meta"))
            else:
                root.register_buffer(name, item.detach())
            new = graph.node_copy(node, read)
            new.target = name
            return new
        return graph.node_copy(node, read)


def _layers(series: Series, start: int, stop: int) -> Iterator[tuple[str, int]]:
    """(series, place) of some layers and of those of their branches."""
    for at in range(start, stop):
        parallel = series.layers[at].parallel
        for branch in parallel.branches if parallel is not None else ():
            yield from _layers(branch, 0, len(branch.layers))
        yield series.name, at


def _always(value: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda _: value


def _meta_conv(config: ConvConfig, dtype: torch.dtype) -> list[nn.Module]:
    """A conv or Linear of this configuration without values, after a pad if its padding is not even zeros, and before
    a shuffle if it enlarges its map."""
    if config.upscale:
        return blank(config, dtype)
    if config.factored:
        return [module for _, module in blank_factors(config, dtype=dtype, device="meta")]
    if not config.kernel_size:
        return [nn.Linear(config.in_channels, config.out_channels, dtype=dtype, device="meta")]
    even = config.even
    make: Any = ops.conv_class(len(config.kernel_size))
    conv = make(
        config.in_channels,
        config.out_channels,
        config.kernel_size,
        config.stride,
        tuple(lo for lo, _ in config.padding) if even else 0,
        config.dilation,
        config.groups,
        dtype=dtype,
        device="meta",
    )
    return [conv] if even else [pad_module(config), conv]
