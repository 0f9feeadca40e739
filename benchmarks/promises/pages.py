"""Pages of results: how large, how soon they are open, how fast the slider is, and how they look.

    PYTHONPATH=. python benchmarks/promises/pages.py [--networks resnet50 ...] [--budgets 0.8 0.65] [--pictures DIR]
    REAL=... PYTHONPATH=. python benchmarks/promises/pages.py --networks efficientnet-lite0 --latency onnxruntime

Needs Chromium. Latencies are of the analytic backend unless `--latency` names another. The ResNets of torchvision have
random weights, and their pages tell of latencies only. `diffusion-unet`, the network of `benchmarks/diffusion`, is
trained here, once (`--steps`). All others are those of `benchmarks/real`, trained by others; one whose package is not
there is left out.

    bytes     of the file
    write     CPU seconds from the result to the file
    elements  of the document
    open      CPU ms of the page's thread in a new browser until it is loaded, with all scripts run
    move      CPU ms of the same thread for one step of the slider, mean over twenty steps
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lmfx
from benchmarks.diffusion import digits
from benchmarks.real import real
from benchmarks.real.packages import Absent
from benchmarks.real.subjects import Subject
from tests.chromium import Chromium

Case = tuple[nn.Module, Any, Any, dict[str, Any]]  # model, example, images, options of compress
QUICK: dict[str, Any] = {"importance": "magnitude", "refit": False}
KEPT = Path("out/pages/originals")  # what was trained here
STEP = """(() => {
const slider = document.getElementById('budget');
for (let i = 0; i < 20; i++) {
  slider.value = Math.round(i * slider.max / 19);
  slider.dispatchEvent(new Event('input'));
  document.getElementById('network').getBoundingClientRect();
}
document.getElementById('back').click();
})()"""


def drawn(model: nn.Module) -> nn.Module:
    """The model with batch statistics that differ by channel, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model.eval()


def untrained(name: str, _: argparse.Namespace) -> Case:
    """A ResNet of torchvision at 96 pixels, with random weights."""
    import torchvision

    images = torch.randn(16, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    return drawn(getattr(torchvision.models, name)(weights=None)), images[:1], images, QUICK


def diffusion(args: argparse.Namespace) -> Case:
    """The denoising network of benchmarks/diffusion, with its time step."""
    run = digits.Run(digits.options(["--steps", str(args.steps), "--images", str(args.images), "--out", str(KEPT)]))
    images, steps = run.calibration()
    return run.original(), (images[:1], steps[:1]), [(images, steps)], {}


def trained(make: Callable[[], Subject], args: argparse.Namespace) -> Case:
    """A network of benchmarks/real, with its own images."""
    subject = make()
    images = subject.images("cal", min(args.images, subject.calibration), subject.size)
    return subject.model(), subject.example, images, {}


NETWORKS: dict[str, Callable[[argparse.Namespace], Case]] = {
    **{name: partial(trained, make) for name, make in real.NETWORKS.items()},
    "resnet50": partial(untrained, "resnet50"),
    "resnet152": partial(untrained, "resnet152"),
    "diffusion-unet": diffusion,
}
SHOWN = ("resnet50", "efficientnet-lite0", "diffusion-unet")


def measured(browser: Chromium, path: Path) -> dict[str, float]:
    """What it costs to open a page, and to move its slider."""
    browser.call("Performance.enable", timeDomain="threadTicks")

    def spent() -> float:
        metrics = browser.call("Performance.getMetrics")["metrics"]
        return 1e3 * float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))

    browser.open(path)
    opened = start = spent()
    browser.evaluate(STEP)
    move = (spent() - start) / 20
    elements = browser.evaluate("document.querySelectorAll('*').length")
    return {"elements": elements, "open": opened, "move": move}


def pictures(browser: Chromium, path: Path, folder: Path, name: str) -> None:
    """The page as one sees it first, and its drawing: light and dark, as WebP."""
    folder.mkdir(parents=True, exist_ok=True)
    browser.resize(1280, 800)
    for scheme in ("light", "dark"):
        browser.media("screen", scheme)
        browser.evaluate("scrollTo({top: 0, behavior: 'instant'})")
        browser.screenshot(folder / f"{name}-answer-{scheme}.webp", kind="webp", quality=80)
        browser.evaluate("document.getElementById('budgets').scrollIntoView({behavior: 'instant'})")
        browser.resize(1280, 1150)
        browser.screenshot(folder / f"{name}-budgets-{scheme}.webp", kind="webp", quality=80)
        browser.resize(1280, 800)
    browser.media("screen", "light")


def main(arguments: list[str] | None = None) -> None:
    """Compress, write, open, look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=SHOWN, choices=list(NETWORKS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.8, 0.65])
    parser.add_argument(
        "--images", type=int, default=256, help="at most so many to calibrate on (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=1500, help="of training the diffusion network (default: %(default)s)"
    )
    parser.add_argument("--latency", default="roofline", help="the backend")
    parser.add_argument("--out", type=Path, default=Path("out/pages"))
    parser.add_argument("--pictures", type=Path, help="a folder for screenshots")
    args = parser.parse_args(arguments)
    print(f"{'page':26} {'bytes':>9} {'write':>7} {'elements':>9} {'open':>8} {'move':>8}  errors", flush=True)
    for name in args.networks:
        torch.manual_seed(0)
        try:
            model, example, images, options = NETWORKS[name](args)
        except Absent as absent:
            print(f"{name:26} left out: {absent}", flush=True)
            continue
        for budget in args.budgets:
            net = lmfx.compress(
                model,
                example,
                budget,
                calibration=images,
                latency=args.latency,
                cache_dir=args.out / "cache",
                progress=False,
                **options,
            )
            start = time.process_time()
            path = lmfx.report(net).html(
                args.out / f"{name}-{budget:g}.html", title=name, random_weights=options is QUICK
            )
            write = time.process_time() - start
            with Chromium() as browser:
                row = measured(browser, path)
                if args.pictures is not None:
                    pictures(browser, path, args.pictures, f"{name}-{budget:g}")
                wrong = len(browser.errors)
            print(
                f"{path.name:26} {path.stat().st_size:9,} {write:6.2f}s {row['elements']:9,} {row['open']:5.0f} ms "
                f"{row['move']:5.1f} ms  {wrong}",
                flush=True,
            )


if __name__ == "__main__":
    main()
