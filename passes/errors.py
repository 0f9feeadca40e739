"""Every error that lmfx raises on purpose. Each message names what was seen and says what to do about it."""

from __future__ import annotations

import math

__all__ = [
    "BudgetError",
    "DeviceError",
    "ExportError",
    "InfeasibleBudget",
    "InputError",
    "LmfxError",
    "MissingExtra",
    "ModelError",
    "OptionError",
    "PlanError",
    "QualityError",
    "SizeError",
    "StoreError",
    "TableError",
    "TraceError",
    "VerifyError",
]


class LmfxError(Exception):
    """The base of every error that lmfx raises on purpose."""


class BudgetError(LmfxError, ValueError):
    """A budget that is not a latency: a wrong string, zero, negative, NaN."""


class InfeasibleBudget(LmfxError):
    """No plan reaches the budget; `latency` is the fastest that was reached, in ms, and `original` that of the original
    (NaN where nobody said)."""

    def __init__(self, message: str, latency: float, original: float = math.nan) -> None:
        super().__init__(message)
        self.latency, self.original = latency, original

    def __reduce__(self) -> tuple[type, tuple[str, float, float]]:
        return type(self), (str(self), self.latency, self.original)


class InputError(LmfxError, ValueError):
    """An example input or calibration data that the model cannot take."""


class SizeError(InputError):
    """An input of a batch or image size for which a graph, traced at another one, is not right."""


class ModelError(LmfxError, ValueError):
    """A model that cannot be compressed as it is: no convolution, NaN weights, training mode, half on a CPU."""


class OptionError(LmfxError, ValueError):
    """An option with a value that it cannot have."""


class DeviceError(LmfxError, RuntimeError):
    """A device was asked for that is not there, or model and input lie on different ones."""


class MissingExtra(LmfxError, ImportError):
    """An optional dependency is needed and not installed; the message has the pip command."""


class TraceError(LmfxError, RuntimeError):
    """No tracer gave a graph that agrees with the model."""


class PlanError(LmfxError, ValueError):
    """A plan or a saved folder that is damaged, or was made for another model."""


class TableError(LmfxError, ValueError):
    """Tables that cannot be used together, or lack a row that is needed."""


class StoreError(LmfxError, RuntimeError):
    """The on-disk store is damaged, foreign or locked."""


class ExportError(LmfxError, RuntimeError):
    """An export failed, or what was exported does not compute what the model computes."""


class VerifyError(LmfxError, AssertionError):
    """A pass broke its own postcondition; always a bug in lmfx, never in the caller's model."""


class QualityError(LmfxError, ValueError):
    """A network that keeps as much of the original as was asked for cannot be had within the budget."""
