"""LayerMerge on ImageNet with the paper's settings: importance, plan, fine-tuning, merge, export, in one command.

    python examples/imagenet.py /data/imagenet --arch mobilenet_v2 --budget 0.6 --out runs/mbv2

DATA has the layout of torchvision's ImageFolder: DATA/train/CLASS/*.JPEG and DATA/val/CLASS/*.JPEG. What is found in
`--out` is not made again: importance rows and latencies (cache), the plan (plan.json), the training (training, after
each epoch). So a run that was stopped goes on. Fine-tuning runs on several GPUs once there is a plan:

    python examples/imagenet.py DATA --arch resnet34 --budget 0.6 --out runs/rn34 --plan-only
    accelerate launch examples/imagenet.py DATA --arch resnet34 --budget 0.6 --out runs/rn34

The defaults of an architecture are those of the paper (Kim, El Halabi, Ji, Song, ICML 2024) and its published code:
importance from one epoch on 4 % of the training images (SGD, rate 0.1, cosine, batches of 256), judged on another 4 %;
then 90 epochs for ResNet-34, 180 for MobileNetV2. Pretrained weights come from torchvision or timm (`--weights`).
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

import lmfx

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Recipe:
    """How one architecture is fine-tuned; `rate` is for batches of `batch` images in all."""

    epochs: int
    rate: float
    batch: int
    momentum: float
    nesterov: bool
    decay: float
    warmup: float  # epochs
    smoothing: float
    activation_after: str | None  # behind a merged span that ended without one


RECIPES = {
    "resnet34": Recipe(90, 1.024, 1024, 0.875, False, 2**-15, 8, 0.1, None),
    "mobilenet_v2": Recipe(180, 0.05, 256, 0.9, True, 1e-5, 0, 0.0, "relu6"),
    "mobilenet_v2_1.4": Recipe(180, 0.1, 256, 0.9, True, 1e-5, 0, 0.0, "relu6"),
}


def network(arch: str, weights: str, classes: int) -> nn.Module:
    """The pretrained network; `weights` is "default", "none", or a safetensors file."""
    import timm
    import torchvision

    if arch == "resnet34":
        kept = "DEFAULT" if weights == "default" else None
        model: nn.Module = torchvision.models.resnet34(weights=kept, num_classes=classes)
    else:
        name = {"mobilenet_v2": "mobilenetv2_100", "mobilenet_v2_1.4": "mobilenetv2_140"}[arch]
        model = timm.create_model(name, pretrained=weights == "default", num_classes=classes)
    if weights not in ("default", "none"):
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights))
    return model.eval()


def folder(root: Path, split: str, size: int) -> Any:
    """An ImageFolder; training images are cropped at random and flipped."""
    import torchvision
    from torchvision import transforms

    where = root / split
    if not where.is_dir():
        raise SystemExit(f"there is no folder {where}: DATA needs train/CLASS/*.JPEG and val/CLASS/*.JPEG")
    crop = (
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        if split == "train"
        else [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    )
    whole = [*crop, transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    return torchvision.datasets.ImageFolder(str(where), transforms.Compose(whole))


@dataclass(frozen=True)
class Short:
    """The paper's importance: one epoch on a share of the training images, accuracy on another share of that size."""

    root: Path
    size: int
    share: float
    batch: int
    rate: float
    workers: int
    device: str

    def _loader(self, part: int) -> DataLoader[Any]:
        data = folder(self.root, "train", self.size)
        count = max(round(len(data) * self.share), 1)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))  # of any process: the same
        chosen = order[part * count : (part + 1) * count].tolist()
        if len(chosen) < count:
            raise SystemExit(f"{len(data)} training images have no two parts of {self.share:.0%}: lower --share")
        return DataLoader(Subset(data, chosen), self.batch, shuffle=part == 0, num_workers=self.workers)

    def train(self, model: nn.Module) -> None:
        """SGD with a cosine schedule, in place."""
        model.to(self.device)
        loader = self._loader(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=self.rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(self.device)), labels.to(self.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def evaluate(self, model: nn.Module) -> float:
        """The accuracy on images that `train` does not see."""
        return accuracy(model.to(self.device), self._loader(1))


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Any, desc: str | None = None) -> float:
    """The share of images that `model` puts into the right class."""
    device = next(model.parameters()).device
    right = total = 0
    for images, labels in tqdm(loader, desc=desc, disable=desc is None):
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        total += len(labels)
    return right / total


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with train/ and val/")
    parser.add_argument("--arch", choices=list(RECIPES), default="resnet34")
    parser.add_argument("--budget", default="0.6", help='0.6, "4.5ms" or "2x" (default: %(default)s)')
    parser.add_argument("--out", type=Path, default=Path("out/imagenet"))
    parser.add_argument("--weights", default="default", help="default, none, or a safetensors file")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--latency", help="backend: tensorrt, torch, onnxruntime, roofline (default: by the device)")
    parser.add_argument("--latency-batch", type=int, default=128, help="images a batch (default: %(default)s)")
    parser.add_argument("--method", default="layermerge", choices=["layermerge", "depth", "layeronly"])
    parser.add_argument("--importance", default="finetune", help="finetune (the paper), or reconstruction (no labels)")
    parser.add_argument("--share", type=float, default=0.04, help="of the training images (default: %(default)s)")
    parser.add_argument("--importance-batch", type=int, default=256)
    parser.add_argument("--importance-rate", type=float, default=0.1)
    parser.add_argument("--calibration", type=int, default=256, help="images (default: %(default)s)")
    parser.add_argument("--plan-only", action="store_true", help="stop when there is a plan")
    parser.add_argument("--epochs", type=int, help="of fine-tuning (default: the recipe's)")
    parser.add_argument(
        "--batch", type=int, help="of fine-tuning, a process (default: the recipe's over the processes)"
    )
    parser.add_argument("--distillation", choices=["none", "logits", "outputs", "features"], default="none")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def make_plan(args: argparse.Namespace, model: nn.Module, example: Tensor, images: Tensor, recipe: Recipe) -> Any:
    """The trainable form under the best plan for the budget, which is written to out/plan.json."""
    importance: Any = args.importance
    if importance == "finetune":
        short = Short(
            args.data.resolve(),
            args.size,
            args.share,
            args.importance_batch,
            args.importance_rate,
            args.workers,
            args.device,
        )
        importance = lmfx.Finetune(
            short.train,
            short.evaluate,
            objective="paper",
            surrogate="identity",
            seed=args.seed,
            key=f"{args.arch} {short}",
        )
    student = lmfx.compress(
        model,
        example,
        args.budget,
        calibration=images,
        latency=args.latency,
        importance=importance,
        realize=("compose",),
        surrogate="identity",
        method=args.method,
        activation_after=recipe.activation_after,
        cache_dir=args.out / "cache",
        merge=False,
    )
    print(lmfx.report(student))
    lmfx.save_plan(lmfx.result_of(student).plan, args.out / "plan.json")
    return student


def main(arguments: list[str] | None = None) -> None:
    """All stages, each skipped where its result is there."""
    args = options(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[args.arch]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    train, held = folder(args.data, "train", args.size), folder(args.data, "val", args.size)
    torch.manual_seed(args.seed)
    model = network(args.arch, args.weights, len(train.classes)).to(args.device)
    few = DataLoader(train, min(args.calibration, len(train)), shuffle=True, generator=torch.Generator().manual_seed(0))
    images = next(iter(few))[0].to(args.device)
    example = torch.randn(args.latency_batch, 3, args.size, args.size, device=args.device)

    plan = args.out / "plan.json"
    if plan.exists():
        student = lmfx.rewrite(lmfx.trace(model, example), lmfx.load_plan(plan), calibration=images)
    elif processes > 1:
        raise SystemExit(f"there is no {plan}: run with --plan-only in one process first")
    else:
        student = make_plan(args, model, example, images, recipe)
    if args.plan_only:
        return

    loader: Any = DataLoader(
        train,
        args.batch or recipe.batch // processes,
        shuffle=True,
        num_workers=args.workers,
        drop_last=True,
        persistent_workers=args.workers > 0,
    )
    epochs = args.epochs or recipe.epochs
    lmfx.distill(
        student,
        model,
        loader,
        epochs=epochs,
        loss=nn.CrossEntropyLoss(label_smoothing=recipe.smoothing),
        distillation=None if args.distillation == "none" else args.distillation,
        optimizer=lambda parameters: torch.optim.SGD(
            parameters,
            lr=recipe.rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.decay,
        ),
        warmup=min(recipe.warmup, epochs / 10),
        precision=args.precision,
        checkpoint=args.out / "training",
        seed=args.seed,
    )
    if int(os.environ.get("RANK", "0")) > 0:
        return
    net = lmfx.merge(student)
    lmfx.export_onnx(net, example, args.out / "net.onnx")
    judged = DataLoader(held, 256, num_workers=args.workers)
    for name, each in (("original", model), ("compressed", net)):
        print(f"{name:12} {accuracy(each, judged, name):.2%}")
    print(f"written: {args.out}/plan.json, training/, net.onnx")


if __name__ == "__main__":
    main()
