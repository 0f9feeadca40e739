"""The table and the picture of `benchmarks/paper/methods.py`, from the folders that its stages leave.

    out/digits-resnet/settings.json              the settings of all rows below
    out/digits-resnet/0/original.json            seed 0: accuracy of the original
    out/digits-resnet/0/fit-0.5/compressed.json  measured ratio, accuracy before fine-tuning
    out/digits-resnet/0/fit-0.5/renewed.json     the same with batch norms' statistics taken anew
    out/digits-resnet/0/fit-0.5/fine-tuned.json  accuracy after it, and after each epoch

A module, not a script.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["gathered", "picture", "table"]

FASTEST = "fastest"


def gathered(folder: Path) -> dict[str, Any]:
    """`{"digits resnet": {"settings": ..., "rows": {"0 original": ..., "0 fit 0.5": ...}}}` of all runs in a folder."""
    found: dict[str, Any] = {}
    for settings in sorted(folder.glob("*-*/settings.json")):
        rows = {}
        for file in sorted(settings.parent.glob("*/original.json")):
            rows[f"{file.parent.name} original"] = json.loads(file.read_text())
        for file in sorted(settings.parent.glob("*/*/compressed.json")):
            name, label = file.parent.name.split("-", 1)
            row = json.loads(file.read_text())
            renewed, tuned = file.with_name("renewed.json"), file.with_name("fine-tuned.json")
            if renewed.exists():
                row |= json.loads(renewed.read_text())
            if tuned.exists():
                told = json.loads(tuned.read_text())
                row |= {"after": told["after"], "curve": told["curve"], "fine_tune_seconds": told["seconds"]}
            rows[f"{file.parent.parent.name} {name} {label}"] = row
        found[settings.parent.name.replace("-", " ")] = {"settings": json.loads(settings.read_text()), "rows": rows}
    return found


def table(found: dict[str, Any], methods: list[str]) -> str:
    """Medians over the seeds that are there; of accuracies after, over those that are fine-tuned.

    A method that misses a budget stands there with its fastest plan, marked with a star.
    """
    lines = []
    for title, run in found.items():
        rows, epochs = run["rows"], run["settings"]["epochs"]
        seeds = sorted({k.split()[0] for k in rows}, key=int)
        originals = [rows[k]["after"] for s in seeds if (k := f"{s} original") in rows]
        if not originals:
            continue
        told = f"{len(originals)} seeds, {epochs} epochs of fine-tuning"
        lines.append(f"{title}: original {median(originals):.1%}, {told}")
        lines.append(
            f"  {'method':11} {'budget':>7} {'measured':>9} {'convs':>5} {'before':>7} {'renewed':>8} {'after':>7} "
            f"{'last':>6}   after, each seed"
        )
        labels = sorted({k.split()[2] for k in rows if len(k.split()) == 3} - {FASTEST}, key=float, reverse=True)
        for label in labels:
            for name in methods:
                lines.append(_line(rows, seeds, name, label))
    return "\n".join(lines)


def _line(rows: dict[str, Any], seeds: list[str], name: str, label: str) -> str:
    there = [rows[k] for s in seeds if (k := f"{s} {name} {label}") in rows]
    head = f"  {name:11} {label:>7}"
    if not there:
        return f"{head} not run"
    good = [r for r in there if "ratio" in r]
    if len(good) == len(there):
        return f"{head}  {_figures(good)}"
    least = median(r.get("infeasible", r.get("ratio", 1.0)) for r in there)
    fast = [r for s in seeds if "ratio" in (r := rows.get(f"{s} {name} {FASTEST}", {}))]
    if len(fast) < len(there):
        return f"{head} cannot be reached, least {least:.3f}"
    return f"{head} *{_figures(fast)}"


def _figures(rows: list[dict[str, Any]]) -> str:
    ratio, before, convs = (median(r[k] for r in rows) for k in ("ratio", "before", "convs"))
    renewed = [r["renewed"] for r in rows if "renewed" in r]
    text = f"{ratio:8.3f} {convs:5.0f} {before:7.1%} " + (f"{median(renewed):8.1%}" if renewed else f"{'-':>8}")
    tuned = [r for r in rows if "after" in r]
    if not tuned:
        return f"{text} not fine-tuned"
    after = [r["after"] for r in tuned]
    # What the last quarter of the epochs still changed: near nothing where the curve has levelled.
    last = median(r["curve"][-1] - r["curve"][-1 - len(r["curve"]) // 4] for r in tuned)
    return f"{text} {median(after):7.1%} {100 * last:+6.1f}   {' '.join(f'{a:.1%}' for a in after)}"


def picture(found: dict[str, Any], methods: list[str], file: Path) -> None:
    """Accuracy over measured latency: dashed before, solid after fine-tuning, medians over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, max(len(found), 1), figsize=(5 * max(len(found), 1), 4), squeeze=False)
    for axis, (title, run) in zip(axes[0], found.items(), strict=False):
        for index, name in enumerate(methods):
            for stage, style in (("before", "--"), ("after", "-")):
                points = _points(run["rows"], name, stage)
                if points:
                    label = f"{name}, {'fine-tuned' if stage == 'after' else 'not trained'}"
                    x, y = zip(*points, strict=True)
                    axis.plot(x, y, style, color=f"C{index}", marker="o", markersize=4, label=label)
        originals = [r["after"] for k, r in run["rows"].items() if k.endswith("original")]
        if originals:
            axis.axhline(median(originals), color="0.6", linewidth=1)
        axis.set(title=title, xlabel="measured latency / original", ylabel="held-out accuracy", ylim=(0, 1.02))
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _points(rows: dict[str, Any], name: str, stage: str) -> list[tuple[float, float]]:
    """(ratio, accuracy) of each budget, medians; the same point once."""
    by_label: dict[str, list[tuple[float, float]]] = {}
    for key, row in rows.items():
        parts = key.split()
        if len(parts) == 3 and parts[1] == name and stage in row:
            by_label.setdefault(parts[2], []).append((row["ratio"], row[stage]))
    return sorted({tuple(median(v) for v in zip(*points, strict=True)) for points in by_label.values()})
