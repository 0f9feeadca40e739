"""Predicted against measured latency by the kind of plan: depth alone, width alone, and both.

    REAL=... python benchmarks/promises/plan_kinds.py [--models drawn-mobilenet mobilenet_v2 ...] [--plans 8]

Each network's table is measured and calibrated by `lmfx.profile` as it is, on plans of all kinds. Then other plans are
drawn, the solver's choice for random importances at random latencies from the fastest to the original: among composed,
fitted and dropped spans (`depth`), narrowed ones (`width`), and all (`both`). Their networks are measured in turn,
beside the original, twice: the second time says what the measurement itself is off by. One thread of ONNX Runtime, CPU
time. Networks of `benchmarks/real/real.py`, of torchvision and of timm (random weights, `--size`), by name.

    mean, worst   absolute error of the predicted over the measured latency, as shares of the original's in both
    bias          mean of predicted over measured, less one
    tau           Kendall's
    noise         mean and worst difference of the two measurements; errors are against their mean
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lmfx
from benchmarks.real.real import NETWORKS, version
from lmfx.latency import LatencyTable, get_backend
from lmfx.latency.cache_state import suited, touched_bytes
from lmfx.latency.sampling import Sampling
from lmfx.latency.table import kendall_tau
from lmfx.latency.whole_networks import measure_wholes, random_plans
from lmfx.passes.ir import MergePlan
from lmfx.passes.spans.enumeration import SpanSet

MODELS = ("drawn-resnet", "drawn-mobilenet", "mtcnn-onet", "mobilenet_v2", "resnet18")
KINDS = ("depth", "width", "both")


def network(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """A network by name, and an example."""
    if name in NETWORKS:
        subject = NETWORKS[name]()
        return subject.model().eval(), subject.example
    import timm
    import torchvision

    torch.manual_seed(0)
    known = hasattr(torchvision.models, name)
    model: nn.Module = torchvision.models.get_model(name) if known else timm.create_model(name)
    return model.eval(), torch.randn(1, 3, size, size)


def drawn(spans: SpanSet, table: LatencyTable, kind: str, count: int) -> list[MergePlan]:
    """Plans of one kind; the original is none."""
    wanted = {"depth": lambda c: not c.cuts, "width": lambda c: bool(c.cuts), "both": lambda c: True}[kind]
    some = replace(spans, candidates=tuple(c for c in spans if c.realization == "keep" or wanted(c)))
    return [p for p in random_plans(some, table, count, seed=1 + KINDS.index(kind)) if p.candidates]


def errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """The figures of some plans."""
    off = predicted / measured - 1
    figures = {"mean": np.abs(off).mean(), "worst": np.abs(off).max(), "bias": off.mean()}
    return {**{k: round(float(v), 4) for k, v in figures.items()}, "tau": round(kendall_tau(predicted, measured), 3)}


def caches(text: str) -> Any:
    """What `Sampling(caches=...)` takes."""
    return text if text.isalpha() else float(text)


def row(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One network."""
    model, example = network(name, args.size)
    graph = lmfx.trace(model, example)
    spans = lmfx.spans(graph, realize=("compose", "fit", "narrow", "factor"))
    backend = suited(get_backend("onnxruntime", sampling=Sampling(caches=args.caches)), graph)
    with tempfile.TemporaryDirectory() as folder:
        table = lmfx.profile(graph, backend, spans=spans, cache_dir=args.cache_dir or folder, progress=False)
    by_kind = {kind: drawn(spans, table, kind, args.plans) for kind in KINDS}
    plans = [MergePlan(), *(p for some in by_kind.values() for p in some)]
    twice = np.array([measure_wholes(spans, table, plans, backend) for _ in range(2)])
    shares = twice / twice[:, :1]
    measured, predicted = shares.mean(0), np.array([table.predict(p) for p in plans]) / table.predict()
    again = np.abs(shares[1] / shares[0] - 1)[1:]
    found: dict[str, Any] = {
        "network": name,
        "version": args.version,
        "caches": str(table.identity["caches"]),
        "touched": touched_bytes(graph),
        "plans": len(plans) - 1,
        "fastest": round(float(measured.min()), 3),
        "noise": [round(float(v), 4) for v in (again.mean(), again.max())],
        "all": errors(predicted[1:], measured[1:]),
    }
    at = 1
    for kind, some in by_kind.items():
        if some:
            found[kind] = errors(predicted[at : at + len(some)], measured[at : at + len(some)])
        at += len(some)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line a network and kind; rows go to `--rows`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--plans", type=int, default=8, help="of each kind (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of the input of networks of torchvision and timm")
    parser.add_argument("--caches", type=caches, default="auto", help="what rows find: auto, network, hot, or a share")
    parser.add_argument("--cache-dir", help="keep the tables here (default: measure them anew)")
    parser.add_argument("--rows", type=Path, help="append the rows to this file of JSON lines")
    args = parser.parse_args(arguments)
    args.version = version()
    torch.set_num_threads(1)
    print(f"{'network':18} {'caches':8} {'kind':6} {'mean':>6} {'worst':>6} {'bias':>6}    tau")
    for name in args.models:
        found = row(name, args)
        if args.rows:
            with args.rows.open("a") as file:
                file.write(json.dumps(found) + "\n")
        for kind in ("all", *KINDS):
            if kind in found:
                e = found[kind]
                start = f"{name:18} {found['caches']:8} {kind:6}"
                print(f"{start} {e['mean']:6.1%} {e['worst']:6.1%} {e['bias']:+6.1%} {e['tau']:6.3f}")
        print(
            f"{'':27} noise  {found['noise'][0]:6.1%} {found['noise'][1]:6.1%}   fastest {found['fastest']}", flush=True
        )


if __name__ == "__main__":
    main()
