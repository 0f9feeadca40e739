"""One rule an op for the emitter: a torch.nn module or function and the names of its inputs -> ONNX nodes.

A rule adds nodes to the `Builder` and gives back the name of its value. Shapes are only worked out (on fake tensors)
when a rule asks for them. The rules of convolutions, pads and pools: `window_rules`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from lmfx.export.builder import Builder, UnsupportedOp
from lmfx.export.window_rules import WINDOW_RULES, Rule
from lmfx.passes.graph.ops import (
    ChannelAffine,
    ChannelLayerNorm,
    ChannelSelect,
    DepthToSpace,
    PixelSlice,
    SpaceToDepth,
)
from lmfx.passes.graph.pointwise import PART, Pointwise, is_operand

__all__ = ["FUNCTION_RULES", "MODULE_RULES"]


def _batch_norm(e: Builder, node: fx.Node, m: Any) -> str:
    if m.running_mean is None:
        raise UnsupportedOp(f"{node.name} has no running statistics, so it is not affine in eval mode")
    ones = torch.ones_like(m.running_var)
    weight = m.weight if m.weight is not None else ones
    bias = m.bias if m.bias is not None else torch.zeros_like(ones)
    constants = [e.tensor(t) for t in (weight, bias, m.running_mean, m.running_var)]
    return e.node("BatchNormalization", e.value(node.args[0]), *constants, epsilon=m.eps)


def _layer_norm(e: Builder, node: fx.Node, m: nn.LayerNorm) -> str:
    scale = m.weight if m.weight is not None else torch.ones(m.normalized_shape, dtype=e.dtype)
    operands = [e.value(node.args[0]), e.tensor(scale)]
    if m.bias is not None:
        operands.append(e.tensor(m.bias))
    return e.node("LayerNormalization", *operands, axis=-len(m.normalized_shape), epsilon=m.eps)


def _channel_layer_norm(e: Builder, node: fx.Node, m: ChannelLayerNorm) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(e.shape(source))
    operands = [e.node("Transpose", e.value(source), perm=[0, *range(2, rank), 1])]
    operands.append(e.tensor(m.weight if m.weight is not None else torch.ones(m.normalized_shape, dtype=e.dtype)))
    if m.bias is not None:
        operands.append(e.tensor(m.bias))
    normed = e.node("LayerNormalization", *operands, axis=-1, epsilon=m.eps)
    return e.node("Transpose", normed, perm=[0, rank - 1, *range(1, rank - 1)])


def _group_norm(e: Builder, node: fx.Node, m: nn.GroupNorm) -> str:
    # GroupNormalization is right only from opset 21 on; instance norm over the groups is the same.
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = e.shape(source)
    grouped = e.node("Reshape", e.value(source), e.ints((shape[0], m.num_groups, -1)))
    ones = torch.ones(m.num_groups, dtype=e.dtype)
    grouped = e.node("InstanceNormalization", grouped, e.tensor(ones), e.tensor(ones * 0), epsilon=m.eps)
    out = e.node("Reshape", grouped, e.ints(shape))
    if m.weight is None:
        return out
    tail = (m.num_channels,) + (1,) * (len(shape) - 2)
    return e.node("Add", e.node("Mul", out, e.tensor(m.weight.view(tail))), e.tensor(m.bias.view(tail)))


def _select(e: Builder, node: fx.Node, m: ChannelSelect) -> str:
    if m.span is None:
        return e.node("Gather", e.value(node.args[0]), e.ints(m.index), axis=1)
    start, stop, step = (e.ints([i]) for i in m.span)
    return e.node("Slice", e.value(node.args[0]), start, stop, e.ints([1]), step)


def _pixel_slice(e: Builder, node: fx.Node, m: PixelSlice) -> str:
    axes = range(2, len(m.steps) + 2)
    starts = [lo for lo, _ in m.amounts]
    stops = [-hi if hi else 2**31 - 1 for _, hi in m.amounts]
    return e.node("Slice", e.value(node.args[0]), e.ints(starts), e.ints(stops), e.ints(axes), e.ints(m.steps))


def _space_to_depth(e: Builder, node: fx.Node, m: SpaceToDepth) -> str:
    return _blocks(e, node, m.factors)


def _blocks(e: Builder, node: fx.Node, factors: Sequence[int]) -> str:
    """Pixels of blocks as channels. ONNX's SpaceToDepth has the block outermost, torch the channel."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    batch, channels, *size = e.shape(source)
    value, n = e.value(source), len(factors)
    if any(s % f for s, f in zip(size, factors, strict=True)):
        whole = [s - s % f for s, f in zip(size, factors, strict=True)]
        value = e.node("Slice", value, e.ints([0] * n), e.ints(whole), e.ints(range(2, n + 2)))
    split = [p for s, f in zip(size, factors, strict=True) for p in (s // f, f)]
    value = e.node("Reshape", value, e.ints([batch, channels, *split]))
    value = e.node("Transpose", value, perm=[0, 1, *range(3, 2 * n + 2, 2), *range(2, 2 * n + 2, 2)])
    return e.node("Reshape", value, e.ints(e.shape(node)))


def _depth_to_space(e: Builder, node: fx.Node, m: DepthToSpace) -> str:
    """Channels as the pixels of a block. ONNX's DepthToSpace has two dimensions and one factor."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    n = len(m.factors)
    batch, channels, *size = e.shape(source)
    if n == 2 and m.factors[0] == m.factors[1]:
        return e.node("DepthToSpace", e.value(source), blocksize=m.factors[0], mode="CRD")
    value = e.node("Reshape", e.value(source), e.ints([batch, channels // math.prod(m.factors), *m.factors, *size]))
    value = e.node("Transpose", value, perm=[0, 1, *(axis for i in range(n) for axis in (n + 2 + i, 2 + i))])
    return e.node("Reshape", value, e.ints(e.shape(node)))


def _affine(e: Builder, node: fx.Node, m: ChannelAffine) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    scale, bias = (t.view(-1, *(1,) * (len(e.shape(source)) - 2)) for t in (m.scale, m.bias))
    return e.node("Add", e.node("Mul", e.value(source), e.tensor(scale)), e.tensor(bias))


def _linear(e: Builder, node: fx.Node, m: nn.Linear) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if len(e.shape(source)) == 2:
        operands = [e.value(source), e.tensor(m.weight)]
        if m.bias is not None:
            operands.append(e.tensor(m.bias))
        return e.node("Gemm", *operands, transB=1)
    out = e.node("MatMul", e.value(source), e.tensor(m.weight.T))
    return out if m.bias is None else e.node("Add", out, e.tensor(m.bias))


def _flat(e: Builder, node: fx.Node, source: fx.Node, start: int, end: int) -> str:
    if start == 1 and end == -1:
        return e.node("Flatten", e.value(source), axis=1)
    return e.node("Reshape", e.value(source), e.ints(e.shape(node)))


def _prelu(e: Builder, node: fx.Node, m: nn.PReLU) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    slope = m.weight
    if slope.numel() > 1:
        slope = slope.view(-1, *(1,) * (len(e.shape(source)) - 2))  # type: ignore[assignment]
    return e.node("PRelu", e.value(source), e.tensor(slope))


def _silu(e: Builder, node: fx.Node, m: nn.Module) -> str:
    x = e.value(node.args[0])
    return e.node("Mul", x, e.node("Sigmoid", x))


def _clip(low: Callable[[Any], float], high: Callable[[Any], float]) -> Callable[[Builder, fx.Node, Any], str]:
    return lambda e, node, m: e.node("Clip", e.value(node.args[0]), e.scalar(low(m)), e.scalar(high(m)))


def _unary(op: str, **attributes: Callable[[Any], Any]) -> Callable[[Builder, fx.Node, Any], str]:
    return lambda e, node, m: e.node(op, e.value(node.args[0]), **{k: f(m) for k, f in attributes.items()})


def _softplus(e: Builder, node: fx.Node, m: nn.Softplus) -> str:
    if m.beta != 1:
        raise UnsupportedOp(f"{node.name}: softplus with a beta of {m.beta}")
    return e.node("Softplus", e.value(node.args[0]))


# Steps of a formula that are one op of ONNX.
_STEPS = {
    **{name: name.capitalize() for name in ("add", "sub", "mul", "div", "pow", "abs", "exp", "log", "sqrt", "erf")},
    **{name: name.capitalize() for name in ("reciprocal", "neg", "sin", "cos", "tan", "sinh", "cosh", "sigmoid")},
    **{
        name: name.capitalize() for name in ("asin", "acos", "atan", "asinh", "acosh", "atanh", "tanh", "sign", "floor")
    },
    **{"ceil": "Ceil", "round": "Round", "relu": "Relu", "where": "Where", "maximum": "Max", "minimum": "Min"},
    **{"max": "Max", "min": "Min", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual"},
}


def _pointwise(e: Builder, node: fx.Node, m: Pointwise) -> str:
    """A formula step by step; a part of it reads a stand-in for the value that it reads."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    names = [e.value(source)]
    apart = fx.Graph()
    for name, args, kwargs in m.steps:
        if name == PART:
            part = m.get_submodule(str(args[0]))
            rule = MODULE_RULES.get(type(part))
            if rule is None:
                raise UnsupportedOp(f"the emitter has no rule for {type(part).__name__} in the formula of {node.name}")
            read = apart.placeholder("value")
            e.stand_in(read, source, names[int(args[1][1:])])
            names.append(rule(e, apart.call_module("part", (read,)), part))
            continue
        given = [names[int(a[1:])] if is_operand(a) else e.value(a) for a in args]
        if name == "square":
            given, name = given * 2, "mul"
        if name == "rsub":
            given, name = given[::-1], "sub"
        if kwargs or name not in _STEPS:
            raise UnsupportedOp(f"the emitter has no rule for {name} in the formula of {node.name}")
        names.append(e.node(_STEPS[name], *given))
    return names[-1]


def _softmax(op: str) -> Callable[[Builder, fx.Node, Any], str]:
    def rule(e: Builder, node: fx.Node, m: Any) -> str:
        if m.dim is None:
            raise UnsupportedOp(f"{node.name}: softmax without a dim")
        return e.node(op, e.value(node.args[0]), axis=m.dim)

    return rule


def _same(e: Builder, node: fx.Node, m: nn.Module) -> str:
    return e.value(node.args[0])


def _binary(op: str) -> Callable[..., str]:
    def rule(e: Builder, node: fx.Node, a: Any, b: Any, *, alpha: float = 1) -> str:
        right = e.value(b)
        if alpha != 1:
            right = e.node("Mul", right, e.scalar(alpha))
        return e.node(op, e.value(a), right)

    return rule


def _cat(e: Builder, node: fx.Node, tensors: Sequence[Any], dim: int = 0) -> str:
    return e.node("Concat", *(e.value(t) for t in tensors), axis=dim)


MODULE_RULES: dict[type[nn.Module], Rule] = {
    **WINDOW_RULES,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), _same),
    ChannelAffine: _affine,
    ChannelLayerNorm: _channel_layer_norm,
    ChannelSelect: _select,
    PixelSlice: _pixel_slice,
    SpaceToDepth: _space_to_depth,
    DepthToSpace: _depth_to_space,
    nn.PixelUnshuffle: lambda e, node, m: _blocks(e, node, (m.downscale_factor,) * 2),
    nn.PixelShuffle: lambda e, node, m: e.node(
        "DepthToSpace", e.value(node.args[0]), blocksize=m.upscale_factor, mode="CRD"
    ),
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Linear: _linear,
    nn.Flatten: lambda e, node, m: _flat(e, node, node.args[0], m.start_dim, m.end_dim),  # type: ignore[arg-type]
    nn.ReLU: _unary("Relu"),
    nn.ReLU6: _clip(lambda m: 0.0, lambda m: 6.0),
    nn.Hardtanh: _clip(lambda m: m.min_val, lambda m: m.max_val),
    nn.SiLU: _silu,
    nn.Hardswish: _unary("HardSwish"),
    nn.Hardsigmoid: _unary("HardSigmoid", alpha=lambda m: 1 / 6, beta=lambda m: 0.5),
    nn.Sigmoid: _unary("Sigmoid"),
    nn.Tanh: _unary("Tanh"),
    nn.GELU: _unary("Gelu", approximate=lambda m: m.approximate),
    nn.LeakyReLU: _unary("LeakyRelu", alpha=lambda m: m.negative_slope),
    nn.ELU: _unary("Elu", alpha=lambda m: m.alpha),
    nn.CELU: _unary("Celu", alpha=lambda m: m.alpha),
    nn.SELU: _unary("Selu"),
    nn.Mish: _unary("Mish"),
    nn.Softsign: _unary("Softsign"),
    nn.Softplus: _softplus,
    nn.Tanhshrink: lambda e, node, m: e.node("Sub", e.value(node.args[0]), e.node("Tanh", e.value(node.args[0]))),
    nn.Softshrink: _unary("Shrink", bias=lambda m: m.lambd, lambd=lambda m: m.lambd),
    nn.Hardshrink: _unary("Shrink", bias=lambda m: 0.0, lambd=lambda m: m.lambd),
    Pointwise: _pointwise,
    nn.PReLU: _prelu,
    nn.Softmax: _softmax("Softmax"),
    nn.LogSoftmax: _softmax("LogSoftmax"),
}
FUNCTION_RULES: dict[Any, Callable[..., str]] = {
    torch.add: _binary("Add"),
    operator.add: _binary("Add"),
    torch.sub: _binary("Sub"),
    operator.sub: _binary("Sub"),
    torch.mul: _binary("Mul"),
    operator.mul: _binary("Mul"),
    torch.cat: _cat,
    torch.concat: _cat,
    torch.flatten: lambda e, node, x, start_dim=0, end_dim=-1: _flat(e, node, x, start_dim, end_dim),
}
