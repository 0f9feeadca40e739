"""Places the marks of a page's charts: the frontier, predicted against measured, other ways to be as fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmfx.planning.frontier import Frontier
from lmfx.quality.measures import Alternative
from lmfx.report.answer import is_calculated, ratio_of
from lmfx.report.charts import Axis, linear, number, symlog
from lmfx.result import Result

__all__ = ["alternatives_chart", "frontier_chart", "measured_chart"]

WIDE, TALL = 660.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 18.0, 14.0, 46.0


def _frame(x: Axis, y: Axis, x_name: str, y_name: str, wide: float = WIDE) -> dict[str, Any]:
    return {
        "wide": wide,
        "tall": TALL,
        "box": (LEFT, TOP, wide - RIGHT, TALL - BOTTOM),
        "x": x.labels,
        "y": y.labels,
        "x_name": x_name,
        "y_name": y_name,
    }


def frontier_chart(
    frontier: Frontier | None, stops: Sequence[dict[str, Any]], own: dict[str, Any], nearest: int
) -> dict[str, Any] | None:
    """The frontier as steps, the places of stops, the original and the result; None without a frontier.

    `own` is the result as a stop: where its loss is not known, it has the place of the stop that is `nearest`.
    """
    if frontier is None or not stops:
        return None
    latencies = [s["ms"] for s in stops] + [frontier.original]
    x = linear(latencies, LEFT, WIDE - RIGHT, zero=min(latencies) < 0.3 * max(latencies))
    y = symlog([s["loss"] for s in (*stops, own) if s["loss"] is not None], TALL - BOTTOM, TOP)
    places = [(round(x.at(s["ms"]), 1), round(y.at(s["loss"]), 1)) for s in stops]
    line = f"M{places[0][0]} {places[0][1]}" + "".join(f"H{px}V{py}" for px, py in places[1:])
    own_x = None if own["ms"] is None else round(x.at(min(max(own["ms"], x.low), x.high)), 1)
    return _frame(x, y, "predicted latency, ms", "predicted loss") | {
        "line": line,
        "places": places,
        "original": (x.at(frontier.original), y.at(0.0)),
        "own_x": own_x,
        "own": places[nearest] if own_x is None or own["loss"] is None else (own_x, round(y.at(own["loss"]), 1)),
        "points": len(frontier),
        "shown": len(stops),
    }


def measured_chart(result: Result) -> dict[str, Any] | None:
    """Predicted against measured, of the networks that the search built; None where there are fewer than two.

    What the analytic backend says of a whole network is calculated, and the chart says so.
    """
    pairs = result.evidence.measured if result.evidence is not None else ()
    if len(pairs) < 2:
        return None
    how = "calculated" if is_calculated(result) else "measured"
    wide, values = 440.0, [v for pair in pairs for v in pair]
    x, y = linear(values, LEFT, wide - RIGHT), linear(values, TALL - BOTTOM, TOP)
    dots = [
        {"x": x.at(p), "y": y.at(m), "tip": f"predicted {number(p, 4)} ms\n{how} {number(m, 4)} ms"} for p, m in pairs
    ]
    line = result.line
    said = "" if line is None else f"network = {number(line.a)} ms + {number(line.b)} × sum of its rows"
    worst = max(abs(p - m) / m for p, m in pairs)
    return (
        {"how": how}
        | _frame(x, y, "predicted, ms", f"{how}, ms", wide)
        | {
            "dots": dots,
            "line": (x.at(x.low), y.at(y.low), x.at(x.high), y.at(y.high)),
            "said": f"{said}; of these {len(pairs)} networks at most {worst:.1%} off".lstrip("; "),
        }
    )


def alternatives_chart(result: Result, alternatives: Sequence[Alternative]) -> dict[str, Any] | None:
    """What is kept over the latency, measured: the result and other ways; None without any."""
    ratio = ratio_of(result)
    if not alternatives or result.quality is None or ratio is None:
        return None
    known = [("lmfx, this result", ratio, result.quality), *((a.what, a.ratio, a.quality) for a in alternatives)]
    wide = 440.0
    x = linear([r for _, r, _ in known] + [1.0], LEFT, wide - RIGHT)
    y = linear([q.kept for *_, q in known] + [1.0], TALL - BOTTOM, TOP)
    # at one latency two ways often keep as much, and differ in how far their outputs went
    far = "KL" if all(q.kl is not None for *_, q in known) else "divergence"
    rows = [
        {"what": what, "ratio": f"{r:.1%}", "kept": f"{q.kept:.1%}", "x": x.at(r), "y": y.at(q.kept), "own": i == 0}
        | {"mark": chr(ord("A") + i) if i < 26 else str(i), "quality": str(q)}
        | {"far": number(q.divergence if far == "divergence" or q.kl is None else q.kl)}
        for i, (what, r, q) in enumerate(known)
    ]
    return _frame(x, y, "of the original's latency", "share that is kept", wide) | {
        "rows": rows,
        "far": far,
        "original": (x.at(1.0), y.at(1.0)),
    }
