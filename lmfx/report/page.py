"""Writes a result as one page of HTML: the answer, every budget with its plan in the network's drawing, the evidence.

    result ─ answer          one line: how much faster, how much of the quality is kept, on what
           ├ stops           the frontier's points, one for each place of the slider
           ├ blocks, lanes   the network in rows and lanes        } drawn once; the page shows and hides
           │ └ changes       what each candidate makes of it      }
           ├ page_tables     latency by layer, errors by span, refusals with advice, how it was made
           └ templates/      Jinja2: page.html.j2 with page.css and page.js, nothing from elsewhere

The charts are SVG from templates and not from a plotting library: they have the page's colours in light and dark, are
read by screen readers, are sharp on paper, and take kilobytes where plotly's script alone takes more than 3 MB.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx

from lmfx.environment.atomic_files import atomic_write
from lmfx.passes.errors import MissingExtra, OptionError
from lmfx.passes.ir import Candidate
from lmfx.planning.saved_networks import is_merged
from lmfx.quality.measures import Alternative
from lmfx.report.answer import answer_of, figures_of
from lmfx.report.blocks import picture_of
from lmfx.report.changes import SpanChange, change_of
from lmfx.report.drawing import draw
from lmfx.report.page_charts import alternatives_chart, frontier_chart, measured_chart
from lmfx.report.page_tables import latency_rows, longest_seen, made_rows, refusal_rows, span_rows, strips
from lmfx.report.stops import say, stop_indices, stop_of
from lmfx.result import Result, result_of

__all__ = ["page_text", "write_page"]

TEMPLATES = Path(__file__).parent / "templates"


def write_page(
    net: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    command: str | None = None,
    alternatives: Sequence[Alternative] = (),
    random_weights: bool = False,
) -> Path:
    """Writes the page of a network to a file, which is complete or as it was before."""
    text = page_text(net, title=title, command=command, alternatives=alternatives, random_weights=random_weights)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return atomic_write(target, text.encode())
    except OSError as error:
        raise OptionError(f"cannot write the page {target}: {error}; give another file") from error


def page_text(
    net: fx.GraphModule,
    *,
    title: str | None = None,
    command: str | None = None,
    alternatives: Sequence[Alternative] = (),
    random_weights: bool = False,
) -> str:
    """The page of a network that carries a result. Raises `MissingExtra` without Jinja2."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra('pages need Jinja2: pip install "lmfx[html]"') from error
    result = replace(result_of(net), merged=is_merged(net))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["script"] = _script
    own = {name: (TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")}
    values = _values(result, title, command, (*result.alternatives, *alternatives), random_weights)
    text: str = environment.get_template("page.html.j2").render(**values, css=own["page.css"], js=own["page.js"])
    return "\n".join(line for line in (line.strip() for line in text.splitlines()) if line) + "\n"


def _script(value: Any) -> Any:
    """Plain values as JSON that a script element holds: no `<` in it can end the element."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


def _values(
    result: Result,
    title: str | None,
    command: str | None,
    alternatives: Sequence[Alternative],
    random_weights: bool,
) -> dict[str, Any]:
    """All that the template shows."""
    evidence, frontier = result.evidence, result.frontier
    model = title or (evidence.model if evidence is not None else "network")
    latencies = frontier.latencies if frontier is not None else None
    scores = frontier.scores if frontier is not None else None
    values: dict[str, Any] = {
        "title": model,
        "answer": answer_of(result, random_weights),
        "figures": figures_of(result, random_weights),
        "refusals": refusal_rows(result),
        "made": made_rows(result, command),
        "spans": span_rows(result, scores),
        "measured": measured_chart(result),
        "alternatives": None if random_weights else alternatives_chart(result, alternatives),
        "loaded": evidence is None,
        "held_out": result.quality is not None and result.quality.held_out,
        "chart": None,
        "drawing": None,
        "strips": None,
        "layers": [],
        "most": 100.0,
        "data": None,
        "now": None,
    }
    if evidence is None:
        return values
    picture = picture_of(evidence.spans.network)
    indices = stop_indices(frontier) if frontier is not None else []
    plans = [frontier.plan(i).candidates for i in indices] if frontier is not None else []
    chosen: dict[str, Candidate] = {c.key: c for plan in (*plans, result.plan.candidates) for c in plan}
    changes = [change_of(c, evidence.spans, picture, latencies, scores) for c in chosen.values()]
    changes.sort(key=lambda c: (c.rows[0] if c.rows else (0, 0), c.key))
    number_of = {c.key: i for i, c in enumerate(changes)}
    stops = [stop_of(frontier, i, number_of) for i in indices] if frontier is not None else []
    own = _own(result, number_of)
    values["now"] = _shown(changes, own["changes"])
    values["drawing"] = draw(picture, changes, latencies)
    values["layers"] = latency_rows(picture, changes, latencies)
    values["most"] = longest_seen(values["layers"], values["now"]["changes"], values["now"]["rows"])
    values["strips"] = strips(picture, changes, latencies)
    nearest = _nearest(stops, own)
    values["chart"] = frontier_chart(frontier, stops, own, nearest)
    values["data"] = {"changes": [_change(c) for c in changes], "stops": stops, "result": own, "nearest": nearest}
    return values


def _own(result: Result, number_of: dict[str, int]) -> dict[str, Any]:
    """The plan of the result, as a stop of the slider."""
    plan = result.plan
    ms = result.predicted if result.predicted is not None else result.measured
    # What the solver adds up, where the plan is one of its points; a plan that was judged has no such sum.
    loss = None if plan.importance is None else 0.0 - plan.importance
    return {
        "ms": ms,
        "loss": loss,
        "changes": [number_of[c.key] for c in plan.candidates if c.key in number_of],
        "say": say(ms or 0.0, result.original, loss, plan),
    }


def _shown(changes: Sequence[SpanChange], chosen: Sequence[int]) -> dict[str, Any]:
    """What is to be seen under a plan: its changes, what becomes of each row that they cover, and the edges that go."""
    rows = {row: changes[i].kind for i in chosen for a, b in changes[i].rows for row in range(a, b + 1)}
    return {"changes": set(chosen), "rows": rows, "edges": {e for i in chosen for e in changes[i].edges}}


def _nearest(stops: Sequence[dict[str, Any]], own: dict[str, Any]) -> int:
    """The stop that is the result's own, or has the latency next to it."""
    same = [i for i, s in enumerate(stops) if s["changes"] == own["changes"]]
    if same or not stops:
        return same[0] if same else 0
    return min(range(len(stops)), key=lambda i: abs(stops[i]["ms"] - (own["ms"] or 0.0)))


def _change(change: SpanChange) -> dict[str, Any]:
    return {"kind": change.kind, "rows": change.rows, "edges": change.edges}
