"""The data types that pass between the stages: regions, spans, candidates, refusals, plans. All are frozen.

A traced graph is reduced to *regions* (series-parallel parts); a region is a `Series` of `Layer`s; a layer is a run of
affine ops up to and including at most one activation, around at most one core: a convolution, a `Parallel` element (a
residual block, say), or an op that lmfx does not understand (opaque).

    Region ── Series ── Layer (conv)
                     ├─ Layer (parallel) ── Parallel(add) ── Series, Series
                     └─ Layer (opaque)

Cuts are the boundaries between layers; a `Span` is what lies between two cuts of one series, half open
`(start, stop]` in the paper's counting, `series.layers[start:stop]` in Python's. A `Candidate` is one way to realize a
span. All references into the graph are *names of fx nodes* (`str`), so these objects survive copies of the graph and
can be written to JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal, get_args

from .html_text import escaped, html_table, plain_facts

__all__ = [
    "Candidate",
    "ConvConfig",
    "Cut",
    "Join",
    "Layer",
    "MergePlan",
    "PaddingMode",
    "Parallel",
    "Realization",
    "Refusal",
    "Region",
    "Series",
    "Span",
    "Surrogate",
]

Realization = Literal["keep", "compose", "fit", "drop", "narrow", "factor"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Surrogate = Literal["identity", "affine"]  # what stands for an activation that a composed span removes
Join = Literal["add", "sub", "cat", "mul", "mesh"]


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be merged: a reason for a person, and the names of the fx nodes that are in the way."""

    reason: str
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.reason} ({', '.join(self.nodes)})" if self.nodes else self.reason

    def _repr_html_(self) -> str:
        nodes = f" <code>{escaped(', '.join(self.nodes))}</code>" if self.nodes else ""
        return f"<div><strong>refused</strong> {escaped(self.reason)}{nodes}</div>"


@dataclass(frozen=True)
class ConvConfig:
    """Everything about a convolution but its values. Tuples have one entry a spatial dimension: up to 3, and
    none for an nn.Linear on vectors.

    `padding` is `((before, after), ...)`, so left/top and right/bottom may differ. It is filled with `padding_value`,
    or from the map itself in one of torch's other padding modes. A negative one drops pixels.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: PaddingMode = "zeros"
    padding_value: float = 0.0
    # What makes a map larger (see `enlarging`): the conv's channels become blocks of pixels, of which some are cut off
    # at the end, or the same is written as one transposed conv: (taps, dilation, padding) in each dimension.
    upscale: tuple[int, ...] = field(default=(), metadata={"optional": True})
    cut: tuple[int, ...] = field(default=(), metadata={"optional": True})
    window: tuple[tuple[int, int, int], ...] = field(default=(), metadata={"optional": True})
    # What a pointwise conv makes the outputs of, where it is two convs: so many depthwise filters of each input
    # channel, or so many channels of a dense conv. Both are 0 for one conv.
    multiplier: int = field(default=0, metadata={"optional": True})
    rank: int = field(default=0, metadata={"optional": True})
    biased: bool = field(default=False, compare=False, repr=False)  # an op that it stands for adds constants

    @property
    def conv_channels(self) -> int:
        """The output channels of the conv itself, before they become pixels."""
        return self.out_channels * prod(self.upscale)

    @property
    def written(self) -> tuple[int, ...]:
        """The kernel as it is written: that of the transposed conv where it is one."""
        return tuple(taps for taps, _, _ in self.window) or self.kernel_size

    @property
    def taps(self) -> float:
        """Multiply-adds for each output pixel, output channel, and input channel of a group."""
        if self.multiplier:
            return self.multiplier * (1 + prod(self.kernel_size) / self.out_channels)
        if self.rank:
            return self.rank * (prod(self.kernel_size) / self.out_channels + 1 / self.in_channels)
        return prod(self.written) / prod(self.upscale if self.window else ())

    @property
    def pads(self) -> bool:
        """Whether there is any padding, or a crop."""
        return any(before or after for before, after in self.padding)

    @property
    def fills(self) -> bool:
        """Whether any padding is filled, and does not crop."""
        return any(before > 0 or after > 0 for before, after in self.padding)

    @property
    def even(self) -> bool:
        """Whether a torch convolution has this padding of its own: zeros, as many before as after, no crop."""
        if self.window:
            return True
        zeros = self.padding_mode == "zeros" and self.padding_value == 0
        return not self.pads or (zeros and all(lo == hi >= 0 for lo, hi in self.padding))

    @property
    def factored(self) -> bool:
        """Whether it is two convs."""
        return bool(self.multiplier or self.rank)

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial output size for a spatial input size."""
        sizes = tuple(
            (n + lo + hi - d * (k - 1) - 1) // s + 1
            for n, (lo, hi), d, k, s in zip(
                size, self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
        if not self.upscale:
            return sizes
        return tuple(u * m - c for m, u, c in zip(sizes, self.upscale, self.cut, strict=True))


@dataclass(frozen=True)
class Parallel:
    """Branches that leave one value and meet in one join. An empty branch (no layers) is a plain skip.

    A `mesh` is a part with one entry and one exit whose branches exchange values on the way: `branches` are the series
    inside it that hold convolutions, wherever they begin and end, `inner` its other nodes before the last one, and
    `refusal` says why it is no series of layers.
    """

    join: Join
    node: str  # the fx node of the join, or the last node of the mesh
    branches: tuple[Series, ...]  # in operand order, for a mesh in the order of the graph
    inner: tuple[str, ...] = ()
    refusal: Refusal | None = None


@dataclass(frozen=True)
class Layer:
    """Affine ops up to and including at most one activation, around at most one core (conv, parallel or opaque op).

    `nodes` are the layer's own fx nodes in order (for a parallel: the join and what follows it, not the branches).
    `entry` is the node whose value enters, `exit` the node whose value leaves.
    """

    nodes: tuple[str, ...]
    entry: str
    exit: str
    conv: str | None = None
    activation: str | None = None
    parallel: Parallel | None = None
    opaque: Refusal | None = None  # why the core is not understood

    def all_nodes(self) -> Iterator[str]:
        """The layer's nodes and those of every branch inside it."""
        if self.parallel is not None:
            for branch in self.parallel.branches:
                for layer in branch.layers:
                    yield from layer.all_nodes()
        yield from self.nodes


@dataclass(frozen=True)
class Series:
    """Consecutive layers. `name` is unique in the graph: `"0"`, and for branch 1 of its layer 3 `"0/3.1"`."""

    name: str
    entry: str
    exit: str
    layers: tuple[Layer, ...]

    def walk(self) -> Iterator[Series]:
        """This series and all series nested in it, outer before inner."""
        yield self
        for layer in self.layers:
            if layer.parallel is not None:
                for branch in layer.parallel.branches:
                    yield from branch.walk()


@dataclass(frozen=True)
class Region:
    """A maximal series-parallel part of the graph, entered and left through one value each."""

    series: Series

    @property
    def entry(self) -> str:
        return self.series.entry

    @property
    def exit(self) -> str:
        return self.series.exit


@dataclass(frozen=True)
class Span:
    """`series.layers[start:stop]`."""

    series: str
    start: int
    stop: int
    entry: str  # fx node whose value enters
    exit: str  # fx node whose value leaves, after the kept activation
    output: str  # fx node whose value the merged conv replaces: `exit`, or what enters the kept activation
    activation: str | None  # the kept activation at the stop, if there is one


@dataclass(frozen=True)
class Cut:
    """Channels inside a span that only this span sees, of which some stay (`passes/spans/narrowing.py`).

    `conv` is the module that makes them, `reader` the one that reads them and is refitted; `of` and `width` are how
    many the reader has before and after. `channels` are those of its input that stay, in order; none until they are
    chosen.
    """

    conv: str
    reader: str
    of: int
    width: int
    channels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One thing the solver may choose: a span, and how to realize it.

    keep     the single layer as it is (`conv` is None; for a parallel layer only its join and what follows it)
    compose  the tensor algebra over the `kept` convs; the others are pruned
    fit      one conv found in closed form, whatever the span holds
    drop     the identity
    narrow   the span as it is, with fewer channels at its `cuts`
    factor   the span's one dense conv as a pointwise one after a depthwise one (`conv.multiplier`) or after a dense one
             of fewer channels (`conv.rank`)

    `convs` are the qualified module names of the convs on the main path in order, `all_convs` those of the skips too,
    `kept` those that are composed. `post_norm` is the node of the norm that moves to after the merged conv
    (`moved_norms`). `calls` are the spans of all other calls of the same layers (`calls.py`): what the candidate makes,
    they share. `exact` says that the candidate is the same function as its span (`passes/spans/exact.py`), so that it
    loses nothing.
    """

    span: Span
    realization: Realization
    conv: ConvConfig | None = None
    convs: tuple[str, ...] = ()
    all_convs: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    post_norm: str | None = field(default=None, kw_only=True, metadata={"optional": True})
    exact: bool = field(default=False, kw_only=True, compare=False, metadata={"optional": True})
    calls: tuple[Span, ...] = field(default=(), kw_only=True, metadata={"optional": True})
    cuts: tuple[Cut, ...] = field(default=(), kw_only=True, metadata={"optional": True})

    @property
    def puts_conv(self) -> bool:
        """Whether a conv of its own (`conv`) stands where the span was."""
        return self.realization not in ("keep", "drop", "narrow")

    @property
    def conv_count(self) -> int:
        """How many convs stand where the span was."""
        return len(self.all_convs) if self.cuts else 2 if self.realization == "factor" else int(self.puts_conv)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans of all calls, the candidate's own first."""
        return self.span, *self.calls

    def each(self) -> tuple[Candidate, ...]:
        """The candidate at each call alone."""
        return tuple(replace(self, span=span, calls=()) for span in self.spans) if self.calls else (self,)

    @property
    def key(self) -> str:
        """A name that is unique among the candidates of one graph and equal in every run."""
        parts = [self.span.series, f"{self.span.start}-{self.span.stop}", self.realization]
        if self.conv is not None and self.puts_conv:
            c = self.conv
            parts.append("x".join(map(str, c.kernel_size)) + f"s{'x'.join(map(str, c.stride))}g{c.groups}")
            if c.multiplier:
                parts.append(f"m{c.multiplier}")
            if c.rank:
                parts.append(f"r{c.rank}")
            if any(d != 1 for d in c.dilation):
                parts.append("d" + "x".join(map(str, c.dilation)))
            if c.padding_mode != "zeros" or c.padding_value:
                parts.append(c.padding_mode if c.padding_mode != "zeros" else f"pad{c.padding_value:g}")
            if c.upscale:
                parts.append(("t" if c.window else "u") + "x".join(map(str, c.upscale)))
        parts += [f"{cut.reader}={cut.width}" for cut in self.cuts]
        if self.post_norm is not None:
            parts.append("post")
        if self.calls:
            parts.append(f"calls{len(self.spans)}")
        return ":".join(parts)

    @property
    def change(self) -> str:
        """What it makes of its span, in words: `3 convs as one 5x5`."""
        count = len(self.all_convs)
        what = f"{count} conv{'' if count == 1 else 's'}"
        if self.cuts:
            return " and ".join(f"{cut.of} to {cut.width} channels" for cut in self.cuts)
        if self.conv is None or not self.puts_conv:
            return f"{what} left out" if self.realization == "drop" else "as it is"
        kernel = "x".join(map(str, self.conv.written)) or "linear"
        if self.conv.multiplier:
            filters = "" if self.conv.multiplier == 1 else f"{self.conv.multiplier} x "
            return f"{kernel} as {filters}depthwise and pointwise"
        if self.conv.rank:
            return f"{kernel} to {self.conv.rank} channels and pointwise"
        into = f"{kernel}{' depthwise' if self.conv.depthwise else ''}"
        return into if count == 1 else f"{what} as one {into}"


@dataclass(frozen=True)
class MergePlan:
    """The chosen candidates (those that change something: never `keep`), in the order of the graph.

    `latency` (ms) and `importance` are the solver's prediction for the whole network; `fingerprint` names the traced
    graph that the plan was made for, and rewriting another graph with it is refused.
    """

    candidates: tuple[Candidate, ...] = ()
    fingerprint: str = ""
    latency: float | None = None
    importance: float | None = None
    surrogate: Surrogate = "identity"
    # An activation after each merged conv whose span ended without one (see `added_activations`).
    activation_after: str | None = field(default=None, metadata={"optional": True})
    # Its spans count layers of one op each, as those of `lmfx.simplify` do (see `find_regions`).
    fine: bool = field(default=False, metadata={"optional": True})
    # Sums that are added up in another order first (see `regrouped_sums`): a node, then operands that become one.
    sums: tuple[tuple[str, ...], ...] = field(default=(), metadata={"optional": True})

    @property
    def exact(self) -> bool:
        """Whether every candidate is: the network under the plan computes what the original computes."""
        return all(c.exact for c in self.candidates)

    @property
    def ways(self) -> dict[str, int]:
        """How many spans it changes in each way."""
        return {way: sum(c.realization == way for c in self.candidates) for way in get_args(Realization)[1:]}

    @property
    def conv_counts(self) -> tuple[int, int]:
        """How many convs its spans have, and how many they become."""
        before = {name for c in self.candidates for name in c.all_convs}
        return len(before), sum(c.conv_count for c in self.candidates)

    def __str__(self) -> str:
        changes = [(c.realization, f"{c.change} of {', '.join(c.all_convs)}") for c in self.candidates]
        return plain_facts(self._caption, changes)

    @property
    def _caption(self) -> str:
        figures = [] if self.latency is None else [f"{self.latency:.4g} ms predicted"]
        figures += [] if self.importance is None else [f"importance {self.importance:.4g}"]
        return "; ".join([f"a plan that changes {len(self.candidates)} spans", *figures])

    def _repr_html_(self) -> str:
        rows = [(c.realization, c.change, ", ".join(c.all_convs)) for c in self.candidates]
        return html_table(("how", "what it makes", "of"), rows, caption=self._caption)
