"""What tells plans apart before they are built, on networks that nobody here made ("How plans are chosen", quality.md).

    REAL=... python benchmarks/real/choices.py --networks efficientnet-lite0 --parts 0.72 0.53
    REAL=... python benchmarks/real/choices.py --networks drawn-resnet --parts 0.5 0.35 --mixtures 0 1 3 7

A part is a share of the original's sum of latency rows (the roofline, unless --latency says otherwise). For each the
plans that are proposed, and what steps lead to from the best one at 1.35 times the part, are built with the fits that
were scored. Their loss on inputs that nothing saw is compared with

    changes   the output changes of the candidates, added up, by which plans are proposed
    choose    the calibration images that choose
    fit       as many as 64 of those that fits have seen
    judge     the calibration images that judge results

With --mixtures the best plan is built in its context and refitted with so many mixtures of each image in the joint
steps. A network whose package is not there is left out by name.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmfx
from benchmarks.real.real import NETWORKS, subjects
from benchmarks.real.subjects import Subject
from lmfx.budget import Budget
from lmfx.calibration import refitting
from lmfx.calibration.images import as_calibration
from lmfx.importance import Reconstruction
from lmfx.latency.table import kendall_tau
from lmfx.passes.ir import MergePlan
from lmfx.planning import judged as judged_plans
from lmfx.planning.compression import Compression
from lmfx.planning.judged import Judged
from lmfx.quality import Choosing, Judge

FITTED = 64  # images that fits have seen


def judged_of(subject: Subject, part: float, latency: str) -> Judged:
    """What judges the plans of a network, scored for a part of its latency as `compress` scores them."""
    images = as_calibration(subject.images("cal", subject.calibration, subject.size), subject.example)
    graph = lmfx.trace(subject.model(), subject.example)
    spans = lmfx.spans(graph, realize=("compose", "fit", "narrow"))
    table = lmfx.profile(graph, latency, spans=spans, progress=False, calibrate=False)
    estimator = Reconstruction()
    session = estimator.session(spans, lmfx.stages.worth_scoring(spans, table), images)
    asked = Compression(estimator, {}, latency, "affine", None, None, True, "auto", True, None, False)
    scores = asked.scores(graph, session, images, spans, table, Budget("fraction", part))
    return Judged(spans, table, scores, session, images, "auto", "affine")


def compare(subject: Subject, part: float, latency: str) -> tuple[dict[str, Any], Judged, MergePlan]:
    """The figures of one network at one part, what judges its plans, and the best of them."""
    began = time.process_time()
    judged = judged_of(subject, part, latency)
    roles, graph = judged.roles, judged.analysis.graph
    held = as_calibration(subject.images("held", subject.held, subject.size), subject.example, subject.held)
    seen = {"choose": roles.choose, "fit": roles.fit.evenly(FITTED), "judge": roles.judge, "held": held}
    judges = {name: Judge(graph, images) for name, images in seen.items()}
    limit = part * judged.table.total()

    def losses(plan: MergePlan) -> dict[str, float]:
        student = judged.sketch(plan)
        found = {name: judge(student).loss() for name, judge in judges.items()}
        agreement = judges["held"](student).agreement
        return {"changes": judged.joint.loss(plan.candidates), **found, "agreement": agreement or 0.0}

    proposals = judged.proposals(limit)
    rows = [losses(p.plan) for p in proposals]
    start = judged.proposals(judged_plans.SLOWER * limit)[0]
    before = time.process_time()
    state = judged.search.down(start.plan.candidates, limit)
    cpu = time.process_time() - before
    best = judged.plan(state.candidates)
    rows.append(losses(best))
    truth = [row["held"] for row in rows[:-1]]
    tau = {name: round(kendall_tau([row[name] for row in rows[:-1]], truth), 2) for name in ("changes", *judges)}
    matrix = np.corrcoef(np.array([[row[name] for name in ("changes", *judges)] for row in rows]).T)
    told = {
        "network": subject.name,
        "part": part,
        "plans": rows[:-1],
        "steps": {**rows[-1], "runs": len(judged.search.states), "cpu_s": cpu},
        "tau with held": tau,
        "correlation with held": dict(zip(("changes", *judges), matrix[-1].round(2).tolist(), strict=True)),
        "cpu_s": time.process_time() - began,
    }
    return told, judged, best


def mixtures(subject: Subject, judged: Judged, plan: MergePlan, counts: list[int]) -> dict[str, Any]:
    """What a refit leaves on inputs that nothing saw, with so many mixtures of each image in the joint steps."""
    graph, roles = judged.analysis.graph, judged.roles
    held = Judge(graph, as_calibration(subject.images("held", subject.held, subject.size), subject.example))
    student = judged.students.student(plan)
    found: dict[str, Any] = {"no refit": {"loss": held(student).loss()}}
    usual = refitting.MIXED, refitting.MOST_MIXED
    for count in counts:
        refitting.MIXED, refitting.MOST_MIXED = count, (count + 1) * len(roles.fit)
        before = time.process_time()
        net = refitting.refit(student, graph, roles.fit, Choosing(Judge(graph, roles.choose)), plan)
        found[str(count)] = {"loss": held(net).loss(), "cpu_s": time.process_time() - before}
    refitting.MIXED, refitting.MOST_MIXED = usual
    return found


def main() -> None:
    """Print the figures of each network and part, as they are ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["drawn-resnet", "drawn-mobilenet"], choices=list(NETWORKS))
    parser.add_argument("--parts", nargs="+", type=float, default=[0.7, 0.5])
    parser.add_argument("--mixtures", nargs="*", type=int, default=[])
    parser.add_argument("--latency", default="roofline")
    parser.add_argument("--results", type=Path, help="append a line of JSON a network and part")
    args = parser.parse_args()
    torch.manual_seed(0)
    for subject in subjects(args.networks).values():
        for part in args.parts:
            told, judged, plan = compare(subject, part, args.latency)
            print(f"{subject.name} at {part:g}: {len(told['plans'])} proposals ({told['cpu_s']:.0f} CPU s)")
            for row in (*told["plans"], told["steps"]):
                print("  " + "  ".join(f"{k} {v:.3g}" for k, v in row.items()))
            print("  Kendall tau with the loss on inputs that nothing saw:", told["tau with held"], flush=True)
            if args.mixtures:
                told["mixtures"] = mixtures(subject, judged, plan, args.mixtures)
                print("  refit with mixtures:", told["mixtures"], flush=True)
            if args.results is not None:
                with args.results.open("a") as file:
                    file.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
