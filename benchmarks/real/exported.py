"""Exported files: what they take, measured side by side, and what they give.

    ratio of a file = median over rounds of   its time / mean of the original's times just before and after it

One thread of ONNX Runtime, every graph optimisation, CPU time, so other jobs on the machine cost (nearly) nothing.
Each visit runs the network once unmeasured, because the one before has thrown its weights out of the caches, and then
for at least four ms.
A module, not a script.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lmfx
from lmfx.passes.model.quiet import quiet

__all__ = ["Latency", "draft", "export", "latencies", "outputs"]

MIN_MS = 4.0
SMALL_MS = 200.0


@dataclass(frozen=True)
class Latency:
    """Of a file: `ratio` to the original in the same rounds, `spread` (interquartile) of that, and ms."""

    ratio: float
    spread: float
    ms: float
    original_ms: float


def export(net: nn.Module, example: Tensor, file: Path) -> Path:
    """Writes the file that is measured and judged."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return lmfx.export_onnx(net, example, file)


def draft(net: nn.Module, example: Tensor) -> bytes:
    """The same network for a search, by torch's older and quicker exporter."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # of an exporter that is to go, and of constants in traces
        file = Path(folder) / "draft.onnx"
        torch.onnx.export(net, (example,), file, dynamo=False)
        return file.read_bytes()


def latencies(original: Path | bytes, files: Sequence[Path | bytes], rounds: int = 15) -> list[Latency]:
    """Each file beside the original, in the same rounds, in random order; small networks get up to 4 times as many."""
    first, *others = (_Timed(f) for f in (original, *files))
    rounds = max(rounds, min(4 * rounds, int(SMALL_MS / first.ms())))
    times: list[list[tuple[float, float]]] = [[] for _ in others]
    shuffle = random.Random(0)
    order = list(range(len(others)))
    for _ in range(rounds):
        shuffle.shuffle(order)
        before = first.ms()
        for i in order:
            ms, after = others[i].ms(), first.ms()
            times[i].append((ms, (before + after) / 2))
            before = after
    return [_latency(t) for t in times]


def _latency(times: list[tuple[float, float]]) -> Latency:
    ratios = [a / b for a, b in times]
    low, high = np.percentile(ratios, [25, 75])
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    return Latency(statistics.median(ratios), float(high - low), a, b)


class _Timed:
    """A session and its inputs."""

    def __init__(self, file: Path | bytes) -> None:
        self.session = session(file)
        random_ = np.random.default_rng(0)
        self.feed = {i.name: random_.random(i.shape, dtype=np.float32) for i in self.session.get_inputs()}
        self._once()
        self.repeats = min(200, max(1, int(np.ceil(MIN_MS / max(self._once(), 1e-3)))))

    def _once(self) -> float:
        start = time.process_time_ns()
        self.session.run(None, self.feed)
        return (time.process_time_ns() - start) / 1e6

    def ms(self) -> float:
        self.session.run(None, self.feed)
        start = time.process_time_ns()
        for _ in range(self.repeats):
            self.session.run(None, self.feed)
        return (time.process_time_ns() - start) / 1e6 / self.repeats


def outputs(file: Path, inputs: Tensor) -> list[np.ndarray]:
    """What the file gives for each input, one at a time; an array an output."""
    net = session(file)
    name = net.get_inputs()[0].name
    given = [net.run(None, {name: x.numpy()}) for x in inputs.split(1)]
    return [np.concatenate(parts) for parts in zip(*given, strict=True)]


def session(file: Path | bytes) -> Any:
    """One thread, every graph optimisation."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    given = file if isinstance(file, bytes) else str(file)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def forward(net: nn.Module, images: Tensor, batch: int = 16) -> list[Tensor]:
    """The outputs of a torch network as a list of tensors."""
    with torch.inference_mode():
        given = [net(part) for part in images.split(batch)]
    rows = [g if isinstance(g, (tuple, list)) else (g,) for g in given]
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]
