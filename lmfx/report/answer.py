"""Says in one line what a compression gave: how much faster, how much of the quality is kept, on what it was judged."""

from __future__ import annotations

import math
from typing import Any

from lmfx.environment.bounded_reading import in_one_line
from lmfx.quality.measures import Quality
from lmfx.report.charts import number
from lmfx.result import Result

__all__ = ["COLLAPSED", "RANDOM", "answer_of", "figures_of", "is_calculated", "ratio_of", "runtime"]

COLLAPSED = (
    "It no longer does what the original did. Allow a larger budget, train it (lmfx.recover, lmfx.distill), or keep "
    "layers with exclude=."
)

FEW = 100  # images, of which a share in per cent says more than was counted

RANDOM = "The weights are random: latencies hold, but outputs mean nothing, so nothing is said of them."


def ratio_of(result: Result) -> float | None:
    """The share of the original's latency: measured, or predicted where nothing was measured."""
    if result.ratio is not None:
        return result.ratio
    return result.predicted / result.original if result.predicted is not None and result.original else None


def answer_of(result: Result, random_weights: bool = False) -> dict[str, Any]:
    """`head` is the answer, `detail` on what it rests, `warning` what is wrong with it (or empty).

    With random weights nothing is said of what is kept.
    """
    ratio, quality = ratio_of(result), None if random_weights else result.quality
    parts = []
    if not result.plan.candidates:
        parts.append("Nothing was changed")
    elif ratio:
        parts.append(f"{1 / ratio:.2f}× as fast")
    if result.plan.candidates and (result.checked or result.plan.exact):
        parts.append("computes the same")
    elif quality is not None and result.plan.candidates:
        if quality.agreement is not None:
            parts.append(f"{_kept(quality)} {'' if _counted(quality) else 'of the '}answers are the same")
        else:
            parts.append(f"{_kept(quality)} of what it computes is kept")
    head, detail = ", ".join(parts) or "Compressed", " ".join(_detail(result, quality))
    if random_weights:
        detail = f"{RANDOM} {detail}"
    collapsed = quality is not None and quality.collapsed
    detail = detail.replace(" ms", "\u00a0ms")  # no line ends between a number and its unit
    return {"head": head, "detail": detail, "warning": COLLAPSED if collapsed else ""}


def _counted(quality: Quality) -> bool:
    """Whether the agreement is a count of few images: of maps it is one of places, and not."""
    n, share = quality.images, quality.agreement
    return share is not None and 1 < n < FEW and abs(share * n - round(share * n)) < 1e-6 * n


def _kept(quality: Quality) -> str:
    """What is kept, as exactly as it is known: "11 of 16", or in per cent."""
    return f"{round(quality.kept * quality.images)} of {quality.images}" if _counted(quality) else f"{quality.kept:.1%}"


def _between(share: float, images: int) -> tuple[float, float]:
    """Wilson's interval, 95 %, of a share that was counted on so many images."""
    z = 1.96
    middle, scale = share + z * z / (2 * images), 1 + z * z / images
    half = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _detail(result: Result, quality: Quality | None) -> list[str]:
    said = []
    if quality is not None:
        seen = "that no fit saw" if quality.held_out else "that the fits saw as well"
        said.append(f"Judged on {quality.images} image{'' if quality.images == 1 else 's'} {seen} ({quality}).")
        if _counted(quality):
            low, high = _between(quality.kept, quality.images)
            said.append(f"So few leave it between {low:.0%} and {high:.0%}: give more to know it better.")
    if result.checked:
        said.append(f"Compared with the model: {result.checked}.")
    where = f"with {runtime(result) or 'an unknown runtime'}"
    if result.measured is not None and result.original is not None:
        how = "Calculated" if is_calculated(result) else "Measured"
        said.append(f"{how}: {number(result.original, 4)} ms before, {number(result.measured, 4)} ms after, {where}.")
    elif result.predicted is not None and result.original is not None:
        text = (
            f"Predicted, not measured: {number(result.original, 4)} ms before, {number(result.predicted, 4)} ms after"
        )
        said.append(f"{text}, {where}.")
    if result.input_size:
        said.append(f"For images of {' × '.join(map(str, result.input_size))}.")
    return said


def is_calculated(result: Result) -> bool:
    """Whether the backend is no clock: the analytic model gives what others measure."""
    return result.backend.get("backend") == "roofline"


def runtime(result: Result) -> str:
    """What the latencies hold for: the backend and its version, the device, threads."""
    b = result.backend
    text = " ".join(str(b[k]) for k in ("backend", "version") if b.get(k) not in (None, ""))
    text += f" on {b['device']}" if b.get("device") else ""
    text += f", {b['threads']} thread{'' if b['threads'] == 1 else 's'}" if isinstance(b.get("threads"), int) else ""
    return in_one_line(text)


def figures_of(result: Result, random_weights: bool = False) -> list[dict[str, str]]:
    """The figures beneath the answer: `name`, `before`, `after` (texts; `before` may be empty)."""
    ratio = ratio_of(result)
    found = []
    after = result.measured if result.measured is not None else result.predicted
    if after is not None and result.original is not None:
        how = "predicted" if result.measured is None else "calculated" if is_calculated(result) else "measured"
        found.append(_figure(f"latency, {how}", f"from {number(result.original, 4)} ms", f"{number(after, 4)} ms"))
    if ratio:
        budget = "" if result.budget is None else f"budget {result.budget}"
        found.append(_figure("of the original's latency", budget, f"{ratio:.1%}"))
    if result.quality is not None and not random_weights:
        q = result.quality
        if q.agreement is not None:
            found.append(_figure("answers that are the same", "" if q.kl is None else f"KL {q.kl:.3g}", _kept(q)))
        else:
            more = "" if q.psnr is None else f"PSNR {q.psnr:.1f} dB"
            found.append(_figure("kept of what it computes", more, f"{q.kept:.1%}"))
    before, left = (count + len(result.kept) for count in result.plan.conv_counts)
    found.append(_figure("convolutions", f"from {before}", str(left)))
    if result.evidence is not None:
        then, now = result.evidence.parameters
        found.append(_figure("parameters", f"from {_short(then)}", _short(now)))
    return found


def _figure(name: str, before: str, after: str) -> dict[str, str]:
    return {"name": name, "before": before, "after": after}


def _short(count: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
