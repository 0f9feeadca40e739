"""A small diffusion network on digits, before and after compression: samples, a distance like FID, latency.

    python benchmarks/diffusion_digits.py [--steps 1200] [--budget 0.7] [--out out/diffusion]

A U-Net of diffusers (GroupNorm, a time embedding added in every block, long skips) learns to denoise real digits at
16 x 16, and is compressed to a share of its measured latency; nothing in lmfx knows of diffusion. Then all draw as many
samples from the same noise (DDIM, Song et al. 2021), and are compared in the feature space of a classifier:

    distance = |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))       m, C: mean and covariance of features; m', C': held out

which is FID (Heusel et al. 2017) with the classifier in place of Inception. `real` is the distance of training digits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import lmfx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import digits

SIZE, TIMES = 16, 200
ALPHA = torch.cumprod(1 - torch.linspace(5e-4, 0.05, TIMES), 0)  # to nearly pure noise in 200 steps


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


def noisy(images: Tensor, random: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy images, time steps, noise) for a batch."""
    steps = torch.randint(TIMES, (len(images),), generator=random)
    noise = torch.randn(images.shape, generator=random)
    alpha = ALPHA[steps][:, None, None, None]
    return alpha.sqrt() * images + (1 - alpha).sqrt() * noise, steps, noise


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
    """Trains the denoiser in place: noise from torch's global generator, Adam, cosine."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for x, t, noise in tqdm(NoisyBatches(images, steps), desc="training the denoiser", unit="step", mininterval=5):
        loss = F.mse_loss(model(x, t), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


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
    large = F.interpolate(images, (digits.SIZE, digits.SIZE), mode="bilinear", align_corners=False)
    trunk = nn.Sequential(classifier.stem, classifier.stage1, classifier.stage2, classifier.stage3)
    return torch.cat([trunk(x).mean((2, 3)) for x in large.split(128)])


def sheet(rows: list[Tensor], file: Path) -> None:
    """One PNG: each row the same noise's first samples, three times as large."""
    from PIL import Image

    columns = min(16, *(len(row) for row in rows))
    lines = [torch.cat(list(row[:columns, 0]), 1) for row in rows]
    grey = ((torch.cat(lines).clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    grey = grey.repeat_interleave(3, 0).repeat_interleave(3, 1)
    Image.fromarray(grey.contiguous().numpy()).save(file)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="of training the original (default: %(default)s)")
    parser.add_argument("--fine-tune", type=int, default=300, help="steps of fine-tuning (default: %(default)s)")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--budget", default="0.7")
    parser.add_argument("--norm", default="affine", choices=["affine", "post"])
    parser.add_argument("--images", type=int, default=32, help="to calibrate on (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--latency", default="onnxruntime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classifier-epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("out/diffusion"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, compress, fine-tune, sample, compare."""
    args = options(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    clock = time.process_time()
    data = digits.load(args.seed)
    images, held = scaled(data.train_images), scaled(data.test_images)
    torch.manual_seed(args.seed)
    classifier = digits.Classifier()
    seen = digits.Digits(*(v for v in (_up(images), data.train_labels, _up(held), data.test_labels)))
    digits.train(classifier, seen, epochs=args.classifier_epochs, seed=args.seed, progress=False)
    right = digits.accuracy(classifier, seen.test_images, seen.test_labels)
    model = train(Denoiser(args.width), images, args.steps, args.seed)

    example = (torch.randn(1, 1, SIZE, SIZE), torch.tensor([TIMES // 2]))
    random = torch.Generator().manual_seed(args.seed)
    x, t, _ = noisy(images[torch.randint(len(images), (args.images,), generator=random)], random)
    student = lmfx.compress(
        model,
        example,
        args.budget,
        calibration=(x, t),
        latency=args.latency,
        norm=args.norm,
        max_span_convs=3,  # residual blocks and their neighbours; longer spans only make the table longer
        cache_dir=args.out / "cache",
        merge=False,
        progress=False,
    )
    result, merged = lmfx.result_of(student), lmfx.merge(student)
    batches = NoisyBatches(images, args.fine_tune)
    tuned = lmfx.merge(
        lmfx.distill(student, model, batches, loss=F.mse_loss, lr=1e-3, clip=1.0, seed=args.seed, progress=False)
    )

    networks = {"original": model, "compressed": merged, "fine-tuned": tuned}
    target, drawn, rows = features(classifier, held), [], {}
    rows["real"] = {"distance": frechet(features(classifier, images), target)}
    for name, network in networks.items():
        drawn.append(sample(network, args.samples, args.seed))
        whole = result.original if name == "original" else result.measured
        rows[name] = {"distance": frechet(features(classifier, drawn[-1]), target), "ms": whole or float("nan")}
        rows[name]["convs"] = sum(isinstance(m, nn.Conv2d) for m in network.modules())
    sheet([held, *drawn], args.out / "samples.png")
    rows["run"] = {"classifier": right, "cpu_s": time.process_time() - clock, "budget_ratio": result.ratio or 1.0}
    (args.out / "diffusion_digits.json").write_text(json.dumps(rows, indent=1))
    print(
        f"classifier of the feature space: {right:.1%} of held-out digits; budget {args.budget}, {args.samples} samples"
    )
    print(f"{'':12} {'distance':>9} {'latency':>10} {'ratio':>6} {'convs':>6}")
    print(f"{'real':12} {rows['real']['distance']:9.2f}")
    for name in networks:
        r = rows[name]
        ratio = r["ms"] / rows["original"]["ms"]
        print(f"{name:12} {r['distance']:9.2f} {r['ms']:7.3f} ms {ratio:6.3f} {r['convs']:6d}")
    print(
        f"{rows['run']['cpu_s']:.0f} s CPU time; samples (held-out digits, then each network): {args.out}/samples.png"
    )


def _up(images: Tensor) -> Tensor:
    return F.interpolate(images, (digits.SIZE, digits.SIZE), mode="bilinear", align_corners=False)


if __name__ == "__main__":
    main()
