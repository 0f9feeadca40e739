"""What the tests of `finetune` train and evaluate; a module of its own, so that worker processes can import it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.toys import images

CENTRES = images(5, seed=3)


def train(model: nn.Module) -> None:
    """Two short steps on images that are drawn anew in each job, with torch's and numpy's random numbers."""
    assert model.training and all(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        labels = torch.from_numpy(np.random.randint(0, 5, 16))
        loss = nn.functional.cross_entropy(model(CENTRES[labels] + 0.5 * torch.randn(16, 3, 12, 12)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def nothing(model: nn.Module) -> None:
    """A training that leaves the model as it is."""


def accuracy(model: nn.Module) -> float:
    """A smooth accuracy: the mean probability of the right class, of noisy images."""
    assert not model.training
    labels = torch.arange(40) % 5
    noise = torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float(model(CENTRES[labels] + 0.5 * noise).softmax(1)[torch.arange(40), labels].mean())


def loss(model: nn.Module) -> torch.Tensor:
    """The cross entropy on the same images, as a tensor with one value."""
    labels = torch.arange(40) % 5
    with torch.no_grad():
        return nn.functional.cross_entropy(model(CENTRES[labels]), labels)


class KillOnce:
    """Trains like `train`, but the first worker that gets here kills itself, as a lack of memory would."""

    def __init__(self, folder: Any, times: int = 1) -> None:
        self.folder, self.times = Path(folder), times

    def __call__(self, model: nn.Module) -> None:
        for i in range(self.times):
            try:
                (self.folder / f"killed{i}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        train(model)


class Slow:
    """Trains like `train` after a while, and leaves the worker's process id in a folder."""

    def __init__(self, folder: Any, seconds: float) -> None:
        self.folder, self.seconds = Path(folder), seconds

    def __call__(self, model: nn.Module) -> None:
        (self.folder / str(os.getpid())).touch()
        time.sleep(self.seconds)
        train(model)
