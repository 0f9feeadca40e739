"""Makes one function or method node a torch.nn module: `F.conv2d(x, self.weight)` as an nn.Conv2d of its own.

    %w = get_attr[conv.weight]                  ->      %c = call_module[conv](%x)       plain nn.Conv2d
    %c = conv2d(%x, %w, None, 1, 1)

A node with arguments that are not known, or that are values, has no module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph import ops
from ..graph.node_facts import is_floating, shape_of, tensor_shape
from ..graph.raw_nodes import bind, tensor_of
from .transposed import transposed_conv

__all__ = ["global_pool", "module_of"]

_CONV_ARGS = ("weight", "bias", "stride", "padding", "dilation", "groups")
_BN_ARGS = {
    "function": ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "aten": ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


# Functions that are one module once their arguments are constants: name -> (module class, parameter names in order).
Maker = Callable[..., nn.Module]


def _relu6_or_hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> nn.Module:
    return nn.ReLU6() if (min_val, max_val) == (0, 6) else nn.Hardtanh(min_val, max_val)


def _clamp(min: float | None = None, max: float | None = None) -> nn.Module | None:
    if isinstance(min, (int, float)) and max is None and min == 0:
        return nn.ReLU()
    if isinstance(min, (int, float)) and isinstance(max, (int, float)) and min < max:
        return _relu6_or_hardtanh(float(min), float(max))
    return None


_MIRROR = {"reflect": 0, "replicate": 3, "circular": 6}  # where in ops.MIRRORS


def _pad(pad: Any, mode: str = "constant", value: float | None = 0.0) -> nn.Module | None:
    if not all(isinstance(p, int) for p in pad) or len(pad) not in (2, 4, 6):
        return None
    ndim = len(pad) // 2
    if mode != "constant":
        mirror: Any = ops.MIRRORS[_MIRROR[mode] + ndim - 1]
        return mirror(tuple(pad))
    return (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)[ndim - 1](tuple(pad), float(value or 0.0))


def _pool(cls: type[nn.Module]) -> Maker:
    def make(kernel_size: Any, stride: Any = None, *args: Any, **kwargs: Any) -> nn.Module:
        return cls(kernel_size, stride or None, *args, **kwargs)

    return make


_AVG = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_KINDS = ("Reflection", "Replication")
FUNCTIONS: dict[str, tuple[Callable[..., nn.Module | None], tuple[str, ...]]] = {
    "relu": (nn.ReLU, ()),
    "relu6": (nn.ReLU6, ()),
    "hardtanh": (_relu6_or_hardtanh, ("min_val", "max_val")),
    "clamp": (_clamp, ("min", "max")),
    "clip": (_clamp, ("min", "max")),
    "clamp_min": (_clamp, ("min",)),
    "silu": (nn.SiLU, ()),
    "gelu": (nn.GELU, ("approximate",)),
    "elu": (nn.ELU, ("alpha",)),
    "selu": (nn.SELU, ()),
    "celu": (nn.CELU, ("alpha",)),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
    "sigmoid": (nn.Sigmoid, ()),
    "logsigmoid": (nn.LogSigmoid, ()),
    "log_sigmoid": (nn.LogSigmoid, ()),
    "tanh": (nn.Tanh, ()),
    "hardswish": (nn.Hardswish, ()),
    "hardsigmoid": (nn.Hardsigmoid, ()),
    "mish": (nn.Mish, ()),
    "softplus": (nn.Softplus, ("beta", "threshold")),
    "softsign": (nn.Softsign, ()),
    "tanhshrink": (nn.Tanhshrink, ()),
    "softshrink": (nn.Softshrink, ("lambd",)),
    "hardshrink": (nn.Hardshrink, ("lambd",)),
    "threshold": (nn.Threshold, ("threshold", "value")),
    "pad": (_pad, ("pad", "mode", "value")),
    "constant_pad_nd": (lambda pad, value=0.0: _pad(pad, "constant", value), ("pad", "value")),
    **{f"{kind.lower()}_pad{n}d": (getattr(nn, f"{kind}Pad{n}d"), ("padding",)) for kind in _KINDS for n in (1, 2, 3)},
    "avg_pool1d": (_pool(nn.AvgPool1d), _AVG[:-1]),
    "avg_pool2d": (_pool(nn.AvgPool2d), _AVG),
    "avg_pool3d": (_pool(nn.AvgPool3d), _AVG),
    "max_pool1d": (_pool(nn.MaxPool1d), _MAX),
    "max_pool2d": (_pool(nn.MaxPool2d), _MAX),
    "max_pool3d": (_pool(nn.MaxPool3d), _MAX),
    "adaptive_avg_pool1d": (nn.AdaptiveAvgPool1d, ("output_size",)),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d, ("output_size",)),
    "adaptive_avg_pool3d": (nn.AdaptiveAvgPool3d, ("output_size",)),
    "adaptive_max_pool1d": (nn.AdaptiveMaxPool1d, ("output_size",)),
    "adaptive_max_pool2d": (nn.AdaptiveMaxPool2d, ("output_size",)),
    "adaptive_max_pool3d": (nn.AdaptiveMaxPool3d, ("output_size",)),
    "pixel_shuffle": (nn.PixelShuffle, ("upscale_factor",)),
    "pixel_unshuffle": (nn.PixelUnshuffle, ("downscale_factor",)),
    "flatten": (lambda start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim), ("start_dim", "end_dim")),
}


def module_of(gm: fx.GraphModule, node: fx.Node, name: str) -> nn.Module | None:
    """The module that computes what the node of the plain name `name` computes, or None if there is none."""
    if "input" in node.kwargs and not node.args:  # F.conv2d(input=x, weight=w)
        node.args = (node.kwargs["input"],)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "input"}
    if name in ("conv1d", "conv2d", "conv3d"):
        return _conv(gm, node, int(name[4]))
    if name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        return transposed_conv(gm, node, int(name[-2]))
    if name == "batch_norm":
        return _batch_norm(gm, node)
    if name == "instance_norm":
        return _instance_norm(gm, node)
    if name == "linear":
        return _linear(gm, node)
    if name in ("group_norm", "layer_norm"):
        return _norm(gm, node, name)
    if name == "prelu":
        return _prelu(gm, node)
    if name in FUNCTIONS and len(node.all_input_nodes) == 1:
        return _simple(node, name)
    return None


def _conv(gm: fx.GraphModule, node: fx.Node, ndim: int) -> nn.Module | None:
    bound = bind(node, _CONV_ARGS)
    weight = tensor_of(gm, bound.get("weight")) if bound else None
    if bound is None or weight is None:
        return None
    bias = tensor_of(gm, bound.get("bias"))
    if bound.get("bias") is not None and bias is None:
        return None
    groups = bound.get("groups", 1)

    def tup(key: str, default: int) -> Any:
        value = bound.get(key, default)
        if isinstance(value, (str, int)):
            return value
        return tuple(value) if len(value) == ndim else tuple(value) * ndim

    conv = nn.utils.skip_init(
        ops.conv_class(ndim),
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=tup("stride", 1),
        padding=tup("padding", 0),
        dilation=tup("dilation", 1),
        groups=groups,
        bias=bias is not None,
    )
    conv.weight = _parameter(weight)
    if bias is not None:
        conv.bias = _parameter(bias)
    return conv


def _batch_norm(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    kind = "aten" if isinstance(node.target, torch._ops.OpOverload) or node.target is torch.batch_norm else "function"
    names = _BN_ARGS[kind] + (("cudnn_enabled",) if kind == "aten" else ())
    bound = bind(node, names)
    shape = tensor_shape(node)
    if bound is None or bound.get("training") not in (False, None) or not 2 <= len(shape) <= 5:
        return None
    tensors = {k: tensor_of(gm, bound.get(k)) for k in ("running_mean", "running_var", "weight", "bias")}
    if any(bound.get(k) is not None and t is None for k, t in tensors.items()) or tensors["running_mean"] is None:
        return None
    cls = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2]
    channels = tensors["running_mean"].numel()
    if (tensors["weight"] is None) != (tensors["bias"] is None):
        return None
    norm = cls(channels, eps=bound.get("eps", 1e-5), affine=tensors["weight"] is not None)
    norm.running_mean, norm.running_var = tensors["running_mean"], tensors["running_var"]
    if tensors["weight"] is not None and tensors["bias"] is not None:
        norm.weight, norm.bias = _parameter(tensors["weight"]), _parameter(tensors["bias"])
    return norm


def _instance_norm(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """A norm of each map by its own statistics; one by running ones is a batch norm, and is left as it is."""
    aten = isinstance(node.target, torch._ops.OpOverload) or node.target is torch.instance_norm
    names = (
        ("weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps", "cudnn_enabled")
        if aten
        else ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    )
    bound, shape = bind(node, names), tensor_shape(node)
    if bound is None or bound.get("use_input_stats") is False or not 3 <= len(shape) <= 5:
        return None
    tensors = {k: tensor_of(gm, bound.get(k)) for k in ("weight", "bias")}
    if any(bound.get(k) is not None and t is None for k, t in tensors.items()):
        return None
    weight, bias = tensors["weight"], tensors["bias"]
    if (weight is None) != (bias is None):
        return None
    norm = ops.INSTANCE_NORMS[len(shape) - 3](shape[1], eps=bound.get("eps", 1e-5), affine=weight is not None)
    if weight is not None and bias is not None:
        norm.weight, norm.bias = _parameter(weight), _parameter(bias)
    return norm


def _norm(gm: fx.GraphModule, node: fx.Node, name: str) -> nn.Module | None:
    """Norms that compute their statistics: F.group_norm(x, groups, ...), F.layer_norm(x, shape, ...), and aten's."""
    first = "num_groups" if name == "group_norm" else "normalized_shape"
    # torch.layer_norm and aten's have one more flag at the end, which says nothing in eval mode.
    bound = bind(node, (first, "weight", "bias", "eps", "cudnn_enabled"))
    if bound is None or isinstance(bound.get(first), (fx.Node, type(None))):
        return None
    tensors = {k: tensor_of(gm, bound.get(k)) for k in ("weight", "bias")}
    if any(bound.get(k) is not None and t is None for k, t in tensors.items()):
        return None
    weight, bias = tensors["weight"], tensors["bias"]
    if weight is None and bias is not None:
        return None
    eps, affine = bound.get("eps", 1e-5), weight is not None
    norm: nn.GroupNorm | nn.LayerNorm
    if name == "group_norm":
        if affine and bias is None:
            return None
        norm = nn.GroupNorm(bound[first], tensor_shape(node)[1], eps=eps, affine=affine)
    else:
        norm = nn.LayerNorm(tuple(bound[first]), eps=eps, elementwise_affine=affine, bias=bias is not None)
    if weight is not None:
        norm.weight = _parameter(weight)
    if bias is not None:
        norm.bias = _parameter(bias)
    return norm


def _linear(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    bound = bind(node, ("weight", "bias"))
    weight = tensor_of(gm, bound.get("weight")) if bound else None
    if bound is None or weight is None or weight.dim() != 2:
        return None
    bias = tensor_of(gm, bound.get("bias"))
    if bound.get("bias") is not None and bias is None:
        return None
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = _parameter(weight)
    if bias is not None:
        linear.bias = _parameter(bias)
    return linear


def _prelu(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    weight = tensor_of(gm, node.args[1] if len(node.args) > 1 else node.kwargs.get("weight"))
    if weight is None:
        return None
    module = nn.PReLU(weight.numel())
    module.weight = _parameter(weight)
    return module


def _simple(node: fx.Node, name: str) -> nn.Module | None:
    make, names = FUNCTIONS[name]
    bound = bind(node, names)
    if bound is None or bound.get("return_indices"):
        return None
    bound.pop("return_indices", None)
    if name in ("pad", "constant_pad_nd") and isinstance(bound.get("pad"), (list, tuple)):
        # F.pad(x, (1, 1)) pads the last dimension of a map only: the others get zeros.
        rank = len(tensor_shape(node))
        bound["pad"] = (*bound["pad"], *(0,) * (2 * (rank - 2) - len(bound["pad"])))
        if bound.get("mode", "constant") != "constant" and len(bound["pad"]) != 2 * (rank - 2):
            return None  # an unbatched map
    if any(isinstance(v, fx.Node) for v in bound.values()):
        return None
    bound = {k: tuple(v) if isinstance(v, list) else v for k, v in bound.items()}  # aten's sizes are lists
    if name == "flatten" and (shape_of(node) is None or bound.get("start_dim", 0) != 1):
        return None  # nn.Flatten is the canonical form of flatten(x, 1) only
    try:
        return make(**bound)
    except (TypeError, ValueError):
        return None


def global_pool(node: fx.Node) -> nn.Module | None:
    """The pool to one pixel that a mean over all of a map's dimensions but the first two is, or None."""
    source = node.args[0] if node.args else None
    before = shape_of(source) if isinstance(source, fx.Node) and is_floating(source) else None
    bound = bind(node, ("dim", "keepdim", "dtype"))
    if bound is None or bound.get("dtype") is not None or before is None or not 3 <= len(before) <= 5:
        return None
    dims = bound.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (list, tuple)) or not all(isinstance(d, int) for d in dims):
        return None
    if sorted(d % len(before) for d in dims) != list(range(2, len(before))):
        return None
    return (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(before) - 3](1)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
