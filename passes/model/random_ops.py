"""Finds the op of a model's forward that draws random numbers, when it gives different outputs for one input.

Each op runs under a mode that compares the state of the generators before it and after it: torch's own one of the CPU
and of each GPU, and the generator that the op is given. numpy and Python's `random` are not seen op by op, so for them
only the fact is told. A model that draws nothing and still differs counts its calls, or keeps what it computed.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ModelError
from .interface import Example

__all__ = ["random_error"]


class _RandomWatch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (kwargs or {}).get("generator")
        before = _states(given)
        value = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        # Reading or setting the state is no draw.
        if "rng_state" not in name and any(not torch.equal(a, b) for a, b in zip(before, _states(given), strict=True)):
            self.found.append(f"{name} in {self.path[-1] if self.path else 'its forward'}")
        return value


def _states(generator: Any) -> list[Tensor]:
    with torch._C.DisableTorchFunction():
        states = [torch.get_rng_state()]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states += torch.cuda.get_rng_state_all()
        if isinstance(generator, torch.Generator):
            states.append(generator.get_state())
    return states


def random_error(model: nn.Module, example: Example) -> ModelError:
    """The error for a model whose two runs on `example` differ. `model` is a copy, which is run once more."""
    with _RandomWatch() as watch:
        names = {id(m): name or "its forward" for name, m in model.named_modules()}
        for module in model.modules():
            module.register_forward_pre_hook(lambda m, _: watch.path.append(names.get(id(m), type(m).__name__)))
            module.register_forward_hook(lambda *_: watch.path.pop() and None)
        outside = _outside()
        with torch.no_grad():
            model(*example[0], **example[1])
        drawn = [name for name, a, b in zip(("numpy", "Python's random"), outside, _outside(), strict=True) if a != b]
    found = list(dict.fromkeys(watch.found))
    cause = "it keeps something from one run to the next"
    remedy = "make the forward depend on its inputs alone"
    if found or drawn:
        what = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        cause = f"{what or ' and '.join(drawn)} draws random numbers in eval mode"
        remedy = "draw only while training (F.dropout takes training=self.training), or make the noise an input"
    return ModelError(f"{type(model).__name__} gives different outputs for one input: {cause}; {remedy}")


def _outside() -> tuple[str, str]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return f"{kind} {np.asarray(keys).tobytes().hex()} {rest}", str(random.getstate())
