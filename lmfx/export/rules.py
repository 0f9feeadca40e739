"""One rule an op for the emitter: a torch.nn module or function and the names of its inputs -> ONNX nodes.

A rule adds nodes to the `Builder` and gives back the name of its value. Shapes are only worked out (on fake tensors)
when a rule asks for them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from lmfx.export.builder import Builder, UnsupportedOp
from lmfx.passes.graph.ops import (
    MIRRORS,
    TRANSPOSED,
    ChannelAffine,
    ChannelLayerNorm,
    ChannelSelect,
    DepthToSpace,
    PixelSlice,
    SpaceToDepth,
)
from lmfx.passes.graph.pointwise import PART, Pointwise, is_operand
from lmfx.passes.graph.shapes import per_dimension

__all__ = ["FUNCTION_RULES", "MODULE_RULES"]

# convolution and padding


def _pads(reversed_pairs: Sequence[int]) -> list[int]:
    """torch's (last begin, last end, second last begin, ...) -> ONNX's (begins..., ends...)."""
    pairs = [(reversed_pairs[i], reversed_pairs[i + 1]) for i in range(0, len(reversed_pairs), 2)][::-1]
    return [lo for lo, _ in pairs] + [hi for _, hi in pairs]


def _conv(e: Builder, node: fx.Node, m: Any) -> str:
    n = len(m.kernel_size)
    pads = _pads(m._reversed_padding_repeated_twice)
    source = node.args[0]
    if isinstance(source, fx.Node) and source in e.pads:
        pads = [a + b for a, b in zip(pads, e.pads.pop(source), strict=True)]
    value = e.value(source)
    if m.padding_mode != "zeros" and any(pads):
        value = e.node("Pad", value, e.ints(pads), "", e.ints(range(-n, 0)), mode=_MODES[m.padding_mode])
        pads = [0] * len(pads)
    operands = [value, e.tensor(m.weight)]
    if m.bias is not None:
        operands.append(e.tensor(m.bias))
    return e.node(
        "Conv",
        *operands,
        kernel_shape=list(m.kernel_size),
        strides=list(per_dimension(m.stride, n)),
        pads=pads,
        dilations=list(per_dimension(m.dilation, n)),
        group=m.groups,
    )


def _transposed(e: Builder, node: fx.Node, m: Any) -> str:
    operands = [e.value(node.args[0]), e.tensor(m.weight)]
    if m.bias is not None:
        operands.append(e.tensor(m.bias))
    return e.node(
        "ConvTranspose",
        *operands,
        kernel_shape=list(m.kernel_size),
        strides=list(m.stride),
        pads=[*m.padding, *m.padding],
        dilations=list(m.dilation),
        output_padding=list(m.output_padding),
        group=m.groups,
    )


_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _mirror(mode: str) -> Callable[[Builder, fx.Node, Any], str]:
    def rule(e: Builder, node: fx.Node, m: Any) -> str:
        pads = _pads(m.padding)
        axes = e.ints(range(-(len(pads) // 2), 0))
        return e.node("Pad", e.value(node.args[0]), e.ints(pads), "", axes, mode=_MODES[mode])

    return rule


def _pad(e: Builder, node: fx.Node, m: Any) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = float(getattr(m, "value", 0.0))
    pads = _pads(m.padding)
    users = list(node.users)
    if value == 0 and min(pads) >= 0 and len(users) == 1 and users[0].op == "call_module":
        user = e.gm.get_submodule(str(users[0].target))
        if type(user) in _CONVS and len(pads) == 2 * len(user.kernel_size) and user.padding_mode == "zeros":  # type: ignore[arg-type]
            e.pads[node] = pads
            return e.value(source)
    n = len(pads) // 2
    axes = e.ints(range(-n, 0))
    return e.node("Pad", e.value(source), e.ints(pads), e.scalar(value), axes, mode="constant")


# normalization


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


# pooling


def _windows(e: Builder, source: fx.Node, m: Any) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Kernel, strides, dilations, torch's pads (one a dimension) and the longer end pads that stand for ceil_mode."""
    shape = e.shape(source)
    n = {"1": 1, "2": 2, "3": 3}[type(m).__name__[-2]]
    kernel = per_dimension(m.kernel_size, n)
    stride = per_dimension(m.stride if m.stride not in (None, ()) else m.kernel_size, n)
    dilation = per_dimension(getattr(m, "dilation", 1), n)
    padding = per_dimension(m.padding, n)
    ends = []
    for size, k, s, d, p in zip(shape[-n:], kernel, stride, dilation, padding, strict=True):
        span = size + 2 * p - d * (k - 1) - 1
        out = span // s + 1
        # torch's rule: a last window that would start in the end padding is left out
        if m.ceil_mode and span % s and out * s < size + p:
            out += 1
        ends.append(max(p, (out - 1) * s + d * (k - 1) + 1 - size - p))
    return list(kernel), list(stride), list(dilation), list(padding), ends


def _max_pool(e: Builder, node: fx.Node, m: Any) -> str:
    if m.return_indices:
        raise UnsupportedOp(f"{node.name} returns indices")
    source = node.args[0]
    assert isinstance(source, fx.Node)
    kernel, stride, dilation, begins, ends = _windows(e, source, m)
    return e.node(
        "MaxPool", e.value(source), kernel_shape=kernel, strides=stride, dilations=dilation, pads=begins + ends
    )


def _avg_pool(e: Builder, node: fx.Node, m: Any) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    kernel, stride, _, begins, ends = _windows(e, source, m)
    name = e.value(source)
    divisor = getattr(m, "divisor_override", None)
    counted = m.count_include_pad or divisor is not None
    if counted and ends != begins and divisor is None:
        # torch counts its own padding but not what ceil_mode adds: the padding becomes real zeros
        axes = e.ints(range(-len(begins), 0))
        name = e.node("Pad", name, e.ints(begins + begins), e.scalar(0.0), axes, mode="constant")
        ends = [end - begin for begin, end in zip(begins, ends, strict=True)]
        begins, counted = [0] * len(begins), False
    out = e.node(
        "AveragePool", name, kernel_shape=kernel, strides=stride, pads=begins + ends, count_include_pad=int(counted)
    )
    if divisor is not None:
        out = e.node("Mul", out, e.scalar(math.prod(kernel) / divisor))
    return out


def _adaptive(average: bool) -> Callable[[Builder, fx.Node, Any], str]:
    def rule(e: Builder, node: fx.Node, m: Any) -> str:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        n = {"1": 1, "2": 2, "3": 3}[type(m).__name__[-2]]
        output = m.output_size
        asked = (output,) * n if isinstance(output, (int, type(None))) else tuple(output)
        if all(w == 1 for w in asked) and not getattr(m, "return_indices", False):
            return e.node("GlobalAveragePool" if average else "GlobalMaxPool", e.value(source))
        sizes = e.shape(source)[-n:]
        wanted = tuple(s if w is None else w for s, w in zip(sizes, asked, strict=True))
        if getattr(m, "return_indices", False):
            raise UnsupportedOp(f"{node.name} returns indices")
        if any(s % w for s, w in zip(sizes, wanted, strict=True)):
            raise UnsupportedOp(f"{node.name}: an adaptive pool from {sizes} to {wanted} has windows of unequal size")
        kernel = [s // w for s, w in zip(sizes, wanted, strict=True)]
        return e.node("AveragePool" if average else "MaxPool", e.value(source), kernel_shape=kernel, strides=kernel)

    return rule


# the rest


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


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MODULE_RULES: dict[type[nn.Module], Callable[[Builder, fx.Node, Any], str]] = {
    **dict.fromkeys(_CONVS, _conv),
    **dict.fromkeys(TRANSPOSED, _transposed),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), _pad),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), _pad),
    **dict.fromkeys(MIRRORS[:3], _mirror("reflect")),
    **dict.fromkeys(MIRRORS[3:6], _mirror("replicate")),
    **dict.fromkeys(MIRRORS[6:], _mirror("circular")),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _max_pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _avg_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _adaptive(True)),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _adaptive(False)),
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
