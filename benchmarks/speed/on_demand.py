"""Scoring on demand against the whole table: evaluations, and the importance of the plans at three budgets.

    python benchmarks/speed/on_demand.py                                  digits, exact reconstruction and finetune
    python benchmarks/speed/on_demand.py --estimators reconstruction --width 16

The whole table is scored first, which is what takes the time. The plans that scoring on demand finds are judged by the
whole table, so that a row that comes out differently when it is scored alone counts for neither side: `lost` is how far
the importance of its plan is below that of the best plan, in percent of the latter. Latencies are those of the
roofline. `finetune` compares with the original after the same training; `paper` is the paper's objective and compares
with the original. `wrong` are scored pairs in which the assumption that the bounds rest on failed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmfx
from benchmarks.shared.short_training import ShortTraining
from lmfx.calibration.images import as_calibration
from lmfx.importance import Finetune, ImportanceTable, Reconstruction
from lmfx.stages import worth_scoring


def main() -> None:
    """Print one table an estimator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="a module like examples/digits.py")
    parser.add_argument("--network", choices=("resnet", "mobilenet"), default="resnet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6, help="of the original's training")
    parser.add_argument("--steps", type=int, default=16, help="of each candidate's training")
    parser.add_argument("--metric", choices=("loss", "accuracy"), default="loss")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--budgets", nargs="+", default=["0.8", "0.6", "0.4"])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.0, 0.01])
    parser.add_argument("--estimators", nargs="+", default=["reconstruction", "finetune", "paper"])
    parser.add_argument("--cache", help="where rows are kept (default: nowhere)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    task = ShortTraining(args.data, args.seed, args.steps, network=args.network)
    model = task.model(args.width, args.epochs, args.cache)
    images = task.images(args.images)
    graph = lmfx.trace(model, images[:1])
    spans = lmfx.spans(graph)
    latency = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    every = [c for c in worth_scoring(spans, latency) if c.realization != "keep"]
    finetune = Finetune(
        task.train,
        task.loss if args.metric == "loss" else task.accuracy,
        metric=args.metric,
        baseline="trained",
        key=f"{task.key} {args.metric}",
    )
    known: dict[str, Any] = {
        "reconstruction": Reconstruction(exact=True),
        "finetune": finetune,
        "paper": replace(finetune, objective="paper", baseline="original"),
    }
    print(
        f"{args.data} {args.network}, seed {args.seed}, width {args.width}: {len(every)} candidates, budgets "
        f"{', '.join(args.budgets)}"
    )
    print(f"{'estimator':16} {'tolerance':>9} {'scored':>7} {'share':>6} {'rounds':>6} {'wrong':>10}  lost")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        cache = args.cache or folder
        for name in args.estimators:
            start = time.perf_counter()
            with lmfx.latency.Store.open(cache) as store:
                full = known[name].score(spans, every, as_calibration(images, images[:1]), store, True)
            seconds = time.perf_counter() - start
            frontier = lmfx.solve(graph, latency, full, spans=spans)
            for tolerance in args.tolerances:
                # Rows of the reconstruction in a folder of their own: they are made anew, alone.
                own = tempfile.mkdtemp(dir=folder) if name == "reconstruction" else cache
                result = lmfx.score_on_demand(
                    graph, known[name], latency, args.budgets, calibration=images, spans=spans, tolerance=tolerance,
                    cache_dir=own, progress=False,
                )  # fmt: skip
                shares = [judged(frontier, full, result, b, graph, latency, spans) for b in args.budgets]
                print(
                    f"{name:16} {tolerance:9.3g} {result.evaluations:7} {result.evaluations / result.candidates:6.1%} "
                    f"{result.rounds:6} {result.broken:4} / {result.pairs:<4} {' '.join(f'{s:.2%}' for s in shares)}",
                    flush=True,
                )
                found.append(
                    {
                        "estimator": name, "tolerance": tolerance, "scored": result.evaluations, "seconds": seconds,
                        "candidates": result.candidates, "rounds": result.rounds, "lost": shares,
                        "wrong": result.broken, "pairs": result.pairs, "excess": result.excess,
                    }
                )  # fmt: skip
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "runs": found}, indent=1)
        )


def judged(
    frontier: lmfx.Frontier,
    full: ImportanceTable,
    result: lmfx.OnDemand,
    budget: str,
    graph: Any,
    latency: lmfx.LatencyTable,
    spans: Any,
) -> float:
    """How far the plan found on demand is below the best one, both by the whole table, as a share of the latter."""
    plan = lmfx.solve(graph, latency, result.table, spans=spans).at(budget)
    best = float(frontier.importance[frontier.index_at(budget)])
    return (best - sum(full[c.key] for c in plan.candidates)) / abs(best) if best else 0.0


if __name__ == "__main__":
    main()
