"""The three methods and the fit without training side by side, at equal measured latency, before and after fine-tuning.

    python benchmarks/methods.py [--data digits characters] [--seeds 0 1 2] [--budgets 0.7 0.5 0.35] [--epochs 2]

For each data set and seed one network is trained, and compressed to each budget (of its own measured latency) by

    layermerge   convolutions and activations are removed, spans are merged (Kim et al. 2024)
    depth        activations are removed, every convolution is merged (Kim et al. 2023)
    layeronly    single convolutions are removed, nothing is merged
    fit          layermerge, and merged convolutions fitted in closed form on unlabelled images (the default of lmfx)

All four use the same latency rows and the same importance (reconstruction); the first three start as in the paper, with
the identity for removed activations. Each is fine-tuned alike: labels and the original's logits, AdamW, `--epochs`.
Every row is written to the JSON as it is made, so a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lmfx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

METHODS: dict[str, dict[str, Any]] = {
    "layermerge": {"method": "layermerge", "realize": ("compose",), "surrogate": "identity"},
    "depth": {"method": "depth", "realize": ("compose",), "surrogate": "identity"},
    "layeronly": {"method": "layeronly", "realize": ("compose",), "surrogate": "identity"},
    "fit": {},
}
Row = dict[str, Any]


def fine_tuned(student: Any, model: nn.Module, data: Any, *, epochs: int, seed: int, lr: float = 2e-3) -> nn.Module:
    """The merged network after the training that is the same for all."""
    dataset = torch.utils.data.TensorDataset(data.train_images, data.train_labels)
    loader = torch.utils.data.DataLoader(dataset, 64, shuffle=True, drop_last=True)
    return lmfx.merge(
        lmfx.distill(
            student,
            model,
            loader,
            epochs=epochs,
            loss=F.cross_entropy,
            distillation="logits",
            weight=0.1,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01),
            warmup=0.1 * epochs,
            clip=1.0,
            seed=seed,
            progress=False,
        )
    )


def row(task: Any, data: Any, model: nn.Module, name: str, budget: float, args: Any, seed: int, cache: str) -> Row:
    """One method at one budget."""
    example, images = data.test_images[:1], data.train_images[: args.images]
    start = time.process_time()
    try:
        student = lmfx.compress(
            model,
            example,
            budget,
            calibration=images,
            latency=args.latency,
            cache_dir=cache,
            merge=False,
            progress=False,
            **METHODS[name],
        )
    except lmfx.InfeasibleBudget as error:
        return {"infeasible_ms": error.latency}
    compressed = time.process_time() - start
    net, result = lmfx.merge(student), lmfx.result_of(student)
    before = task.accuracy(net, data.test_images, data.test_labels)
    start = time.process_time()
    after = task.accuracy(
        fine_tuned(student, model, data, epochs=args.epochs, seed=seed), data.test_images, data.test_labels
    )
    return {
        "ratio": result.ratio,
        "ms": result.measured,
        "before": before,
        "after": after,
        "convs": sum(isinstance(m, nn.Conv2d) for m in net.modules()),
        "compress_s": compressed,
        "fine_tune_s": time.process_time() - start,
    }


def measure(args: Any, rows: dict[str, Row]) -> None:
    """Fills `rows`, one key a run, and writes them after each."""

    def done(key: str, value: Row) -> None:
        rows[key] = value
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1)
        )
        print(f"{key}: {value}", file=sys.stderr, flush=True)

    for seed in args.seeds:
        for source in args.data:
            wanted = [(m, b) for b in args.budgets for m in METHODS if f"{source} {seed} {m} {b}" not in rows]
            if not wanted:
                continue
            task: Any = importlib.import_module(source)
            data = task.load(seed)
            torch.manual_seed(seed)
            model = task.Classifier(args.width).eval()
            task.train(model, data, epochs=args.train_epochs, seed=seed, progress=False)
            if f"{source} {seed} original" not in rows:
                done(f"{source} {seed} original", {"after": task.accuracy(model, data.test_images, data.test_labels)})
            with tempfile.TemporaryDirectory() as cache:
                for name, budget in wanted:
                    done(f"{source} {seed} {name} {budget}", row(task, data, model, name, budget, args, seed, cache))


def table(rows: dict[str, Row], args: Any) -> str:
    """Medians over the seeds that are there."""
    lines = []
    for source in args.data:
        originals = [v["after"] for k, v in rows.items() if k.startswith(f"{source} ") and k.endswith("original")]
        if not originals:
            continue
        lines.append(f"{source}: original {statistics.median(originals):.1%}, {len(originals)} seeds")
        lines.append(f"  {'method':11} {'budget':>6} {'measured':>9} {'before':>7} {'after':>7}   after, each seed")
        for budget in args.budgets:
            for name in METHODS:
                found = [rows[k] for s in args.seeds if (k := f"{source} {s} {name} {budget}") in rows]
                good = [r for r in found if "ratio" in r]
                if len(good) < len(found) or not good:
                    lines.append(f"  {name:11} {budget:6.2f} {'can not be reached' if found else 'not run'}")
                    continue
                ratio, before, after = (statistics.median(r[k] for r in good) for k in ("ratio", "before", "after"))
                each = " ".join(f"{r['after']:.1%}" for r in good)
                lines.append(f"  {name:11} {budget:6.2f} {ratio:9.3f} {before:7.1%} {after:7.1%}   {each}")
    return "\n".join(lines)


def picture(rows: dict[str, Row], args: Any, file: Path) -> None:
    """Accuracy over measured latency: dashed before, solid after fine-tuning, medians over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(args.data), figsize=(5.5 * len(args.data), 4), squeeze=False)
    for axis, source in zip(axes[0], args.data, strict=True):
        for index, name in enumerate(METHODS):
            for stage, style in (("before", "--"), ("after", "-")):
                points = []
                for budget in args.budgets:
                    found = [rows.get(f"{source} {s} {name} {budget}", {}) for s in args.seeds]
                    good = [r for r in found if "ratio" in r]
                    if good:
                        points.append(tuple(statistics.median(r[k] for r in good) for k in ("ratio", stage)))
                if points:
                    label = f"{name}, {'fine-tuned' if stage == 'after' else 'not trained'}"
                    x, y = zip(*sorted(points), strict=True)
                    axis.plot(x, y, style, color=f"C{index}", marker="o", markersize=4, label=label)
        originals = [r["after"] for k, r in rows.items() if k.startswith(f"{source} ") and k.endswith("original")]
        if originals:
            axis.axhline(statistics.median(originals), color="0.6", linewidth=1)
        axis.set(title=source, xlabel="measured latency / original", ylabel="held-out accuracy", ylim=(0, 1.02))
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits", "characters"], choices=["digits", "characters"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--train-epochs", type=int, default=4, help="of the original (default: %(default)s)")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--images", type=int, default=256, help="to calibrate on (default: %(default)s)")
    parser.add_argument("--latency", default="onnxruntime")
    parser.add_argument("--json", type=Path, default=Path("out/methods.json"), help="rows there are kept")
    parser.add_argument("--png", type=Path, help="the picture; beside the JSON by default")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, print the table, draw the picture."""
    args = options(arguments)
    rows: dict[str, Row] = json.loads(args.json.read_text())["rows"] if args.json.exists() else {}
    measure(args, rows)
    print(table(rows, args))
    picture(rows, args, args.png or args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
