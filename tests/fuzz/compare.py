"""Comparing outputs: structure exactly, values up to rounding, and what rounding is where a network amplifies it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Wrong", "call", "check_same", "clones", "leaves", "state_of", "structure"]

NOISE = 1e-14  # relative, put on every weight and input to see what rounding may do
AMPLIFIED = 100.0  # how much more than the effect of that noise is still rounding


class Wrong(AssertionError):
    """A property does not hold; `kind` names it."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


def clones(example: Any) -> Any:
    """The example with tensors of its own, for networks that write into their inputs."""
    if isinstance(example, dict):
        return {k: clones(v) for k, v in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(clones(v) for v in example)
    return example.clone() if isinstance(example, Tensor) else example


def call(model: nn.Module, example: Any) -> Any:
    """The output on copies of the example, without gradients."""
    with torch.no_grad():
        example = clones(example)
        if isinstance(example, dict):
            return model(**example)
        return model(*example) if isinstance(example, tuple) else model(example)


def leaves(value: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in leaves(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in leaves(v)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in leaves(getattr(value, f.name))]
    return []


def structure(value: Any, shapes: bool = True) -> Any:
    """The types, keys, shapes and dtypes of an output."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape) if shapes else None, value.dtype)
    if isinstance(value, dict):
        return (type(value).__name__, [(k, structure(v, shapes)) for k, v in value.items()])
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, [structure(v, shapes) for v in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(f.name, structure(getattr(value, f.name), shapes)) for f in dataclasses.fields(value)]
        return (type(value).__name__, fields)
    return repr(value)


def distance(expected: Any, actual: Any) -> float:
    """The largest ||a - b|| / ||a|| of the floating tensors of two outputs."""
    worst = 0.0
    for a, b in zip(leaves(expected), leaves(actual), strict=True):
        if not a.is_floating_point():
            continue  # an argmax may see a tie either way
        scale = max(float(a.double().norm()), 1e-12)
        error = float((a.double() - b.double()).norm()) / scale
        worst = error if not error <= worst else worst
    return worst


def noise_of(model: nn.Module, example: Any) -> float:
    """What a relative noise of `NOISE` on weights and inputs does to the output."""
    shaken = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)

    def shake(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        return t * (1 + NOISE * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype))

    with torch.no_grad():
        for tensor in [*shaken.parameters(), *shaken.buffers()]:
            tensor.data = shake(tensor.data)
    expected = call(model, example)
    shaken_example = pytree.tree_map(lambda v: shake(v) if isinstance(v, Tensor) else v, example)
    return max(distance(expected, call(shaken, shaken_example)), distance(expected, call(shaken, example)))


def check_same(
    kind: str, expected: Any, actual: Any, tolerance: float, noise: Callable[[], float] | None = None
) -> None:
    """Raise `Wrong` if two outputs differ in structure, or by more than `tolerance` and what noise does."""
    if structure(expected) != structure(actual):
        raise Wrong(kind, f"{structure(expected)} became {structure(actual)}")
    error = distance(expected, actual)
    if error <= tolerance:
        return
    floor = noise() if noise is not None else 0.0
    if not error <= AMPLIFIED * floor:
        raise Wrong(kind, f"relative error {error:.2e}, over {tolerance:.0e} (noise gives {floor:.1e})")


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a compiler might change: values, identities, modes, hooks, attributes."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                for own, tensor in value.items():
                    if tensor is not None:
                        state[f"{name}.{own}"] = (id(tensor), tensor.requires_grad, tensor.grad is None)
                        state[f"{name}.{own} values"] = tensor.detach().clone()
            elif key == "_modules":
                state[f"{name}:modules"] = [(k, id(m)) for k, m in value.items()]
            elif isinstance(value, Tensor):
                state[f"{name}.{key} values"] = value.detach().clone()
            elif isinstance(value, dict):
                state[f"{name}:{key}"] = [(k, id(v)) for k, v in value.items()]
            else:
                state[f"{name}:{key}"] = repr(value) if isinstance(value, (int, float, str, tuple, list)) else id(value)
        state[f"{name}:type"] = (type(module), sorted(k for k in vars(type(module)) if k[:2] != "__"))
    return state


def check_untouched(before: dict[str, Any], model: nn.Module) -> None:
    """Raise `Wrong` if the model is not as it was."""
    after = state_of(model)
    if before.keys() != after.keys():
        raise Wrong("the model was changed", f"attributes {sorted(before.keys() ^ after.keys())}")
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        if not same:
            raise Wrong("the model was changed", f"{key}: {value} became {after[key]}")
