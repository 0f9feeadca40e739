"""A small residual classifier on scikit-learn's bundled digits: what the demo and the benchmarks compress.

1,797 real handwritten digits of 8x8 pixels, upsampled to 32x32 so that the network takes long enough to be timed. The
network is an ordinary ResNet: a stem, six basic blocks in three stages, a linear classifier. It has 13 convolutions on
its main path, and two of 1x1 on the skips of the blocks that change size.

    data = digits.load(seed=0)
    model = digits.train(digits.Classifier(), data, epochs=6, seed=0)
    digits.accuracy(model, data.test_images, data.test_labels)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm.auto import tqdm

__all__ = ["Classifier", "Digits", "accuracy", "batches", "load", "train"]

SIZE = 32


@dataclass(frozen=True)
class Digits:
    """Images are float32 `(n, 1, 32, 32)` with mean 0 and variance 1, labels int64 `(n,)` from 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Block(nn.Module):
    """Two 3x3 convs and a skip, which is a 1x1 conv where the size changes (He et al. 2016, the basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
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
        out = self.bn2(self.conv2(out))
        out += skip
        return self.relu(out)


class Classifier(nn.Module):
    """Images `(n, 1, h, w)` to logits `(n, 10)`, in stages of `width`, `2 width` and `4 width` channels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.stage1 = nn.Sequential(Block(width, width), Block(width, width))
        self.stage2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width))
        self.stage3 = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width))
        self.classifier = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


def load(seed: int = 0) -> Digits:
    """The digits, three quarters of them for training, split evenly over the classes by `seed`."""
    bunch = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        bunch.images, bunch.target, test_size=0.25, stratify=bunch.target, random_state=seed
    )
    mean, deviation = float(train_x.mean()), float(train_x.std())

    def images(array: object) -> Tensor:
        small = (torch.as_tensor(array, dtype=torch.float32)[:, None] - mean) / deviation
        return F.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=False)

    return Digits(images(train_x), torch.as_tensor(train_y), images(test_x), torch.as_tensor(test_y))


def batches(data: Digits, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled training batches, each shifted by up to two pixels; the few left over are not used."""
    order = torch.randperm(len(data.train_labels), generator=generator)
    for chosen in order.split(size):
        if len(chosen) == size:
            dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
            yield data.train_images[chosen].roll((dy, dx), (2, 3)), data.train_labels[chosen]


def train(model: nn.Module, data: Digits, *, epochs: int = 6, seed: int = 0, progress: bool = True) -> nn.Module:
    """Trains `model` in place, in about a minute on two cores, and returns it in eval mode."""
    size, generator = 64, torch.Generator().manual_seed(seed)
    steps = epochs * (len(data.train_labels) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps, pct_start=0.2)
    model.train()
    with tqdm(total=steps, desc="training", unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            for images, labels in batches(data, size, generator):
                loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that `model` puts into the right class, from 0 to 1."""
    logits = torch.cat([model(batch) for batch in images.split(128)])
    return float((logits.argmax(1) == labels).float().mean())
