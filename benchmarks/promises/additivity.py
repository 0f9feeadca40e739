"""Predicted against measured latency of whole networks: random plans, of which half were not used for the calibration.

    python benchmarks/promises/additivity.py [--models resnet18 ...] [--plans 20] [--backend onnxruntime]

Random weights, 224 x 224, batch 1, one thread, CPU time. For each network the latency table is measured (or taken from
`--cache-dir`), random plans are drawn and the networks of all plans are measured in turn, beside the sentinel.
`whole = a + b * sum` is fitted on every second plan (and the original); the errors are those of the other half. Plans
are drawn in two ways: `solver`, the solver's choice for random importances, at random latencies; `uniform`, from cut to
cut, any candidate that has a row, for a random share of the cuts. Plans below a fifth of the original are left out.

    MAPE, worst   absolute error of the predicted whole over the measured one, held-out plans
    tau           Kendall's, predicted against measured, of the held-out plans, and of all
    fastest       the fastest plan over the original
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from pathlib import Path

import torch
import torchvision

import lmfx
from lmfx.latency import LatencyTable, Store, get_backend
from lmfx.latency.profiling import profile_spans
from lmfx.latency.table import calibrate, kendall_tau
from lmfx.latency.whole_networks import LEAST, measure_wholes, random_plans
from lmfx.passes.ir import Candidate, MergePlan, Series
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.trace.tracing import fingerprint

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "regnet_x_400mf", "densenet121")


def uniform_plan(spans: SpanSet, table: LatencyTable, rng: random.Random) -> MergePlan:
    """A plan that walks each series from cut to cut and, with a probability drawn for the plan, changes something."""
    starts: dict[tuple[str, int], list[Candidate]] = {}
    for c in spans:
        if c.key in table:
            starts.setdefault((c.span.series, c.span.start), []).append(c)
    chosen: list[Candidate] = []
    probability = rng.random()

    def walk(series: Series) -> None:
        at = 0
        while at < len(series.layers):
            changed = [c for c in starts[series.name, at] if c.realization != "keep"]
            if changed and rng.random() < probability:
                chosen.append(rng.choice(changed))
                at = chosen[-1].span.stop
                continue
            parallel = series.layers[at].parallel
            for branch in parallel.branches if parallel else ():
                walk(branch)
            at += 1

    for region in spans.network.regions:
        walk(region.series)
    order = {name: i for i, name in enumerate(spans.network.nodes)}
    chosen.sort(key=lambda c: order[c.span.exit])
    return MergePlan(tuple(chosen), fingerprint(spans.network.gm))


def main() -> None:
    """Print one row a model and a way to draw plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--draw", nargs="+", default=["solver", "uniform"], choices=["solver", "uniform"])
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", help="keep the tables here (default: measure them anew)")
    parser.add_argument("--dump", help="write all figures of the plans to this JSON file")
    args = parser.parse_args()
    head = f"{'model':15} {'rows':>5} {'s':>6} {'plans':8} {'fastest':>7} {'a':>6} {'b':>6} {'MAPE':>6} {'worst':>6}"
    print(head, " tau (all)")
    dump = {}
    for name in args.models:
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None).eval()
        graph = lmfx.trace(model, torch.randn(1, 3, args.size, args.size))
        spans = lmfx.spans(graph, max_kernel_size=7, max_span_convs=12, max_fit_convs=12)
        backend = get_backend(args.backend)
        with tempfile.TemporaryDirectory() as folder, Store.open(args.cache_dir or folder) as store:
            start = time.perf_counter()
            table = profile_spans(spans, backend, store)
            seconds = time.perf_counter() - start
            for way in args.draw:
                rng = random.Random(args.seed)
                if way == "solver":
                    plans = random_plans(spans, table, args.plans, args.seed)
                else:
                    drawn = (uniform_plan(spans, table, rng) for _ in iter(int, 1))
                    enough = (p for p in drawn if table.total(p) >= LEAST * table.total())
                    plans = list(itertools.islice(enough, args.plans))
                plans = [MergePlan(), *plans]
                wholes = measure_wholes(spans, table, plans, backend)
                sums = [table.total(p) for p in plans]
                used = [0, *range(1, len(plans), 2)]
                held = [(sums[i], wholes[i]) for i in range(2, len(plans), 2)]
                line = calibrate([sums[i] for i in used], [wholes[i] for i in used], held)
                print(
                    f"{name:15} {len(table):5d} {seconds:6.1f} {way:8} {min(wholes) / wholes[0]:7.2f} {line.a:6.2f} "
                    f"{line.b:6.3f} {line.held_out:6.1%} {line.worst:6.1%} {line.kendall_tau:5.3f} "
                    f"({kendall_tau(sums, wholes):.3f})",
                    flush=True,
                )
                chosen = [[c.key for c in p.candidates] for p in plans]
                dump[f"{name} {way}"] = {"sums": sums, "wholes": wholes, "plans": chosen}
    if args.dump:
        Path(args.dump).write_text(json.dumps(dump))


if __name__ == "__main__":
    main()
