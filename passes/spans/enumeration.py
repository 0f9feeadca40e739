"""Enumerates candidates and refusals: for every span of every series, what it could become, or why it cannot.

compose   one candidate for each merged kernel size and group structure that some way to prune the span reaches, with
          the kept set of the largest L1 norm that holds every irreducible conv (`pruning`).
fit       kernels of several sizes, dense or depthwise, placed on the centre of the span's window, with a padding that
          follows the span's own size rule (`fit_kernels`).
drop      the identity, for spans that keep the shape and do not fall apart into shorter such spans.
narrow    the span with fewer channels at one or two cuts inside of it (`narrowing`).
factor    a dense conv as a pointwise one after a depthwise one or one of fewer channels (`factoring`).

What may be enumerated is said by `SpanOptions` (`span_options`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from ..graph import ops
from ..graph.conv_configs import is_identity_config, module_config
from ..graph.map_shapes import follows
from ..graph.reduction import join_of
from ..html_text import html_facts, html_table, plain_facts
from ..ir import Candidate, ConvConfig, Cut, Layer, Refusal, Series, Span
from .exact import inexact
from .factoring import factorable, factored_ways
from .fit_kernels import centred, fit_kernels
from .globs import Globs
from .layers import Network
from .moved_norms import last_norm
from .narrowing import PrivateCut
from .pruning import State, States, side_inputs
from .span_options import Method, Norm, SpanOptions

__all__ = ["Method", "Norm", "SpanOptions", "SpanSet", "enumerate_spans"]

REFUSALS_SHOWN = 20
_TITLE = "lmfx: what could be merged"


@dataclass(frozen=True)
class SpanSet:
    """All that was found in one graph."""

    network: Network
    options: SpanOptions
    candidates: tuple[Candidate, ...]
    refusals: tuple[Refusal, ...] = ()
    by_key: dict[str, Candidate] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_key", {c.key: c for c in self.candidates})

    def __len__(self) -> int:
        return len(self.candidates)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates)

    def __str__(self) -> str:
        refused = [("refused", r) for r in self.refusals[:REFUSALS_SHOWN]]
        return plain_facts(_TITLE, [*self._facts(), *refused])

    def _facts(self) -> list[tuple[str, object]]:
        ways = Counter(c.realization for c in self)
        return [("candidates", len(self)), *ways.items(), ("refusals", len(self.refusals))]

    def _repr_html_(self) -> str:
        rows = [(r.reason, ", ".join(r.nodes)) for r in self.refusals[:REFUSALS_SHOWN]]
        more = f"{len(rows)} of {len(self.refusals)} refusals" if len(rows) < len(self.refusals) else "refusals"
        shown = html_table(("why not", "where"), rows, caption=more) if rows else ""
        return html_facts(_TITLE, self._facts()) + shown


def enumerate_spans(network: Network, options: SpanOptions | None = None) -> SpanSet:
    """Candidates and refusals of every series, in the order of the graph; deterministic."""
    finder = _Finder(network, options or SpanOptions())
    finder.check_globs()
    for region in network.regions:
        for series in region.series.walk():
            finder.series(series)
    finder.refuse_boundaries()
    if "narrow" in finder.allowed:
        finder.narrow()
    return SpanSet(network, finder.options, tuple(finder.candidates), tuple(dict.fromkeys(finder.refusals)))


class _Finder:
    def __init__(self, network: Network, options: SpanOptions) -> None:
        self.network = network
        self.options = options
        self.candidates: list[Candidate] = []
        self.refusals: list[Refusal] = []
        self.allowed = options.allowed
        self.states = States(network, options.max_kernel_size, prune=options.method not in ("depth", "exact"))
        self.globs = Globs(network.gm, options.include, options.exclude)

    # --- the loop over spans -----------------------------------------------------------------------------------------

    def series(self, series: Series) -> None:
        first = len(self.candidates)
        for start in range(len(series.layers)):
            states: list[State] | Refusal | None = None
            for stop in range(start + 1, len(series.layers) + 1):
                layer = series.layers[stop - 1]
                if stop > start + 1 and (self.options.method == "layeronly" or self.too_long(series, start, stop)):
                    break
                if stop > start + 1 and self.options.method == "exact" and series.layers[stop - 2].activation:
                    break
                states = self.states.extend(states, layer)
                if stop == start + 1:
                    self.keep(series, start, layer)
                self.span(series, start, stop, states)
        found = self.candidates[first:]
        drops = {(c.span.start, c.span.stop): c.span for c in found if c.realization == "drop"}
        self.candidates[first:] = [c for c in found if c.realization != "drop" or not self.falls_apart(c.span, drops)]

    def span(self, series: Series, start: int, stop: int, states: list[State] | Refusal) -> None:
        layers = series.layers[start:stop]
        span = self.make_span(series, start, stop)
        main, every = self.network.convs(layers)
        refusal = self.refused(span, layers)
        role = self.network.calls.role(series.name, start, stop)
        if refusal is None and role == "torn":
            reason = "a part of the span is called elsewhere as well, and the rest is not"
            refusal = Refusal(reason, self.network.calls.torn(series.name, start, stop))
        if refusal is not None:
            self.refusals.append(refusal)
            return
        if role == "other":
            return  # what the first call becomes
        if isinstance(states, Refusal):
            self.refusals.append(states)
        elif main and "compose" in self.allowed:
            self.compose(span, layers, states, main, every)
        if not main:
            return
        if "drop" in self.allowed:
            self.drop(span, layers, main, every)
        if "fit" in self.allowed:
            self.fit(span, series, layers, main, every)
        if "factor" in self.allowed and len(layers) == 1:
            self.factor(span, layers[0], main, every)

    def sites(self, span: Span) -> tuple[Span, ...]:
        """The span, and those of all other calls of its layers."""
        others = self.network.calls.others(span.series, span.start, span.stop)
        return span, *(self.make_span(self.network.series[name], *at) for name, *at in others)

    def add(self, candidate: Candidate) -> None:
        """Take a candidate, for all calls of its span."""
        calls = self.sites(candidate.span)[1:]
        self.candidates.append(replace(candidate, calls=calls) if calls else candidate)

    def too_long(self, series: Series, start: int, stop: int) -> bool:
        limit = self.options.max_span_convs
        return limit is not None and len(self.network.convs(series.layers[start:stop])[0]) > limit

    def make_span(self, series: Series, start: int, stop: int) -> Span:
        last = series.layers[stop - 1]
        before = [n for n in last.nodes if n != last.activation]
        output = before[-1] if before else last.entry
        return Span(series.name, start, stop, series.layers[start].entry, last.exit, output, last.activation)

    def refused(self, span: Span, layers: tuple[Layer, ...]) -> Refusal | None:
        if span.output == span.entry:
            return Refusal("nothing to merge: only an activation", tuple(n for lay in layers for n in lay.nodes))
        if not (self.options.exclude or self.options.include):
            return None
        for node in (n for lay in layers for n in _inside(lay)):
            if (path := self.globs.excluded(node)) is not None:
                return Refusal(f"excluded: {path} matches exclude={self.options.exclude!r}", (span.entry, span.exit))
            if (path := self.globs.omitted(node)) is not None:
                return Refusal(f"not included: {path} matches nothing of include={self.options.include!r}", (node,))
        return None

    def check_globs(self) -> None:
        regions = self.network.regions if self.options.include else ()
        nodes = [n for r in regions for layer in r.series.layers for n in _inside(layer)]
        self.globs.check([n for n in nodes if self.globs.weighted(n)])

    def refuse_boundaries(self) -> None:
        """Say why regions end where they end."""
        for region in self.network.regions:
            inside = {name for layer in region.series.layers for name in layer.all_nodes()}
            for name in (region.entry, region.exit):
                readers = self.network.nodes[name].users
                if len(readers) > 1 and not inside.issuperset(u.name for u in readers):
                    names = (name, *(u.name for u in readers))
                    far = [u for u in readers if join_of(u) is not None]
                    skip = f"; {far[-1].name} takes it as a long skip" if far else ""
                    self.refusals.append(
                        Refusal(f"the value of {name} is read by {len(readers)} ops that do not rejoin{skip}", names)
                    )
            for reader in self.network.nodes[region.exit].users:
                refusal = self.network.meeting(self.network.nodes[region.exit], reader)
                if refusal is not None:
                    self.refusals.append(refusal)

    # --- keep, compose, drop, fit ------------------------------------------------------------------------------------

    def keep(self, series: Series, start: int, layer: Layer) -> None:
        main, every = self.network.convs((layer,)) if layer.parallel is None else ((), ())
        config = self.network.config(layer) if layer.conv is not None else None
        conv = config if isinstance(config, ConvConfig) else None
        self.candidates.append(
            Candidate(self.make_span(series, start, start + 1), "keep", conv, *self.paths(main, every, every))
        )

    def paths(self, *groups: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(self.network.path(n) for n in names) for names in groups)

    def compose(
        self, span: Span, layers: tuple[Layer, ...], states: list[State], main: tuple[str, ...], every: tuple[str, ...]
    ) -> None:
        if len(layers) == 1 and not self.folds_something(layers[0]):
            return
        enlarging = self.network.enlarging(layers)
        if enlarging is not None and side_inputs(self.network, layers, frozenset(every)):
            reason = "a vector from the side is added beside an op that enlarges the map"
            self.refusals.append(Refusal(reason, (enlarging,)))
            return
        if enlarging is not None and any(s.config.padding_mode != "zeros" or s.config.padding_value for s in states):
            reason = "beside an op that enlarges the map only zeros can be padded"
            self.refusals.append(Refusal(reason, (enlarging,)))
            return
        best: dict[tuple[object, ...], State] = {}
        for state in states:
            if not state.kept and is_identity_config(state.config):
                continue  # that is `drop`
            key = (state.config.kernel_size, state.config.dilation, state.config.groups, state.config.written)
            if key not in best or state.score > best[key].score:
                best[key] = state
        order = {name: i for i, name in enumerate(every)}
        post = last_norm(self.network, layers) if self.options.norm == "post" else None
        for state in sorted(best.values(), key=lambda s: (s.config.kernel_size, s.config.groups)):
            kept = sorted(state.kept, key=order.__getitem__)
            if every and not kept:
                continue
            again = {self.network.path(n) for n in kept} & {self.network.path(n) for n in every if n not in state.kept}
            if again:
                continue  # one call of a conv is kept and another pruned, which a plan cannot say
            too_small = next(filter(None, (self.too_small(s, state.config) for s in self.sites(span))), None)
            if too_small is not None:
                self.refusals.append(too_small)
                continue
            lossy = self.lossy(span, layers, state, every, post)
            if lossy is not None and self.options.method == "exact":
                self.refusals.append(lossy)
                continue
            paths = self.paths(main, every, kept)
            self.add(Candidate(span, "compose", state.config, *paths, post_norm=post, exact=lossy is None))

    def lossy(
        self, span: Span, layers: tuple[Layer, ...], state: State, every: tuple[str, ...], post: str | None
    ) -> Refusal | None:
        """Why a composed candidate is not the same function as its span; None if it is."""
        if set(state.kept) != set(every) or post is not None:
            gone = tuple(n for n in every if n not in state.kept) or (span.exit,)
            return Refusal("convs are pruned, or a norm moves", gone)
        kept = span.activation is not None and not ops.normalizes(
            self.network.module(span.activation), self.network.shape(span.activation)
        )
        if self.options.activation_after is not None and len(every) > 1 and not kept:
            return Refusal(f"activation_after={self.options.activation_after!r} follows the merged conv", (span.exit,))
        return inexact(self.network, layers, state.config)

    def too_small(self, span: Span, config: ConvConfig) -> Refusal | None:
        """Why a map cannot be padded from its own values, as torch does it."""
        if config.padding_mode in ("zeros", "replicate"):
            return None
        least = 1 if config.padding_mode == "reflect" else 0
        size = self.network.shape(span.entry)[2:]
        if all(max(pads) + least <= n for pads, n in zip(config.padding, size, strict=True)):
            return None
        reason = f"all padding in front would be {config.padding} of a map of {size}, too much to {config.padding_mode}"
        return Refusal(reason, (span.entry, span.exit))

    def folds_something(self, layer: Layer) -> bool:
        """Whether composing this one layer gives another graph than keeping it: a pool or a pad, or a parallel."""
        if layer.parallel is not None:
            return True
        if layer.conv is None:
            return False
        config = self.network.config(layer)
        own = self.network.nodes[layer.conv]
        conv_only = [n for n in self.network.affine_nodes(layer) if n != own.name]
        if self.network.enlarging((layer,)) is not None:  # no runtime is sure to fold a norm there
            shuffles = (n for n in conv_only if self.network.nodes[n].op == "call_module")
            return any(ops.shuffled_blocks(self.network.module(n)) is None for n in shuffles)
        return isinstance(config, ConvConfig) and any(self.changes_window(n) for n in conv_only)

    def changes_window(self, name: str) -> bool:
        if self.network.nodes[name].op != "call_module":
            return False
        return not self.network.module(name)._get_name().startswith(("BatchNorm", "ChannelAffine"))

    def drop(self, span: Span, layers: tuple[Layer, ...], main: tuple[str, ...], every: tuple[str, ...]) -> None:
        net = self.network
        geometry = net.series_geometry(net.series[span.series], layers)
        if geometry is None or any(s != 1 for s in geometry.stride):
            return
        if all(net.shape(s.entry) == net.shape(s.output) for s in self.sites(span)):
            self.add(Candidate(span, "drop", None, *self.paths(main, every, ())))

    def narrow(self) -> None:
        """Narrowed spans: at each cut by itself, and at two cuts that share a conv, at widths that are about alike."""
        narrowing = self.network.narrowing
        self.refusals += narrowing.refusals
        taken = {reader for reader, cut in narrowing.cuts.items() if self.can_narrow(cut)}
        for reader in [r for r in narrowing.cuts if r in taken]:
            cut = narrowing.cuts[reader]
            for width in cut.widths:
                self.narrowed(cut.start, cut.stop, cut.series, (narrowing.made(cut, width),))
        for first, second in narrowing.pairs():
            if not {first.space.reader, second.space.reader} <= taken:
                continue
            start, stop = min(first.start, second.start), max(first.stop, second.stop)
            for i, a in enumerate(first.widths):
                for j, b in enumerate(second.widths):
                    near = i / len(first.widths) - j / len(second.widths)
                    if abs(near) <= 1.01 / max(len(first.widths), len(second.widths)):
                        cuts = (narrowing.made(first, a), narrowing.made(second, b))
                        self.narrowed(start, stop, first.series, cuts)

    def can_narrow(self, cut: PrivateCut) -> bool:
        """Whether a cut is allowed; if it is not, why is noted."""
        reader: Any = self.network.module(cut.space.reader)
        limit, taps = self.options.max_fit_unknowns, prod(getattr(reader, "kernel_size", ()))
        if limit is not None and cut.space.of * taps > limit:
            reason = f"not narrowed: {cut.space.of * taps} unknowns of a refit are more than max_fit_unknowns={limit}"
            self.refusals.append(Refusal(reason, (cut.space.reader,)))
            return False
        series = self.network.series[cut.series]
        return self.refused(self.make_span(series, cut.start, cut.stop), series.layers[cut.start : cut.stop]) is None

    def narrowed(self, start: int, stop: int, name: str, cuts: tuple[Cut, ...]) -> None:
        series = self.network.series[name]
        main, every = self.network.convs(series.layers[start:stop])
        span = self.make_span(series, start, stop)
        self.candidates.append(Candidate(span, "narrow", None, *self.paths(main, every, every), cuts=cuts))

    def factor(self, span: Span, layer: Layer, main: tuple[str, ...], every: tuple[str, ...]) -> None:
        config = factorable(self.network, layer)
        if config is None:
            return
        sizes = [(self.network.shape(s.entry)[2:], self.network.shape(s.output)[2:]) for s in self.sites(span)]
        for made in factored_ways(config, self.options.max_fit_unknowns):
            if all(config.output_size(before) == after for before, after in sizes):
                self.add(Candidate(span, "factor", made, *self.paths(main, every, every)))

    def falls_apart(self, span: Span, drops: dict[tuple[int, int], Span]) -> bool:
        """Whether two shorter drops give the same network: nothing stays at their cut, or what the end repeats."""
        for middle in range(span.start + 1, span.stop):
            before, after = drops.get((span.start, middle)), drops.get((middle, span.stop))
            if before is not None and after is not None and self.repeats(before.activation, span.activation):
                return True
        return False

    def repeats(self, first: str | None, second: str | None) -> bool:
        if first is None or second is None:
            return first is None
        one, two = self.network.module(first), self.network.module(second)
        return type(one) is type(two) and isinstance(one, ops.IDEMPOTENT) and one.extra_repr() == two.extra_repr()

    def fit(
        self, span: Span, series: Series, layers: tuple[Layer, ...], main: tuple[str, ...], every: tuple[str, ...]
    ) -> None:
        limit = self.options.max_fit_convs
        if limit is not None and len(main) > limit:
            return
        geometry = self.network.series_geometry(series, layers)
        before, after = self.network.shape(span.entry), self.network.shape(span.output)
        sizes = [(self.network.shape(s.entry)[2:], self.network.shape(s.output)[2:]) for s in self.sites(span)]
        if geometry is None or not self.network.sized(span.output) or not follows(geometry, before, after):
            blockers = [lay for lay in layers if self.network.geometry(lay) is None] or layers
            self.refusals.append(
                Refusal("the output size follows no conv's rule, so nothing can be fitted", blockers[0].nodes)
            )
            return
        as_it_is = self.network.config(layers[0]) if len(layers) == 1 and layers[0].conv else None
        alone = module_config(self.network.module(every[0]), before[1], len(before) - 2) if len(every) == 1 else None
        for kernel, dilation in fit_kernels(geometry, alone, self.options.max_kernel_size):
            config = centred(geometry, kernel, dilation, before[1], after[1])
            if config is None or any(config.output_size(a) != b for a, b in sizes):
                continue
            depthwise = before[1] == after[1] > 1 and len(before) > 2
            for groups in (1, before[1]) if depthwise else (1,):
                unknowns = before[1] // groups * prod(kernel)
                if self.options.max_fit_unknowns is not None and unknowns > self.options.max_fit_unknowns:
                    continue
                chosen = replace(config, groups=groups)
                if chosen != as_it_is:
                    self.add(Candidate(span, "fit", chosen, *self.paths(main, every, ())))


def _inside(layer: Layer) -> Iterator[str]:
    """All nodes that go when a layer is replaced: its own, those of its branches, and those between branches."""
    if layer.parallel is not None:
        yield from layer.parallel.inner
        for branch in layer.parallel.branches:
            for inner in branch.layers:
                yield from _inside(inner)
    yield from layer.nodes
