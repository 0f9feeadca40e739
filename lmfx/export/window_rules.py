"""The emitter's rules for ops that have a window: convolutions, pads and pools (the others: `rules`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from lmfx.export.builder import Builder, UnsupportedOp
from lmfx.passes.graph.ops import MIRRORS, TRANSPOSED
from lmfx.passes.graph.shapes import per_dimension

__all__ = ["WINDOW_RULES", "Rule"]

Rule = Callable[[Builder, fx.Node, Any], str]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


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


def _mirror(mode: str) -> Rule:
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


def _adaptive(average: bool) -> Rule:
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


WINDOW_RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(_CONVS, _conv),
    **dict.fromkeys(TRANSPOSED, _transposed),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), _pad),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), _pad),
    **dict.fromkeys(MIRRORS[:3], _mirror("reflect")),
    **dict.fromkeys(MIRRORS[3:6], _mirror("replicate")),
    **dict.fromkeys(MIRRORS[6:], _mirror("circular")),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _max_pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _avg_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _adaptive(True)),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _adaptive(False)),
}
