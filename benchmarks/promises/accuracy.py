"""Accuracy without training: the demo's network at half of its measured latency, on held-out digits, three seeds.

    python benchmarks/promises/accuracy.py [--seeds 0 1 2] [--budget 0.5]

Each row is one `lmfx.compress` call with the same budget and the same 256 unlabelled calibration images:

    fit                    reconstruction importance, closed-form fits (the default)
    compose, affine        reconstruction importance, composed kernels, affine surrogates for removed activations
    compose, identity      the same with the identity (the paper's initialisation)
    fit on magnitude's plan   weights-only importance, closed-form fits
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import lmfx

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import digits

VARIANTS: dict[str, dict[str, Any]] = {
    "fit": {},
    "compose, affine": {"realize": ("compose",), "surrogate": "affine"},
    "compose, identity": {"realize": ("compose",), "surrogate": "identity"},
    "fit on magnitude's plan": {"importance": "magnitude"},
}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", default="0.5")
    parser.add_argument("--images", type=int, default=256)
    args = parser.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in ("original", *VARIANTS)}
    for seed in args.seeds:
        data = digits.load(seed)
        model = digits.train(digits.Classifier(), data, seed=seed, progress=False)
        example, images = data.test_images[:1], data.train_images[: args.images]
        rows["original"].append((digits.accuracy(model, data.test_images, data.test_labels), 1.0))
        with tempfile.TemporaryDirectory() as cache:
            for name, options in VARIANTS.items():
                net = lmfx.compress(
                    model, example, args.budget, calibration=images, cache_dir=cache, progress=False, **options
                )
                ratio = lmfx.result_of(net).ratio or 1.0
                rows[name].append((digits.accuracy(net, data.test_images, data.test_labels), ratio))
                print(f"seed {seed}: {name:26} {rows[name][-1][0]:6.1%} at {ratio:.3f}", file=sys.stderr)
    print(f"{'':26} {'median':>7}   " + " ".join(f"seed {s:<2}" for s in args.seeds) + "   measured / original")
    for name, found in rows.items():
        accuracies = " ".join(f"{a:6.1%} " for a, _ in found)
        ratios = " ".join(f"{r:.3f}" for _, r in found)
        print(f"{name:26} {statistics.median(a for a, _ in found):7.1%}   {accuracies}  {ratios}")


if __name__ == "__main__":
    main()
