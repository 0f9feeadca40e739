"""Plain definitions of the benchmarks' networks, for machines that have torch and no torchvision.

Module names, their order and thus the state dicts are those of torchvision (tested), so weights can be copied over:

    resnet18, resnet34, resnet50    He, Zhang, Ren, Sun, 2015, with the stride in the 3 x 3 conv of a bottleneck
    mobilenet_v2                    Sandler, Howard, Zhu, Zhmoginov, Chen, 2018
    unet                            Ronneberger, Fischer, Brox, 2015, with BatchNorm and padded convs; no counterpart
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "mobilenet_v2", "resnet18", "resnet34", "resnet50", "unet"]


def _conv(inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)


class _Block(nn.Module):
    """A residual block of convs with a norm after each, and ReLU between."""

    def __init__(self, convs: list[nn.Conv2d], downsample: nn.Sequential | None) -> None:
        super().__init__()
        self.count = len(convs)
        for i, conv in enumerate(convs, 1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(conv.out_channels))
        self.relu = nn.ReLU(inplace=True)
        if downsample is not None:
            self.add_module("downsample", downsample)
        self.shortcut = downsample is not None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.count:
                y = self.relu(y)
        y += self.get_submodule("downsample")(x) if self.shortcut else x
        return self.relu(y)


class ResNet(nn.Module):
    """Four stages of residual blocks with two convs, or three in a `bottleneck`."""

    def __init__(self, depths: tuple[int, ...], bottleneck: bool, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        inside = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            outside = 4 * width if bottleneck else width
            blocks = []
            for i in range(depth):
                stride = 2 if stage and not i else 1
                if bottleneck:
                    convs = [_conv(inside, width, 1), _conv(width, width, 3, stride), _conv(width, outside, 1)]
                else:
                    convs = [_conv(inside, width, 3, stride), _conv(width, outside, 3)]
                skip = None
                if stride > 1 or inside != outside:
                    skip = nn.Sequential(_conv(inside, outside, 1, stride), nn.BatchNorm2d(outside))
                blocks.append(_Block(convs, skip))
                inside = outside
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class _Inverted(nn.Module):
    """Expand (1 x 1), depthwise, project (1 x 1) without activation; with a skip where shapes allow."""

    def __init__(self, inside: int, outside: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inside * expand
        layers: list[nn.Module] = [] if expand == 1 else [_conv_bn(inside, hidden, 1)]
        layers += [_conv_bn(hidden, hidden, 3, stride, hidden), _conv(hidden, outside, 1), nn.BatchNorm2d(outside)]
        self.conv = nn.Sequential(*layers)
        self.skip = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


def _conv_bn(inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = _conv(inside, outside, kernel, stride, groups)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU6(inplace=True))


class MobileNetV2(nn.Module):
    """Width 1.0."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn(3, 32, 3, 2)]
        inside = 32
        for expand, outside, count, stride in (
            *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
            *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
        ):
            for i in range(count):
                layers.append(_Inverted(inside, outside, stride if not i else 1, expand))
                inside = outside
        self.features = nn.Sequential(*layers, _conv_bn(inside, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class UNet(nn.Module):
    """Down and up again with skips: two convs a level, max pools down, nearest neighbours and a conv up."""

    def __init__(self, width: int = 32, levels: int = 3, channels: int = 3, classes: int = 2) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(levels + 1)]
        self.down = nn.ModuleList(self._two(a, b) for a, b in zip([channels, *widths[:-2]], widths[:-1], strict=True))
        self.bottom = self._two(widths[-2], widths[-1])
        self.up = nn.ModuleList(_conv_bn(b, a, 3) for a, b in itertools.pairwise(widths))
        self.join = nn.ModuleList(self._two(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(width, classes, 1)
        self.pool, self.grow = nn.MaxPool2d(2), nn.Upsample(scale_factor=2.0)

    @staticmethod
    def _two(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(_conv_bn(inside, outside, 3), _conv_bn(outside, outside, 3))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            skips.append(level(x))
            x = self.pool(skips[-1])
        x = self.bottom(x)
        for up, join, skip in zip(reversed(self.up), reversed(self.join), reversed(skips), strict=True):
            x = join(torch.cat([skip, up(self.grow(x))], 1))
        return self.head(x)


def resnet18() -> nn.Module:
    """11.7 M parameters."""
    return ResNet((2, 2, 2, 2), bottleneck=False)


def resnet34() -> nn.Module:
    """21.8 M parameters."""
    return ResNet((3, 4, 6, 3), bottleneck=False)


def resnet50() -> nn.Module:
    """25.6 M parameters."""
    return ResNet((3, 4, 6, 3), bottleneck=True)


def mobilenet_v2() -> nn.Module:
    """3.5 M parameters."""
    return MobileNetV2()


def unet() -> nn.Module:
    """2.1 M parameters."""
    return UNet()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "unet": unet,
}
