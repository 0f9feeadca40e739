"""Two promises on networks that nobody here made: `keep=` holds on other images, and the same call gives the same plan.

    REAL=... python benchmarks/real/kept.py --networks drawn-resnet drawn-mobilenet mtcnn-onet --keep 0.98
    REAL=... python benchmarks/real/kept.py --networks drawn-resnet --budget 0.5 --calls 5

With `--keep` a line a network: what the fastest network that keeps so much takes, what it keeps of the calibration
images that judge, and of inputs that nothing saw. With `--budget` the same call several times, latencies measured anew
each time: how many of the plans differ, and what each network loses on inputs that nothing saw. A network whose package
is not there is left out by name.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import lmfx
from benchmarks.real.real import NETWORKS, subjects
from benchmarks.real.subjects import Subject
from lmfx.calibration.images import as_calibration
from lmfx.quality import Judge


def compressed(subject: Subject, latency: str, **options: Any) -> tuple[Any, float]:
    """What `compress` gives, and the CPU seconds that it took."""
    before = time.process_time()
    images = subject.images("cal", subject.calibration, subject.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmfx.QualityWarning)
        net = lmfx.compress(
            subject.model(), subject.example, calibration=images, latency=latency, progress=False, **options
        )
    return net, time.process_time() - before


def judge_of(subject: Subject) -> Judge:
    """What judges networks on inputs that nothing saw."""
    held = as_calibration(subject.images("held", subject.held, subject.size), subject.example)
    return Judge(lmfx.trace(subject.model(), subject.example), held)


def keeps(subject: Subject, share: float, latency: str) -> dict[str, Any]:
    """The fastest network that keeps a share: what it takes, and what it keeps."""
    net, seconds = compressed(subject, latency, keep=share)
    result, held = lmfx.result_of(net), judge_of(subject)(net)
    assert result.quality is not None
    row = {"network": subject.name, "keep": share, "ratio": result.ratio, "kept": result.quality.kept}
    return {**row, "held": held.kept, "held_images": held.images, "cpu_s": seconds}


def repeated(subject: Subject, budget: float, calls: int, latency: str) -> dict[str, Any]:
    """The same call several times: the plans, their measured ratios, and the losses on inputs that nothing saw."""
    judge, plans, ratios, losses = judge_of(subject), [], [], []
    for _ in range(calls):
        net, _ = compressed(subject, latency, budget=budget)
        result = lmfx.result_of(net)
        plans.append(tuple(c.key for c in result.plan.candidates))
        ratios.append(result.ratio)
        losses.append(judge(net).loss())
    row = {"network": subject.name, "budget": budget, "calls": calls, "plans": len(set(plans))}
    return {**row, "ratios": ratios, "losses": losses}


def main() -> None:
    """Print a line of JSON a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["drawn-resnet", "drawn-mobilenet"], choices=list(NETWORKS))
    parser.add_argument("--keep", type=float)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--latency", default="onnxruntime")
    parser.add_argument("--results", type=Path, help="append the lines")
    args = parser.parse_args()
    if (args.keep is None) == (args.budget is None):
        parser.error("give --keep or --budget")
    torch.set_num_threads(1)
    for subject in subjects(args.networks).values():
        if args.keep is not None:
            row = keeps(subject, args.keep, args.latency)
        else:
            row = repeated(subject, args.budget, args.calls, args.latency)
        print(json.dumps(row), flush=True)
        if args.results is not None:
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
