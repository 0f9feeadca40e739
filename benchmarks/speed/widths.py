"""What all widths cost: candidates and the rows they share, one solve over all budgets, and the choice of channels.

    python benchmarks/speed/widths.py [--models resnet50 tf_efficientnet_lite0] [--repeat 5]

Random weights, 224 x 224, rows of the roofline, random importances (for each candidate that may lose something, minus
a log-normal number times the share that it takes away), CPU time of one thread, best of several.

    narrow        candidates with fewer channels; `rows` the layers that their latencies are sums of, `measured` how
                  many of those are different, and are in no kept layer
    solve         all budgets at once, with composed, fitted and narrowed candidates; `gap` 0 is exact
    elimination   one Gram of so many channels and taps, all widths, with what is left of the weight at each
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import nn

import lmfx
from lmfx.importance import ImportanceTable
from lmfx.latency.candidate_workloads import Workloads
from lmfx.latency.whole_networks import share_taken
from lmfx.passes.fit.elimination import eliminate
from lmfx.passes.spans.narrowing import widths_of
from lmfx.planning.frontier import solve_spans

GRAMS = ((1152, 1), (256, 9))


def best(call: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """The least CPU seconds of several calls, and what the last one gave."""
    least, found = float("inf"), None
    for _ in range(repeat):
        start = time.process_time()
        found = call()
        least = min(least, time.process_time() - start)
    return least, found


def model_of(name: str) -> nn.Module:
    """A network of torchvision or timm, with random weights."""
    torch.manual_seed(0)
    known = hasattr(torchvision.models, name)
    return (torchvision.models.get_model(name) if known else timm.create_model(name)).eval()


def network(name: str, repeat: int) -> str:
    """One line of the table."""
    example = torch.randn(1, 3, 224, 224)
    graph = lmfx.trace(model_of(name), example)
    spans = lmfx.spans(graph, realize=("compose", "fit", "narrow"))
    table = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    make = Workloads(spans.network)
    narrow = [c for c in spans if c.cuts]
    rows = [w.signature for c in narrow for w in make.each(c)]
    kept = {w.signature for c in spans if c.realization == "keep" for w in make.each(c)}
    rng = np.random.default_rng(0)
    changing = [c for c in spans if c.realization != "keep" and c.key in table]
    lost = np.exp(rng.normal(size=len(changing))) * np.array([share_taken(c) for c in changing])
    scores = ImportanceTable({c.key: -float(v) for c, v in zip(changing, lost, strict=True)}, {})
    seconds, frontier = best(lambda: solve_spans(spans, table, scores), repeat)
    return (
        f"{name:22} {len(narrow):6d} {len(rows):6d} {len(set(rows) - kept):8d} {len(changing):10d} "
        f"{len(frontier):6d} {1e3 * seconds:8.1f} {frontier.raw.gap:6.3%}"
    )


def elimination(channels: int, taps: int) -> float:
    """CPU seconds for all widths of one cut."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * channels * taps, channels * taps, dtype=torch.float64, generator=generator)
    columns = torch.randn(channels * taps, 64, dtype=torch.float64, generator=generator)
    gram, labels = x.T @ x, torch.arange(channels).repeat(taps)
    return best(lambda: eliminate(gram, columns, labels, widths_of(channels), 0.01), 1)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line a network and a line a Gram."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "tf_efficientnet_lite0"])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{'network':22} narrow   rows measured candidates points solve ms    gap")
    for name in args.models:
        print(network(name, args.repeat), flush=True)
    for channels, taps in GRAMS:
        print(f"{channels} channels, {taps} taps: {elimination(channels, taps):.2f} s", flush=True)


if __name__ == "__main__":
    main()
