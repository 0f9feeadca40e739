"""Cuts channels off modules: a copy of a module that has only some of its input and output channels.

    conv, Linear        rows of the weight for its outputs, columns for its inputs
    grouped conv        whole groups, its inputs and outputs alike
    norm, scale, PReLU  one number a channel: inputs and outputs are the same channels
    GroupNorm           whole groups of channels that are normalised together
    ChannelSelect       an index into the inputs that stay

Tensors that are not cut are shared with the module.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..model.model_copy import shared_copy
from . import ops
from .pointwise import Pointwise

__all__ = ["cut_module", "is_cut"]

_NORMS = (*ops.BATCH_NORMS, *ops.INSTANCE_NORMS, nn.GroupNorm)


def is_cut(module: nn.Module) -> bool:
    """Whether a module has anything of its own for each channel, so that it must change where channels go."""
    if isinstance(module, Pointwise):
        return any(is_cut(part) for part in module.children())
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    if isinstance(module, ops.ChannelAffine):
        return max(module.scale.numel(), module.bias.numel()) > 1
    return isinstance(module, (*ops.CONVS, *ops.TRANSPOSED, nn.Linear, *_NORMS, ops.ChannelSelect))


def cut_module(module: nn.Module, inputs: Tensor | None, outputs: Tensor | None) -> nn.Module:
    """A copy of `module` with the input channels `inputs` and the output channels `outputs`, indices in order; None for
    all of them. What has nothing for each channel is given back as it is."""
    if not is_cut(module) or (inputs is None and outputs is None):
        return module
    if isinstance(module, ops.ChannelSelect):
        return _cut_select(module, inputs, outputs)
    new: Any = shared_copy(module)
    if isinstance(module, Pointwise):
        for name, part in module.named_children():
            new._modules[name] = cut_module(part, outputs, outputs)
    elif isinstance(module, nn.Linear):
        _set(new, "weight", _taken(_taken(module.weight, outputs, 0), inputs, 1))
        _set(new, "bias", _taken(module.bias, outputs, 0))
        new.out_features, new.in_features = new.weight.shape
    elif isinstance(module, (*ops.CONVS, *ops.TRANSPOSED)):
        _cut_conv(new, module, inputs, outputs)
    else:
        for name in ("weight", "bias", "running_mean", "running_var", "scale"):
            value = getattr(module, name, None)
            if isinstance(value, Tensor) and value.numel() > 1:
                _set(new, name, _taken(value, outputs, 0))
        _set_counts(new, outputs)
    return new


def _cut_conv(new: Any, module: Any, inputs: Tensor | None, outputs: Tensor | None) -> None:
    transposed = isinstance(module, ops.TRANSPOSED)
    if module.groups == 1:
        weight = _taken(_taken(module.weight, outputs, int(transposed)), inputs, int(not transposed))
        assert weight is not None
        new.in_channels, new.out_channels = weight.shape[int(not transposed)], weight.shape[int(transposed)]
    else:
        assert inputs is not None and outputs is not None
        size = module.in_channels // module.groups
        weight = _taken(module.weight, inputs if transposed else outputs, 0)
        new.groups = len(inputs) // size
        new.in_channels, new.out_channels = len(inputs), len(outputs)
    _set(new, "weight", weight)
    _set(new, "bias", _taken(module.bias, outputs, 0))


def _cut_select(module: ops.ChannelSelect, inputs: Tensor | None, outputs: Tensor | None) -> ops.ChannelSelect:
    places = range(len(module.index)) if outputs is None else outputs.tolist()
    chosen = [module.index[i] for i in places]
    if inputs is not None:
        position = {channel: i for i, channel in enumerate(inputs.tolist())}
        chosen = [position[channel] for channel in chosen]
    device = None if module.gather is None else module.gather.device
    return ops.ChannelSelect(chosen, device).train(module.training)


def _set_counts(new: Any, outputs: Tensor | None) -> None:
    if outputs is None:
        return
    if isinstance(new, nn.GroupNorm):
        new.num_groups = len(outputs) * new.num_groups // new.num_channels
        new.num_channels = len(outputs)
    elif isinstance(new, nn.PReLU):
        new.num_parameters = len(outputs)
    elif hasattr(new, "num_features"):
        new.num_features = len(outputs)


def _taken(value: Tensor | None, index: Tensor | None, dim: int) -> Tensor | None:
    if value is None or index is None:
        return value
    return value.detach().index_select(dim, index.to(value.device))


def _set(new: nn.Module, name: str, value: Tensor | None) -> None:
    if value is None:
        return
    if name in new._parameters:
        before = new._parameters[name]
        assert before is not None
        if value is not before:
            new._parameters[name] = nn.Parameter(value, requires_grad=before.requires_grad)
    else:
        new._buffers[name] = value
