"""The table of the zoo: one line a network, without times, so that two runs can be compared.

`compare` finds what got worse; `summary` says what the zoo shows as a whole.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.zoo.runner import Row

__all__ = ["COLUMNS", "cells", "compare", "read_table", "summary", "write_table"]

COLUMNS = (
    *("model", "family", "parameters_m", "input", "tracer", "opaque", "trace"),
    *("other_batch", "other_size", "convs", "in_region", "in_candidate"),
    *(
        "candidates",
        "refusals",
        "exact",
        "exact_error",
        "composed",
        "compress",
        "ratio",
        "predicted",
        "onnx",
        "onnx_of",
    ),
    "reasons",
)
# Whole detectors have data-dependent outputs, transformers nothing but a patch or pooling conv.
NO_CONV_NETWORKS = ("det-full", "vit", "swin", "video-transformer")
REASONS = 4  # that are written, most frequent first
GOOD = {
    "trace": ("equal",),
    "other_batch": ("agrees", "says so", "not taken"),
    "other_size": ("agrees", "says so", "not taken"),
    "exact": ("exact", "exact to rounding"),
    "compress": ("ok",),
    "onnx": ("agrees", "agrees to rounding"),
}


def cells(row: Row, family: str) -> dict[str, str]:
    """One line of the table."""
    found = {c: _text(row.get(c, "")) for c in COLUMNS}
    worst = max((row[e] for e in ("keep_error", "exact_error") if e in row), default=None)
    found["exact_error"] = "" if worst is None else f"{worst:.0e}"
    found["reasons"] = "; ".join(f"{n} x {text}" for text, n in list(row.get("reasons", {}).items())[:REASONS])
    found["family"] = family
    for stage in ("build", "error"):  # nothing else is known of such a row
        if stage in row:
            found["trace"] = f"error: {stage}: {row[stage]}" if stage == "error" else row[stage]
    if "regions" in row:
        found["trace"] = row["regions"]
    if "sizes" in row:
        found["other_size"] = row["sizes"]
    return {c: v.replace("\n", " ")[:400] for c, v in found.items()}


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) and not float(value).is_integer() else str(value)


def read_table(file: Path) -> dict[str, dict[str, str]]:
    """model -> its line; lines without results (a list of names) are left out."""
    if not file.exists():
        return {}
    with file.open(encoding="utf-8") as source:
        return {row["model"]: row for row in csv.DictReader(source) if row.get("trace")}


def write_table(file: Path, table: Mapping[str, Mapping[str, str]]) -> None:
    """Writes the lines in the order of their names."""
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows({c: table[name].get(c, "") for c in COLUMNS} for name in sorted(table))


def compare(old: Mapping[str, Mapping[str, str]], new: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What got worse, one line each; a stage that was left out this time, or skipped for its size, says nothing."""
    worse = []
    for name, now in new.items():
        before = old.get(name)
        if before is None:
            continue
        for stage, good in GOOD.items():
            was, is_ = before.get(stage, ""), now.get(stage, "")
            failed = is_ and _kind(is_) not in good and not is_.startswith("skipped")
            if (_kind(was) in good and failed) or (was and not was.startswith("error") and is_.startswith("error")):
                worse.append(f"{name}: {stage} was {was!r} and is {is_!r}")
        for column in ("in_region", "in_candidate"):
            shares = [_share(line, column) for line in (before, now)]
            if shares[0] is not None and shares[1] is not None and shares[1] < shares[0] - 0.005:
                worse.append(f"{name}: {column} fell from {shares[0]:.1%} to {shares[1]:.1%} of the convs on maps")
    return worse


def _share(line: Mapping[str, str], column: str) -> float | None:
    convs, found = line.get("convs", ""), line.get(column, "")
    return int(found) / int(convs) if convs not in ("", "0") and found else None


def summary(table: Mapping[str, Mapping[str, str]]) -> str:
    """The figures of the zoo: torchvision's and timm's conv networks, then all."""
    every = list(table.values())
    nets = [r for r in every if r["model"].startswith(("tv/", "timm/")) and r["family"] not in NO_CONV_NETWORKS]
    out = [f"{len(every)} networks, of them {len(nets)} conv networks of torchvision and timm"]
    out.append(_shares("traced and equal", nets, "trace", "equal"))
    out.append("  tracers: " + _counts(r["tracer"] for r in nets if r["tracer"]))
    for column in ("other_batch", "other_size"):
        out.append(f"  {column.replace('_', ' ')}: " + _counts(_kind(r.get(column, "")) for r in nets))
    convs = sum(int(r["convs"] or 0) for r in nets)
    for column, text in (("in_region", "a region"), ("in_candidate", "a candidate")):
        found = sum(int(r[column] or 0) for r in nets)
        out.append(f"convs on maps in {text} with another: {found:,} of {convs:,} ({found / max(convs, 1):.1%})")
    with_opaque = [r for r in nets if r["opaque"] not in ("", "0")]
    out.append(f"  {len(with_opaque)} networks have modules that torch.fx cannot trace")
    out.append(_shares("compressed to 0.8 of the roofline", nets, "compress", "ok"))
    out.append("  " + _counts(_kind(r["compress"]) for r in nets))
    for label, rows in (("conv networks", nets), ("all networks", every)):
        errors = [float(r["exact_error"]) for r in rows if r["exact_error"]]
        kinds = _counts(_kind(r["exact"]) for r in rows)
        out.append(f"exact in float64, {label}: {kinds}; worst {max(errors, default=0.0):.0e}")
        out.append(f"ONNX Runtime, {label}: " + _counts(_kind(r["onnx"]) for r in rows))
    return "\n".join(out)


def _shares(what: str, rows: list[Mapping[str, str]], column: str, good: str) -> str:
    asked = [r for r in rows if r[column]]
    found = sum(r[column] == good for r in asked)
    return f"{what}: {found} of {len(asked)} ({found / max(len(asked), 1):.1%})"


def _kind(cell: str) -> str:
    return cell.split(":")[0] if cell else "not asked"


def _counts(values: Iterable[str]) -> str:
    return ", ".join(f"{n} {value}" for value, n in Counter(values).most_common())
