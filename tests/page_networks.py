"""Small networks whose pages the tests read: one compressed under a budget, with a name that is HTML."""

from __future__ import annotations

import functools
import tempfile
from collections import OrderedDict

import torch
from torch import Tensor, fx, nn

import lmfx

SHARP = "<b>&amp; x"  # a module name that would be markup


class Block(nn.Module):
    """A bottleneck around a skip."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def model() -> nn.Module:
    """Two blocks, a downsampling conv and a classifier, with statistics that differ by channel."""
    torch.manual_seed(0)
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(3, 16, 3, padding=1), act=nn.ReLU())
    parts["one"] = Block(16, 24)
    parts[SHARP] = nn.Conv2d(16, 24, 3, stride=2, padding=1)
    parts["two"] = Block(24, 32)
    parts["three"] = Block(24, 32)
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flat"] = nn.Flatten()
    parts["fc"] = nn.Linear(24, 5)
    net = nn.Sequential(parts)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return net.eval()


@functools.cache
def compressed() -> fx.GraphModule:
    """The model at six tenths of what the analytic backend says, made once a process."""
    images = torch.randn(24, 3, 13, 13, generator=torch.Generator().manual_seed(1))
    options = {"latency": "roofline", "refit": False, "progress": False}
    with tempfile.TemporaryDirectory(prefix="lmfx-page-") as folder:
        return lmfx.compress(model(), images[:1], 0.6, calibration=images, cache_dir=folder, **options)
