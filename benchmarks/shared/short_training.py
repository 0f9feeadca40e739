"""A trained classifier and a short training of it: what the importance benchmarks give to `Finetune`.

The data set is a module with the face of `examples/digits.py`: `load(seed)` with train_images, train_labels,
test_images and test_labels, `Classifier(width)`, `train(model, data, epochs=, seed=, progress=)`. The last quarter of
the training images is not trained on; performances are taken on at most 1,024 of them, and the test images are left
alone. `network` is "resnet", that module's own, or "mobilenet", the small one of `small_networks`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shared.small_networks import classifier

HELD = 1024
HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2] / "examples")]


@functools.lru_cache(2)
def data_of(name: str, seed: int) -> tuple[Any, Tensor, Tensor]:
    """(the data with less to train on, images and labels that are held out of it)."""
    data = importlib.import_module(name).load(seed)
    cut = len(data.train_labels) * 3 // 4
    left = replace(data, train_images=data.train_images[:cut], train_labels=data.train_labels[:cut])
    return left, data.train_images[cut : cut + HELD], data.train_labels[cut : cut + HELD]


@dataclass(frozen=True)
class ShortTraining:
    """`train` and `evaluate` for `Finetune`: `steps` of Adam on random batches, cosine schedule, clipped gradients."""

    data: str = "digits"
    seed: int = 0
    steps: int = 16
    batch: int = 64
    lr: float = 0.001
    network: str = "resnet"

    @property
    def key(self) -> str:
        """A name for this training, to store rows under."""
        return f"{self.data} {self.network} {self.seed} adam {self.steps} x {self.batch} lr {self.lr} v2"

    def model(self, width: int, epochs: int, folder: str | None = None) -> nn.Module:
        """A trained classifier, kept in `folder`."""
        torch.manual_seed(self.seed)
        module = importlib.import_module(self.data)
        data, _, _ = data_of(self.data, self.seed)
        net = classifier(module, data, self.network, width)
        file = Path(folder or "") / f"{self.data}-{self.network}-{self.seed}-{width}-{epochs}.safetensors"
        if folder and file.exists():
            net.load_state_dict(safetensors.torch.load_file(file))
            return net.eval()
        module.train(net, data, epochs=epochs, seed=self.seed, progress=False)
        if folder:
            file.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(net.state_dict(), file)
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
