"""Compresses in this process, then in a forked and a spawned one; prints what each chose, as JSON. Run by a test."""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from typing import Any

import torch
from torch import nn

import lmfx


def chosen(folder: str) -> list[str]:
    torch.manual_seed(0)
    body = [m for i in (3, 6, 6) for m in (nn.Conv2d(i, 6, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x, images = torch.randn(1, 3, 32, 32), torch.randn(8, 3, 32, 32)
    net = lmfx.compress(model, x, 0.8, calibration=images, latency="roofline", cache_dir=folder, progress=False)
    return [c.key for c in lmfx.result_of(net).plan.candidates]


def work(queue: Any, folder: str, kind: str) -> None:
    threads = torch.get_num_threads()
    found: dict[str, Any] = {"chosen": chosen(folder), "threads": torch.get_num_threads() == threads}
    if kind == "fork":
        graph = lmfx.trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval(), torch.zeros(1, 3, 4, 4))
        try:
            lmfx.profile(graph, "torch", threads=2, cache_dir=folder, progress=False, calibrate=False)
        except lmfx.LmfxError as error:
            found["refused"] = str(error)
    queue.put(found)


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of Python, that a process with threads is forked
    torch.set_num_threads(2)
    torch.ones(800, 800) @ torch.ones(800, 800)  # torch's threads run
    results: dict[str, Any] = {"here": {"chosen": chosen(sys.argv[1])}}
    for kind in sys.argv[2:]:
        context = multiprocessing.get_context(kind)
        queue = context.SimpleQueue()
        child: Any = context.Process(target=work, args=(queue, sys.argv[1], kind))  # type: ignore[attr-defined]
        child.start()
        child.join(200)
        results[kind] = queue.get() if child.exitcode == 0 else f"exit code {child.exitcode}"
        child.kill()
    print(json.dumps(results))
