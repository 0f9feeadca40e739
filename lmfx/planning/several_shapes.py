"""Plans for several shapes at once: the latency is the weighted sum of those at each of them, measured.

    compress(model, [a, b], 0.6, weights=(3, 1))         rows     3 ms(row at a) + 1 ms(row at b)
                                                         wholes   3 ms(network at a) + 1 ms(network at b)

A list of inputs is a list of shapes, where it is not what the forward takes: `[x, t]` of a network of two inputs is one
example, as `(x, t)` is. With `weights=` it is a list of shapes in any case. The first shape is that of the calibration
images, and all but latency is found there.

A candidate has a row where it has one at every shape, of the same convolution: one that is slower at one of them than
what it replaces is left out, and so is a fit whose kernel depends on the size of the map.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Real
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lmfx import stages
from lmfx.latency import Backend, LatencyTable, Measurement, Prune, Store, Whole, Workload
from lmfx.latency.whole_times import time_wholes
from lmfx.made_of import made_of, set_made_of
from lmfx.passes.errors import InputError, OptionError, SizeError
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.trace.tracing import example_arguments
from lmfx.result import ShapeTime, result_of

__all__ = ["OverShapes", "shapes_of", "with_shape_times"]

FINAL_ROUNDS = 11
_QUALITIES = ("full", "analytic", "bound", "quick", "noisy", "busy")  # of rows that are added up: the last is told


def shapes_of(model: Any, example_input: Any, weights: Sequence[float] | None) -> tuple[list[Any], list[float]] | None:
    """The examples of several shapes and their weights; None for one example.

    Raises `OptionError` for weights that do not fit.
    """
    if weights is None and not isinstance(example_input, list):
        return None
    if not isinstance(example_input, list) or not example_input:
        raise OptionError(
            "weights= are those of several shapes: pass them as a list of inputs, example_input=[a, b], weights=(3, 1)"
        )
    if weights is None:
        if _is_one(model, example_input):
            return None
        weights = [1.0] * len(example_input)
    given = list(weights)
    fine = all(isinstance(w, Real) and not isinstance(w, bool) and math.isfinite(w) and w > 0 for w in given)
    if len(given) != len(example_input) or not fine:
        raise OptionError(
            f"weights={weights!r}: one number above 0 for each of the {len(example_input)} shapes, such as its share "
            "of all calls"
        )
    return list(example_input), [float(w) for w in given]


def _is_one(model: Any, example: list[Any]) -> bool:
    """Whether the forward takes the entries of a list as its arguments."""
    if not isinstance(model, nn.Module):
        return True  # whoever looks at the model says what it is
    try:
        inspect.signature(model.forward).bind(*example)
    except TypeError:
        return False
    return True


class OverShapes:
    """A backend that times networks at several shapes and adds up: another backend, and the examples with weights."""

    def __init__(
        self, backend: Backend, model: nn.Module, examples: Sequence[Any], weights: Sequence[float], options: Any
    ) -> None:
        self.inner, self.weights, self.examples = backend, list(weights), list(examples)
        self.graphs = [stages.trace(model, example) for example in examples]
        self.tensors = [bare(self.graphs[0], example_arguments(e))[1] for e in examples]
        self.shapes = [" and ".join(_size(t) for t in tensors) for tensors in self.tensors]
        _check_sizes(self.graphs[0], examples, self.shapes)
        self.spans = [None, *(stages.spans(graph, **options) for graph in self.graphs[1:])]

    @property
    def name(self) -> str:
        """That of the backend below."""
        return self.inner.name

    @property
    def sampling(self) -> Any:
        """That of the backend below, if it has any."""
        return getattr(self.inner, "sampling", None)

    def identity(self) -> dict[str, Any]:
        """That of the backend below, and the shapes with their weights."""
        return {**self.inner.identity(), "shapes": self.shapes, "weights": self.weights}

    def measure(
        self,
        workloads: Iterable[Workload],
        store: Store | None = None,
        progress: bool = False,
        rounds: int | None = None,
        prune: Prune | None = None,
    ) -> dict[str, Measurement]:
        """A workload has a shape of its own, so that it is measured as the backend below does."""
        return self.inner.measure(workloads, store, progress, rounds, prune)

    def measure_interleaved(self, modules: Sequence[Whole], repeats: int = 5) -> list[list[float]]:
        """The weighted sums over the shapes, of networks that are given with an example of any of them."""
        total = [[0.0] * repeats for _ in modules]
        for times, weight in zip(self.each(modules, repeats), self.weights, strict=True):
            total = [[t + weight * ms for t, ms in zip(a, b, strict=True)] for a, b in zip(total, times, strict=True)]
        return total

    def each(self, modules: Sequence[Whole], repeats: int) -> list[list[list[float]]]:
        """The latencies at each shape."""
        return [
            time_wholes(self.inner, [m if isinstance(m, Workload) else (m[0], tensors) for m in modules], repeats)
            for tensors in self.tensors
        ]

    def table(self, spans: SpanSet, cache_dir: str | os.PathLike[str] | None, progress: bool) -> LatencyTable:
        """The rows of `spans` (of the graph at the first shape), each the weighted sum of its rows at the shapes."""
        convs = {c.key: c.conv for c in spans}
        tables: list[LatencyTable] = []
        for graph, others in zip(self.graphs, self.spans, strict=True):
            some = spans
            if others is not None:
                same = (c for c in others if c.key in convs and c.conv == convs[c.key])
                some = replace(others, candidates=tuple(same))
            graph = some.network.gm if others is None else graph
            tables.append(
                stages.profile(graph, self.inner, spans=some, cache_dir=cache_dir, progress=progress, calibrate=False)
            )
        rows: dict[str, Measurement] = {}
        for key in tables[0]:
            found = [t[key] for t in tables if key in t]
            if len(found) == len(tables):
                rows[key] = self._sum(found)
            elif key.endswith(":keep"):
                raise InputError(
                    f"at {self.shapes[0]} the network has a layer ({key}) that it does not have at all other shapes: "
                    "compress it for each by itself"
                )
        return LatencyTable(rows, {**tables[0].identity, "shapes": self.shapes, "weights": self.weights})

    def _sum(self, rows: Sequence[Measurement]) -> Measurement:
        pairs = list(zip(self.weights, rows, strict=True))
        worst = max((m.quality for m in rows), key=_QUALITIES.index)
        ms, spread = (sum(w * getattr(m, name) for w, m in pairs) for name in ("ms", "spread"))
        return replace(rows[0], ms=ms, spread=spread, n=min(m.n for m in rows), quality=worst)


def with_shape_times(net: fx.GraphModule, over: OverShapes) -> fx.GraphModule:
    """The network with its measured latency at each shape, beside the original's, in its result."""
    made = made_of(net)
    assert made is not None
    original, result = over.graphs[0], result_of(net)
    example = example_arguments(over.examples[0])
    times = over.each([bare(original, example), bare(net, example)], FINAL_ROUNDS)
    shapes = []
    for shape, weight, (before, after) in zip(over.shapes, over.weights, times, strict=True):
        ratio = median(b / a for a, b in zip(before, after, strict=True))
        shapes.append(ShapeTime(shape, weight, median(before), ratio * median(before), ratio))
    set_made_of(net, replace(made, result=replace(result, shapes=tuple(shapes))))
    return net


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _check_sizes(graph: fx.GraphModule, examples: Sequence[Any], shapes: Sequence[str]) -> None:
    """Raises `InputError` for a network that is right at one of the shapes only."""
    for example, shape in zip(examples, shapes, strict=True):
        args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example_arguments(example))
        try:
            with torch.no_grad():
                graph(*args, **kwargs)
        except SizeError as error:
            raise InputError(
                f"the network for {shapes[0]} is not right at {shape}, so there is no one plan for both ({error}): "
                "compress it for each by itself"
            ) from error
        except Exception as error:  # the caller's forward may refuse a shape in any way
            raise InputError(
                f"the network for {shapes[0]} does not run at {shape}: {type(error).__name__}: {error}"
            ) from error
