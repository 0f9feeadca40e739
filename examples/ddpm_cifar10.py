"""LayerMerge on the DDPM of CIFAR-10 with the paper's settings: importance, plan, fine-tuning, merge, export.

    python examples/ddpm_cifar10.py /data/cifar-10-batches-bin --budget 0.7 --out runs/ddpm

DATA is CIFAR-10's binary version (data_batch_1.bin to data_batch_5.bin), which is read without unpickling anything. The
network is google/ddpm-cifar10-32 of diffusers, or `--weights FOLDER`. What is found in the folder `--out` is not made
again (cache, plan.json, training), so a run that was stopped goes on.

The defaults are those of the paper (Kim, El Halabi, Ji, Song, ICML 2024) and its published code: importance from 50
epochs on 1 % of the images, judged by the denoising loss on another 1 %; GroupNorm moves behind merged convolutions;
fine-tuning is Adam, rate 4e-4, 100,000 steps of 128 images. There, weights are averaged over steps (EMA); here not.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx

TIMES = 1000
ALPHA = torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64), 0).float()
CHUNK = 1000  # steps between two checkpoints


def read(folder: Path) -> Tensor:
    """All training images, uint8 `(n, 3, 32, 32)`: records of one label and 3 x 32 x 32 bytes."""
    files = sorted(folder.glob("data_batch_*.bin"))
    if not files:
        raise SystemExit(f"there is no data_batch_*.bin in {folder}: give the folder of CIFAR-10's binary version")
    parts = [np.fromfile(file, dtype=np.uint8) for file in files]
    for file, part in zip(files, parts, strict=True):
        if not len(part) or len(part) % 3073:
            raise SystemExit(f"{file} has {len(part)} bytes, not a multiple of 3073: it is damaged")
    return torch.from_numpy(np.concatenate(parts).reshape(-1, 3073)[:, 1:].reshape(-1, 3, 32, 32).copy())


def scaled(images: Tensor) -> Tensor:
    """uint8 images from -1 to 1."""
    return images.float() / 127.5 - 1


def noisy(images: Tensor, random: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy images, time steps, noise) for a batch (Ho, Jain, Abbeel 2020, equation 4)."""
    steps = torch.randint(TIMES, (len(images),), generator=random)
    noise = torch.randn(images.shape, generator=random)
    alpha = ALPHA[steps][:, None, None, None]
    return alpha.sqrt() * images + (1 - alpha).sqrt() * noise, steps, noise


class Denoiser(nn.Module):
    """Noisy images and time steps to the noise: diffusers' network, which gives a tensor here."""

    def __init__(self, weights: str, channels: tuple[int, ...]) -> None:
        super().__init__()
        import diffusers

        kind: Any = diffusers.UNet2DModel
        if weights != "none":
            self.net = kind.from_pretrained(weights)
            return
        small = {"norm_num_groups": min(32, channels[0] // 2)}
        self.net = kind(
            sample_size=32,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * (len(channels) - 2)),
            up_block_types=(*["UpBlock2D"] * (len(channels) - 2), "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2 if channels[0] >= 64 else 1,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            attention_head_dim=None,
            **small,
        )

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.net(sample, timestep, return_dict=False)[0]


class NoisyBatches:
    """`count` batches of fresh noise on random images, half of them flipped, from torch's global generator."""

    def __init__(self, images: Tensor, count: int, size: int, device: str) -> None:
        self.images, self.count, self.size, self.device = images, count, size, device

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(self.count):
            chosen = scaled(self.images[torch.randint(len(self.images), (self.size,))])
            flip = torch.rand(self.size) < 0.5
            chosen[flip] = chosen[flip].flip(3)
            yield tuple(v.to(self.device) for v in noisy(chosen))


@dataclass(frozen=True)
class Short:
    """The paper's importance: some epochs on a share of the images, the denoising loss on another share as large."""

    folder: Path
    share: float
    epochs: int
    batch: int
    rate: float
    device: str

    def _part(self, part: int) -> Tensor:
        images = read(self.folder)
        count = max(round(len(images) * self.share), 1)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images[order[part * count : (part + 1) * count]]

    def train(self, model: nn.Module) -> None:
        """Adam on fresh noise, in place."""
        model.to(self.device)
        images = self._part(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.rate)
        steps = self.epochs * max(len(images) // self.batch, 1)
        for x, t, noise in NoisyBatches(images, steps, self.batch, self.device):
            loss = F.mse_loss(model(x, t), noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> float:
        """The denoising loss on images that `train` does not see, with the same noise for all."""
        model.to(self.device)
        random, losses = torch.Generator().manual_seed(0), []
        images = scaled(self._part(1))
        whole = torch.arange(-(-len(images) // self.batch) * self.batch) % len(images)  # see `main`: whole batches
        for chosen in images[whole].split(self.batch):
            x, t, noise = (v.to(self.device) for v in noisy(chosen, random))
            losses.append(float(F.mse_loss(model(x, t), noise)))
        return sum(losses) / len(losses)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of CIFAR-10's binary version")
    parser.add_argument("--budget", default="0.7", help='0.7, "4.5ms" or "1.5x" (default: %(default)s)')
    parser.add_argument("--out", type=Path, default=Path("out/ddpm"))
    parser.add_argument("--weights", default="google/ddpm-cifar10-32", help="a folder, a name on the hub, or none")
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 256, 256, 256], help="with --weights none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--latency", help="backend: tensorrt, torch, onnxruntime, roofline (default: by the device)")
    parser.add_argument("--importance", default="finetune", help="finetune (the paper), or reconstruction")
    parser.add_argument("--share", type=float, default=0.01, help="of the images (default: %(default)s)")
    parser.add_argument("--importance-epochs", type=int, default=50)
    parser.add_argument("--calibration", type=int, default=128, help="images (default: %(default)s)")
    parser.add_argument("--norm", default="post", choices=["post", "affine"])
    parser.add_argument("--plan-only", action="store_true", help="stop when there is a plan")
    parser.add_argument("--steps", type=int, default=100_000, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="in training and in latencies (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """All stages, each skipped where its result is there."""
    args = options(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    images = read(args.data)
    torch.manual_seed(args.seed)
    model = Denoiser(args.weights, tuple(args.channels)).eval().to(args.device)
    random = torch.Generator().manual_seed(args.seed)
    chosen = scaled(images[torch.randint(len(images), (args.calibration,), generator=random)])
    x, t, _ = (v.to(args.device) for v in noisy(chosen, random))
    # Attention reshapes to numbers that are read off the example, so all batches are as large as it is.
    example = (
        torch.randn(args.batch, 3, 32, 32, device=args.device),
        torch.full((args.batch,), TIMES // 2, device=args.device),
    )
    short = Short(args.data.resolve(), args.share, args.importance_epochs, args.batch, args.rate, args.device)
    plan = args.out / "plan.json"
    if plan.exists():
        student = lmfx.rewrite(lmfx.trace(model, example), lmfx.load_plan(plan), calibration=(x, t))
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit(f"there is no {plan}: run with --plan-only in one process first")
    else:
        importance: Any = args.importance
        if importance == "finetune":
            importance = lmfx.Finetune(
                short.train,
                short.evaluate,
                metric="loss",
                objective="paper",
                surrogate="identity",
                seed=args.seed,
                key=f"ddpm {short}",
            )
        student = lmfx.compress(
            model,
            example,
            args.budget,
            calibration=(x, t),
            latency=args.latency,
            importance=importance,
            realize=("compose",),
            surrogate="identity",
            norm=args.norm,
            cache_dir=args.out / "cache",
            merge=False,
        )
        print(lmfx.report(student))
        lmfx.save_plan(lmfx.result_of(student).plan, plan)
    if args.plan_only:
        return
    lmfx.distill(
        student,
        None,
        NoisyBatches(images, min(CHUNK, args.steps), args.batch, args.device),
        epochs=max(args.steps // CHUNK, 1),
        loss=F.mse_loss,
        distillation=None,
        lr=args.rate,
        schedule="constant",
        clip=1.0,
        precision=args.precision,
        checkpoint=args.out / "training",
        seed=args.seed,
    )
    if int(os.environ.get("RANK", "0")) > 0:
        return
    net = lmfx.merge(student)
    lmfx.export_onnx(net, example, args.out / "net.onnx")
    for name, each in (("original", model), ("compressed", net)):
        print(f"{name:12} denoising loss {short.evaluate(each):.5f} on {args.share:.0%} of the images")
    print(f"written: {args.out}/plan.json, training/, net.onnx")


if __name__ == "__main__":
    main()
