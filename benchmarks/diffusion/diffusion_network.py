"""A small diffusion network on digits, and how far its samples are from real ones.

A U-Net of diffusers (GroupNorm, a time embedding added in every block, long skips) learns to tell the noise in digits
of 16 x 16 (Ho et al. 2020):

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e          net(x_t, t) = e          a: from 1 to nearly 0 in 200 steps

Samples are drawn by DDIM without added noise (Song et al. 2021), and are compared in the feature space of a classifier:

    distance = |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))       m, C: mean and covariance of features; m', C': held out

which is FID (Heusel et al. 2017) with the classifier in place of Inception.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import digits

SIZE, TIMES = 16, 200
ALPHA = torch.cumprod(1 - torch.linspace(5e-4, 0.05, TIMES), 0)  # to nearly pure noise in 200 steps
EMA = 0.999  # of the weights, as is usual for such networks
BUCKETS = 4  # of time steps, for which errors are told apart


class Denoiser(nn.Module):
    """Noisy images `(n, 1, 16, 16)` and time steps `(n,)` to the noise in them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        import diffusers

        make: Any = diffusers.UNet2DModel
        self.net = make(
            sample_size=SIZE,
            in_channels=1,
            out_channels=1,
            block_out_channels=(width, 2 * width),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            add_attention=False,  # whose reshapes would tie the traced network to one batch size
        )

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.net(sample, timestep, return_dict=False)[0]


def scaled(images: Tensor) -> Tensor:
    """The digits at 16 x 16, from -1 to 1."""
    small = F.interpolate(images, (SIZE, SIZE), mode="area")
    low, high = small.amin(), small.amax()
    return (small - low) / (high - low) * 2 - 1


def enlarged(images: Tensor) -> Tensor:
    """Images in the size that the classifier takes."""
    return F.interpolate(images, (digits.SIZE, digits.SIZE), mode="bilinear", align_corners=False)


def noisy(
    images: Tensor, random: torch.Generator | None = None, steps: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy images, time steps, noise) for a batch; random time steps if none are given."""
    if steps is None:
        steps = torch.randint(TIMES, (len(images),), generator=random)
    noise = torch.randn(images.shape, generator=random)
    alpha = ALPHA[steps][:, None, None, None]
    return alpha.sqrt() * images + (1 - alpha).sqrt() * noise, steps, noise


def spread(images: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`noisy` of `count` random images with time steps spread evenly, in random order."""
    random = torch.Generator().manual_seed(seed)
    steps = torch.linspace(0, TIMES - 1, count).round().long()[torch.randperm(count, generator=random)]
    return noisy(images[torch.randint(len(images), (count,), generator=random)], random, steps)


class NoisyBatches:
    """Fresh noise on random images at each turn: `count` batches of (noisy, time steps, noise)."""

    def __init__(self, images: Tensor, count: int, size: int = 64) -> None:
        self.images, self.count, self.size = images, count, size

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _ in range(self.count):
            yield noisy(self.images[torch.randint(len(self.images), (self.size,))])


def train(model: nn.Module, images: Tensor, steps: int, seed: int) -> nn.Module:
    """Trains the denoiser in place, and gives the moving average of its weights: Adam, cosine, torch's own noise."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    model.train()
    for x, t, noise in tqdm(NoisyBatches(images, steps), desc="training the denoiser", unit="step", mininterval=5):
        loss = F.mse_loss(model(x, t), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    module = average.module
    assert isinstance(module, nn.Module)
    return module.eval()


@torch.inference_mode()
def errors(model: Callable[..., Tensor], images: Tensor, count: int = 1024) -> list[float]:
    """The mean squared error of the predicted noise in `count` noisy images, for each quarter of the time steps."""
    x, t, noise = spread(images, count, seed=1)
    found = torch.cat([model(*part) for part in zip(x.split(128), t.split(128), strict=True)])
    each = (found - noise).square().flatten(1).mean(1)
    return [float(each[t * BUCKETS // TIMES == i].mean()) for i in range(BUCKETS)]


@torch.inference_mode()
def sample(model: Callable[..., Tensor], count: int, seed: int, steps: int = 20, batch: int = 128) -> Tensor:
    """`count` images by DDIM without added noise; the same seed starts from the same noise."""
    start = torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(TIMES - 1, 0, steps).round().long().tolist()
    found = []
    for x in start.split(batch):
        for now, then in zip(times, [*times[1:], -1], strict=True):
            noise = model(x, torch.full((len(x),), now))
            a, b = ALPHA[now], ALPHA[then] if then >= 0 else torch.tensor(1.0)
            clean = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(-1, 1)
            # the noise that goes with the clamped image, so that both stay consistent
            noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
            x = b.sqrt() * clean + (1 - b).sqrt() * noise
        found.append(x)
    return torch.cat(found)


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of two sets of features `(n, d)`, as Gaussians."""
    x, y = a.double().numpy(), b.double().numpy()
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(c)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # tr (c d)^(1/2) = tr (c^(1/2) d c^(1/2))^(1/2), which is symmetric
    cross = np.sqrt(np.linalg.eigvalsh(root @ d @ root).clip(0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * cross)


@torch.inference_mode()
def features(classifier: digits.Classifier, images: Tensor) -> Tensor:
    """What the classifier sees just before its last layer, `(n, 64)`, of images from -1 to 1."""
    trunk = nn.Sequential(classifier.stem, classifier.stage1, classifier.stage2, classifier.stage3)
    return torch.cat([trunk(x).mean((2, 3)) for x in enlarged(images).split(128)])


def sheet(rows: list[Tensor], file: Path) -> None:
    """One PNG: each row the same noise's first samples, three times as large."""
    from PIL import Image

    columns = min(24, *(len(row) for row in rows))
    lines = [torch.cat(list(row[:columns, 0]), 1) for row in rows]
    grey = ((torch.cat(lines).clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    grey = grey.repeat_interleave(3, 0).repeat_interleave(3, 1)
    Image.fromarray(grey.contiguous().numpy()).save(file)
