"""Checks the options of `distill`: what each of them may be."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from torch import nn

from lmfx.passes.errors import InputError, OptionError
from lmfx.training.losses import Distance
from lmfx.training.relative_steps import Kind

__all__ = [
    "Norms",
    "Precision",
    "Schedule",
    "check_networks",
    "check_objective",
    "check_recovery",
    "check_run",
    "check_steps",
]

Precision = Literal["fp32", "fp16", "bf16"]
Schedule = Literal["cosine", "constant"]
Norms = Literal["train", "frozen"]


def check_networks(student: Any, teacher: Any, distillation: Any) -> None:
    """Raises `InputError` unless both are modules; a teacher may be missing where nothing is distilled."""
    for role, net in (("student", student), ("teacher", teacher)):
        if not isinstance(net, nn.Module) and not (role == "teacher" and net is None and distillation is None):
            raise InputError(
                f"the {role} is a {type(net).__name__}, not a module: pass what lmfx.compress(..., merge=False) gave, "
                "and the original model"
            )


def check_steps(epochs: Any, lr: Any, schedule: Any, warmup: Any) -> None:
    """Raises `OptionError` for what cannot be the length and the rates of a training."""
    if not isinstance(epochs, int) or epochs < 1 or not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
        raise OptionError(f"epochs={epochs!r}, lr={lr!r}: use at least one epoch and a positive learning rate")
    _check_choice("schedule", schedule, get_args(Schedule))
    if not isinstance(warmup, (int, float)) or not 0 <= warmup < epochs:
        raise OptionError(f"warmup={warmup!r}: use a number of epochs below epochs={epochs}")


def check_objective(loss: Any, distillation: Any, weight: Any, temperature: Any, features: Any) -> None:
    """Raises `OptionError` for what cannot be minimised."""
    if distillation is not None:
        _check_choice("distillation", distillation, get_args(Distance))
    elif loss is None:
        raise OptionError("distillation=None without a loss leaves nothing to minimise: pass loss=, or a distance")
    if features is not None and distillation != "features":
        raise OptionError(f"features= goes with distillation='features', not with {distillation!r}")
    _check_positive("weight", weight)
    _check_positive("temperature", temperature)


def check_run(clip: Any, norms: Any, ema: Any, precision: Any) -> None:
    """Raises `OptionError` for how a step cannot be made."""
    _check_positive("clip", clip)
    if norms is not None:
        _check_choice("norms", norms, get_args(Norms))
    if ema is not None and not (isinstance(ema, (int, float)) and 0 < ema < 1):
        raise OptionError(f"ema={ema!r}: use a decay between 0 and 1, like 0.9999")
    _check_choice("precision", precision, get_args(Precision))


def check_recovery(
    steps: Any, lr: Any, optimizer: Any, norms: Any, batch: Any, temperature: Any, features: Any
) -> None:
    """Raises `OptionError` for what cannot be the options of a recovery."""
    for name, value in (("steps", steps), ("batch", batch)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise OptionError(f"{name}={value!r}: use a whole number from 1, or None")
    _check_positive("lr", lr)
    _check_positive("temperature", temperature)
    if optimizer is not None:
        _check_choice("optimizer", optimizer, get_args(Kind))
    if norms is not None:
        _check_choice("norms", norms, get_args(Norms))
    if not isinstance(features, (int, float)) or not 0 <= features < math.inf:
        raise OptionError(f"features={features!r}: use a weight from 0")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name}={value!r}: use one of {', '.join(map(repr, allowed))}")


def _check_positive(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise OptionError(f"{name}={value!r}: use a positive number")
