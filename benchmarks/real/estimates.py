"""Estimates of a plan's loss against its truth, on networks that nobody here made: which of them ranks plans rightly?

    REAL=... python benchmarks/real/estimates.py --networks crnn-english efficientnet-lite0 --plans 30

Plans are the solver's for importances with random factors, at random latencies of the roofline (nothing is timed).
Truth is the loss of the plan's student, fitted in context, on the images that plans are chosen by. Compared with it:

    second order   the sum over the plan's candidates of their second-order estimates
    alone          the sum of what each candidate loses alone, by running the network
    joint          the loss of their output changes, added up (`lmfx.importance.joint`), by which plans are proposed

For each: Kendall's tau with the truth, and the median of estimate / truth. A network whose package is not there is left
out by name.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import lmfx
from benchmarks.real.real import NETWORKS, subjects
from benchmarks.real.subjects import Subject
from lmfx.calibration.images import as_calibration
from lmfx.calibration.students import Students
from lmfx.environment.progress import progress
from lmfx.importance import ImportanceTable, Reconstruction
from lmfx.importance.joint import JointLoss
from lmfx.latency.table import kendall_tau
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.stages import worth_scoring

SPREAD = 1.0  # of the random factors, exp(SPREAD * normal)


def plans_around(graph: Any, spans: Any, table: Any, scores: ImportanceTable, count: int, seed: int) -> list[MergePlan]:
    """Different plans that change something, at latencies from half of the original's to nearly all of it."""
    random = np.random.default_rng(seed)
    found: dict[tuple[str, ...], MergePlan] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        rows = {k: v * float(np.exp(SPREAD * random.standard_normal())) for k, v in scores.rows.items()}
        frontier = lmfx.solve(graph, table, replace(scores, rows=rows), spans=spans, surrogate="affine")
        least = max(0.5, float(frontier.latency[0]) / frontier.original)
        plan = frontier.at(float(random.uniform(min(least * 1.001, 0.94), 0.95)))
        if any(not c.exact for c in plan.candidates):
            found[tuple(c.key for c in plan.candidates)] = plan
    return list(found.values())


def compare(subject: Subject, plans: int, seed: int) -> dict[str, Any]:
    """The figures of one network."""
    began = time.process_time()
    calibration = subject.images("cal", subject.calibration, subject.size)
    graph = lmfx.trace(subject.model(), subject.example)
    spans = lmfx.spans(graph)
    table = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    images = as_calibration(calibration, subject.example)
    wanted = worth_scoring(spans, table)
    session = Reconstruction(exact=False).session(spans, wanted, images)
    scores = session.score(spans, wanted, images, progress=True)
    joint = JointLoss(session.scorer, session.candidates)
    students = Students(Analysis.of(spans.network), images.roles().fit)
    rows = []
    chosen = plans_around(graph, spans, table, scores, plans, seed)
    with progress(len(chosen), subject.name, True) as bar:
        for plan in chosen:
            truth = joint.judge(students.student(plan)).loss()
            lossy = [c for c in plan.candidates if not c.exact]
            together = joint.loss(plan.candidates)
            rows.append((truth, -sum(scores[c.key] for c in lossy), sum(joint.alone(c.key) for c in lossy), together))
            bar.update(1)
    truths = [row[0] for row in rows]
    found: dict[str, Any] = {"network": subject.name, "plans": len(rows), "truth": [min(truths), max(truths)]}
    for i, name in enumerate(("second order", "alone", "joint"), 1):
        guesses = [row[i] for row in rows]
        ratio = median(g / t for g, t in zip(guesses, truths, strict=True) if t > 0)
        found[name] = {"tau": kendall_tau(guesses, truths), "ratio": ratio}
    return {**found, "cpu_s": time.process_time() - began}


def main() -> None:
    """Print the figures of each network, as they are ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="append a line of JSON a network")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    for subject in subjects(args.networks).values():
        found = compare(subject, args.plans, args.seed)
        low, high = found["truth"]
        print(f"{subject.name}: {found['plans']} plans that lose {low:.3g} to {high:.3g} ({found['cpu_s']:.0f} CPU s)")
        for name in ("second order", "alone", "joint"):
            print(f"  {name:14} tau {found[name]['tau']:.2f}   estimate / truth {found[name]['ratio']:.2f}", flush=True)
        if args.results is not None:
            with args.results.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
