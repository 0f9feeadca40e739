"""Tells the errors by which autograd says that an op has no derivative from all others."""

from __future__ import annotations

__all__ = ["has_no_derivative"]

_SAID = ("is not implemented", "does not require grad", "not differentiable", "not differentiate")


def has_no_derivative(error: RuntimeError) -> bool:
    """Whether a `RuntimeError` of a backward pass says that some op between output and input has no derivative."""
    text = str(error)
    return any(words in text for words in _SAID) and any(word in text for word in ("derivative", "grad", "differentia"))
