"""Trace + regions + spans, with the default options: CPU seconds (best of three) for torchvision networks at 224.

    python benchmarks/speed/trace_time.py [--models resnet50 mobilenet_v2]

Tracing runs the network three times: the model itself, the raw graph for shapes, the canonical graph to compare.
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision

from lmfx.passes.spans.enumeration import enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace

MODELS = [
    *("resnet18", "resnet34", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "mobilenet_v2", "mnasnet1_0"),
    *("vgg16_bn", "regnet_x_400mf", "densenet121", "squeezenet1_1", "googlenet"),
]


def main() -> None:
    """Print one row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    args = parser.parse_args()
    x = torch.randn(1, 3, 224, 224)
    print(f"{'model':18} {'trace':>7} {'regions':>8} {'spans':>7} {'sum':>7} {'wall':>7} {'candidates':>11}")
    for name in args.models:
        options = {"init_weights": False} if name == "googlenet" else {}
        model = getattr(torchvision.models, name)(weights=None, **options).eval()
        rows = []
        for _ in range(3):
            wall = time.perf_counter()
            t0 = time.process_time()
            graph = trace(model, x)
            t1 = time.process_time()
            network = Network(graph)
            t2 = time.process_time()
            spans = enumerate_spans(network)
            t3 = time.process_time()
            rows.append((t3 - t0, t1 - t0, t2 - t1, t3 - t2, time.perf_counter() - wall, len(spans)))
        total, trace_s, regions_s, spans_s, wall_s, count = min(rows)
        print(
            f"{name:18} {trace_s:7.2f} {regions_s:8.3f} {spans_s:7.3f} {total:7.2f} {wall_s:7.2f} {count:11d}",
            flush=True,
        )


if __name__ == "__main__":
    main()
