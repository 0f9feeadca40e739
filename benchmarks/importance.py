"""How well importances that need no training rank candidates as the paper's does: Kendall tau on a trained network.

    python benchmarks/importance.py                              digits, 120 candidates, some minutes on one core
    python benchmarks/importance.py --data digits --candidates 0 --metric accuracy

The paper's importance (`finetune`) trains the network for a moment with each candidate alone, and compares what it then
does on images that neither training saw. Against it: `reconstruction` (exact, and its second-order estimate), which
sees unlabelled images only, and `magnitude`, which sees weights only. Candidates are those that could pay on the
roofline; where there are more than asked for, every n-th. `better half` are the candidates that finetune ranks higher,
which are the ones that plans are made of.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import lmfx
from benchmarks.short_training import ShortTraining
from lmfx.importance import Finetune, Magnitude, Reconstruction
from lmfx.latency.table import kendall_tau
from lmfx.stages import worth_scoring


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="a module like examples/digits.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6, help="of the original's training")
    parser.add_argument("--steps", type=int, default=16, help="of each candidate's training")
    parser.add_argument("--candidates", type=int, default=120, help="at most; 0 for all")
    parser.add_argument("--metric", choices=("loss", "accuracy"), default="loss")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--cache", help="where rows are kept (default: nowhere)")
    parser.add_argument("--json", type=Path, help="write the table there")
    args = parser.parse_args()
    task = ShortTraining(args.data, args.seed, args.steps)
    model = task.model(args.width, args.epochs)
    images = task.images(args.images)
    graph = lmfx.trace(model, images[:1])
    spans = lmfx.spans(graph)
    latency = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    every = [c for c in worth_scoring(spans, latency) if c.realization != "keep"]
    chosen = every if args.candidates <= 0 else every[:: max(-(-len(every) // args.candidates), 1)]
    evaluate = task.loss if args.metric == "loss" else task.accuracy
    estimators: dict[str, Any] = {
        "finetune": Finetune(task.train, evaluate, metric=args.metric, key=f"{task.key} {args.metric}"),
        "reconstruction, exact": Reconstruction(exact=True),
        "reconstruction, estimate": Reconstruction(exact=False),
        "magnitude": Magnitude(),
    }
    rows, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder, lmfx.latency.Store.open(args.cache or folder) as store:
        for name, estimator in estimators.items():
            start = time.perf_counter()
            table = estimator.score(spans, chosen, lmfx.calibration.as_calibration(images, images[:1]), store, True)
            seconds[name] = time.perf_counter() - start
            rows[name] = np.array([table[c.key] for c in chosen])
    print(
        f"{args.data}, seed {args.seed}, width {args.width}: held-out accuracy {task.accuracy(model):.1%}, loss "
        f"{task.loss(model):.4f}; {len(chosen)} of {len(every)} candidates, {args.steps} steps each"
    )
    paper = rows.pop("finetune")
    print(f"finetune: {seconds['finetune']:.0f} s, {args.metric} changes by {paper.min():.3g} to {paper.max():.3g}")
    half = paper >= np.median(paper)
    print(f"{'against finetune':26} {'tau':>6} {'better half':>12} {'seconds':>8}")
    found = {}
    for name, values in rows.items():
        found[name] = {"tau": kendall_tau(values, paper), "better_half": kendall_tau(values[half], paper[half])}
        print(f"{name:26} {found[name]['tau']:6.3f} {found[name]['better_half']:12.3f} {seconds[name]:8.1f}")
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "arguments": {k: str(v) for k, v in vars(args).items()},
                    "against_finetune": found,
                    "seconds": seconds,
                    "rows": {
                        c.key: [float(paper[i]), *(float(v[i]) for v in rows.values())] for i, c in enumerate(chosen)
                    },
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
