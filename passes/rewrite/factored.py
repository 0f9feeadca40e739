"""Factors a conv of a network: puts a depthwise conv, or one of fewer channels, and a pointwise one in its place.

    before   x ─ conv k x k ─ norm ─ relu            after   x ─ depthwise k x k ─ pointwise 1 x 1 ─ relu
                                                             x ─ low_rank k x k  ─ pointwise 1 x 1 ─ relu

Both are plain modules, `conv_depthwise` or `conv_low_rank` and `conv_pointwise`, in the trainable form and in the
merged one, after a pad where the conv's own is uneven. The norm goes into the pointwise conv. Their values are the
nearest to the conv's weights until calibration data set them (`passes/fit/factors.py`, `passes/fit/low_rank.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..algebra.linear_op import LinearOp
from ..algebra.linear_span import LinearSpan, pad_module
from ..errors import PlanError
from ..fit.factors import Factors, first_factors
from ..fit.low_rank import LowRank, low_rank
from ..graph import ops
from ..graph.graph_edit import free_name, set_submodule
from ..graph.node_facts import note_like, shape_of
from ..ir import Candidate, ConvConfig
from ..spans.factoring import factorable, factored_ways
from ..spans.layers import Network
from .span_modules import build_span

__all__ = ["FactoredOp", "blank_factors", "conv_weight", "dense_op", "nearest", "put_factored", "set_factored"]

DEPTHWISE, LOW_RANK, POINTWISE = "depthwise", "low_rank", "pointwise"


@dataclass(frozen=True)
class FactoredOp(LinearOp):
    """The one conv that two are, and these two: `parts`."""

    parts: Factors | LowRank | None = None

    @classmethod
    def of(cls, op: LinearOp, parts: Factors | LowRank, shift: Tensor | None = None) -> FactoredOp:
        """Factors of the conv `op`; `shift` (out,) is what they lack of its outputs in the mean."""
        bias = op.bias.double() if shift is None else op.bias.double() + shift
        weight = parts.product.reshape(op.weight.shape)
        return cls(weight, bias, op.stride, op.padding, op.dilation, op.groups, parts=parts)


def conv_weight(op: LinearOp) -> Tensor:
    """The weight of a conv as (out, in, taps) in float64."""
    return op.weight.detach().double().flatten(2)


def nearest(weight: Tensor, config: ConvConfig) -> Factors | LowRank:
    """The factors of a weight (out, in, taps) that are nearest to it, whatever it reads."""
    return low_rank(weight, config.rank) if config.rank else first_factors(weight, config.multiplier)


def dense_op(network: Network, candidate: Candidate) -> LinearOp:
    """The conv that a candidate factors, with its norm.

    A plan may come from a file: raises `PlanError` for a span that is not that conv alone, and for factors that are
    never offered.
    """
    layers = network.series[candidate.span.series].layers[candidate.span.start : candidate.span.stop]
    found = factorable(network, layers[0]) if len(layers) == 1 else None
    if candidate.conv is None or found is None:
        raise PlanError(f"the plan factors {candidate.key}, which this graph has not to factor: solve again")
    if candidate.conv not in factored_ways(found):
        raise PlanError(
            f"the plan factors a conv as {candidate.conv} in {candidate.key}, and this graph has {found}, which is not "
            "factored so: solve again"
        )
    span = build_span(network, replace(candidate, realization="compose", conv=found, kept=candidate.all_convs))
    assert isinstance(span, LinearSpan)
    with torch.no_grad():
        return span.linear_op()


def blank_factors(config: ConvConfig, **where: Any) -> list[tuple[str, nn.Module]]:
    """The modules of a factored conv by their kinds, in order: a pad where the conv's own is uneven, then the two."""
    even, ndim = config.even, len(config.kernel_size)
    make: Any = ops.conv_class(ndim)
    wide = config.rank or config.in_channels * config.multiplier
    before = tuple(lo for lo, _ in config.padding) if even else 0
    first = make(
        config.in_channels,
        wide,
        config.kernel_size,
        config.stride,
        before,
        config.dilation,
        1 if config.rank else config.in_channels,
        bias=False,
        **where,
    )
    parts = [] if even else [("pad", pad_module(config))]
    kind = LOW_RANK if config.rank else DEPTHWISE
    return [*parts, (kind, first), (POINTWISE, make(wide, config.out_channels, (1,) * ndim, **where))]


def put_factored(
    gm: fx.GraphModule, nodes: dict[str, fx.Node], network: Network, candidate: Candidate, name: str
) -> None:
    """Put the two convs of a factored one into a copy of the network's graph; the pointwise one is called `name`."""
    config, op = candidate.conv, dense_op(network, candidate)
    assert config is not None
    like = next(p for p in network.gm.parameters() if p.is_floating_point())
    conv: Any = network.gm.get_submodule(candidate.all_convs[0])
    parts = blank_factors(config, dtype=like.dtype, device=like.device)
    names = {
        kind: name if kind == POINTWISE else free_name(gm, f"{candidate.all_convs[0]}_{kind}") for kind, _ in parts
    }
    for kind, module in parts:
        set_submodule(gm, names[kind], module.train(network.gm.training))
        for p in module.parameters():
            p.requires_grad_(conv.weight.requires_grad)
    for number, span in enumerate(candidate.spans):
        output = nodes[span.output]
        shape, last, place = shape_of(output), nodes[span.entry], output
        for kind, _ in parts:
            with gm.graph.inserting_after(place):
                own = names[kind].replace(".", "_")
                place = gm.graph.create_node("call_module", names[kind], (last,), {}, name=own)
            wide = None if kind == "pad" or shape is None else (shape[0], parts[-1][1].in_channels, *shape[2:])
            note_like(place, output, shape=shape if kind == POINTWISE else wide, path=names[kind], call=number)
            last = place
        output.replace_all_uses_with(last)
        nodes[span.output] = last
    set_factored(gm, name, FactoredOp.of(op, nearest(conv_weight(op), config)))


def set_factored(gm: fx.GraphModule, name: str, op: FactoredOp) -> None:
    """Set both convs of a factored one; `name` is that of the pointwise conv."""
    node = next(n for n in gm.graph.nodes if n.op == "call_module" and n.target == name)
    source = node.args[0]
    assert isinstance(source, fx.Node) and op.parts is not None
    first: Any = gm.get_submodule(str(source.target))
    pointwise: Any = gm.get_submodule(name)
    with torch.no_grad():
        first.weight.copy_(op.parts.first.reshape(first.weight.shape))
        pointwise.weight.copy_(op.parts.pointwise.reshape(pointwise.weight.shape))
        pointwise.bias.copy_(op.bias)
