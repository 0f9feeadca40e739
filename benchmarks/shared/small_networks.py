"""Small variants of two well-known designs for 32 x 32 images: what the benchmarks train in minutes of one core.

    SmallResNet       3x3 stem of stride 2, six basic blocks in three stages of w, 2w, 4w channels
    SmallMobileNetV2  3x3 stem of stride 2, nine inverted residuals (expansion 4, 3x3 depthwise, linear bottleneck)

They have the blocks of the originals (He et al. 2016; Sandler et al. 2018) with fewer channels and layers. A module,
not a script: `benchmarks/shared/characters.py` trains them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["SmallMobileNetV2", "SmallResNet", "classifier"]


class _Basic(nn.Module):
    """Two 3x3 convs and a skip, which is a 1x1 conv where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + skip)


class SmallResNet(nn.Module):
    """Images `(n, channels, h, w)` to logits `(n, classes)`."""

    def __init__(self, width: int = 16, classes: int = 36, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.stage1 = nn.Sequential(_Basic(width, width, 1), _Basic(width, width, 1))
        self.stage2 = nn.Sequential(_Basic(width, 2 * width, 2), _Basic(2 * width, 2 * width, 1))
        self.stage3 = nn.Sequential(_Basic(2 * width, 4 * width, 2), _Basic(4 * width, 4 * width, 1))
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


class _Inverted(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down without an activation, and a skip where the size stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        up: list[nn.Module] = []
        if expansion != 1:
            up = [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(
            *up,
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


class SmallMobileNetV2(nn.Module):
    """Images `(n, channels, h, w)` to logits `(n, classes)`; stages are (expansion, channels, blocks, stride)."""

    def __init__(self, width: int = 16, classes: int = 36, channels: int = 3) -> None:
        super().__init__()
        w = width
        stages = ((1, w, 1, 1), (4, w * 3 // 2, 3, 1), (4, 2 * w, 3, 2), (4, 4 * w, 2, 2))
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(channels, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU6(inplace=True))
        ]
        inputs = w
        for expansion, outputs, blocks, stride in stages:
            for block in range(blocks):
                layers.append(_Inverted(inputs, outputs, stride if block == 0 else 1, expansion))
                inputs = outputs
        last = 8 * w
        layers.append(nn.Sequential(nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(True)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def classifier(task: Any, data: Any, network: str, width: int) -> nn.Module:
    """An untrained network for a data set: "resnet" is the one that comes with its module `task`, "mobilenet" the small
    one with as many classes and channels as `data` has."""
    if network == "resnet":
        own: nn.Module = task.Classifier(width)
        return own
    if network != "mobilenet":
        raise SystemExit(f"unknown network {network!r}: use 'resnet' or 'mobilenet'")
    return SmallMobileNetV2(width, int(data.train_labels.max()) + 1, data.train_images.shape[1])
