"""Finds which candidates can be expected to be no better than which others, before either is scored.

Candidate c is *bounded by* d if d lies inside c, and d takes away no more than c does there:

    span       d's span is within c's (the same, a part of it, or a span of a branch inside it)
    window     d's kernel reaches as far as c's, counted in pixels where c begins:  k_c - 1 <= stride (k_d - 1)
    groups     d's channels see as many others: it is dense, or its groups are a part of c's
    freedom    a fit is free to be any conv; a composed conv is not, and prunes what it does not keep;
               the identity (`drop`) is one conv among all: it is bounded, and bounds nothing
    factors    of one conv in fewer depthwise filters by that in more, of lower by those of higher rank
    width      of narrowed spans the one with fewer channels at each cut; the sets of channels are nested

`importance(c) <= importance(d)` is then an *assumption*. It is what is usually seen, because all that stays between d
and the ends of c is replaced by c as well; it is no theorem. Two layers that were trained with each other may be worth
less apart than neither, and a fit is judged on other images than those that it was made from. Scored tables tell how
well it holds (`violations`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lmfx.passes.ir import Candidate, ConvConfig, Span
from lmfx.passes.spans.layers import Network

__all__ = ["bounded_by", "places", "violations"]


def bounded_by(network: Network, candidates: Sequence[Candidate]) -> list[NDArray[np.intp]]:
    """For each candidate that changes something, the places of those that bound it, smallest span first."""
    found = [np.empty(0, dtype=np.intp)] * len(candidates)
    inside: dict[str, list[tuple[int, int, int]]] = {}
    for i, d in enumerate(candidates):
        if d.puts_conv or d.cuts:
            for series, start, stop in places(d.span):
                inside.setdefault(series, []).append((start, stop, i))
    tables = {name: np.array(rows) for name, rows in inside.items()}
    for i, c in enumerate(candidates):
        table = tables.get(c.span.series)
        if table is None or c.realization == "keep":
            continue
        within = table[(table[:, 0] >= c.span.start) & (table[:, 1] <= c.span.stop), 2]
        bounding = [j for j in within.tolist() if j != i and _bounds(network, candidates[j], c)]
        bounding.sort(key=lambda j: (len(candidates[j].convs), -sum(cut.width for cut in candidates[j].cuts), j))
        found[i] = np.array(bounding, dtype=np.intp)
    return found


def places(span: Span) -> list[tuple[str, int, int]]:
    """Where a span lies: in its own series, and as a part of one layer in each series around that."""
    name, places = span.series, [(span.series, span.start, span.stop)]
    while "/" in name:
        name, _, branch = name.rpartition("/")
        at = int(branch.split(".")[0])
        places.append((name, at, at + 1))
    return places


def _fewer(c: ConvConfig | None, d: ConvConfig | None) -> bool:
    """Whether one conv's factors of one kind are fewer than others."""
    assert c is not None and d is not None
    return 0 < c.multiplier < d.multiplier or 0 < c.rank < d.rank


def _bounds(network: Network, d: Candidate, c: Candidate) -> bool:
    """Whether d, which lies inside c, takes away no more than c does there."""
    if c.cuts or d.cuts:
        return _narrower(c, d)
    if c.realization == "drop":
        return True
    if c.realization == "fit" and d.realization != "fit":
        return False
    if c.realization == d.realization == "compose" and not set(c.kept) & set(d.all_convs) <= set(d.kept):
        return False
    if "factor" in (c.realization, d.realization):
        return c.realization == d.realization and c.span == d.span and _fewer(c.conv, d.conv)
    if any(e.conv is not None and e.conv.upscale for e in (c, d)):
        return False  # their kernels are those of a smaller map
    if c.conv is None or d.conv is None or len(c.conv.kernel_size) != len(d.conv.kernel_size):
        return False
    if d.conv.groups > 1 and c.conv.groups % d.conv.groups:
        return False
    before, after = network.shape(c.span.entry)[2:], network.shape(d.span.entry)[2:]
    for k, kd, dc, dd, size, smaller in zip(
        c.conv.kernel_size, d.conv.kernel_size, c.conv.dilation, d.conv.dilation, before, after, strict=True
    ):
        if dc * (k - 1) > dd * (kd - 1) * max(size // max(smaller, 1), 1):
            return False
    # Two that bound each other would both wait for the other.
    return c.span != d.span or (c.realization, c.conv) != (d.realization, d.conv)


def _narrower(c: Candidate, d: Candidate) -> bool:
    """Whether c has all cuts of d, at widths that are no larger."""
    widths = {cut.reader: cut.width for cut in c.cuts}
    same = bool(d.cuts) and all(widths.get(cut.reader, cut.of) <= cut.width for cut in d.cuts)
    return same and {cut.reader for cut in d.cuts} <= widths.keys() and c.key != d.key


def violations(
    bounded: Sequence[NDArray[np.intp]], values: Mapping[int, float], slack: float = 0.0
) -> tuple[int, int, float]:
    """(pairs of scored candidates in which the bounded one is better, all such pairs, by how much at most)."""
    broken, pairs, most = 0, 0, 0.0
    for i, value in values.items():
        for j in bounded[i].tolist():
            if j in values:
                pairs += 1
                excess = float(value - values[j])
                broken += int(excess > slack)
                most = max(most, excess)
    return broken, pairs, most
