"""Measures another way to be as fast (a pruned network, say) as results are measured, to be shown beside them."""

from __future__ import annotations

from statistics import median
from typing import Any

from torch import fx, nn

from lmfx.calibration.images import as_calibration
from lmfx.environment.caller_state import entry
from lmfx.latency import Backend, get_backend
from lmfx.latency.whole_times import time_wholes
from lmfx.passes.errors import InputError
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.trace.tracing import example_arguments, trace
from lmfx.quality.judge import Judge
from lmfx.quality.measures import Alternative

__all__ = ["alternative"]


@entry
def alternative(
    what: str, network: nn.Module, graph: fx.GraphModule, images: Any, latency: str | Backend | None = None
) -> Alternative:
    """What any network of the same inputs and outputs (one that Torch-Pruning made, say) keeps, and how fast it is.

    `graph` is the original as `lmfx.trace` gives it, `images` are unlabelled inputs that the network was not made with,
    `latency` is the backend that both are measured on, in turn ("onnxruntime" on a CPU by default). `what` names it in
    plots and pages. Raises `InputError` for a graph that was not traced, and for other outputs.
    """
    example = noted(graph).example if isinstance(graph, fx.GraphModule) else None
    if example is None:
        raise InputError(
            f"alternative takes the original as lmfx.trace(model, example_input) gives it, not a {type(graph).__name__}"
        )
    if not isinstance(network, nn.Module):
        raise InputError(f"alternative takes a network, an nn.Module, not a {type(network).__name__}")
    other = trace(network, example)
    first = next(graph.parameters(), None)
    backend = get_backend(
        latency if latency is not None else "torch" if first is not None and first.is_cuda else "onnxruntime"
    )
    arguments = example_arguments(example)
    times = time_wholes(backend, [bare(graph, arguments), bare(other, arguments)])
    ratio = median(b / a for a, b in zip(*times, strict=True))
    return Alternative(what, ratio, Judge(graph, as_calibration(images, example))(other))
