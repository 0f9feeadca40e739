"""A trained classifier and a short training of it: what the importance benchmarks give to `Finetune`.

The data set is a module with the face of `examples/digits.py`: `load(seed)` with train_images, train_labels,
test_images and test_labels, `Classifier(width)`, `train(model, data, epochs=, seed=, progress=)`. The last quarter of
the training images is not trained on; performances are taken there, and the test images are left alone.
"""

from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples")]


@functools.lru_cache(2)
def data_of(name: str, seed: int) -> tuple[Any, Tensor, Tensor]:
    """(the data with less to train on, images and labels that are held out of it)."""
    data = importlib.import_module(name).load(seed)
    cut = len(data.train_labels) * 3 // 4
    left = replace(data, train_images=data.train_images[:cut], train_labels=data.train_labels[:cut])
    return left, data.train_images[cut:], data.train_labels[cut:]


@dataclass(frozen=True)
class ShortTraining:
    """`train` and `evaluate` for `Finetune`: `steps` of Adam on random batches, cosine schedule, clipped gradients."""

    data: str = "digits"
    seed: int = 0
    steps: int = 16
    batch: int = 64
    lr: float = 0.001

    @property
    def key(self) -> str:
        """A name for this training, to store rows under."""
        return f"{self.data} {self.seed} adam {self.steps} x {self.batch} lr {self.lr} v1"

    def model(self, width: int, epochs: int) -> nn.Module:
        """A trained classifier."""
        torch.manual_seed(self.seed)
        module = importlib.import_module(self.data)
        data, _, _ = data_of(self.data, self.seed)
        net: nn.Module = module.train(module.Classifier(width), data, epochs=epochs, seed=self.seed, progress=False)
        return net.eval()

    def images(self, count: int) -> Tensor:
        """Unlabelled images to calibrate on."""
        images: Tensor = data_of(self.data, self.seed)[0].train_images[:count]
        return images

    def train(self, model: nn.Module) -> None:
        """A short training in place; batches come from torch's global generator, which is seeded."""
        data, _, _ = data_of(self.data, self.seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            chosen = torch.randint(len(data.train_labels), (self.batch,))
            loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    @torch.inference_mode()
    def loss(self, model: nn.Module) -> float:
        """The cross entropy of the images that are held out."""
        _, images, labels = data_of(self.data, self.seed)
        return float(F.cross_entropy(torch.cat([model(x) for x in images.split(128)]), labels))

    @torch.inference_mode()
    def accuracy(self, model: nn.Module) -> float:
        """The share of the images that are held out which are put into the right class."""
        _, images, labels = data_of(self.data, self.seed)
        return float((torch.cat([model(x) for x in images.split(128)]).argmax(1) == labels).float().mean())
