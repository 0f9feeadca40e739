"""The tables of a page as plain values: latency by layer, errors by span, refusals with advice, how it was made."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Container, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from lmfx._version import __version__
from lmfx.environment.bounded_reading import in_one_line
from lmfx.environment.host import cpu_name, host_facts
from lmfx.importance import ImportanceTable
from lmfx.latency import LatencyTable
from lmfx.report.advice import advice_for
from lmfx.report.blocks import Picture
from lmfx.report.changes import KINDS, SpanChange, in_words, kept_ms, loss_of
from lmfx.report.charts import number
from lmfx.report.drawing import shortened, tip_of
from lmfx.report.text import group_refusals
from lmfx.result import Result

__all__ = ["latency_rows", "longest_seen", "made_rows", "refusal_rows", "span_rows", "strips"]

NAMES_SHOWN = 6


def latency_rows(
    picture: Picture, changes: Sequence[SpanChange], latencies: LatencyTable | None
) -> list[dict[str, Any]]:
    """A row for each layer that is kept and each change, in the order of the network; bars are parts of the longest."""
    if latencies is None:
        return []
    rows: list[dict[str, Any]] = [
        {"row": c.rows[0][0], "change": i, "kind": c.kind, "name": _span_name(c), "before": c.before, "after": c.after}
        for i, c in enumerate(changes)
        if c.before is not None and c.after is not None and c.rows
    ]
    for block in picture.blocks:
        ms = kept_ms(latencies, block.layer)
        if ms:
            rows.append(
                {"row": block.row, "change": None, "kind": "keep", "name": block.name, "before": ms, "after": ms}
            )
    rows.sort(key=lambda r: (r["row"], r["change"] is None))
    longest = max((max(r["before"], r["after"]) for r in rows), default=1.0) or 1.0
    for r in rows:
        r |= {f"{k}_part": round(100 * r[k] / longest, 2) for k in ("before", "after")}
        r |= {f"{k}_text": number(r[k]) for k in ("before", "after")}
        r["short"], r["word"] = shortened(r["name"], 44), KINDS[r["kind"]]
    return rows


def longest_seen(rows: Sequence[dict[str, Any]], changes: Container[int], covered: Container[int]) -> float:
    """The longest bar of those that a plan shows, as a part of the longest of all."""
    seen = [r for r in rows if (r["row"] not in covered if r["change"] is None else r["change"] in changes)]
    return max((part for r in seen for part in (r["before_part"], r["after_part"])), default=0.0) or 100.0


def _span_name(change: SpanChange) -> str:
    return f"{change.name}: {change.text}"


def strips(picture: Picture, changes: Sequence[SpanChange], latencies: LatencyTable | None) -> dict[str, Any] | None:
    """The latencies of all layers end to end, before and after, as shares of the original's sum."""
    if latencies is None:
        return None
    kept = [(b, kept_ms(latencies, b.layer) or 0.0) for b in picture.blocks]
    total = sum(ms for _, ms in kept)
    if not total:
        return None
    before = [
        {"row": b.row, "part": round(100 * ms / total, 3), "tip": f"{in_one_line(b.name)}\n{number(ms)} ms"}
        for b, ms in kept
        if ms
    ]
    after: list[dict[str, Any]] = [
        {"row": c.rows[0][0], "change": i, "kind": c.kind, "part": round(100 * c.after / total, 3)}
        | {"tip": "\n".join(tip_of(c))}
        for i, c in enumerate(changes)
        if c.after and c.rows
    ]
    after += [{**b, "change": None, "kind": "keep"} for b in before]
    after.sort(key=lambda s: (s["row"], s["change"] is None))
    return {"before": before, "after": after, "total": f"{number(total)} ms"}


def span_rows(result: Result, scores: ImportanceTable | None) -> list[dict[str, Any]]:
    """What each changed span is, how far off the network is at its end, and what the change costs alone."""
    errors = result.evidence.errors if result.evidence is not None else ()
    found = []
    for i, (name, c) in enumerate(zip(result.names, result.plan.candidates, strict=False)):
        error = errors[i] if i < len(errors) else None
        loss = loss_of(c, scores)
        found.append(
            {
                "name": in_one_line(c.convs[0] if c.convs else name),
                "kind": c.realization,
                "word": KINDS[c.realization],
                "text": in_words(c),
                "of": [in_one_line(n) for n in c.all_convs],
                "error": None if error is None else number(error),
                "part": 0.0 if error is None else round(100 * min(error, 1.0), 2),
                "loss": None if loss is None else number(loss),
            }
        )
    return found


def refusal_rows(result: Result) -> list[dict[str, Any]]:
    """Refusals by their reason, the most frequent first, each with what to do about it."""
    found = []
    for reason, members in group_refusals(result.refusals):
        nodes = [in_one_line(n) for n in dict.fromkeys(n for r in members for n in r.nodes)]
        found.append(
            {
                "count": len(members),
                "reason": in_one_line(reason),
                "advice": advice_for(members[0].reason),
                "nodes": nodes[:NAMES_SHOWN],
                "more": nodes[NAMES_SHOWN:],
            }
        )
    return found


def made_rows(result: Result, command: str | None) -> dict[str, Any]:
    """The command and what it ran on."""
    facts = host_facts()
    rows = [
        ("lmfx", __version__),
        ("torch", torch.__version__),
        ("Python", platform.python_version()),
        ("system", f"{facts['system']} {facts['machine']}, {facts['cores']} cores"),
        ("processor", cpu_name()),
    ]
    rows += [(k if k == "backend" else f"its {k}", str(v)) for k, v in result.backend.items() if v not in (None, "")]
    rows.append(("budget", "none" if result.budget is None else str(result.budget)))
    rows += [("to keep", f"{result.keep:.4g}")] if result.keep is not None else []
    rows += [("calibration images", str(result.images))] if result.images is not None else []
    rows += [("candidates considered", f"{result.candidates:,}")]
    rows += [("form", "merged" if result.merged else "trainable")]
    stages = []
    if result.effort is not None:
        stages = [(name, f"{seconds:.2f}") for name, seconds in result.effort.stages]
        stages.append(("all", f"{result.effort.seconds:.2f}"))
    return {
        "command": shlex.join(sys.orig_argv) if command is None else command,
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "rows": [(k, in_one_line(v)) for k, v in rows],
        "stages": stages,
    }
