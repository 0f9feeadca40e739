"""Small networks that the tests of the pipeline compress, on the roofline backend unless a test says otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

import lmfx
from tests.helpers import double


class Block(nn.Module):
    """A residual block; its sum is after the second conv."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x)))) + x)


class Net(nn.Module):
    """A stem, two residual blocks, a strided conv, a classifier: one region."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.down = nn.Conv2d(width, width, 3, 2, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.stem(x)))
        return self.head(torch.relu(self.down(x)).mean((2, 3)))


class TwoInputs(nn.Module):
    """Two images that meet in the middle, each through convs of its own, and two outputs: several regions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.right = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.tail = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), Block(width))

    def forward(self, image: Tensor, depth: Tensor) -> dict[str, Tensor]:
        met = self.left(image) + self.right(depth)
        return {"map": self.tail(met), "mean": met.mean((2, 3))}


def images(count: int, size: int = 12, seed: int = 7, channels: int = 3) -> Tensor:
    """Smooth random images, which are closer to data than noise is."""
    coarse = torch.randn(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def toy(width: int = 8) -> Net:
    """A `Net` in float32 and eval mode whose norms are not the identity."""
    return double(Net(width)).float()  # type: ignore[return-value]


def compress(model: nn.Module, example: Any, budget: Any, **options: Any) -> fx.GraphModule:
    """`lmfx.compress` on the roofline, without progress bars."""
    return lmfx.compress(model, example, budget, **{"latency": "roofline", "progress": False, **options})
