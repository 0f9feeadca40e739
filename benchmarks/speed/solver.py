"""How long the dynamic program takes: CPU milliseconds, best of several, for all budgets at once.

    python benchmarks/speed/solver.py [--tables DIR] [--repeat 5]

`--tables` takes a folder of CSV files with columns `st`, `end` and `time` (ms): spans of one chain that were measured.
Their importances are made up, since only the solver's time is looked at.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np

from lmfx.passes.solve.dynamic_program import ParetoFrontier, solve_series

Rows = list[tuple[int, int, float, float]]


def uniform(layers: int, entries: int, seed: int = 1) -> Rows:
    """Layers of 0.5 to 1.5 ms; spans of up to six layers with any latency and importance."""
    rng = np.random.default_rng(seed)
    rows = [(i, i + 1, float(rng.uniform(0.5, 1.5)), 0.0) for i in range(layers)]
    while len(rows) < entries:
        width = int(rng.integers(1, 7))
        start = int(rng.integers(0, layers - width + 1))
        latency, importance = rng.uniform(0.1, 1.5) * width**0.5, -rng.uniform(0, width)
        rows.append((start, start + width, float(latency), float(importance)))
    return rows


def correlated(layers: int, entries: int, seed: int = 1) -> Rows:
    """Importance is lost with the square of the time saved, and some noise: the hardest kind, with huge frontiers."""
    rng = np.random.default_rng(seed)
    rows = [(i, i + 1, float(rng.uniform(1, 2)), 0.0) for i in range(layers)]
    while len(rows) < entries:
        width = int(rng.integers(1, 5))
        start = int(rng.integers(0, layers - width + 1))
        left = rng.uniform(0.1, 0.9)
        latency = left * sum(row[2] for row in rows[start : start + width])
        rows.append((start, start + width, float(latency), float(-width * (1 - left) ** 2 * rng.uniform(0.9, 1.1))))
    return rows


def measured(path: Path, entries: int = 391, seed: int = 1) -> Rows:
    """The rows of one CSV file, with cheaper variants of random spans (smaller kernels, say) up to `entries`."""
    rng = np.random.default_rng(seed)
    with path.open(newline="") as file:
        spans = [(int(row["st"]), int(row["end"]), float(row["time"])) for row in csv.DictReader(file)]
    rows = [(a, b, t, float(-rng.uniform(0, b - a)) if b - a > 1 else 0.0) for a, b, t in spans]
    while len(rows) < entries:
        a, b, t = spans[int(rng.integers(len(spans)))]
        rows.append((a, b, float(t * rng.uniform(0.3, 1)), float(-rng.uniform(0.5, 1.5) * (b - a))))
    return rows


def best(rows: Rows, repeat: int) -> tuple[float, ParetoFrontier]:
    """The least CPU time in ms of `repeat` solves, and the frontier."""
    taken = float("inf")
    for _ in range(repeat):
        begin = time.process_time()
        frontier = solve_series(rows)
        taken = min(taken, time.process_time() - begin)
    return 1e3 * taken, frontier


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, help="folder of CSV files with st, end, time")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()

    cases: list[tuple[str, Rows]] = []
    for layers, entries in ((52, 391), (300, 3000), (1000, 10_000)):
        rows = uniform(layers, entries)
        cases.append(("uniform", rows))
        cases.append(("uniform, whole 25 us", [(a, b, float(max(1, round(40 * t))), v) for a, b, t, v in rows]))
        cases.append(("correlated", correlated(layers, entries)))
    if args.tables:
        cases += [(path.stem, measured(path)) for path in sorted(args.tables.glob("*.csv"))]
    # The gap is that of single budgets: the median one, and the worst one, as a share of the importance at stake.
    print(f"{'table':28} {'layers':>6} {'entries':>7} {'points':>7} {'CPU ms':>8} {'median gap':>10} {'max gap':>8}")
    for name, rows in cases:
        taken, frontier = best(rows, args.repeat)
        at_stake = float(np.ptp(frontier.importance)) or 1.0
        layers = max(row[1] for row in rows)
        median, worst = float(np.median(frontier.gaps)) / at_stake, frontier.gap / at_stake
        print(f"{name:28} {layers:6} {len(rows):7} {len(frontier):7} {taken:8.1f} {median:10.3%} {worst:8.2%}")


if __name__ == "__main__":
    main()
