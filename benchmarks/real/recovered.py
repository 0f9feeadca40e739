"""What recovery without labels gives in so many CPU seconds: figures on held-out inputs before and after.

    REAL=... python benchmarks/real/recovered.py drawn-resnet:0.5 demosaicking:0.7 --seconds 180

Networks are those of `real.py`, each with the budget after the colon. Students are planned on the roofline unless
`--latency` is a saved table, and time is that of the process, so a busy machine changes neither; the budget is
therefore no measured latency. Figures are of torch, not of the exported file. One JSON line a network.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lmfx
from benchmarks.real.real import NETWORKS
from benchmarks.real.subjects import Subject
from lmfx.training import recovery_clock

__all__ = ["figures", "main", "recovered"]


@torch.no_grad()
def outputs(net: nn.Module, images: Tensor) -> list[np.ndarray]:
    """The one output of a network, of all images."""
    return [torch.cat([net(part) for part in images.split(16)]).numpy()]


def figures(subject: Subject, original: nn.Module, net: nn.Module) -> dict[str, float]:
    """What a network is worth on the held-out inputs."""
    images = subject.images("held", subject.held, subject.size)
    return {k: round(float(v), 4) for k, v in subject.judge(outputs(net, images), outputs(original, images)).items()}


def recovered(subject: Subject, budget: float, seconds: float, count: int | None, latency: Any) -> dict[str, Any]:
    """Compresses and recovers a network, and says what it was worth before and after."""
    model = subject.model().eval()
    calibration = subject.images("cal", subject.calibration, subject.size)
    options: dict[str, Any] = {"latency": latency, "merge": False, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmfx.QualityWarning)
        student = lmfx.compress(model, subject.example, budget, calibration=calibration, **options)
    told: dict[str, Any] = {"network": subject.name, "budget": budget, "original": figures(subject, model, model)}
    told["before"] = figures(subject, model, lmfx.merge(student))
    images = subject.images("cal", count or subject.recovery, subject.size)
    lmfx.recover(student, model, images, minutes=f"{seconds:g}s", progress=False)
    told["after"] = figures(subject, model, lmfx.merge(student))
    return {**told, "recovery": str(student.meta["lmfx_recovery"])}


def main(arguments: list[str] | None = None) -> None:
    """Prints a line a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="NETWORK:BUDGET", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--seconds", type=float, default=180.0, help="of CPU time (default: %(default)g)")
    parser.add_argument("--images", type=int, help="to train on and choose by (default: the network's own number)")
    parser.add_argument("--latency", default="roofline", help="a saved table, or a name of compress's `latency=`")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recovery_clock.now = time.process_time
    latency = lmfx.LatencyTable.load(args.latency) if args.latency.endswith(".json") else args.latency
    for one in args.networks:
        name, budget = one.rsplit(":", 1)
        print(json.dumps(recovered(NETWORKS[name](), float(budget), args.seconds, args.images, latency)), flush=True)


if __name__ == "__main__":
    main()
