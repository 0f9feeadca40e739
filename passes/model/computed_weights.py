"""Evaluates weights that a module computes from other tensors, so that they become plain parameters.

    torch.nn.utils.parametrize        w = f(original, ...)                   a property of a class made for the module
    weight_norm, spectral_norm (old)  w = g v / |v|,  w / sigma(w)           a forward pre-hook
    torch.nn.utils.prune              w = weight_orig * weight_mask          a forward pre-hook
    any other pre-hook that sets `w` from parameters called `w_...` and looks at no input

A computed weight is trainable if anything that it is computed from is. What was a buffer stays one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["evaluate_weights"]


def evaluate_weights(module: nn.Module) -> None:
    """Put plain tensors in place of what `module` computes before it runs. It is the caller's own copy."""
    with torch.no_grad():
        if torch.nn.utils.parametrize.is_parametrized(module):
            _evaluate_parametrizations(module)
        for key, hook in list(module._forward_pre_hooks.items()):
            if key not in module._forward_pre_hooks_with_kwargs:
                _evaluate_hook(module, key, hook)


def _evaluate_parametrizations(module: Any) -> None:
    """Put plain parameters in place of parametrized ones.

    torch's `remove_parametrizations` deletes properties of the module's class, which a deep copy shares with its
    original: it would break the caller's model.
    """
    lists: dict[str, Any] = dict(module.parametrizations.items())
    values = {name: getattr(module, name).detach().clone() for name in lists}
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        held = any(key.startswith("original") for key in lists[name]._parameters)
        trainable = any(p.requires_grad for p in lists[name].parameters())
        _register(module, name, value, trainable, held)


def _register(module: nn.Module, name: str, value: Tensor, trainable: bool, parameter: bool = True) -> None:
    if parameter and value.is_floating_point():
        module.register_parameter(name, nn.Parameter(value, requires_grad=trainable))
    else:
        module.register_buffer(name, value)


def _evaluate_hook(module: Any, key: int, hook: Callable[..., Any]) -> None:
    """Run a hook that computes weights once, and take it away; any other hook stays as it is."""
    names = _computed_names(module)
    own = {n: [t for k, t in _tensors(module).items() if k.startswith(f"{n}_")] for n in names}
    trainable = {n: any(t.requires_grad for t in sources) for n, sources in own.items()}
    kind = type(hook).__name__
    if kind in ("WeightNorm", "SpectralNorm"):  # torch also takes away what they put into the state dict
        name: str = hook.name  # type: ignore[attr-defined]
        remove = nn.utils.remove_weight_norm if kind == "WeightNorm" else nn.utils.remove_spectral_norm
        remove(module, name)
        module._parameters[name].requires_grad_(trainable.get(name, True))
        return
    if not names:
        return
    before = dict(vars(module))
    try:
        given = hook(module, (_Untouchable(),))
    except Exception:  # it looks at the input, so it is no function of the weights alone
        given = NotImplemented
    changed = {n for n, v in vars(module).items() if n not in before or before[n] is not v}
    made = {n: vars(module)[n] for n in changed}
    if given is not None or not changed or not changed <= names or not all(_is_plain(v) for v in made.values()):
        for n in changed:
            del vars(module)[n]
            if n in before:
                vars(module)[n] = before[n]
        return
    del module._forward_pre_hooks[key]
    for n, value in made.items():
        del vars(module)[n]
        if type(module).__module__.startswith("torch.nn."):  # another class may read them itself
            for held in (module._parameters, module._buffers):
                for source in [k for k in held if k.startswith(f"{n}_")]:
                    del held[source]
        _register(module, n, value.detach().clone(), trainable[n])


def _computed_names(module: nn.Module) -> set[str]:
    """`weight` for a module with `weight_orig` or `weight_g` and no parameter or buffer called `weight`."""
    tensors = _tensors(module)
    return {name.rpartition("_")[0] for name in tensors} - tensors.keys() - {""}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Untouchable:
    """An input that nobody may look at."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("the hook looks at the input")

    __repr__ = __len__ = __iter__ = __getitem__ = __bool__ = __getattribute__  # type: ignore[assignment]
