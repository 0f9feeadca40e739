"""Diffusion networks of diffusers, as they are, through the whole public face: CPU seconds and memory of each stage.

    python benchmarks/diffusion/public_face.py                             all networks and settings, one process each
    python benchmarks/diffusion/public_face.py --networks ddpm --settings onnxruntime

Networks: UNet2DModel in the configuration of google/ddpm-cifar10-32 at full width, and tiny UNet2DConditionModel and
AutoencoderKL; random weights, batch 1. A row compresses one (`compress`), then `report`, `save`, `load` (outputs must
be equal), `export_onnx` (checked against ONNX Runtime). `ratio` is the latency over the original's on the backend of
the row; `GB` the largest memory of the process. One thread.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lmfx
from benchmarks.paper.ddpm_table import library_net
from benchmarks.zoo.models import DIFFUSION
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.model.interface import plain_output
from lmfx.passes.trace.tracing import example_arguments

__all__ = ["NETWORKS", "SETTINGS", "row"]

Made = Callable[[], torch.nn.Module]


def _noisy(count: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(count, 3, 32, 32), torch.randint(0, 1000, (count,))


def _conditioned(count: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(count, 4, 32, 32), torch.randint(0, 1000, (count,)), torch.randn(count, 7, 32)


# A network, and inputs for so many images.
NETWORKS: dict[str, tuple[Made, Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "ddpm": (library_net, _noisy),
    "conditional": (DIFFUSION["unet2dcond-tiny"][0], _conditioned),
    "autoencoder": (DIFFUSION["autoencoderkl-tiny"][0], lambda count: (torch.randn(count, 3, 64, 64),)),
}
PAPER: dict[str, Any] = {"latency": "roofline", "realize": ("compose",), "surrogate": "identity"}
SETTINGS: dict[str, dict[str, Any]] = {
    "reconstruction": {"latency": "roofline"},
    "magnitude": {"latency": "roofline", "importance": "magnitude"},
    "onnxruntime": {"latency": "onnxruntime", "importance": "magnitude"},
    "paper, post": {**PAPER, "norm": "post", "importance": "magnitude"},
    "paper, affine": {**PAPER, "norm": "affine", "importance": "magnitude"},
    "depth": {**PAPER, "norm": "post", "importance": "magnitude", "method": "depth"},
    "layeronly": {**PAPER, "importance": "magnitude", "method": "layeronly"},
}


def row(name: str, setting: str, budget: float, images: int) -> dict[str, Any]:
    """What one network and one setting took. Raises what the product raises."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make, inputs = NETWORKS[name]
    model, example, calibration = make().eval(), inputs(1), inputs(images)
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        seconds[stage] = time.process_time() - start
        return result

    with tempfile.TemporaryDirectory(prefix="lmfx-face-") as folder:
        here = Path(folder)
        options = {"calibration": calibration, "cache_dir": here / "cache", "progress": False, **SETTINGS[setting]}
        net = timed("compress", lambda: lmfx.compress(model, example, budget, **options))
        report = str(timed("report", lambda: lmfx.report(net)))
        timed("save", lambda: lmfx.save(net, here / "net"))
        loaded = timed("load", lambda: lmfx.load(here / "net", model))
        with torch.inference_mode():
            error = relative_error(_call(net, example), _call(loaded, example))
        del loaded
        gc.collect()
        timed("export", lambda: lmfx.export_onnx(net, example, here / "net.onnx"))
    result = lmfx.result_of(net)
    return {
        "spans": len(result.plan.candidates),
        "candidates": result.candidates,
        "ratio": result.ratio,
        "lines": len(report.splitlines()),
        "error": error,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        **seconds,
    }


def _call(net: Any, example: Any) -> list[torch.Tensor]:
    args, kwargs = example_arguments(example)
    leaves = torch.utils._pytree.tree_leaves(plain_output(net(*args, **kwargs)))
    return [v for v in leaves if isinstance(v, torch.Tensor)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--budget", type=float, default=0.8)
    parser.add_argument("--images", type=int, default=8, help="of calibration")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(row(args.networks[0], args.settings[0], args.budget, args.images)))
        return
    stages = ("compress", "report", "save", "load", "export")
    titles = " ".join(f"{stage:>9}" for stage in (*stages, "GB"))
    print(f"{'network':12} {'setting':15} {'candidates':>10} {'spans':>6} {'ratio':>6} {titles}")
    failed = False
    for name in args.networks:
        for setting in args.settings:
            options = ["--networks", name, "--settings", setting, "--budget", args.budget, "--images", args.images]
            command = [sys.executable, __file__, "--one", *map(str, options)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                told = (done.stderr.strip().splitlines() or ["?"])[-1]
                refused = "InfeasibleBudget" in told
                failed |= not refused
                print(f"{name:12} {setting:15} {'cannot be reached: ' if refused else ''}{told}", flush=True)
                continue
            r = json.loads(done.stdout.splitlines()[-1])
            failed |= r["error"] > 1e-5
            cells = " ".join(f"{r[stage]:9.1f}" for stage in (*stages, "gigabytes"))
            print(
                f"{name:12} {setting:15} {r['candidates']:10} {r['spans']:6} {r['ratio']:6.3f} {cells}"
                + (f"  loaded is off by {r['error']:.1e}" if r["error"] > 1e-5 else ""),
                flush=True,
            )
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
