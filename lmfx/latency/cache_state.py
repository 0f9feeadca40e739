"""Says how much memory a network touches, and so in which state its rows find the caches (`Sampling.caches`).

weights + the largest inputs and output of one op       because results are written over one another
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TypeVar

from torch import fx

from lmfx.latency.backend import Backend
from lmfx.latency.chosen_backend import precision_of
from lmfx.latency.table import LatencyTable
from lmfx.passes.graph.node_facts import dtype_of, shape_of

__all__ = ["suited", "touched_bytes"]

SHARES = {"fp16": 0.5, "bf16": 0.5, "int8": 0.25}  # of the bytes in float32, where the backend runs networks so
Source = TypeVar("Source", bound=Backend | LatencyTable)


def touched_bytes(graph: fx.GraphModule) -> int:
    """The bytes that one run of a traced network reads and writes."""
    weights = sum(t.numel() * t.element_size() for t in (*graph.parameters(), *graph.buffers()))
    results = (_bytes(n) + sum(map(_bytes, n.all_input_nodes)) for n in graph.graph.nodes if n.op != "output")
    return weights + max(results, default=0)


def suited(source: Source, graph: fx.GraphModule) -> Source:
    """A backend as it is to time the rows of a network; one of somebody else, and a table, as it is."""
    change: Callable[[int], Source] | None = getattr(source, "for_network", None)
    if change is None:
        return source
    return change(int(touched_bytes(graph) * SHARES.get(precision_of(source), 1.0)))


def _bytes(node: fx.Node) -> int:
    shape, dtype = shape_of(node), dtype_of(node)
    return 0 if shape is None or dtype is None else prod(shape) * dtype.itemsize
