"""`LinearOp`: every affine op of a convolutional network as one convolution, and the algebra of such ops.

A `LinearOp` is ``y = conv(pad(x, p), W, stride s, dilation d, groups g) + b`` in 1, 2 or 3 spatial dimensions, with the
zeros before (left, top) and after (right, bottom) kept apart. In each dimension, tap ``t`` of output pixel ``o`` reads
input pixel ``s o - p + d t``, so the window is ``[s o - p, s o - p + K]`` with the extent ``K = d (k - 1)``.

**compose** (second after first). All padding moves to the front: the composed op equals the two ops run without any
padding on an input that was padded once. It equals the two ops as they stand if the second does not pad.

    s = s1 s2       p = p1 + s1 p2       K = K1 + s1 K2       groups = gcd(g1, g2)
    W[o, i, d1 t + s1 d2 j] += sum_m W2[o, m, j] W1[m, i, t]            b = b2 + sum_j W2[., ., j] b1

``gcd`` is exact: a block-diagonal matrix is block-diagonal in every coarser partition, and the finest that both share
has ``gcd(g1, g2)`` blocks. Sizes agree because ``floor((floor(a / s1) + c) / s2) = floor((a + s1 c) / (s1 s2))``.

**add, cat** align the windows of branches of equal stride and sum, or stack, the zero-extended kernels.

**select** (the channels `index` of what an op gives) takes rows of the dense kernel, **spread** (an op that reads only
the channels `index` of its input) puts its columns where these channels are:

    W'[k, i, t] = W[index[k], i, t]            W'[o, index[m], t] += W[o, m, t]

The integer rules (padding, dilation, groups, and why output sizes agree) are those of `shapes`, and the tensors follow
them.

A vector is a map without spatial dimensions, so nn.Linear is an op with an empty kernel and all of this holds for it.

Weights are float64 unless the caller asks for something else; all is plain differentiable torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from types import EllipsisType

import torch
from torch import Tensor

from ..errors import OptionError
from ..graph.enlarging import compose_config
from ..graph.shapes import add_configs, branch_crops, cat_configs
from ..ir import ConvConfig
from .enlarged import from_shuffle, from_transposed, lowered_op, raised, small_op
from .linear_op import (
    LinearOp,
    densify,
    diagonal,
    from_avg_pool,
    from_batch_norm,
    from_conv,
    from_linear,
    from_pad,
    from_slice,
    from_space_to_depth,
    identity,
    taps,
    to_conv,
)

__all__ = [
    "LinearOp",
    "add",
    "add_configs",
    "branch_crops",
    "cat",
    "cat_configs",
    "compose",
    "compose_config",
    "densify",
    "diagonal",
    "from_avg_pool",
    "from_batch_norm",
    "from_conv",
    "from_linear",
    "from_pad",
    "from_shuffle",
    "from_slice",
    "from_space_to_depth",
    "from_transposed",
    "identity",
    "select",
    "spread",
    "to_conv",
]


def compose(first: LinearOp, second: LinearOp) -> LinearOp:
    """The op that does `first`, then `second`, with all padding moved to the front (module docstring)."""
    config = compose_config(first.config, second.config)
    if first.upscale:
        small = compose(small_op(first), lowered_op(second, first.upscale, first.cut))
        return raised(small, config)
    if second.upscale:
        return raised(compose(first, small_op(second)), config)
    if first.groups % second.groups and second.groups % first.groups:
        first, second = densify(first, config.groups), densify(second, config.groups)
    g2 = second.groups
    sums = taps(second).sum(2).reshape(g2, second.out_channels // g2, -1)  # (g2, out / g2, mid / g2)
    bias = second.bias + (sums @ first.bias.reshape(g2, -1, 1)).flatten()
    steps1 = [d // u for d, u in zip(first.dilation, config.dilation, strict=True)]
    steps2 = [s * d // u for s, d, u in zip(first.stride, second.dilation, config.dilation, strict=True)]
    weight = first.weight.new_zeros(config.out_channels, config.in_channels // config.groups, *config.kernel_size)
    # One matrix product for each tap of the op that has fewer: that is all the arithmetic there is, in large pieces.
    by_second = prod(second.kernel_size) <= prod(first.kernel_size)
    few, many = (second, first) if by_second else (first, second)
    few_steps, many_steps = (steps2, steps1) if by_second else (steps1, steps2)
    for i, tap in enumerate(product(*map(range, few.kernel_size))):
        w1, w2 = taps(first), taps(second)
        w1, w2 = (w1, w2[..., i : i + 1]) if by_second else (w1[..., i : i + 1], w2)
        part = _product(w1, w2, first.groups, second.groups)
        starts = [t * step for t, step in zip(tap, few_steps, strict=True)]
        weight[_window(starts, many_steps, many.kernel_size)] += part.reshape(*part.shape[:2], *many.kernel_size)
    return LinearOp(weight, bias, config.stride, config.padding, config.dilation, config.groups)


def add(ops: Sequence[LinearOp], signs: Sequence[float] | None = None) -> LinearOp:
    """The sum of branches that read one input, each times its sign (module docstring)."""
    config = add_configs([op.config for op in ops])
    factors = [1.0] * len(ops) if signs is None else list(signs)
    if len(factors) != len(ops):
        raise OptionError(f"{len(factors)} signs for {len(ops)} branches; give one a branch")
    weight = sum(f * _embed(op, config) for f, op in zip(factors, ops, strict=True))
    bias = sum(f * op.bias for f, op in zip(factors, ops, strict=True))
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    return LinearOp(weight, bias, config.stride, config.padding, config.dilation, config.groups)


def cat(ops: Sequence[LinearOp]) -> LinearOp:
    """The concatenation, along the channels, of branches that read one input (module docstring)."""
    config = cat_configs([op.config for op in ops])
    weight = torch.cat([_embed(op, config) for op in ops])
    bias = torch.cat([op.bias for op in ops])
    return LinearOp(weight, bias, config.stride, config.padding, config.dilation, config.groups)


def select(op: LinearOp, index: Sequence[int]) -> LinearOp:
    """The op, then the output channels `index` of it. Dense, unless the index is the identity."""
    if tuple(index) == tuple(range(op.out_channels)):
        return op
    if not index or min(index) < 0 or max(index) >= op.out_channels:
        raise OptionError(f"cannot select the channels {list(index)} of the {op.out_channels} that an op gives")
    rows = torch.tensor(index, device=op.weight.device)
    part = op.weight[rows]
    weight = part.new_zeros(len(rows), op.in_channels, *op.kernel_size)
    weight[torch.arange(len(rows), device=rows.device)[:, None], _fan_in(op)[rows]] = part
    return LinearOp(weight, op.bias[rows], op.stride, op.padding, op.dilation)


def spread(op: LinearOp, index: Sequence[int], channels: int) -> LinearOp:
    """The op on the channels `index` of an input of `channels` channels. Dense, unless the index is the identity."""
    if len(index) != op.in_channels or min(index) < 0 or max(index) >= channels:
        raise OptionError(
            f"an op of {op.in_channels} input channels cannot read the channels {list(index)} of {channels}"
        )
    if tuple(index) == tuple(range(channels)):
        return op
    columns = torch.tensor(index, device=op.weight.device)[_fan_in(op)]
    rows = torch.arange(op.out_channels, device=columns.device)[:, None].expand_as(columns)
    weight = op.weight.new_zeros(op.out_channels, channels, *op.kernel_size)
    weight = weight.index_put((rows, columns), op.weight, accumulate=True)  # a channel may be read twice
    return LinearOp(weight, op.bias, op.stride, op.padding, op.dilation)


def _fan_in(op: LinearOp) -> Tensor:
    """The input channels that each output channel reads, (out, in / groups)."""
    inner = op.weight.shape[1]
    block = torch.arange(op.out_channels, device=op.weight.device) // (op.out_channels // op.groups)
    return block[:, None] * inner + torch.arange(inner, device=op.weight.device)


def _product(w1: Tensor, w2: Tensor, g1: int, g2: int) -> Tensor:
    """sum_m W2[o, m, j] W1[m, i, t] as (out, in / min(g1, g2), j t), where one of g1, g2 divides the other.

    Works on the finer blocks, so a depthwise op is never made dense. Of the tap axes j and t one has length 1.
    """
    out, _, taps2 = w2.shape
    mid, fan_in, taps1 = w1.shape
    g, r = min(g1, g2), max(g1, g2) // min(g1, g2)
    w1 = w1.reshape(g, r, mid // (g * r), fan_in, taps1)
    if g1 >= g2:  # each block of the first is read by all outputs of one block of the second
        blocks = torch.einsum("gormj,grmit->gorijt", w2.reshape(g, out // g, r, mid // (g * r), taps2), w1)
    else:  # each block of the second reads a part of what one block of the first writes
        blocks = torch.einsum("gromj,grmit->groijt", w2.reshape(g, r, out // (g * r), -1, taps2), w1)
    return blocks.reshape(out, -1, taps2 * taps1)


def _embed(op: LinearOp, config: ConvConfig) -> Tensor:
    """The weight of a branch inside the common window of `config`, with its groups."""
    op = densify(op, config.groups)
    lattice = list(zip(config.dilation, config.padding, op.padding, op.dilation, op.kernel_size, strict=True))
    starts = [(common[0] - own[0]) // u for u, common, own, _, _ in lattice]
    steps = [d // u if k > 1 else 1 for u, _, _, d, k in lattice]
    weight = op.weight.new_zeros(*op.weight.shape[:2], *config.kernel_size)
    weight[_window(starts, steps, op.kernel_size)] += op.weight
    return weight


def _window(starts: Sequence[int], steps: Sequence[int], counts: Sequence[int]) -> tuple[EllipsisType | slice, ...]:
    """The index of every `step`-th tap, `count` of them, in each spatial dimension of a weight."""
    slices = (slice(a, a + s * (n - 1) + 1, max(s, 1)) for a, s, n in zip(starts, steps, counts, strict=True))
    return (..., *slices)
