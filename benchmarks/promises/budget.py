"""The budget holds, and what a call costs: compress torchvision networks, then measure again, independently.

    python benchmarks/promises/budget.py [--models resnet18 ...] [--budgets 0.8 0.6 0.4] [--importance magnitude]

Random weights, 64 random calibration images, 224 x 224, batch 1, ONNX Runtime on one thread, CPU time. Original and
result are both written by torch's own ONNX exporter (not by the emitter that lmfx searches with) and measured in turn,
each run once before it is timed, as a network that is run again and again finds its weights. Five repetitions of
`--rounds` rounds; a repetition is the median of its rounds' ratios.

    measured   result over original: median, and the largest of the five repetitions
    / budget   the largest of the five over the budget: at most 1.02 is asked for
    next       the next slower plan of the frontier, measured in the same way, over the budget: above 1 it would have
               missed, and the plan that was taken is not needlessly fast
    predicted  the prediction before the plan was measured, over what the search then measured
    seconds    wall time of the `compress` call; the first budget of a model measures the tables, the others reuse them
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

import lmfx
from lmfx.latency.whole_networks import timing_form
from lmfx.result import Result

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "regnet_x_400mf", "densenet121")


def repetitions(files: tuple[Path, Path], example: torch.Tensor, rounds: int, count: int = 5) -> list[float]:
    """`count` medians of result over original, each over `rounds` rounds in which both run in turn."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(str(f), options, providers=["CPUExecutionProvider"]) for f in files]
    feeds = [{s.get_inputs()[0].name: example.numpy()} for s in sessions]

    def once(i: int) -> float:
        sessions[i].run(None, feeds[i])  # the other network has thrown this one's weights out of the caches
        start = time.process_time_ns()
        sessions[i].run(None, feeds[i])
        return (time.process_time_ns() - start) / 1e6

    for i in (0, 1):
        once(i)
    found = []
    for _ in range(count):
        ratios = []
        for turn in range(rounds):
            first, second = (0, 1) if turn % 2 == 0 else (1, 0)
            times = {first: once(first), second: once(second)}
            ratios.append(times[1] / times[0])
        found.append(statistics.median(ratios))
    return found


def slower(result: Result, original: Path, example: torch.Tensor, rounds: int, folder: Path) -> float:
    """The measured ratio of the next slower plan of the frontier."""
    frontier = result.frontier
    assert frontier is not None
    index = int(np.abs(frontier.importance - (result.plan.importance or 0.0)).argmin())
    if index + 1 == len(frontier):
        return 1.0
    net = timing_form(frontier.spans.network.gm, frontier.plan(index + 1))
    file = Path(lmfx.export_onnx(net, example, folder / "next.onnx", check=False))
    return statistics.median(repetitions((original, file), example, rounds, count=1))


def main() -> None:
    """Print one row a model and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.8, 0.6, 0.4])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--importance", default="reconstruction", help="magnitude needs no images and is fast")
    args = parser.parse_args()
    head = f"{'model':14} {'budget':>6} {'measured':>9} {'worst':>6} {'/ budget':>9} {'next':>6} {'predicted':>10}"
    print(f"{head} {'convs':>9} {'seconds':>8}")
    for name in args.models:
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None).eval()
        example, images = torch.randn(1, 3, 224, 224), torch.randn(args.images, 3, 224, 224)
        before = sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
        with tempfile.TemporaryDirectory() as folder:
            original = lmfx.export_onnx(model, example, Path(folder) / "original.onnx")
            for budget in args.budgets:
                start = time.perf_counter()
                net = lmfx.compress(
                    model, example, budget, calibration=images, importance=args.importance, cache_dir=folder
                )
                seconds = time.perf_counter() - start
                result = lmfx.result_of(net)
                file = lmfx.export_onnx(net, example, Path(folder) / "net.onnx")
                ratios = repetitions((Path(original), Path(file)), example, args.rounds)
                after = sum(isinstance(m, torch.nn.Conv2d) for m in net.modules())
                following = slower(result, Path(original), example, args.rounds, Path(folder))
                predicted = (result.predicted or 0.0) / (result.measured or 1.0)
                print(
                    f"{name:14} {budget:6.2f} {statistics.median(ratios):9.3f} {max(ratios):6.3f} "
                    f"{max(ratios) / budget:9.3f} {following / budget:6.3f} {predicted:10.3f} "
                    f"{before:4d}->{after:<3d} {seconds:8.1f}",
                    flush=True,
                )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
