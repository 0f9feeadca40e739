"""The second-order importance against the exact one, on the demo's trained network.

    python benchmarks/promises/estimator.py [--seed 0]

Both score the same candidates on the same held-out images: the estimate from a backward pass, the exact value by
running the rest of the network. Printed: rank correlations over all candidates and over those that a plan would use
(the better half), the seconds of each, and the accuracy at half of the roofline latency with either.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import lmfx
from lmfx.importance import Reconstruction
from lmfx.latency.table import kendall_tau

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import digits


def main() -> None:
    """Print a small table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", default="0.4")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    data = digits.load(args.seed)
    model = digits.train(digits.Classifier(), data, seed=args.seed, progress=False)
    images = data.train_images[:256]
    graph = lmfx.trace(model, data.test_images[:1])
    spans = lmfx.spans(graph)
    tables, seconds, accuracy = {}, {}, {}
    with tempfile.TemporaryDirectory() as cache:
        latency = lmfx.profile(graph, "roofline", spans=spans, cache_dir=cache, progress=False)
        for name, estimator in {"estimate": Reconstruction(exact=False), "exact": Reconstruction(exact=True)}.items():
            start = time.process_time()
            tables[name] = lmfx.score(
                graph, estimator, calibration=images, spans=spans, latency=latency, cache_dir=cache, progress=False
            )
            seconds[name] = time.process_time() - start
            plan = lmfx.solve(graph, latency, tables[name], spans=spans).at(args.budget)
            net = lmfx.merge(lmfx.rewrite(graph, plan, calibration=images))
            accuracy[name] = digits.accuracy(net, data.test_images, data.test_labels)
    keys = [k for k, c in spans.by_key.items() if k in tables["exact"] and c.realization != "keep"]
    estimate, exact = (np.array([tables[n][k] for k in keys]) for n in ("estimate", "exact"))
    better = exact >= np.median(exact)
    print(f"{len(keys)} candidates, original accuracy {digits.accuracy(model, data.test_images, data.test_labels):.1%}")
    print(f"Kendall tau: all {kendall_tau(estimate, exact):.3f}, better half "
          f"{kendall_tau(estimate[better], exact[better]):.3f}")  # fmt: skip
    ratio = estimate[better & (exact < 0)] / exact[better & (exact < 0)]
    print(f"estimate / exact in the better half: median {np.median(ratio):.2f}, "
          f"quartiles {np.quantile(ratio, 0.25):.2f} to {np.quantile(ratio, 0.75):.2f}")  # fmt: skip
    for name in tables:
        print(f"{name:9} {seconds[name]:6.1f} CPU s, accuracy {accuracy[name]:.1%} at budget {args.budget} (roofline)")


if __name__ == "__main__":
    main()
