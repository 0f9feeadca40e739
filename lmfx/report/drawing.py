"""Gives every part of a network's drawing its place: names, the original, the result beside it row by row, and words.

      name       channels │ tracks lanes │ tracks lanes │ what became of it
      layer1.0.conv1   64 │   │   [3×3]  │   │   ┌───┐  │ merged · 2 convs as one 5×5 · 0.42 → 0.18 ms
      layer1.0.conv2   64 │   │   [3×3]  │   │   └5×5┘  │
      layer1.0         64 │   └─▶ (+)    │   └─▶ (+)    │ 0.02 ms

Both drawings have the same lanes (`lanes`), so a merged convolution stands beside the layers that it replaces. A block
is as wide as the logarithm of its channels. Everything that some plan shows is drawn once; the page hides and shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmfx.environment.bounded_reading import in_one_line
from lmfx.latency import LatencyTable
from lmfx.report.blocks import Block, Picture
from lmfx.report.changes import SpanChange, kept_ms
from lmfx.report.charts import number
from lmfx.report.lanes import Lanes, Route, in_lanes

__all__ = ["Drawing", "draw", "shortened"]

ROW, GLYPH, TRACK, MARGIN = 26, 16, 12, 12
CHANNELS, GAP = 58, 24
LETTER, MONO = 6.2, 6.7  # about the width of one in the last column, and in the first
LONGEST = 32  # letters of a name


@dataclass
class Drawing:
    """Places in pixels; the lists are what a template draws, as dicts of plain values."""

    width: int
    height: int
    columns: dict[str, int]  # where each column begins
    names: list[dict[str, Any]] = field(default_factory=list)
    edges: list[dict[str, Any]] = field(default_factory=list)
    original: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)


class _Places:
    """Where rows, lanes and tracks are."""

    def __init__(self, picture: Picture, lanes: Lanes) -> None:
        self.lanes = lanes
        self.pitch = {0: 88, 1: 88, 2: 76, 3: 62}.get(lanes.lanes, 52)
        self.wide = self.pitch - 10
        counts = [b.channels for b in picture.blocks if b.channels]
        self.least, self.most = (min(counts), max(counts)) if counts else (1, 1)
        self.pace = TRACK if lanes.tracks <= 8 else TRACK * 2 // 3
        self.tracks = MARGIN + self.pace * lanes.tracks
        self.breadth = self.tracks + self.pitch * max(lanes.lanes, 1)
        longest = max((len(shortened(b.name)) for b in picture.blocks), default=8)
        self.left = round(MONO * longest) + CHANNELS + 16
        self.right = self.left + self.breadth + GAP
        self.words = self.right + self.breadth + MARGIN

    def x(self, lane: int) -> float:
        return self.tracks + self.pitch * (lane + 0.5)

    def track(self, track: int) -> float:
        return self.tracks - self.pace * (track + 0.5)

    def top(self, row: int) -> float:
        return row * ROW + (ROW - GLYPH) / 2

    def width(self, channels: int) -> float:
        least = 34.0
        if not channels or self.most == self.least:
            return self.wide
        part = math.log(max(channels, self.least) / self.least) / math.log(self.most / self.least)
        return round(least + part * (self.wide - least), 1)

    def path(self, route: Route) -> str:
        """The line of an edge, from its source to its target, both of which lie on its ends."""
        x1, y1 = self.x(self.lanes.lane[route.source]), self.top(route.source) + GLYPH
        x2, y2 = self.x(self.lanes.lane[route.target]), self.top(route.target)
        xm = self.x(route.lane) if route.lane is not None else self.track(route.track or 0)
        gutter = ROW - GLYPH
        if route.target == route.source + 1:
            return _line(x1, y1) + (f"V{y2:g}" if x1 == x2 else _bend(x1, y1, x2, y2)) + f"V{y2 + GLYPH / 2:g}"
        text = _line(x1, y1)
        down, up = y1, y2
        if xm != x1:
            down = y1 + gutter
            text += _bend(x1, y1, xm, down)
        if xm != x2:
            up = y2 - gutter
        text += f"V{up:g}" if up != down else ""
        return text + (_bend(xm, up, x2, y2) if xm != x2 else "") + f"V{y2 + GLYPH / 2:g}"


def _line(x: float, y: float) -> str:
    return f"M{x:g} {y - GLYPH / 2:g}V{y:g}"


def _bend(x1: float, y1: float, x2: float, y2: float) -> str:
    middle = (y1 + y2) / 2
    return f"C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}"


def draw(picture: Picture, changes: Sequence[SpanChange], latencies: LatencyTable | None) -> Drawing:
    """The drawing of a network and of all changes that some plan makes."""
    lanes = in_lanes(len(picture.blocks), picture.edges)
    places = _Places(picture, lanes)
    columns = {"original": places.left, "result": places.right, "words": places.words}
    longest = max((len(words_of(c)) for c in changes), default=30)
    made = Drawing(places.words + round(LETTER * longest) + MARGIN, len(picture.blocks) * ROW, columns)
    number_of = {edge: i for i, edge in enumerate(picture.edges)}
    made.edges = [{"edge": number_of[r.source, r.target], "d": places.path(r)} for r in lanes.routes]
    for block in picture.blocks:
        ms = None if latencies is None else kept_ms(latencies, block.layer)
        y = block.row * ROW + ROW / 2
        shown = {"row": block.row, "y": y, "tip": _tip(block, ms)}
        channels = f"{block.channels:,}" if block.channels else ""
        made.names.append({**shown, "name": shortened(block.name), "channels": channels, "kind": block.kind})
        glyph = _glyph(places, block, block.channels)
        made.original.append({**shown, **glyph})
        words = "" if ms is None or not round(ms, 4) else f"{number(ms)} ms"
        made.kept.append({**shown, **glyph, "words": words})
    made.changes = [_change(places, picture, i, c) for i, c in enumerate(changes)]
    return made


def _glyph(places: _Places, block: Block, channels: int) -> dict[str, Any]:
    x, y = places.x(places.lanes.lane[block.row]), places.top(block.row)
    if block.kind == "conv":
        wide = places.width(channels)
        return {"shape": "box", "x": x - wide / 2, "top": y, "wide": wide, "text": block.kernel, "middle": x}
    if block.kind == "join" and len(block.sign) == 1:
        return {"shape": "dot", "x": x - 8, "top": y, "wide": 16, "text": block.sign, "middle": x}
    if block.kind in ("input", "output"):
        return {"shape": "end", "x": x - 16, "top": y + 4, "wide": 32, "text": "", "middle": x}
    wide = 34.0 if block.sign else 30.0
    return {"shape": "join" if block.sign else "op", "x": x - wide / 2, "top": y, "wide": wide, "text": block.sign} | {
        "middle": x
    }


def _change(places: _Places, picture: Picture, index: int, change: SpanChange) -> dict[str, Any]:
    boxes, glyphs = [], []
    for first, last in change.rows:
        x1, x2 = (places.x(places.lanes.lane[row]) for row in (first, last))
        top, bottom = places.top(first), places.top(last) + GLYPH
        if change.kind == "narrow":
            for row in range(first, last + 1):
                block = picture.blocks[row]
                now = change.widths.get(row)
                before = _glyph(places, block, block.channels)
                glyphs.append({**_glyph(places, block, now or block.channels), "cut": now is not None, "was": before})
            continue
        wide = places.width(change.channels[1])
        low, high = min(x1, x2) - wide / 2, max(x1, x2) + wide / 2
        boxes.append({"x": low, "y": top, "wide": high - low, "tall": bottom - top, "middle": (low + high) / 2})
    return {
        "index": index,
        "kind": change.kind,
        "row": change.rows[0][0] if change.rows else 0,
        "ys": [first * ROW + ROW / 2 for first, _ in change.rows],
        "boxes": boxes,
        "glyphs": glyphs,
        "text": change.kernel if change.kind != "drop" else "",
        "words": words_of(change),
        "tip": "\n".join(tip_of(change)),
    }


def words_of(change: SpanChange) -> str:
    """What became of a span, in one line."""
    parts = [f"{change.word}: {change.text}"]
    if change.before is not None and change.after is not None:
        parts.append(f"{number(change.before)} → {number(change.after)} ms")
    if change.loss is not None:
        parts.append("no loss" if change.loss == 0 else f"loss {number(change.loss)}")
    return " · ".join(parts)


def tip_of(change: SpanChange) -> list[str]:
    """All there is to say of a change, a line each."""
    lines = [in_one_line(change.name), f"{change.word}: {change.text}"]
    if change.kernel:
        lines.append(f"kernel {change.kernel}, {change.channels[0]:,} → {change.channels[1]:,} channels")
    if change.before is not None and change.after is not None:
        lines.append(f"predicted {number(change.before)} → {number(change.after)} ms")
    if change.loss is not None:
        lines.append("loses nothing" if change.loss == 0 else f"predicted loss alone {number(change.loss)}")
    return lines


def _tip(block: Block, ms: float | None) -> str:
    lines = [in_one_line(block.name)]
    lines += [f"kernel {block.kernel}, {block.channels:,} channels"] if block.kernel else []
    lines += [block.what]
    lines += [f"{number(ms)} ms"] if ms else []
    return "\n".join(lines)


def shortened(name: str, longest: int = LONGEST) -> str:
    """A name that fits its column: its end says more than its middle."""
    name = in_one_line(name)
    if len(name) <= longest:
        return name
    head = longest // 3
    return f"{name[:head]}…{name[-(longest - head - 1) :]}"
