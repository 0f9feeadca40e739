"""Pages of results: how large, how soon they are open, how fast the slider is, and how they look.

    PYTHONPATH=. python benchmarks/promises/pages.py [--networks resnet50 ...] [--budgets 0.7 0.45] [--pictures DIR]
    REAL=... PYTHONPATH=. python benchmarks/promises/pages.py --networks drawn-mobilenet --budgets 0.6 [--latency X]

Needs Chromium. Latencies are of the analytic backend. The networks of this file have random weights, 16 random images
and importances of magnitudes: their pages are looked at, not the networks, so a percentage on them means nothing. Those
of `benchmarks/real` are trained, and compressed with the defaults of lmfx on the images that are theirs to calibrate.

    bytes     of the file
    write     CPU seconds from the result to the file
    elements  of the document
    open      CPU ms of the page's thread in a new browser until it is loaded, with all scripts run
    move      CPU ms of the same thread for one step of the slider, mean over twenty steps
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lmfx
from benchmarks.real import real
from benchmarks.real.subjects import Subject
from tests.chromium import Chromium

Case = tuple[nn.Module, Any, Any, dict[str, Any]]  # model, example, images, options of compress
QUICK: dict[str, Any] = {"importance": "magnitude", "refit": False}
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


def resnet(name: str) -> Case:
    """A network of torchvision at 96 pixels."""
    import torchvision

    images = torch.randn(16, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    return drawn(getattr(torchvision.models, name)(weights=None)), images[:1], images, QUICK


def efficientnet() -> Case:
    """timm's EfficientNet-Lite0 at 96 pixels."""
    import timm

    images = torch.randn(16, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    return drawn(timm.create_model("tf_efficientnet_lite0", pretrained=False)), images[:1], images, QUICK


def diffusion() -> Case:
    """The denoising network of benchmarks/diffusion, with its time step."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "diffusion"))
    found = importlib.import_module("diffusion_network")
    size, times = found.SIZE, found.TIMES

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 1, size, size, generator=generator)
    steps = torch.randint(0, times, (16,), generator=generator)
    return found.Denoiser().eval(), (images[:1], steps[:1]), [(images, steps)], QUICK


def trained(make: Callable[[], Subject]) -> Case:
    """A network of benchmarks/real, with its own images."""
    subject = make()
    images = subject.images("cal", subject.calibration, subject.size)
    return subject.model(), subject.example, images, {}


NETWORKS: dict[str, Callable[[], Case]] = {
    "resnet50": lambda: resnet("resnet50"),
    "resnet152": lambda: resnet("resnet152"),
    "efficientnet-lite0": efficientnet,
    "diffusion-unet": diffusion,
}
TRAINED: dict[str, Callable[[], Case]] = {name: partial(trained, make) for name, make in real.NETWORKS.items()}


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
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=[*NETWORKS, *TRAINED])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.45])
    parser.add_argument("--latency", default="roofline", help="the backend")
    parser.add_argument("--out", type=Path, default=Path("out/pages"))
    parser.add_argument("--pictures", type=Path, help="a folder for screenshots")
    args = parser.parse_args(arguments)
    print(f"{'page':26} {'bytes':>9} {'write':>7} {'elements':>9} {'open':>8} {'move':>8}  errors", flush=True)
    for name in args.networks:
        torch.manual_seed(0)
        model, example, images, options = {**NETWORKS, **TRAINED}[name]()
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
            path = lmfx.report(net).html(args.out / f"{name}-{budget:g}.html", title=name)
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
