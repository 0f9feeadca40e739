"""Compares what modules keep in plain Python attributes before and after a run: counters, caches, the last input.

    self.calls += 1                     2 -> 3
    self.seen.append(x.mean())          a list that grows
    self.state.step = 4                 an attribute of an object of the model's own
    type(self).total += 1               an attribute of its class

Parameters, buffers, submodules and hooks are no plain attributes. Objects are looked into as far as they are plain.
"""

from __future__ import annotations

import collections
import itertools
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["changed_attributes", "plain_attributes", "same_value"]

_OF_TORCH = frozenset(vars(nn.Module()))
_PLAIN = (int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
_NOT_LOOKED_INTO = (nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)
DEPTH = 4
MOST = 1000  # entries of one container that are looked at


def plain_attributes(model: nn.Module) -> dict[str, Any]:
    """The plain state of a model by the attributes' qualified names; tensors and arrays are copies."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in _OF_TORCH and k != "training"}
        found |= {f"{path}.{k}" if path else k: _frozen(v, DEPTH) for k, v in own.items()}
    for kind in {
        k for m in model.modules() for k in type(m).__mro__ if not k.__module__.startswith(("torch.", "builtins"))
    }:
        own = {k: v for k, v in vars(kind).items() if not k.startswith("__") and isinstance(v, (*_PLAIN, list, dict))}
        found |= {f"{kind.__name__}.{k}": _frozen(v, DEPTH) for k, v in own.items()}
    return found


def changed_attributes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names of attributes that are new or not what they were."""
    return [name for name, value in after.items() if name not in before or not same_value(before[name], value)]


def _frozen(value: Any, depth: int) -> Any:
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and value.device.type != "meta"
        return value.detach().clone() if plain else _Same(value)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype.kind in "fiub" else _Same(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, itertools.count):
        return repr(value)
    if depth == 0 or isinstance(value, _NOT_LOOKED_INTO):
        return _Same(value)
    if isinstance(value, Mapping):
        items = list(itertools.islice(value.items(), MOST))
        return (len(value), [(_frozen(k, depth - 1), _frozen(v, depth - 1)) for k, v in items])
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return (len(value), [_frozen(v, depth - 1) for v in itertools.islice(value, MOST)])
    state = getattr(value, "__dict__", None)
    return [_frozen(state, depth - 1)] if isinstance(state, dict) else _Same(value)


class _Same:
    """An object that nobody looks into: it is the same as long as it is the very same."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def same_value(a: Any, b: Any) -> bool:
    """Whether two plain values or tensors are alike, NaN like NaN."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        alike = isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
        return alike and bool(((a == b) | ((a != a) & (b != b))).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size):
        return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)
