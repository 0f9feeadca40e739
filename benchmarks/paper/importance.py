"""How well importances that need no training rank candidates as the paper's does: Kendall tau on a trained network.

    python benchmarks/paper/importance.py                              digits, 120 candidates, some minutes on one core
    python benchmarks/paper/importance.py --data characters --network mobilenet --candidates 0 --metric accuracy

The paper's importance (`finetune`) trains the network for a moment with each candidate alone, and compares what it then
does on images that neither training saw. Against it: `reconstruction` (exact, and its second-order estimate), which
sees unlabelled images only, and `magnitude`, which sees weights only. Candidates are those that could pay on the
roofline; where there are more than asked for, every n-th. `better half` are the candidates that finetune ranks higher,
which are the ones that plans are made of.

`finetune` is a random number itself: with other batches it ranks candidates in another order. The row `finetune, other
batches` is the tau of two such tables, and every other row is the mean of its taus against both. `loss, not trained` is
what the candidate does to the held-out loss before any training: the column `untrained` has the taus against that.

`where` has the mean difference of ranks, as shares of all candidates, by kind of candidate: above 0, reconstruction
thinks better of it than finetune does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lmfx
from benchmarks.shared.short_training import ShortTraining
from lmfx.calibration import as_calibration
from lmfx.importance import Finetune, Magnitude, Reconstruction
from lmfx.latency.table import kendall_tau
from lmfx.passes.ir import Candidate
from lmfx.stages import worth_scoring

PAPER, AGAIN, UNTRAINED = "finetune", "finetune, other batches", "loss, not trained"
Rows = dict[str, NDArray[np.float64]]


def main() -> None:
    """Print the tables."""
    args = options()
    task = ShortTraining(args.data, args.seed, args.steps, network=args.network)
    model = task.model(args.width, args.epochs, args.cache)
    images = task.images(args.images)
    graph = lmfx.trace(model, images[:1])
    spans = lmfx.spans(graph)
    latency = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    every = [c for c in worth_scoring(spans, latency) if c.realization != "keep"]
    chosen = every if args.candidates <= 0 else every[:: max(-(-len(every) // args.candidates), 1)]
    evaluate = task.loss if args.metric == "loss" else task.accuracy
    finetune = Finetune(task.train, evaluate, metric=args.metric, key=f"{task.key} {args.metric}", baseline="trained")
    estimators: dict[str, Any] = {
        PAPER: finetune,
        AGAIN: replace(finetune, seed=finetune.seed + 1),
        UNTRAINED: replace(finetune, train=_nothing, baseline="original", key=f"{task.key} {args.metric} untrained"),
        "reconstruction, exact": Reconstruction(exact=True),
        "reconstruction, new norms": Reconstruction(exact=True, norms="batch"),
        "reconstruction, estimate": Reconstruction(exact=False),
        "magnitude": Magnitude(),
    }
    rows, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder, lmfx.latency.Store.open(args.cache or folder) as store:
        for name, estimator in estimators.items():
            start = time.perf_counter()
            table = estimator.score(spans, chosen, as_calibration(images, images[:1]), store, True)
            seconds[name] = time.perf_counter() - start
            rows[name] = np.array([table[c.key] for c in chosen])
    print(
        f"{args.data} {args.network}, seed {args.seed}, width {args.width}: held-out accuracy "
        f"{task.accuracy(model):.1%}, loss {task.loss(model):.4f}; {len(chosen)} of {len(every)} candidates, "
        f"{args.steps} steps each"
    )
    paper = rows[PAPER]
    print(f"finetune: {seconds[PAPER]:.0f} s, {args.metric} changes by {paper.min():.3g} to {paper.max():.3g}")
    found = agreement(rows)
    print(f"{'against finetune':26} {'tau':>6} {'better half':>12} {'untrained':>10} {'seconds':>8}")
    for name, (tau, half) in found.items():
        untrained = kendall_tau(rows[name], rows[UNTRAINED])
        print(f"{name:26} {tau:6.3f} {half:12.3f} {untrained:10.3f} {seconds[name]:8.1f}")
    for kind, shares in where(chosen, rows).items():
        print(f"where, by {kind}: " + ", ".join(f"{k} {v:+.2f} ({n})" for k, (v, n) in shares.items()))
    if args.json:
        kept = {c.key: [float(v[i]) for v in rows.values()] for i, c in enumerate(chosen)}
        told = {"arguments": {k: str(v) for k, v in vars(args).items()}, "against_finetune": found}
        args.json.write_text(json.dumps({**told, "columns": list(rows), "seconds": seconds, "rows": kept}, indent=1))


def _nothing(model: Any) -> None:
    """No training at all."""


def agreement(rows: Rows) -> dict[str, tuple[float, float]]:
    """(tau, tau over the better half) of each table against `finetune`, means over its two trainings; of the second
    training, against the first."""
    papers = [rows[PAPER], rows[AGAIN]]
    halves = [p >= np.median(p) for p in papers]
    found = {}
    for name in (n for n in rows if n != PAPER):
        values, against = rows[name], papers[:1] if name == AGAIN else papers
        taus = [kendall_tau(values, p) for p in against]
        better = [kendall_tau(values[h], p[h]) for p, h in zip(against, halves, strict=False)]
        found[name] = (float(np.mean(taus)), float(np.mean(better)))
    return found


def where(chosen: Sequence[Candidate], rows: Rows) -> dict[str, dict[str, tuple[float, int]]]:
    """Kind of candidate -> (mean rank by the exact reconstruction less that by finetune, how many)."""
    ranks = [
        np.argsort(np.argsort(v)) / len(chosen) for v in (rows["reconstruction, exact"], rows[PAPER] + rows[AGAIN])
    ]
    apart = ranks[0] - ranks[1]
    regions = {name: i for i, name in enumerate(dict.fromkeys(c.span.series.split("/")[0] for c in chosen))}
    kinds: dict[str, Callable[[Candidate], str]] = {
        "realization": lambda c: c.realization,
        "convs": lambda c: "1" if len(c.all_convs) < 2 else "2 to 3" if len(c.all_convs) < 4 else "4 or more",
        "kernel": lambda c: "none" if c.conv is None else "x".join(map(str, c.conv.kernel_size)),
        "groups": lambda c: "none" if c.conv is None else "grouped" if c.conv.groups > 1 else "dense",
        "depth in the network": lambda c: f"{regions[c.span.series.split('/')[0]]}:{c.span.start // 4}",
    }
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for kind, of in kinds.items():
        names = [of(c) for c in chosen]
        found[kind] = {
            name: (float(np.mean([a for a, n in zip(apart, names, strict=True) if n == name])), names.count(name))
            for name in sorted(set(names))
        }
    return found


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="a module like examples/digits.py")
    parser.add_argument("--network", choices=("resnet", "mobilenet"), default="resnet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6, help="of the original's training")
    parser.add_argument("--steps", type=int, default=16, help="of each candidate's training")
    parser.add_argument("--candidates", type=int, default=120, help="at most; 0 for all")
    parser.add_argument("--metric", choices=("loss", "accuracy"), default="loss")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--cache", help="where rows and the original are kept (default: nowhere)")
    parser.add_argument("--json", type=Path, help="write the table there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
