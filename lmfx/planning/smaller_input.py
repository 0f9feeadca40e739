"""Says what a smaller input alone would keep at the latency of a result: what anybody can do without a compiler.

sizes that suit the network  ─▶  the largest of those that are fast enough, measured  ─▶  its quality, as it is
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lmfx.calibration.images import Calibration
from lmfx.latency import Backend
from lmfx.passes.errors import LmfxError
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.trace.tracing import example_arguments
from lmfx.planning.scaled_images import scaled, scaled_example, size_of, usual_sizes
from lmfx.planning.search import measure_pair
from lmfx.quality import Judge
from lmfx.quality.measures import Alternative
from lmfx.stages import trace

__all__ = ["smaller_input"]

NEARLY, TRIES = 1.1, 2  # times the share that pixels promise, from which on sizes are measured; how many are


def smaller_input(
    model: nn.Module,
    graph: fx.GraphModule,
    example_input: Any,
    images: Calibration,
    backend: Backend,
    share: float,
    original: float,
) -> Alternative | None:
    """The original on smaller images that takes at most `share` of its latency (about `original` ms), judged on
    `images` at their own size.

    None where there is no such size, where the network does not take smaller images, gives other shapes for them, or
    gives no scores: of a map a smaller one is wanted, not the same.
    """
    try:
        judge = Judge(graph, images)
        if not any(kind.kind == "scores" for kind in judge.kinds):
            return None
        own = size_of(images)
        sizes = [s for s in usual_sizes(graph, own) if s[0] * s[1] <= NEARLY * share * own[0] * own[1]]
        whole = bare(graph, example_arguments(example_input))
        for size in sizes[:TRIES]:
            example = scaled_example(example_input, own, size)
            small = trace(model, example)
            ratio = measure_pair(backend, whole, bare(small, example_arguments(example)), original)
            if ratio <= share:
                quality = judge.of(judge.outputs_of(small, scaled(images, size)))
                return Alternative(f"input {size[0]} x {size[1]} alone", ratio, quality)
    except (LmfxError, RuntimeError):  # a network may refuse a size in any way, and nobody asked for this one
        return None
    return None
