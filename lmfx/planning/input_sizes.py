"""Compresses for several input sizes, and takes the one of best quality: a smaller input is a way to be faster too.

    own size     plan within the budget b
    smaller      the original alone takes r of its latency:  plan within b / r,  nothing but loss-free merges if r <= b;
                 measured beside the original at its own size, and made anew within less where it is over the budget

Quality is that of the original at its own size, on the same images scaled. So a network whose output does not depend on
the input size can be had at any of them; others are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lmfx.budget import Budget
from lmfx.calibration.images import Calibration, as_calibration
from lmfx.latency import LatencyTable
from lmfx.latency.chosen_backend import chosen_backend
from lmfx.latency.whole_times import time_wholes
from lmfx.made_of import made_of, set_made_of
from lmfx.passes.errors import InfeasibleBudget, InputError, LmfxError, OptionError
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.trace.tracing import example_arguments
from lmfx.planning.compression import Compression
from lmfx.planning.search import ACCEPT, measure_pair
from lmfx.quality import Judge, QualityName
from lmfx.result import Alternative, result_of
from lmfx.stages import default_backend, merge, trace

__all__ = ["at_best_size", "parse_sizes"]

Size = tuple[int, int]
TRIES = 3  # networks at one size, where they measure over the budget


def parse_sizes(sizes: Sequence[int | Sequence[int]]) -> tuple[Size, ...]:
    """(height, width) of each size, of a number both. Raises `OptionError` for anything else."""
    found = []
    for size in sizes:
        pair = [size, size] if isinstance(size, int) else list(size) if isinstance(size, (tuple, list)) else []
        if len(pair) != 2 or any(type(n) is not int or n < 1 for n in pair):
            raise OptionError(f"input_sizes={sizes!r}: write heights, or pairs of height and width, like (224, 192)")
        found.append((pair[0], pair[1]))
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class _Made:
    net: fx.GraphModule
    ratio: float  # of the original's latency at its own size
    size: Size
    loss: float


def at_best_size(
    asked: Compression,
    model: nn.Module,
    example_input: Any,
    budget: Budget,
    sizes: Sequence[Size],
    calibration: Any,
    name: QualityName,
) -> fx.GraphModule:
    """What is asked for, at the size of best quality.

    Raises `InputError` for a network that does not take images of another size, or gives another output there.
    """
    images = as_calibration(calibration, example_input)
    whole = trace(model, example_input)
    own = _size(images)
    roles = images.roles()
    choose, judge = (Judge(whole, part, held_out=not roles.seen) for part in (roles.choose, roles.judge))
    examples = {size: example_input if size == own else _example(example_input, own, size) for size in (own, *sizes)}
    graphs = {own: whole}
    for size in sizes:
        if size != own:
            graphs[size] = _graph(model, examples[size], choose, size)
    networks = [bare(g, example_arguments(examples[s])) for s, g in graphs.items()]
    assert not isinstance(asked.latency, LatencyTable)
    backend = chosen_backend(asked.latency, default_backend(whole), asked.precision)
    assert not isinstance(backend, LatencyTable)
    times = time_wholes(backend, networks)
    originals = dict(zip(graphs, (median(t) for t in times), strict=True))
    share = budget.resolve(originals[own]) / originals[own]
    made: list[_Made] = []
    alternatives: list[Alternative] = []
    refused: InfeasibleBudget | None = None
    for size, graph in graphs.items():
        part = originals[size] / originals[own]
        if size != own and part <= share:
            outputs = judge.of(_outputs(graph, judge, size))
            alternatives.append(Alternative(f"input {size[0]} x {size[1]} alone", part, outputs))
        scaled = images if size == own else _scaled(images, size)
        target, ratio = min(share / part, 1.0), 1.0
        try:
            for _ in range(TRIES):
                net = asked.run(model, examples[size], Budget("fraction", target), None, scaled)
                inner = result_of(net).ratio
                if size == own:
                    ratio = 1.0 if inner is None else inner
                    break
                # Two measured ratios are off by more than one: the network itself beside the original at its own size.
                smaller = bare(net if asked.merge else merge(net), example_arguments(examples[size]))
                ratio = measure_pair(backend, networks[0], smaller, originals[own])
                if ratio <= share:
                    break
                target *= ACCEPT * share / ratio
            else:
                reached = ratio * originals[own]
                raise InfeasibleBudget(
                    f"for images of {size[0]} x {size[1]} no network within {share:.1%} of the original's latency was "
                    f"found: the last one measured {ratio:.1%}. Leave that size out, or ask for less",
                    reached,
                    originals[own],
                )
        except InfeasibleBudget as error:
            refused = error
            continue
        loss = choose.of(_outputs(net, choose, size)).loss(name)
        quality = judge.of(_outputs(net, judge, size))
        alternatives.append(Alternative(f"compressed for {size[0]} x {size[1]}", ratio, quality))
        made.append(_Made(net, ratio, size, loss))
    if not made:
        assert refused is not None
        raise refused
    best = min(made, key=lambda m: (m.loss, m.ratio))
    told = made_of(best.net)
    assert told is not None
    result = replace(
        result_of(best.net),
        budget=budget,
        ratio=best.ratio,
        original=originals[own],
        measured=best.ratio * originals[own],
        quality=judge.of(_outputs(best.net, judge, best.size)),
        input_size=best.size,
        alternatives=tuple(alternatives),
    )
    set_made_of(best.net, replace(told, result=result))
    return best.net


def _graph(model: nn.Module, example: Any, judge: Judge, size: Size) -> fx.GraphModule:
    try:
        graph = trace(model, example)
        outputs = _outputs(graph, judge, size)
        judge.of(outputs)
    except LmfxError as error:
        raise InputError(
            f"input_sizes={size}: the network does not give the same outputs for images of that size ({error}); leave "
            "that size out"
        ) from error
    return graph


def _outputs(net: fx.GraphModule, judge: Judge, size: Size) -> list[Tensor]:
    """What a network for images of `size` gives for the judge's images."""
    own = judge.images
    return judge.outputs(net) if _size(own) == size else judge.outputs_of(net, _scaled(own, size))


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def _size(images: Calibration) -> Size:
    for tensor in images.tensors:
        if _is_image(tensor):
            return int(tensor.shape[2]), int(tensor.shape[3])
    raise InputError("input_sizes= is for networks that take images (batch, channels, height, width)")


def _scaled(images: Calibration, size: Size) -> Calibration:
    own = _size(images)
    names = images.names
    return Calibration(tuple(_resized(t, own, size) for t in images.tensors), names)


def _resized(value: Any, own: Size, size: Size) -> Any:
    """An image of the network's own size at another one; anything else as it is."""
    if not _is_image(value) or tuple(value.shape[2:]) != own:
        return value
    parts = [F.interpolate(v, size=size, mode="bilinear", antialias=True) for v in value.split(64)]
    return torch.cat(parts).to(value.dtype)


def _example(example: Any, own: Size, size: Size) -> Any:
    return pytree.tree_map(lambda v: _resized(v, own, size), example)
