"""What lmfx knows of single operations: which modules are convs, affine, activations, and how functions map to them.

    conv         y = W * x + b                    nn.Conv1d/2d/3d with zero padding, transposed ones (`enlarging`)
    affine       diagonal, pads, averages         BatchNorm with running statistics, ChannelAffine, pads and crops
                 pixels that move                 slices of pixels, space-to-depth, pixel shuffles
    selection    a part or an order of channels   ChannelSelect: affine, and a layer of its own
    activation   one number in, one number out    ReLU, SiLU, formulas; a cut keeps it, a span makes it linear. Norms
                                                  whose statistics come from the map (GroupNorm) are treated so
    join         several maps in, one out         add, sub, cat, mul

Everything else is opaque: it may be kept, or replaced whole by a fitted conv, but not composed.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import fx, nn

from ..errors import OptionError
from .modules import ChannelAffine, ChannelLayerNorm, ChannelSelect, DepthToSpace, PixelSlice, SpaceToDepth
from .pointwise import Pointwise

__all__ = [
    "ACTIVATIONS",
    "AFFINE",
    "AVG_POOLS",
    "BATCH_NORMS",
    "CASTS",
    "CONVS",
    "IDEMPOTENT",
    "IDENTITIES",
    "INSTANCE_NORMS",
    "JOINS",
    "MAX_POOLS",
    "MIRRORS",
    "PADS",
    "TRANSPOSED",
    "ChannelAffine",
    "ChannelLayerNorm",
    "ChannelSelect",
    "DepthToSpace",
    "PixelSlice",
    "Pointwise",
    "SpaceToDepth",
    "activation_of",
    "blocks_of",
    "conv_class",
    "enlarges",
    "has_hooks",
    "is_plain",
    "normalizes",
]

CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS: tuple[type[nn.Module], ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
AVG_POOLS: tuple[type[nn.Module], ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAX_POOLS: tuple[type[nn.Module], ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
PADS: tuple[type[nn.Module], ...] = (
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
)
MIRRORS: tuple[type[nn.Module], ...] = (
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
)
AFFINE: tuple[type[nn.Module], ...] = (
    *(*BATCH_NORMS, *AVG_POOLS, *PADS, ChannelAffine, ChannelSelect),
    *(PixelSlice, SpaceToDepth, nn.PixelUnshuffle, DepthToSpace, nn.PixelShuffle),
)
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.SiLU,
    nn.GELU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
    nn.Threshold,
    nn.Tanhshrink,
    nn.Softshrink,
    nn.Hardshrink,
    Pointwise,
)
IDEMPOTENT: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
IDENTITIES: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
# Classes that are the identity in eval mode, wherever they are defined (timm, torchvision and copies of them).
IDENTITY_NAMES = frozenset({"DropPath", "StochasticDepth", "DropBlock2d", "DropBlock3d"})
IDENTITY_FUNCTIONS = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"}
    | {"stochastic_depth", "drop_path", "drop_block2d", "drop_block3d"}
)
# The identity where the value has the type already, which the example tells.
CASTS = frozenset({"to", "type_as", "float", "double", "half", "bfloat16", "_to_copy"})
JOINS: dict[str, str] = {"add": "add", "sub": "sub", "cat": "cat", "concat": "cat", "concatenate": "cat", "mul": "mul"}


def normalizes(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether `module` is a norm of maps of this shape whose statistics come from the map itself.

    GroupNorm, InstanceNorm, and a LayerNorm over the channels of channels-first maps: a class of its own that overrides
    what nn.LayerNorm computes, known by its size, where that cannot be the last dimension's.
    """
    if has_hooks(module) or len(shape) < 3:
        return False
    if isinstance(module, ChannelLayerNorm):
        return True
    if isinstance(module, nn.LayerNorm):
        size = tuple(module.normalized_shape)
        return not is_plain(module, nn.LayerNorm) and size == (shape[1],) and shape[-1] != shape[1]
    return isinstance(module, (nn.GroupNorm, *INSTANCE_NORMS))


_WITH_ARGUMENTS = (nn.Threshold, nn.PReLU, nn.RReLU, Pointwise)


def activation_of(name: str) -> nn.Module:
    """The activation of this name: "relu", "relu6", "silu", "gelu", "hardswish", ... Raises `OptionError`."""
    known = {kind.__name__.lower(): kind for kind in ACTIVATIONS if kind not in _WITH_ARGUMENTS}
    if not isinstance(name, str) or name not in known:
        raise OptionError(f"activation_after={name!r}: use None, or one of {', '.join(map(repr, known))}")
    return known[name]()


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` computes exactly what `kind` computes: `kind` itself or a subclass with nothing overridden."""
    if not isinstance(module, kind) or has_hooks(module):
        return False
    if not _METHODS.isdisjoint(vars(module)):
        return False  # replaced on this one module
    return type(module) is kind or not _overrides(type(module), kind)  # type: ignore[arg-type]


_METHODS = frozenset({"forward", "_conv_forward", "_check_input_dim"})
# What a subclass may have of its own and still compute the same; __init__ only says what is computed.
_HARMLESS = frozenset({"extra_repr", "reset_parameters", "train", "eval"})
_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var", "__call__", "__getattr__", "__getattribute__"})


@functools.cache
def _overrides(own: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether a subclass has a forward, a helper of it, a call or a weight (as a property) of its own."""
    used = (_METHODS | _TENSORS | {name for name in dir(kind) if not name.startswith("_")}) - _HARMLESS
    between = own.__mro__[: own.__mro__.index(kind)]
    return any(
        name in used and getattr(own, name) is not getattr(kind, name, None) for c in between for name in vars(c)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether the module runs hooks around its forward, which a rewritten graph would lose."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def plain_in(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether `module` is plainly one of `kinds`."""
    return any(is_plain(module, kind) for kind in kinds)


def mirror_mode(module: nn.Module) -> Literal["zeros", "reflect", "replicate", "circular"]:
    """The padding mode of a pad module."""
    modes: tuple[Literal["reflect", "replicate", "circular"], ...] = ("reflect", "replicate", "circular")
    found = [mode for i, mode in enumerate(modes) if isinstance(module, MIRRORS[3 * i : 3 * i + 3])]
    return found[0] if found else "zeros"


def rank(module: nn.Module) -> int:
    """The rank of the batched maps that a conv, norm, pool or pad of so many dimensions takes: 4 for nn.Conv2d."""
    mirrors = (MIRRORS[:3], MIRRORS[3:6], MIRRORS[6:])
    if isinstance(module, (nn.PixelUnshuffle, nn.PixelShuffle)):
        return 4
    if isinstance(module, DepthToSpace):
        return len(module.factors) + 2
    for kinds in (CONVS, TRANSPOSED, BATCH_NORMS, AVG_POOLS, MAX_POOLS, PADS[:3], PADS[3:], *mirrors):
        for i, kind in enumerate(kinds):
            if isinstance(module, kind):
                return i + 3
    raise TypeError(f"{type(module).__name__} has no number of spatial dimensions")


def blocks_of(module: nn.Module, ndim: int) -> tuple[int, ...] | None:
    """The size of the blocks of pixels that a space-to-depth makes channels of, or None if it is none."""
    if isinstance(module, SpaceToDepth):
        return module.factors
    return (module.downscale_factor,) * ndim if is_plain(module, nn.PixelUnshuffle) else None  # type: ignore[return-value]


def shuffled_blocks(module: nn.Module) -> tuple[int, ...] | None:
    """The size of the blocks of pixels that a pixel shuffle makes of channels, or None if it is none."""
    if isinstance(module, DepthToSpace):
        return module.factors
    return (module.upscale_factor,) * 2 if is_plain(module, nn.PixelShuffle) else None  # type: ignore[return-value]


def enlarges(module: nn.Module) -> bool:
    """Whether a module is written by `enlarging`: a transposed conv or a pixel shuffle."""
    return plain_in(module, TRANSPOSED) or shuffled_blocks(module) is not None


def keeps_shape(module: nn.Module) -> bool:
    """Whether the output has the shape and dtype of the one input, so that no shape needs to be computed.

    Fake tensors decompose norms into many small ops, which costs more than everything else in a graph.
    """
    own = (ChannelAffine, ChannelLayerNorm)
    return plain_in(module, (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm, *ACTIVATIONS, *own))


def conv_class(ndim: int) -> type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]:
    """The torch conv module for 1 to 3 spatial dimensions."""
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]


def affine_refusal(module: nn.Module) -> str | None:
    """None if the module is affine with the constants it has, else the reason why it is not."""
    if has_hooks(module):
        return "the module has forward hooks"
    if plain_in(module, (*CONVS, *TRANSPOSED)):
        return None
    if plain_in(module, BATCH_NORMS):
        return None if getattr(module, "running_mean", None) is not None else "the norm keeps no running statistics"
    if plain_in(module, AVG_POOLS):
        pool: Any = module
        padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,)
        if pool.ceil_mode:
            return "the average pool rounds its output size up"
        if any(padding) and not pool.count_include_pad and not getattr(pool, "divisor_override", None):
            return "the average pool does not count its padding"
        return None
    if plain_in(module, MIRRORS):
        pad: Any = module
        return "the pad crops, and fills from the map itself" if min(pad.padding) < 0 else None
    if plain_in(module, (*PADS, nn.PixelUnshuffle, nn.PixelShuffle)) or isinstance(
        module, (ChannelAffine, ChannelSelect, PixelSlice, SpaceToDepth, DepthToSpace)
    ):
        return None
    return f"{type(module).__name__} is not affine"


_RESIZING_MODULES: tuple[type[nn.Module], ...] = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Upsample,
    nn.Flatten,
    nn.Unflatten,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
_RESIZING_FUNCTIONS = frozenset(
    {"interpolate", "upsample", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes"}
    | {"movedim", "getitem", "narrow", "select", "expand", "grid_sample", "view_as", "expand_as", "resize", "t"}
)


def resizes(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether an opaque op gives a size of its own, so that equal sizes at the example's say nothing of others."""
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), _RESIZING_MODULES)
    name = function_name(node)
    return name in _RESIZING_FUNCTIONS or name.startswith(("adaptive_", "upsample_", "slice"))


def function_name(node: fx.Node) -> str:
    """The plain name of a function or method node: `relu` for F.relu, torch.relu, x.relu() and aten.relu.default."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).split("::")[1]
    return FUNCTION_NAMES.get(target) or str(getattr(target, "__name__", target))


# torch.nn.functional wraps these in dispatchers whose __name__ says nothing.
FUNCTION_NAMES: dict[Any, str] = {
    getattr(torch.nn.functional, name): name
    for name in ("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d")
}
