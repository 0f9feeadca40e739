"""Rewrites a transposed convolution of stride 1 as a convolution, with its kernel turned around.

    y[o] += W[i, o, t] x[i, n + p - d t]      ->      W'[o, i, j] = W[i, o, k - 1 - j]      p' = d (k - 1) - p

With groups this holds within each. Where the padding would be negative (it crops) or the stride is larger it stays what
it is, and `enlarging` describes it.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..graph import ops
from ..graph.raw_nodes import bind, tensor_of

__all__ = ["as_conv", "transposed_conv"]

_ARGS = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def transposed_conv(gm: fx.GraphModule, node: fx.Node, ndim: int) -> nn.Module | None:
    """The module that `F.conv_transpose2d(x, self.weight, ...)` is, None where its tensors are values."""
    bound = bind(node, _ARGS)
    weight = tensor_of(gm, bound.get("weight")) if bound else None
    bias = tensor_of(gm, bound.get("bias")) if bound else None
    if bound is None or weight is None or (bound.get("bias") is not None and bias is None):
        return None

    def tup(key: str, default: int) -> Any:
        value = bound.get(key, default)
        sizes = (value,) if isinstance(value, int) else tuple(value)
        return sizes if len(sizes) == ndim else sizes * ndim

    groups = bound.get("groups", 1)
    geometry = {"stride": tup("stride", 1), "padding": tup("padding", 0), "output_padding": tup("output_padding", 0)}
    if any(isinstance(n, fx.Node) for sizes in (*geometry.values(), tup("dilation", 1), (groups,)) for n in sizes):
        return None
    conv = nn.utils.skip_init(
        ops.TRANSPOSED[ndim - 1],
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        dilation=tup("dilation", 1),
        groups=groups,
        bias=bias is not None,
        **geometry,
    )
    conv.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        conv.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    made: nn.Module = conv
    return made


def as_conv(module: nn.Module) -> nn.Module | None:
    """The equal convolution of a transposed one, with a weight of its own; None if there is none."""
    if not isinstance(module, _ConvTransposeNd) or not ops.plain_in(module, ops.TRANSPOSED):
        return None
    extents = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    cropped: Any = module.padding
    padding = tuple(e - p for e, p in zip(extents, cropped, strict=True))
    if any(s != 1 for s in module.stride) or any(module.output_padding) or min(padding) < 0:
        return None
    ndim, groups = len(extents), module.groups
    conv = nn.utils.skip_init(
        ops.conv_class(ndim),
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        padding=padding,
        dilation=module.dilation,
        groups=groups,
        bias=module.bias is not None,
    )
    inner, outer = module.in_channels // groups, module.out_channels // groups
    blocks = module.weight.detach().reshape(groups, inner, outer, *module.kernel_size).transpose(1, 2)
    turned = blocks.flip(tuple(range(3, 3 + ndim))).reshape(module.out_channels, inner, *module.kernel_size)
    conv.weight = nn.Parameter(turned.contiguous(), requires_grad=module.weight.requires_grad)
    if module.bias is not None:
        conv.bias = module.bias
    return conv
