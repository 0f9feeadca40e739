"""Copies a model to work on: in eval mode, with plain parameters, and nothing of the original shared or changed.

Weights that modules compute (weight norm, prune masks, parametrizations) are evaluated (`computed_weights`), and what
only wraps a network is left out: the copy of a compiled or data-parallel network is a copy of the network.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .computed_weights import evaluate_weights

__all__ = ["deep_copy", "eval_copy", "leaf_copy", "shared_copy", "unwrapped"]


def eval_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode with plain parameters (parametrizations such as weight norm are evaluated)."""
    # Old-style weight_norm keeps a computed tensor as an attribute, which deepcopy refuses.
    model = unwrapped(model)
    computed: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    # A scripted function is no more than code, and refuses as well.
    held = [value for module in model.modules() for value in vars(module).values()]
    computed |= {id(value): value for value in held if isinstance(value, torch.jit.ScriptFunction)}
    clone = deep_copy(model, computed).eval()
    for module in list(clone.modules()):
        evaluate_weights(module)
        module._compiled_call_impl = None  # module.compile() was called: the eager forward computes the same
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = unwrapped(child)
    return clone


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """copy.deepcopy(model, memo), several times as fast where most of it is layers of torch.nn as they come."""
    memo = {} if memo is None else memo
    for module in model.modules():
        if id(module) not in memo and _is_simple(module):
            memo[id(module)] = leaf_copy(module, memo)
    return copy.deepcopy(model, memo)


def leaf_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of one layer."""
    memo = {} if memo is None else memo
    if not _is_simple(module):
        return copy.deepcopy(module, memo)
    clone = module.__new__(type(module))
    for name, value in vars(module).items():
        if isinstance(value, dict):  # tensors, or hooks of which there are none
            clone.__dict__[name] = type(value)((k, copy.deepcopy(v, memo)) for k, v in value.items())
        else:
            clone.__dict__[name] = value.copy() if isinstance(value, (list, set)) else value
    return clone


def shared_copy(module: nn.Module) -> nn.Module:
    """A module of its own with the same tensors and children: what is put into one is not in the other."""
    new: nn.Module = object.__new__(type(module))
    for name, value in vars(module).items():
        new.__dict__[name] = copy.copy(value) if isinstance(value, (dict, set)) else value
    return new


def _is_simple(module: nn.Module) -> bool:
    """Whether a module is a layer of torch.nn with nothing in it but numbers, words and tensors of its own."""
    if not type(module).__module__.startswith("torch.nn.modules."):
        return False
    return all(name in _TENSORS or _is_plain(value) for name, value in vars(module).items())


def _is_plain(value: Any) -> bool:
    """Whether a shallow copy of a value is a deep one."""
    if isinstance(value, (tuple, list)):
        return all(v is None or isinstance(v, (bool, int, float, str)) for v in value)
    return value is None or isinstance(value, (bool, int, float, str)) or (isinstance(value, (dict, set)) and not value)


_TENSORS = ("_parameters", "_buffers", "_non_persistent_buffers_set")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of what only runs it: torch.compile, DataParallel, an average of weights."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    if model._forward_hooks or model._forward_pre_hooks:
        return None
    for kind in type(model).__mro__:
        name = _WRAPPERS.get(f"{kind.__module__}.{kind.__qualname__}")
        inner = model._modules.get(name) if name else None
        if inner is not None:
            return inner
    return None


# By their names, so that none of them has to be imported: class -> where it keeps the network.
_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}
