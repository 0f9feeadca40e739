"""Tells how far a training is: in steps where their number is given, else in seconds of wall clock from its start.

fraction    0 at the beginning, 1 at the end; the learning rate and the times of judging depend on it alone
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, field

from lmfx.passes.errors import OptionError

__all__ = ["Clock", "cosine", "seconds_of"]

UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
WARMUP = 0.03


def seconds_of(time: float | str) -> float:
    """Seconds of a number of minutes, or of a text like "3min", "90s", "1.5h". Raises `OptionError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", time) if isinstance(time, str) else None
    if found is not None and (found[2] or "min") in UNITS:
        seconds = float(found[1]) * UNITS[found[2] or "min"]
    elif isinstance(time, (int, float)) and not isinstance(time, bool):
        seconds = 60.0 * time
    else:
        seconds = -1.0
    if not 0 < seconds < math.inf:
        raise OptionError(f"{time!r} is no time to recover in: use minutes, or a text like '3min', '90s', '1h'")
    return seconds


def now() -> float:
    """Seconds of wall clock."""
    return time.monotonic()


@dataclass
class Clock:
    """Of a training of `steps` steps, or one that ends `seconds` after its beginning (and `spent` before it)."""

    seconds: float
    steps: int | None = None
    spent: float = 0.0
    begun: float = field(default_factory=lambda: now())

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return now() - self.begun + self.spent

    def fraction(self, step: int) -> float:
        """The share that is done before a step."""
        return min((step / self.steps) if self.steps is not None else self.elapsed() / self.seconds, 1.0)


def cosine(fraction: float) -> float:
    """The learning rate over its largest: up in a line over the first steps, then down to 0 as a half cosine."""
    return min(1.0, (fraction + 1e-3) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
