"""The table and the picture of `benchmarks/real/real.py`, from its rows. A module, not a script."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.real.rows import Key, Rows

__all__ = ["picture", "table"]

KNOWN = {
    *("network", "variant", "budget", "stage", "version", "digest", "seconds", "peak_gb", "missed"),
    *("minutes", "steps", "recovery_seconds"),
    *("ratio", "spread", "ms", "original_ms", "figure", "unit"),
    *("reported", "kept", "spans", "size", "importance", "channels", "errors"),
}


def table(rows: Rows) -> str:
    """A block a network: the original, then a line a variant and budget."""
    lines: list[str] = []
    networks = list(dict.fromkeys(k.network for k in rows.variants()))
    for network in networks:
        keys = [k for k in rows.variants() if k.network == network]
        judged = [r for k in keys if "figure" in (r := rows.whole(k))]
        if not judged:
            continue
        figures = list(dict.fromkeys([judged[0]["figure"], *(f for r in judged for f in r if f not in KNOWN)]))
        lines += [network, "  " + f"{'variant':24}{'budget':>7}{'measured':>9}" + "".join(f"{f:>14}" for f in figures)]
        for key in sorted(keys, key=lambda k: (k.variant != "original", -k.budget, k.variant)):
            lines.append(f"  {key.variant:24}{key.budget:7g}" + _line(rows.whole(key), figures))
        lines.append("")
    return "\n".join(lines)


def _line(row: dict[str, Any], figures: list[str]) -> str:
    if "missed" in row:
        return " cannot be reached" + (f", least {row['missed']:.3f}" if row["missed"] < 1 else "")
    measured = f"{row['ratio']:9.3f}" if "ratio" in row else f"{'-':>9}"
    shown = "".join(_figure(row.get(f, math.nan), f, row.get("unit", "%")) for f in figures)
    return measured + shown + _note(row)


def _figure(value: float, name: str, unit: str) -> str:
    if math.isnan(value):
        return f"{'-':>14}"
    if unit == "%" and name not in ("kl", "box", "psnr"):
        return f"{value:14.1%}"
    return f"{value:14.2f}" if unit != "%" else f"{value:14.3f}"


def _note(row: dict[str, Any]) -> str:
    told = [f"{row['size']} px"] if "size" in row else []
    if "importance" in row:
        told.append(f"{row['importance']}, {row['channels']:.0%} of channels")
    if "reported" in row and row["reported"] is not None:
        says = f" and {row['kept']:.1%} kept" if "kept" in row else ""
        told.append(f"{row['version']}, reported {row['reported']:.3f}{says}")
    return f"   {'; '.join(told)}" if told else ""


def points(rows: Rows, network: str) -> dict[str, list[tuple[float, float]]]:
    """Variant -> (ratio, figure), the original first in each."""
    found: dict[str, list[tuple[float, float]]] = {}
    start = rows.whole(Key(network, "original", 1.0))
    for key in rows.variants():
        row = rows.whole(key)
        if key.network == network and key.variant != "original" and "ratio" in row and "figure" in row:
            found.setdefault(key.variant, []).append((row["ratio"], row[row["figure"]]))
    first = [(1.0, start[start["figure"]])] if "figure" in start else []
    return {variant: sorted(first + given) for variant, given in found.items()}


def picture(rows: Rows, file: Path) -> None:
    """Quality over measured latency, a panel a network; dashed without, solid after recovery."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = [n for n in dict.fromkeys(k.network for k in rows.variants()) if points(rows, n)]
    if not networks:
        return
    columns = min(4, len(networks))
    height = math.ceil(len(networks) / columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(4.2 * columns, 3.4 * height), squeeze=False)
    bases = list(dict.fromkeys(k.variant.removesuffix("+recover") for k in rows.variants() if k.variant != "original"))
    for axis, network in zip(axes.flat, networks, strict=False):
        for variant, given in points(rows, network).items():
            base = variant.removesuffix("+recover")
            style = "-" if variant != base else "--"
            x, y = zip(*given, strict=True)
            axis.plot(x, y, style, color=f"C{bases.index(base)}", marker="o", markersize=4, label=variant)
        row = rows.whole(Key(network, "original", 1.0))
        axis.set(title=network, xlabel="measured latency / original", ylabel=f"{row.get('figure')}")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(networks) :]:
        axis.set_visible(False)
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    axes.flat[0].legend(handles.values(), handles.keys(), fontsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
