"""What each candidate does to a drawing of the network: which rows it takes, which edges go, and what there is to say.

A candidate that puts one convolution in the place of its span takes the rows of the span and the edges between them; of
the edges into the span only the one to its first row is left. A narrowed span keeps its rows and edges, and its layers
have fewer channels. Each change is drawn once and shown whenever a plan has it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lmfx.importance import ImportanceTable
from lmfx.latency import LatencyTable
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.report.blocks import Picture

__all__ = ["KINDS", "SpanChange", "change_of", "in_words", "kept_ms", "loss_of"]

KINDS = {
    "compose": "merged",
    "fit": "fitted",
    "narrow": "narrowed",
    "factor": "factored",
    "drop": "dropped",
    "keep": "kept",
}


@dataclass(frozen=True)
class SpanChange:
    """One candidate in a drawing. Latencies are rows of the table in ms, `loss` is what the candidate costs alone."""

    key: str
    kind: str  # a realization
    name: str  # of its first conv
    text: str  # what it makes of what
    kernel: str
    channels: tuple[int, int]
    rows: tuple[tuple[int, int], ...]  # first and last of each call
    edges: tuple[int, ...]  # of the picture, that go
    widths: dict[int, int]  # row -> channels that it has now, of a narrowed span
    before: float | None = None
    after: float | None = None
    loss: float | None = None

    @property
    def word(self) -> str:
        """What happened, in one word."""
        return KINDS[self.kind]


def change_of(
    candidate: Candidate,
    spans: SpanSet,
    picture: Picture,
    latencies: LatencyTable | None = None,
    scores: ImportanceTable | None = None,
) -> SpanChange:
    """What a candidate does to the drawing of its network."""
    ranges = [picture.rows(spans.network, s.series, s.start, s.stop) for s in candidate.spans]
    rows = tuple((r[0], r[-1]) for r in ranges if r)
    edges = () if candidate.cuts else _edges(picture, rows)
    config, shape = candidate.conv, spans.network.shape
    kernel = ""
    if config is not None and candidate.puts_conv:
        kernel = "×".join(map(str, config.written)) or "linear"
    known = latencies is not None and candidate.key in latencies
    return SpanChange(
        key=candidate.key,
        kind=candidate.realization,
        name=(candidate.convs or candidate.all_convs or (candidate.span.exit,))[0],
        text=in_words(candidate),
        kernel=kernel,
        channels=(_channels(shape(candidate.span.entry)), _channels(shape(candidate.span.exit))),
        rows=rows,
        edges=edges,
        widths=_widths(candidate, picture, spans),
        before=latencies.kept(candidate) if latencies is not None and known else None,
        after=latencies.ms(candidate.key) if latencies is not None and known else None,
        loss=loss_of(candidate, scores),
    )


def in_words(candidate: Candidate) -> str:
    """What a candidate makes of its span: `3 convs as one 5×5`."""
    return re.sub(r"(?<=\d)x(?=\d)", "×", candidate.change)


def loss_of(candidate: Candidate, scores: ImportanceTable | None) -> float | None:
    """What a candidate costs alone; None where no table says so."""
    if candidate.exact:
        return 0.0
    return 0.0 - scores[candidate.key] if scores is not None and candidate.key in scores else None


def kept_ms(latencies: LatencyTable, layer: tuple[str, int] | None) -> float | None:
    """The row of a layer that stays as it is, without what is in its branches; None where there is none."""
    if layer is None:
        return None
    series, index = layer
    found = latencies.rows.get(f"{series}:{index}-{index + 1}:keep")
    return None if found is None else found.ms


def _channels(shape: Sequence[int]) -> int:
    return shape[1] if len(shape) > 1 else 0


def _edges(picture: Picture, rows: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    gone = []
    for first, last in rows:
        into = {a for a, b in picture.edges if b == first}
        for i, (a, b) in enumerate(picture.edges):
            inside = first <= b <= last
            if inside and (first <= a <= last or (a in into and b != first)):
                gone.append(i)
    return tuple(gone)


def _widths(candidate: Candidate, picture: Picture, spans: SpanSet) -> dict[int, int]:
    """The channels of the rows between the conv of each cut and what reads them."""
    network = spans.network
    at = {network.path(n): picture.row_of[n] for n in network.nodes if n in picture.row_of}
    found = {}
    for cut in candidate.cuts:
        start, stop = at.get(cut.conv), at.get(cut.reader)
        if start is None or stop is None:
            continue
        for row in range(start, stop):
            block = picture.blocks[row]
            if block.channels:
                found[row] = max(1, round(block.channels * cut.width / cut.of))
    return found
