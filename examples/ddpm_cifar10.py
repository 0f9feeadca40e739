"""LayerMerge on the DDPM of CIFAR-10 with the paper's settings: importance, plan, fine-tuning, merge, export.

    python examples/ddpm_cifar10.py /data/cifar-10-batches-bin --budget 0.7 --out runs/ddpm
    torchrun --nproc_per_node 8 examples/ddpm_cifar10.py /data/cifar-10-batches-bin --budget 0.7 --out runs/ddpm

DATA is CIFAR-10's binary version (data_batch_1.bin to data_batch_5.bin), which is read without unpickling anything. The
network is google/ddpm-cifar10-32 of diffusers, or `--weights FOLDER`. Importance jobs run on all GPUs, fine-tuning in
all processes that the launcher started. A run that was stopped is started again with the same command: nothing that
`--out` holds (options.json, cache/, plan.json, training/) is made again. At the end there are net/, net.onnx,
samples.png and results.json.

The defaults are those of the paper (Kim, El Halabi, Ji, Song, ICML 2024) and its published code: importance from 50
epochs on 1 % of the images, judged by the denoising loss on another 1 %; GroupNorm moves to after merged convolutions;
fine-tuning is Adam, rate 4e-4, 100,000 steps of 128 images, and the network is the moving average of the weights over
them (0.9999: Ho, Jain, Abbeel 2020).

What is reported is the denoising loss, with the same noise for both networks. The paper reports FID, which needs the
weights of an Inception network and is not made here: `--judge package.module:function` calls a function of yours with
`--samples` samples of each network, uint8 (n, 3, 32, 32) (100 steps of DDIM, Song, Meng, Ermon 2021), and reports the
number that it gives.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from launch import Launch, check_options, job_pool, wait_for
from torch import Tensor, nn

import lmfx

TIMES = 1000
ALPHA = torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64), 0).float()
# What may change between two runs of one --out; all else is of the plan.
FREE = {"data", "out", "device", "jobs", "plan_only", "steps", "save_every", "rate", "ema", "precision"}
FREE |= {"samples", "judge"}


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

    @property
    def key(self) -> str:
        """What the stored rows belong to; they outlive another device."""
        return f"{self.folder} {self.share} x {self.epochs} x {self.batch} adam {self.rate} v2"

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
    parser.add_argument("--importance-rate", type=float, default=4e-4)
    parser.add_argument("--jobs", type=int, help="importance jobs side by side (default: one a GPU)")
    parser.add_argument("--include", nargs="+", default=[], metavar="GLOB", help="modules that may be touched")
    parser.add_argument("--calibration", type=int, default=128, help="images (default: %(default)s)")
    parser.add_argument("--norm", default="post", choices=["post", "affine"])
    parser.add_argument("--plan-only", action="store_true", help="stop when there is a plan")
    parser.add_argument("--steps", type=int, default=100_000, help="of fine-tuning (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=128, help="in all processes, and in latencies (default: %(default)s)"
    )
    parser.add_argument("--save-every", type=int, default=1000, help="steps (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--ema", type=float, default=0.9999, help="decay of the weights' average; 0 for none")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--samples", type=int, default=64, help="of each network at the end (default: %(default)s)")
    parser.add_argument("--judge", help="package.module:function, samples -> a number like FID")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


@torch.inference_mode()
def sample(net: nn.Module, count: int, batch: int, device: str, steps: int = 100) -> Tensor:
    """`count` images, uint8 `(count, 3, 32, 32)`: DDIM without noise (Song, Meng, Ermon 2021, equation 12, sigma 0)."""
    random = torch.Generator().manual_seed(0)
    times = torch.linspace(TIMES - 1, 0, steps).round().long()
    done = []
    for _ in range(0, count, batch):  # whole batches, see `main`
        x = torch.randn(batch, 3, 32, 32, generator=random).to(device)
        for i, t in enumerate(times):
            now, then = ALPHA[t], ALPHA[times[i + 1]] if i + 1 < steps else torch.tensor(1.0)
            noise = net(x, torch.full((batch,), int(t), device=device))
            image = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
            x = then.sqrt() * image + (1 - then).sqrt() * noise
        done.append(x.cpu())
    return ((torch.cat(done)[:count] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def write_picture(rows: list[Tensor], file: Path) -> None:
    """The first 16 images of each, a row each."""
    from PIL import Image

    whole = torch.cat([torch.cat(list(images[:16]), 2) for images in rows], 1)
    Image.fromarray(whole.permute(1, 2, 0).contiguous().numpy()).save(file)


def make_plan(args: argparse.Namespace, model: nn.Module, example: Any, noise: Any, short: Short) -> None:
    """Writes out/report.txt and, once all is done, out/plan.json: the best plan for the budget."""
    importance: Any = args.importance
    if importance == "finetune":
        importance = lmfx.Finetune(
            short.train,
            short.evaluate,
            metric="loss",
            objective="paper",
            surrogate="identity",
            seed=args.seed,
            key=f"ddpm {short.key}",
        )
    student = lmfx.compress(
        model,
        example,
        args.budget,
        calibration=noise,
        latency=args.latency,
        importance=importance,
        realize=("compose",),
        surrogate="identity",
        norm=args.norm,
        include=tuple(args.include),
        executor=job_pool(args.jobs, args.device),
        cache_dir=args.out / "cache",
        merge=False,
    )
    report = str(lmfx.report(student))
    print(report)
    (args.out / "report.txt").write_text(report + "\n")
    lmfx.save_plan(lmfx.result_of(student).plan, args.out / "plan.json")


def judge(args: argparse.Namespace, nets: dict[str, nn.Module], short: Short) -> dict[str, dict[str, float]]:
    """The denoising loss of each network and what `--judge` says of its samples; writes out/samples.png."""
    results: dict[str, dict[str, float]] = {}
    rows = []
    for name, net in nets.items():
        results[name] = {"denoising loss": short.evaluate(net)}
        if args.samples:
            rows.append(sample(net, args.samples, args.batch, args.device))
            if args.judge:
                module, _, function = args.judge.partition(":")
                results[name][args.judge] = float(getattr(importlib.import_module(module), function)(rows[-1]))
    if rows:
        write_picture(rows, args.out / "samples.png")
    return results


def main(arguments: list[str] | None = None) -> None:
    """All stages, each skipped where its result is there."""
    args = options(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Launch.of(args.device)
    images = read(args.data)
    check_options(args.out / "options.json", {k: v for k, v in vars(args).items() if k not in FREE})
    torch.manual_seed(args.seed)
    model = Denoiser(args.weights, tuple(args.channels)).eval().to(run.device)
    random = torch.Generator().manual_seed(args.seed)
    chosen = scaled(images[torch.randint(len(images), (args.calibration,), generator=random)])
    noise = tuple(v.to(run.device) for v in noisy(chosen, random)[:2])

    def example(batch: int) -> tuple[Tensor, Tensor]:
        times = torch.full((batch,), TIMES // 2, device=run.device)
        return torch.randn(batch, 3, 32, 32, device=run.device), times

    # Attention reshapes to numbers that are read off the example, so all batches of a graph are as large as it is.
    short = Short(
        args.data.resolve(), args.share, args.importance_epochs, args.batch, args.importance_rate, args.device
    )
    plan = args.out / "plan.json"
    if run.first and not plan.exists():
        make_plan(args, model, example(args.batch), noise, short)
    wait_for(plan)
    if args.plan_only:
        return
    share, chosen_plan = run.share(args.batch), lmfx.load_plan(plan)
    # The same network at another batch is another graph: its plan goes by the names of the layers.
    by_name = dataclasses.replace(chosen_plan, fingerprint="")
    student = lmfx.rewrite(lmfx.trace(model, example(share)), by_name, calibration=noise)
    chunks = -(-args.steps // args.save_every)
    lmfx.distill(
        student,
        None,
        # Each process takes every n-th batch.
        NoisyBatches(images, args.steps // chunks * run.processes, share, run.device),
        epochs=chunks,
        loss=F.mse_loss,
        distillation=None,
        lr=args.rate,
        schedule="constant",
        clip=1.0,
        ema=args.ema or None,
        precision=args.precision,
        checkpoint=args.out / "training",
        seed=args.seed,
    )
    if run.first:
        whole = lmfx.rewrite(lmfx.trace(model, example(args.batch)), chosen_plan, calibration=noise)
        trained = dict(student.named_parameters())  # buffers are constants, some as long as the batch
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                parameter.copy_(trained[name])
        net = lmfx.merge(whole)
        lmfx.save(net, args.out / "net")
        lmfx.export_onnx(net, example(args.batch), args.out / "net.onnx")
        results = judge(args, {"original": model, "compressed": net}, short)
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
        for name, row in results.items():
            print(f"{name:12} " + ", ".join(f"{what} {value:.5f}" for what, value in row.items()))
        print(f"written: {args.out}/plan.json, report.txt, training/, net/, net.onnx, samples.png, results.json")
    run.leave()


if __name__ == "__main__":
    main()
