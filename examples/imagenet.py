"""LayerMerge on ImageNet with the paper's settings: importance, plan, fine-tuning, merge, export, in one command.

    python examples/imagenet.py /data/imagenet --arch mobilenet_v2 --budget 0.6 --out runs/mbv2
    torchrun --nproc_per_node 8 examples/imagenet.py /data/imagenet --arch resnet34 --budget 0.6 --out runs/rn34

DATA has the layout of torchvision's ImageFolder: DATA/train/CLASS/*.JPEG and DATA/val/CLASS/*.JPEG. Importance jobs run
on all GPUs of the machine, one a GPU; fine-tuning runs in all processes that the launcher started, with the same plan.
A run that was stopped is started again with the same command: nothing that `--out` holds is made again.

    options.json      what the plan was made with; other options need another folder
    cache/            latencies and importance rows, each kept as it is made
    plan.json         what is merged; report.txt says it in words
    training/         student, optimizer and epoch, after each epoch; log.jsonl has the accuracies
    net/, net.onnx    the merged network: lmfx.load("net", model), and a checked ONNX file
    results.json      accuracies before and after

The defaults of an architecture are those of the paper (Kim, El Halabi, Ji, Song, ICML 2024) and its published code:
importance from one epoch on 4 % of the training images (SGD, rate 0.1, cosine, batches of 256), judged on another 4 %;
then 90 epochs for ResNet-34, 180 for MobileNetV2. `--on-demand` trains only those candidates on which the plan depends.
Pretrained weights come from torchvision or timm (`--weights`).
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from launch import Launch, check_options, job_pool, wait_for
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

import lmfx

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What may change between two runs of one --out; all else is of the plan.
FREE = ("data", "out", "device", "workers", "jobs", "plan_only", "epochs", "batch", "distillation", "precision")


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
    activation_after: str | None  # after a merged span that ended without one


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


@functools.cache  # a listing of a million files is made once a process, not in each importance job
def folder(root: Path, split: str, size: int, augment: bool) -> Any:
    """An ImageFolder; with `augment` images are cropped at random and flipped, else cropped in the middle."""
    import torchvision
    from torchvision import transforms

    where = root / split
    if not where.is_dir():
        raise SystemExit(f"there is no folder {where}: DATA needs train/CLASS/*.JPEG and val/CLASS/*.JPEG")
    crop = (
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        if augment
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

    @property
    def key(self) -> str:
        """What the stored rows belong to; they outlive another number of workers and another device."""
        return f"{self.root} {self.size} {self.share} x {self.batch} sgd {self.rate} v2"

    def loader(self, part: int) -> DataLoader[Any]:
        """Part 0 is trained on, part 1 is judged on, without augmentation."""
        data = folder(self.root, "train", self.size, part == 0)
        count = max(round(len(data) * self.share), 1)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))  # of any process: the same
        chosen = order[part * count : (part + 1) * count].tolist()
        if len(chosen) < count:
            raise SystemExit(f"{len(data)} training images have no two parts of {self.share:.0%}: lower --share")
        return DataLoader(Subset(data, chosen), self.batch, shuffle=part == 0, num_workers=self.workers)

    def train(self, model: nn.Module) -> None:
        """SGD with a cosine schedule, in place."""
        model.to(self.device)
        loader = self.loader(0)
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
        right, total = count_right(model.to(self.device), self.loader(1))
        return right / total


@torch.inference_mode()
def count_right(model: nn.Module, loader: Any, desc: str | None = None) -> tuple[int, int]:
    """(images that `model` puts into the right class, all of them)."""
    device = next(model.parameters()).device
    right = total = 0
    for images, labels in tqdm(loader, desc=desc, disable=desc is None):
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        total += len(labels)
    return right, total


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with train/ and val/")
    plan = parser.add_argument_group("the plan, fixed once --out has one")
    plan.add_argument("--arch", choices=list(RECIPES), default="resnet34")
    plan.add_argument("--budget", default="0.6", help='0.6, "4.5ms" or "2x" (default: %(default)s)')
    plan.add_argument("--weights", default="default", help="default, none, or a safetensors file")
    plan.add_argument("--size", type=int, default=224)
    plan.add_argument("--latency", help="backend: tensorrt, torch, onnxruntime, roofline (default: by the device)")
    plan.add_argument("--latency-batch", type=int, default=128, help="images a batch (default: %(default)s)")
    plan.add_argument("--method", default="layermerge", choices=["layermerge", "depth", "layeronly"])
    plan.add_argument("--include", nargs="+", default=[], metavar="GLOB", help="modules that may be touched")
    plan.add_argument("--importance", default="finetune", help="finetune (the paper), or reconstruction (no labels)")
    plan.add_argument("--share", type=float, default=0.04, help="of the training images (default: %(default)s)")
    plan.add_argument("--importance-batch", type=int, default=256)
    plan.add_argument("--importance-rate", type=float, default=0.1)
    plan.add_argument("--on-demand", action="store_true", help="score only what the plan depends on")
    plan.add_argument("--calibration", type=int, default=256, help="images (default: %(default)s)")
    plan.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/imagenet"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=8, help="that read images, for each process and each job")
    parser.add_argument("--jobs", type=int, help="importance jobs side by side (default: one a GPU)")
    parser.add_argument("--plan-only", action="store_true", help="stop when there is a plan")
    parser.add_argument("--epochs", type=int, help="of fine-tuning (default: the recipe's)")
    parser.add_argument("--batch", type=int, help="of fine-tuning, in all processes (default: the recipe's)")
    parser.add_argument("--distillation", choices=["none", "logits", "outputs", "features"], default="none")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    return parser.parse_args(arguments)


def make_plan(args: argparse.Namespace, model: nn.Module, example: Tensor, images: Tensor, recipe: Recipe) -> None:
    """Writes out/report.txt and, once all is done, out/plan.json: the best plan for the budget."""
    executor = job_pool(args.jobs, args.device)
    importance: Any = args.importance
    settings: dict[str, Any] = {"realize": ("compose",), "method": args.method, "include": tuple(args.include)}
    settings |= {"activation_after": recipe.activation_after}
    cache = args.out / "cache"
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
            key=f"{args.arch} {short.key}",
        )
        if args.on_demand:
            graph = lmfx.trace(model, example)
            spans = lmfx.spans(graph, **settings)
            latency = lmfx.profile(graph, args.latency, spans=spans, cache_dir=cache)
            found = lmfx.score_on_demand(
                graph,
                importance,
                latency,
                [args.budget],
                calibration=images,
                spans=spans,
                width=args.jobs or 1,
                cache_dir=cache,
                executor=executor,
            )
            print(found)
            importance = found.table
    student = lmfx.compress(
        model,
        example,
        args.budget,
        calibration=images,
        latency=args.latency,
        importance=importance,
        surrogate="identity",
        executor=executor,
        cache_dir=cache,
        merge=False,
        **settings,
    )
    report = str(lmfx.report(student))
    print(report)
    (args.out / "report.txt").write_text(report + "\n")
    lmfx.save_plan(lmfx.result_of(student).plan, args.out / "plan.json")


def main(arguments: list[str] | None = None) -> None:
    """All stages, each skipped where its result is there."""
    args = options(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    recipe, run = RECIPES[args.arch], Launch.of(args.device)
    train, few = (folder(args.data.resolve(), "train", args.size, augment) for augment in (True, False))
    held = folder(args.data.resolve(), "val", args.size, False)
    check_options(args.out / "options.json", {k: v for k, v in vars(args).items() if k not in FREE})
    torch.manual_seed(args.seed)
    model = network(args.arch, args.weights, len(train.classes)).to(run.device)
    chosen = torch.randperm(len(few), generator=torch.Generator().manual_seed(args.seed))[: args.calibration].tolist()
    images = torch.stack([few[i][0] for i in chosen]).to(run.device)
    example = torch.randn(args.latency_batch, 3, args.size, args.size, device=run.device)

    plan = args.out / "plan.json"
    if run.first and not plan.exists():
        make_plan(args, model, example, images, recipe)
    wait_for(plan)
    if args.plan_only:
        return
    student = lmfx.rewrite(lmfx.trace(model, example), lmfx.load_plan(plan), calibration=images)

    share = Subset(held, range(run.rank, len(held), run.processes))
    judged = DataLoader(share, 256, num_workers=args.workers)

    def accuracy(net: nn.Module, desc: str | None) -> float:
        right, total = run.total(*count_right(net, judged, desc if run.first else None))
        return right / total

    def note(epoch: int, net: nn.Module) -> None:
        value = accuracy(net, None)
        if run.first:
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps({"epoch": epoch, "accuracy": value, "time": round(time.time())}) + "\n")

    epochs = args.epochs or recipe.epochs
    lmfx.distill(
        student,
        model,
        DataLoader(
            train,
            run.share(args.batch or recipe.batch),
            shuffle=True,
            num_workers=args.workers,
            drop_last=True,
            persistent_workers=args.workers > 0,
        ),
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
        after_epoch=note,
    )
    net = lmfx.merge(student)
    results = {name: accuracy(each, name) for name, each in (("original", model), ("compressed", net))}
    if run.first:
        lmfx.save(net, args.out / "net")
        lmfx.export_onnx(net, example, args.out / "net.onnx")
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
        for name, value in results.items():
            print(f"{name:12} {value:.2%}")
        print(f"written: {args.out}/plan.json, report.txt, training/, net/, net.onnx, results.json")
    run.leave()


if __name__ == "__main__":
    main()
