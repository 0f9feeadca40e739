"""waifu2x (nagadomi 2018): pictures of half the size enlarged to twice it; how near are they to the ones before?

    low ── conv ── five blocks ── conv ── + ── transposed conv, stride 2 ── picture         UpResNet10
            └───────────── cut to the middle ──┘
    block: two convs, a gate of linear layers, + the input cut to the middle

    low ── six convs ── transposed conv, stride 2 ── picture                                 UpConv7

Both pad nothing, so the truth is cut to the middle. The package has weights for Chainer and their networks as Chainer
code; here they are written for torch. `psnr`: mean over the held-out crops in dB, the output clipped to 0..1. The
weights were made for drawings, and photographs are what is here. A module, not a script.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.real.packages import needs, photographs
from benchmarks.real.subjects import Outputs, Subject, mean_psnr

__all__ = ["UpConv7", "UpResNet10", "upconv7", "upresnet10"]

SLOPE = 0.1
HELD = 64


class UpConv7(nn.Module):
    """Seven layers in a row; 14 pixels of each side of what it makes are missing."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 128, 256, 256)
        for i, (before, after) in enumerate(itertools.pairwise(widths), 1):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, 3))
        self.conv7 = nn.ConvTranspose2d(256, 3, 4, stride=2, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 7):
            x = F.leaky_relu(self.get_submodule(f"conv{i}")(x), SLOPE)
        out: Tensor = self.conv7(x)
        return out


class Block(nn.Module):
    """Two convs and a gate beside the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3), nn.Conv2d(width, width, 3)
        self.fc1, self.fc2 = nn.Linear(width, width // 4), nn.Linear(width // 4, width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), SLOPE)), SLOPE)
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(y.mean((2, 3))))))
        return y * gate[:, :, None, None] + x[:, :, 2:-2, 2:-2]


class UpResNet10(nn.Module):
    """Five blocks; 26 pixels of each side of what it makes are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_pre = nn.Conv2d(3, 64, 3)
        for i in range(1, 6):
            self.add_module(f"res{i}", Block(64))
        self.conv_bridge = nn.Conv2d(64, 64, 3)
        self.conv_post = nn.ConvTranspose2d(64, 3, 4, stride=2, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = x = F.leaky_relu(self.conv_pre(x), SLOPE)
        for i in range(1, 6):
            x = self.get_submodule(f"res{i}")(x)
        x = F.leaky_relu(self.conv_bridge(x), SLOPE) + first[:, :, 11:-11, 11:-11]
        out: Tensor = self.conv_post(x)
        return out


def upresnet10() -> Subject:
    """A residual network that enlarges 72 px to 92."""
    return _subject("waifu2x-upresnet10", UpResNet10)


def upconv7() -> Subject:
    """A plain network that enlarges 72 px to 116."""
    return _subject("waifu2x-upconv7", UpConv7)


def _subject(name: str, network: Callable[[], nn.Module]) -> Subject:
    return Subject(
        name=name,
        what="photographs of half the size, enlarged: PSNR to the photograph",
        model=lambda: _with_weights(network(), name.rpartition("-")[2]),
        images=lambda kind, count, size: F.avg_pool2d(_pictures(kind, count, size), 2),
        judge=judge,
        figure="psnr",
        size=72,
        calibration=96,
        recovery=256,
        held=HELD,
        unit="dB",
    )


def judge(outputs: Outputs, original: Outputs) -> dict[str, float]:
    """PSNR to the photographs, and to what the original makes of the same pictures."""
    made, size = outputs[0], outputs[0].shape[-1]
    edge = (2 * 72 - size) // 2
    truth = _pictures("held", len(made), 72).numpy()[..., edge : edge + size, edge : edge + size]
    return {"psnr": mean_psnr(made, truth), "psnr to the original": mean_psnr(made, original[0].clip(0, 1))}


def _pictures(kind: str, count: int, size: int) -> Tensor:
    """Crops of twice the size."""
    return photographs(kind, count, 288)[:, :, 70 : 70 + 2 * size, 70 : 70 + 2 * size] / 255


def _with_weights(network: nn.Module, folder: str) -> nn.Module:
    """A network with Chainer's arrays: `res1/conv1/W` is the weight of `res1.conv1`, `b` the bias."""
    (path,) = needs(f"site/waifu2x/models/{folder}/anime_style_scale_rgb.npz")
    names = {"W": "weight", "b": "bias"}
    with np.load(path, allow_pickle=False) as arrays:
        owners = {key: key.split("/") for key in arrays.files}
        state = {".".join((*o[:-1], names[o[-1]])): torch.from_numpy(arrays[key]) for key, o in owners.items()}
    network.load_state_dict(state)
    return network.eval()
