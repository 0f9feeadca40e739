"""Runs a model as if its own autocast regions were not there: it is compressed in the dtype of its weights.

    with torch.autocast("cpu", dtype=torch.bfloat16):     ->      y = conv(x)        in float32
        y = conv(x)

What a region computes depends on the device it runs on, it is not written in the graph, and the rounding of bfloat16
would hide what an edit does. So the forward is run, traced and compared as if its regions were not there; the result is
a network in full precision, which may be run under `torch.autocast` like any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["FullPrecision", "autocast_on", "no_autocast"]

KINDS = ("cpu", "cuda", "mps", "xpu")


def autocast_on() -> tuple[str, ...]:
    """The kinds of device on which autocast is on in this thread."""
    return tuple(kind for kind in KINDS if torch.is_autocast_enabled(kind))


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Autocast is off within, for every kind of device."""
    with contextlib.ExitStack() as stack:
        for kind in autocast_on():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class FullPrecision(TorchFunctionMode):
    """Every op of torch runs without autocast; `seen` says whether one was inside a region."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not autocast_on():
            return func(*args, **(kwargs or {}))
        self.seen = True
        with no_autocast():
            return func(*args, **(kwargs or {}))
