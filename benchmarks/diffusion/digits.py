"""A small diffusion network on digits, before and after compression: samples, a distance like FID, latency.

    python benchmarks/diffusion/digits.py [--stage train profile score plan tune report] [--budgets 0.9 0.8 0.7]

The denoiser of `diffusion` is trained, and compressed to shares of its measured latency without training; then it is
fine-tuned on noise and on what the original says of it. Nothing in lmfx knows of diffusion: it calibrates on pairs of a
noisy image and a time step. Stages keep what they made in `--out`; `profile`, `plan` and `report` measure latencies:

    train     the original, and the classifier in whose features samples are compared
    profile   a latency for each candidate            score    an importance for each that may pay
    plan      one network for each budget             tune     the same, fine-tuned
    report    for each: error of the noise by time step, distance of the samples, latency side by side with the
              original; one picture

All networks draw from the same noise. `real` is the distance of training digits to held-out ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import lmfx
from benchmarks.diffusion import diffusion_network as diffusion
from benchmarks.diffusion.diffusion_network import SIZE, TIMES, Denoiser, NoisyBatches, digits
from lmfx.latency import get_backend
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.trace.tracing import example_arguments

STAGES = ("train", "profile", "score", "plan", "tune", "report")


class Run:
    """One command: its options, data and files."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        args.out.mkdir(parents=True, exist_ok=True)
        self.data = digits.load(args.seed)
        self.images, self.held = diffusion.scaled(self.data.train_images), diffusion.scaled(self.data.test_images)
        self.example = (torch.randn(args.batch, 1, SIZE, SIZE), torch.full((args.batch,), TIMES // 2))
        self.cache = args.out / "cache"

    # --- what is trained ---------------------------------------------------------------------------------------------

    def train(self) -> None:
        self.original()
        self.classifier()

    def original(self) -> nn.Module:
        """The denoiser, trained once."""
        a = self.args
        torch.manual_seed(a.seed)
        return self.kept(
            Denoiser(a.width),
            f"original-{a.width}-{a.steps}-{a.seed}",
            lambda model: diffusion.train(model, self.images, a.steps, a.seed),
        )

    def classifier(self) -> digits.Classifier:
        """A classifier of digits at this size, trained once."""
        a = self.args
        seen = digits.Digits(
            diffusion.enlarged(self.images),
            self.data.train_labels,
            diffusion.enlarged(self.held),
            self.data.test_labels,
        )

        def trained(model: nn.Module) -> nn.Module:
            return digits.train(model, seen, epochs=a.classifier_epochs, seed=a.seed, progress=False)

        torch.manual_seed(a.seed)
        model = self.kept(digits.Classifier(), f"classifier-{a.classifier_epochs}-{a.seed}", trained)
        assert isinstance(model, digits.Classifier)
        self.right = digits.accuracy(model, seen.test_images, seen.test_labels)
        return model

    def kept(self, model: nn.Module, name: str, trained: Any) -> nn.Module:
        """`model` with the weights of `name`, which are made by `trained` if they are not there."""
        file = self.out / f"{name}.safetensors"
        if not file.exists():
            save_file({k: v.contiguous() for k, v in trained(model).state_dict().items()}, file)
        model.load_state_dict(load_file(file))
        return model.eval()

    # --- what is compressed ------------------------------------------------------------------------------------------

    @property
    def options(self) -> dict[str, Any]:
        """What may be merged: residual blocks and their neighbours; longer spans only make the table longer."""
        return {"norm": self.args.norm, "max_span_convs": 3, "max_kernel_size": 5}

    def calibration(self) -> tuple[Tensor, Tensor]:
        x, t, _ = diffusion.spread(self.images, self.args.images, self.args.seed)
        return x, t

    def tables(self, score: bool) -> None:
        graph = lmfx.trace(self.original(), self.example)
        spans = lmfx.spans(graph, **self.options, max_fit_convs=3)
        table = lmfx.profile(graph, self.args.latency, spans=spans, cache_dir=self.cache, calibrate=False)
        print(f"{len(spans)} candidates, {len(table)} rows that may pay", flush=True)
        if score:
            found = lmfx.score(graph, spans=spans, calibration=self.calibration(), latency=table, cache_dir=self.cache)
            frontier = lmfx.solve(graph, table, found, spans=spans)
            for share in (0.95, *self.args.budgets):
                i = frontier.index_at(share)
                print(f"predicted {share}: {frontier[i].importance:.3g}, plan {i} of {len(frontier)}")

    def profile(self) -> None:
        self.tables(score=False)

    def score(self) -> None:
        self.tables(score=True)

    def folder(self, budget: float, tuned: bool = False) -> Path:
        return Path(self.out) / f"{self.args.norm}-{budget}{f'-tuned-{self.args.fine_tune}' if tuned else ''}"

    def plan(self) -> None:
        model, calibration = self.original(), self.calibration()
        for budget in self.args.budgets:
            student = lmfx.compress(
                model,
                self.example,
                budget,
                calibration=calibration,
                latency=self.args.latency,
                cache_dir=self.cache,
                merge=False,
                progress=False,
                **self.options,
            )
            lmfx.save(student, self.folder(budget))
            print(lmfx.report(student), flush=True)

    def load(self, model: nn.Module, budget: float, tuned: bool = False) -> fx.GraphModule:
        return lmfx.load(self.folder(budget, tuned), model)

    def tune(self) -> None:
        """On the noise itself and on what the original says of it."""
        model, a = self.original(), self.args
        for budget in a.budgets:
            if not self.folder(budget, True).exists():
                student = self.load(model, budget)
                batches = NoisyBatches(self.images, a.fine_tune)
                lmfx.distill(
                    student,
                    model,
                    batches,
                    loss=F.mse_loss,
                    lr=a.lr,
                    clip=1.0,
                    warmup=0.05,
                    ema=0.995,
                    seed=a.seed,
                )
                lmfx.save(student, self.folder(budget, True))

    # --- what is shown -----------------------------------------------------------------------------------------------

    def report(self) -> None:
        model, classifier = self.original(), self.classifier()
        target, drawn = diffusion.features(classifier, self.held), []
        rows: dict[str, dict[str, Any]] = {}
        rows["real"] = {"distance": diffusion.frechet(diffusion.features(classifier, self.images), target)}

        example = example_arguments(self.example)
        backend, graph = get_backend(self.args.latency), lmfx.trace(model, self.example)

        def add(name: str, network: nn.Module, form: fx.GraphModule) -> None:
            drawn.append(diffusion.sample(network, self.args.samples, self.args.seed))
            each = diffusion.errors(network, self.held)
            times = backend.measure_interleaved([bare(graph, example), bare(form, example)], 21)
            rows[name] = {
                "distance": diffusion.frechet(diffusion.features(classifier, drawn[-1]), target),
                "ms": statistics.median(times[1]),
                "ratio": statistics.median(b / a for a, b in zip(*times, strict=True)),
                "error": sum(each) / len(each),
                "errors": each,
                "convs": sum(isinstance(m, nn.Conv2d) for m in network.modules()),
            }

        add("original", model, graph)
        for budget in self.args.budgets:
            for tuned, name in ((False, "compressed"), (True, "fine-tuned")):
                if self.folder(budget, tuned).exists():
                    merged = lmfx.merge(self.load(model, budget, tuned))
                    add(f"{budget} {name}", merged, merged)
        diffusion.sheet([self.held, *drawn], self.out / "samples.png")
        rows["run"] = {"classifier": self.right, "arguments": {k: str(v) for k, v in vars(self.args).items()}}
        (self.out / "diffusion_digits.json").write_text(json.dumps(rows, indent=1))
        print(table(rows))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as text; errors in thousandths, those by time from the least noisy images to the noisiest."""
    lines = [f"{'':15} {'distance':>8} {'latency':>10} {'ratio':>6} {'convs':>5} {'error':>6}   by time, x 1000"]
    lines.append(f"{'real':15} {rows['real']['distance']:8.2f}")
    for name, r in rows.items():
        if "error" in r:
            each = " ".join(f"{1000 * e:5.1f}" for e in r["errors"])
            lines.append(
                f"{name:15} {r['distance']:8.2f} {r['ms']:7.3f} ms {r['ratio']:6.3f} {r['convs']:5d} "
                f"{1000 * r['error']:6.1f}   {each}"
            )
    return "\n".join(lines)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--steps", type=int, default=6000, help="of training the original (default: %(default)s)")
    parser.add_argument("--fine-tune", type=int, default=1000, help="steps of fine-tuning (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--norm", default="affine", choices=["affine", "post"])
    parser.add_argument("--images", type=int, default=512, help="noisy ones, to calibrate on (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="of which the latency counts (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--latency", default="onnxruntime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classifier-epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("out/diffusion"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The stages that are asked for, in their order."""
    args = options(arguments)
    run = Run(args)
    for stage in STAGES:
        if stage in args.stage:
            start = time.process_time()
            getattr(run, stage)()
            print(f"{stage}: {time.process_time() - start:.0f} s CPU time", flush=True)


if __name__ == "__main__":
    main()
