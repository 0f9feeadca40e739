"""A copy of a model to work on: in eval mode, with plain parameters, and nothing of the original shared or changed.

Parametrizations (weight norm, spectral norm, old and new style) are evaluated: w = g v / |v| becomes a plain weight.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["eval_copy"]


def eval_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode with plain parameters (parametrizations such as weight norm are evaluated)."""
    # Old-style weight_norm keeps a computed tensor as an attribute, which deepcopy refuses.
    computed: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    clone = copy.deepcopy(model, computed).eval()
    for module in list(clone.modules()):
        if torch.nn.utils.parametrize.is_parametrized(module):
            _evaluate_parametrizations(module)
        hooks: list[Any] = list(module._forward_pre_hooks.values())
        for hook in hooks:
            if type(hook).__name__ == "WeightNorm":
                torch.nn.utils.remove_weight_norm(module, hook.name)
            elif type(hook).__name__ == "SpectralNorm":
                torch.nn.utils.remove_spectral_norm(module, hook.name)
    return clone


def _evaluate_parametrizations(module: Any) -> None:
    """Put plain parameters in place of parametrized ones.

    torch's `remove_parametrizations` deletes properties of the module's class, which a deep copy shares with its
    original: it would break the caller's model.
    """
    names = list(module.parametrizations)
    values = {name: getattr(module, name).detach().clone() for name in names}
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))
