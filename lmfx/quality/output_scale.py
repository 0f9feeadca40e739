"""Sets the scale of scores anew: how sure a network is, which fits of few images change and an arg-max does not show.

    T = arg min KL(softmax(y) | softmax(z / T))        the last layer's weight and bias are divided by T

z are the network's scores, y those of the original. KL is convex in 1 / T. Plans and fits are chosen by the KL that is
left at the best T (`measures.scaled_kl`), so what is returned should have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from lmfx.quality.judge import Judge
from lmfx.quality.last_layers import last_layers
from lmfx.quality.measures import LEAST_PROBABILITY

__all__ = ["best_temperature", "set_scale"]

FURTHEST = 4.0  # T and 1 / T at most
STEPS = 40  # of the search, each of which leaves 0.62 of the interval
LEAST_GAIN = 0.02  # the share by which KL must fall
LEAST_ROWS = 16  # of scores, below which the scale that is best for them says nothing of others


@torch.no_grad()
def set_scale(
    student: fx.GraphModule,
    judge: Judge,
    free: Callable[[str], bool] = lambda name: True,
    outputs: Sequence[Tensor] | None = None,
) -> list[float]:
    """Divides the last layers of scores by their best temperature, in place; the temperatures, 1 where nothing is done.

    An output is left as it is where KL falls by less than 2 %, where there are fewer than 16 rows of scores, and where
    its last layer is not one that is called once and read by this output alone. `free` says of a node's name whether
    its layer may be changed, `outputs` are what it gives for the judge's images where its own are of another size.
    """
    found: list[float] = []
    if not any(kind.kind == "scores" for kind in judge.kinds):
        return found
    layers = last_layers(student)
    outputs = judge.outputs(student) if outputs is None else outputs
    if len(layers) != len(outputs):  # tensors that the graph does not name one by one
        return found
    for kind, node, reference, other in zip(judge.kinds, layers, judge.reference, outputs, strict=True):
        if kind.kind != "scores" or kind.rows is None or node is None or not free(node.name):
            continue
        y, z = (t.movedim(kind.rows, 0).double() for t in (reference, other))
        if kind.probabilities:
            y, z = (t.clamp_min(LEAST_PROBABILITY).log() for t in (y, z))
        if y[..., 0].numel() < LEAST_ROWS:
            continue
        temperature, gain = best_temperature(y, z)
        found.append(temperature if gain >= LEAST_GAIN else 1.0)
        if found[-1] != 1:
            layer = student.get_submodule(str(node.target))
            for p in layer.parameters(recurse=False):
                p.data.div_(temperature)
    return found


def best_temperature(y: Tensor, z: Tensor) -> tuple[float, float]:
    """(T, the share by which KL falls) for scores z of a network and y of the original, (rows, ..., classes)."""
    p = y.log_softmax(-1)

    def loss(log_t: float) -> float:
        kl = (p.exp() * (p - (z / math.exp(log_t)).log_softmax(-1))).sum(-1).mean()
        return float(kl) if math.isfinite(float(kl)) else math.inf

    low, high, part = -math.log(FURTHEST), math.log(FURTHEST), (math.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        a, b = high - part * (high - low), low + part * (high - low)
        low, high = (low, b) if loss(a) <= loss(b) else (a, high)
    best, now = loss((low + high) / 2), loss(0.0)
    return math.exp((low + high) / 2), (now - best) / now if now > 0 and math.isfinite(now) else 0.0
