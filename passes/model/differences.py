"""Compares plain outputs: tensors to the rounding of their dtype, numbers and words beside them exactly.

    |a - b|  <=  tolerance |a|        norms over all numbers of a tensor; 1e-9 in float64, 1e-3 in float32, else 5e-2

What is wrong because a size is in the wrong place is wrong by far more than rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["differs"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
HALF = 5e-2


def differs(expected: Any, actual: Any, tolerance: float | None = None) -> bool:
    """Whether plain outputs differ by more than rounding, in values, in shapes, or in numbers beside the tensors."""
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(actual)
    return len(left) != len(right) or any(_differ(a, b, tolerance) for a, b in zip(left, right, strict=True))


def _differ(a: Any, b: Any, tolerance: float | None) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is not type(b) or (isinstance(a, (int, float, str)) and a != b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    if not a.is_floating_point():
        return float((a != b).double().mean()) > 0.01  # ties of an argmax
    scale = max(float(a.double().norm()), 1e-30)
    error = float((a.double() - b.double()).norm()) / scale
    return not error <= (TOLERANCE.get(a.dtype, HALF) if tolerance is None else tolerance)
