"""What the canonical form costs where nothing is merged: a channels-last block, and a shuffle of channels.

The block (depthwise conv, LayerNorm, Linear, GELU, Linear, scale, add) is timed in ONNX Runtime as torch's own exporter
writes it, with the permutes where they were, and as lmfx's canonical graph has it. A shuffle is timed as torch's
view, transpose, contiguous, view and as the gather that `ChannelSelect` is. One thread, CPU time, interleaved, medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor, nn

from lmfx.export.emit import emit, fallback_bytes
from lmfx.passes.graph.modules import ChannelSelect
from lmfx.passes.trace.tracing import trace

BLOCKS = ((96, 56), (384, 14))  # channels, pixels a side
SHUFFLES = ((58, 56), (116, 28), (464, 7))
REPEATS = 31


class Block(nn.Module):
    """A residual block whose second half is channels-last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.act = nn.LayerNorm(channels), nn.GELU()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + (self.fc2(self.act(self.fc1(y))) * self.scale).permute(0, 3, 1, 2)


def medians(*functions: Callable[[], Any], calls: int = 1) -> list[float]:
    """CPU milliseconds a call of each function, in turns."""
    rows: list[list[float]] = [[] for _ in functions]
    for repeat in range(REPEATS + 3):
        for row, function in zip(rows, functions, strict=True):
            start = time.process_time()
            for _ in range(calls):
                function()
            if repeat >= 3:
                row.append((time.process_time() - start) * 1e3 / calls)
    return [statistics.median(row) for row in rows]


def runner(model: bytes, x: Tensor) -> Callable[[], Any]:
    """A call of the model in ONNX Runtime on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feeds)[0]


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'block':<12}{'channels-last':>16}{'channels-first':>16}{'ratio':>8}{'difference':>12}")
    for channels, size in BLOCKS:
        block, x = Block(channels).eval(), torch.randn(1, channels, size, size)
        last = runner(fallback_bytes(block, [x]), x)
        first = runner(emit(trace(block, x), [x]).SerializeToString(), x)
        difference = float(abs(last() - first()).max())
        a, b = medians(last, first)
        print(f"{f'{channels} x {size}':<12}{a:>13.2f} ms{b:>13.2f} ms{b / a:>8.2f}{difference:>12.1e}")
    print(f"\n{'shuffle':<12}{'transpose':>16}{'gather':>16}{'ratio':>8}")
    for channels, size in SHUFFLES:
        x = torch.randn(1, channels, size, size)
        select = ChannelSelect(torch.arange(channels).view(2, -1).T.flatten().tolist())

        def turn(x: Tensor = x, shape: tuple[int, ...] = (1, 2, channels // 2, size, size)) -> Tensor:
            return x.view(shape).transpose(1, 2).contiguous().view(x.shape)

        assert torch.equal(turn(), select(x))
        with torch.inference_mode():
            a, b = medians(turn, partial(select, x), calls=100)
        print(f"{f'{channels} x {size}':<12}{a:>13.4f} ms{b:>13.4f} ms{b / a:>8.2f}")


if __name__ == "__main__":
    main()
