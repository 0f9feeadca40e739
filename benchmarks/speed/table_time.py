"""How long a whole latency table takes, from nothing and from the store.

    python benchmarks/speed/table_time.py [--models resnet34 ...] [--backend onnxruntime]

`lmfx.profile` of a traced network at 224 x 224, batch 1, one thread, into an empty store, and once more in a process of
its own. Wall time.

    candidates   what the solver could choose from if every one had a row (kept layers included)
    distinct     operator configurations that were measured, bounded or timed quickly: equal ones are one
    rows         candidates with a row: those faster than keeping their span
    wholes       networks measured for the calibration, and its errors on those that were held out
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

import torch
import torchvision

import lmfx
from lmfx.latency import Store


def profile(name: str, backend: str, size: int, folder: str) -> None:
    """Print one row for one run."""
    model = getattr(torchvision.models, name)(weights=None).eval()
    graph = lmfx.trace(model, torch.randn(1, 3, size, size))
    spans = lmfx.spans(graph, max_kernel_size=7, max_span_convs=12, max_fit_convs=12)
    with Store.open(folder) as store:
        before = store.count("latency"), store.count("whole")
    start = time.perf_counter()
    table = lmfx.profile(graph, backend, spans=spans, cache_dir=folder, progress=False)
    seconds = time.perf_counter() - start
    with Store.open(folder) as store:
        after = store.count("latency"), store.count("whole")
    line = table.calibration
    errors = f"{line.held_out:6.1%} {line.worst:6.1%} {line.kendall_tau:6.2f}" if line is not None else ""
    rows, wholes = (b - a for a, b in zip(before, after, strict=True))
    print(f"{name:15} {seconds:8.2f} {len(spans):11d} {rows:9d} {len(table):6d} {wholes:7d} {errors}", flush=True)


def main() -> None:
    """Print two rows a model: from nothing, and from the store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet34"])
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        profile(args.models[0], args.backend, args.size, args.child)
        return
    head = f"{'model':15} {'seconds':>8} {'candidates':>11} {'distinct':>9} {'rows':>6} {'wholes':>7}"
    print(f"{head} {'MAPE':>6} {'worst':>6} {'tau':>6}", flush=True)
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(2):
                options = ["--models", name, "--backend", args.backend, "--size", str(args.size), "--child", folder]
                subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    main()
