"""The three methods and the fit without training side by side, at equal measured latency, before and after fine-tuning.

    python benchmarks/paper/methods.py [--data digits characters] [--networks resnet mobilenet] [--seeds 0 1 2]
        [--epochs 6]
    python benchmarks/paper/methods.py --stage train          one stage at a time: originals
    python benchmarks/paper/methods.py --stage compress     the only one that measures latencies; keep the machine quiet
    python benchmarks/paper/methods.py --stage renew    accuracies with batch norms' statistics taken anew, no training
    python benchmarks/paper/methods.py --stage fine-tune      the longest one, measures nothing
    python benchmarks/paper/methods.py --stage report         table, JSON and picture of all that is there

For each data set, network and seed an original is trained, and compressed to each budget (of its measured latency) by

    layermerge   convolutions and activations are removed, spans are merged (Kim et al. 2024)
    depth        activations are removed, every convolution is merged (Kim et al. 2023)
    layeronly    single convolutions are removed, nothing is merged
    fit          layermerge, and merged convolutions fitted in closed form on unlabelled images (the default of lmfx)

All four use the same latency rows and the same importance (reconstruction); the first three start as in the paper,
with the identity for removed activations. Where no plan of a method reaches a budget, its fastest is taken as well.
Batch norms keep the original's statistics, which no longer fit; `renewed` is the accuracy with those of the calibration
images, which needs no label and no gradient. Each is fine-tuned alike: labels and the original's logits, AdamW,
`--epochs`, with the accuracy after each epoch.

What is finished lies in `--out`, a folder a run of one data set and network, and is not done again. A folder that was
begun with other settings is refused.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

import lmfx
from benchmarks.paper import methods_report
from benchmarks.shared.small_networks import classifier

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "shared"), str(HERE.parents[1] / "examples")]

METHODS: dict[str, dict[str, Any]] = {
    "layermerge": {"method": "layermerge", "realize": ("compose",), "surrogate": "identity"},
    "depth": {"method": "depth", "realize": ("compose",), "surrogate": "identity"},
    "layeronly": {"method": "layeronly", "realize": ("compose",), "surrogate": "identity"},
    "fit": {},
}
SETTINGS = ("width", "train_epochs", "images", "latency", "epochs", "lr")
FASTEST = (1.02, 1.04, 1.07, 1.1)  # of the least latency that was seen: measured anew, it may miss it by some percent
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One data set, network and seed; `folder` holds a folder a row."""

    source: str
    network: str
    seed: int
    args: argparse.Namespace

    @property
    def folder(self) -> Path:
        folder: Path = self.args.out / f"{self.source}-{self.network}" / str(self.seed)
        return folder

    @property
    def task(self) -> Any:
        return importlib.import_module(self.source)

    @property
    def data(self) -> Any:
        return _data(self.source, self.seed)

    def model(self) -> nn.Module:
        """The original, trained; raises SystemExit if it is not yet."""
        file = self.folder / "original.safetensors"
        if not file.exists():
            raise SystemExit(f"{file} is not there: run --stage train first")
        model = self.untrained()
        model.load_state_dict(safetensors.torch.load_file(file))
        return model.eval()

    def untrained(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return classifier(self.task, self.data, self.network, self.args.width)

    def accuracy(self, net: nn.Module) -> float:
        return float(self.task.accuracy(net, self.data.test_images, self.data.test_labels))


@functools.lru_cache(1)
def _data(source: str, seed: int) -> Any:
    return importlib.import_module(source).load(seed)


def read(file: Path) -> Row | None:
    """A finished row, or None."""
    return json.loads(file.read_text()) if file.exists() else None


def write(file: Path, row: Row) -> None:
    """A row, as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(row, indent=1))
    os.replace(part, file)
    print(f"{'/'.join(file.parts[-4:])}: {row}", file=sys.stderr, flush=True)


# --- the stages -------------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """The original."""
    if (run.folder / "original.json").exists():
        return
    start = time.process_time()
    model = run.untrained()
    run.task.train(model, run.data, epochs=run.args.train_epochs, seed=run.seed, progress=False)
    run.folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), run.folder / "original.safetensors")
    write(run.folder / "original.json", {"after": run.accuracy(model), "seconds": time.process_time() - start})


def compress(run: Run) -> None:
    """A student a method and a budget, and of the fastest plan of a method that misses a budget."""
    model = run.model()
    for name in METHODS:
        least = [one(run, model, name, str(b), b).get("infeasible") for b in run.args.budgets]
        known = [r for r in least if r is not None]
        for factor in FASTEST if known else ():
            if "ratio" in one(run, model, name, "fastest", min(known) * factor, factor == FASTEST[-1]):
                break


def one(run: Run, model: nn.Module, name: str, label: str, budget: float, last: bool = True) -> Row:
    """The row of one method at one budget; `infeasible` is the least ratio that it reaches, kept after the last try."""
    folder = run.folder / f"{name}-{label}"
    if found := read(folder / "compressed.json"):
        return found
    start = time.process_time()
    try:
        student = lmfx.compress(
            model,
            run.data.test_images[:1],
            min(budget, 1.0),
            calibration=run.data.train_images[: run.args.images],
            latency=run.args.latency,
            cache_dir=run.args.out / "cache",
            merge=False,
            progress=False,
            **METHODS[name],
        )
    except lmfx.InfeasibleBudget as error:
        missed: Row = {"infeasible": error.latency / error.original, "ms": error.latency}
        if last:
            write(folder / "compressed.json", missed)
        return missed
    seconds = time.process_time() - start
    net, result = lmfx.merge(student), lmfx.result_of(student)
    lmfx.save(student, folder)
    row: Row = {
        "ratio": result.ratio,
        "ms": result.measured,
        "original_ms": result.original,
        "before": run.accuracy(net),
        "convs": sum(isinstance(m, nn.Conv2d) for m in net.modules()),
        "plan": hashlib.sha256(" ".join(c.key for c in result.plan.candidates).encode()).hexdigest()[:12],
        "seconds": seconds,
    }
    write(folder / "compressed.json", row)
    return row


def renew(run: Run) -> None:
    """Accuracy before any training, but with batch norms that have the statistics of the calibration images."""
    for folder in students(run):
        if "ratio" in (read(folder / "compressed.json") or {}) and not (folder / "renewed.json").exists():
            student = lmfx.load(folder, run.model())
            update_bn(run.data.train_images[: run.args.images].split(64), student)
            write(folder / "renewed.json", {"renewed": run.accuracy(lmfx.merge(student.eval()))})


def fine_tune(run: Run) -> None:
    """The training that is the same for all; equal plans of a method are trained once."""
    done: dict[tuple[str, str], Row] = {}
    for folder in students(run):
        compressed, file = read(folder / "compressed.json") or {}, folder / "fine-tuned.json"
        key = (folder.name.split("-")[0], compressed.get("plan", ""))
        if "ratio" not in compressed:
            continue
        row = read(file) or done.get(key) or tuned(run, folder)
        if not file.exists():
            write(file, row)
        done[key] = row


def students(run: Run) -> Iterator[Path]:
    """The folders of the rows that are asked for."""
    for name in METHODS:
        for label in (*map(str, run.args.budgets), "fastest"):
            if (run.folder / f"{name}-{label}" / "compressed.json").exists():
                yield run.folder / f"{name}-{label}"


def tuned(run: Run, folder: Path) -> Row:
    """Held-out accuracy after each epoch of the fine-tuning, and of the merged network at its end."""
    model, data, epochs = run.model(), run.data, run.args.epochs
    dataset = torch.utils.data.TensorDataset(data.train_images, data.train_labels)
    loader = torch.utils.data.DataLoader(dataset, 64, shuffle=True, drop_last=True)
    curve: list[float] = []
    start = time.process_time()
    student = lmfx.distill(
        lmfx.load(folder, model),
        model,
        loader,
        epochs=epochs,
        loss=F.cross_entropy,
        distillation="logits",
        weight=0.1,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=run.args.lr, weight_decay=0.01),
        warmup=0.1 * epochs,
        clip=1.0,
        seed=run.seed,
        after_epoch=lambda _, net: curve.append(run.accuracy(net)),
        progress=False,
    )
    return {"after": run.accuracy(lmfx.merge(student)), "curve": curve, "seconds": time.process_time() - start}


STAGES = {"train": train, "compress": compress, "renew": renew, "fine-tune": fine_tune}


# --- the command line -------------------------------------------------------------------------------------------------


def runs(args: argparse.Namespace) -> list[Run]:
    """What is asked for. Raises SystemExit for a folder that was begun with other settings."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    for source in args.data:
        for network in args.networks:
            file = args.out / f"{source}-{network}" / "settings.json"
            known = read(file)
            if known is None:
                write(file, settings)
            elif known != settings:
                other = ", ".join(f"{k}={known.get(k)}, not {v}" for k, v in settings.items() if known.get(k) != v)
                raise SystemExit(f"{file.parent} was begun with {other}: use the same settings or another --out")
    return [
        Run(source, network, seed, args) for seed in args.seeds for source in args.data for network in args.networks
    ]


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "report", "all"], default="all")
    parser.add_argument("--data", nargs="+", default=["digits", "characters"], choices=["digits", "characters"])
    parser.add_argument("--networks", nargs="+", default=["resnet"], choices=["resnet", "mobilenet"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.85, 0.7, 0.5, 0.35])
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--train-epochs", type=int, default=12, help="of the original (default: %(default)s)")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--images", type=int, default=256, help="to calibrate on (default: %(default)s)")
    parser.add_argument("--latency", default="onnxruntime")
    parser.add_argument("--out", type=Path, default=Path("out/methods"), help="what is there is kept")
    parser.add_argument("--json", type=Path, help="the gathered rows; methods.json in --out by default")
    parser.add_argument("--png", type=Path, help="the picture; beside the JSON by default")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Do what is missing, print the table, draw the picture."""
    args = options(arguments)
    if args.stage != "report":
        wanted = runs(args)
        for name, stage in STAGES.items():
            for run in wanted if args.stage in (name, "all") else ():
                stage(run)
    if args.stage in ("report", "all"):
        found = methods_report.gathered(args.out)
        file = args.json or args.out / "methods.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1))
        print(methods_report.table(found, list(METHODS)))
        methods_report.picture(found, list(METHODS), args.png or file.with_suffix(".png"))


if __name__ == "__main__":
    main()
