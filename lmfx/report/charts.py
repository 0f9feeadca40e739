"""Scales and ticks of the charts of a page: where a value stands, and which round values are marked.

linear     position = a + b value                  ticks at 1, 2 or 5 times a power of ten
symlog     value <= t: linear, above: logarithmic   ticks at 0 and powers of ten, t below the least value but 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmfx.planning.loss_decades import loss_decades

__all__ = ["Axis", "linear", "number", "symlog"]


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on positions from `start` to `end`; `threshold` is where a symlog axis bends."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    threshold: float | None = None

    def at(self, value: float) -> float:
        """The position of a value."""
        low, high, here = (self._bent(v) for v in (self.low, self.high, value))
        return self.start + (here - low) / ((high - low) or 1.0) * (self.end - self.start)

    def _bent(self, value: float) -> float:
        if self.threshold is None:
            return value
        return math.copysign(math.log1p(abs(value) / self.threshold), value)

    @property
    def labels(self) -> list[tuple[float, str]]:
        """Position and text of each tick; powers of ten below 0.001 are short, and clear of the axis' name."""
        short = self.threshold is not None
        return [(self.at(t), _power(t) if short and 0 < t < 0.999e-3 else number(t)) for t in self.ticks]


def linear(values: Sequence[float], start: float, end: float, count: int = 5, zero: bool = False) -> Axis:
    """An axis for finite values, from 0 on if `zero`, with about `count` ticks, that begins and ends at one."""
    low, high = min(values), max(values)
    low = min(low, 0.0) if zero else low
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        low, high = (low - 0.5, high + 0.5) if not zero else (low, high or 1.0)
    step = _step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], start, end, ticks)


def symlog(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis from 0 on whose powers of ten are apart (`loss_decades`)."""
    high = max(*values, 1e-12)
    bottom, top = loss_decades(values)
    ticks = [0.0, *(float(10**p) for p in range(bottom, top + 1))]
    return Axis(0.0, max(high, ticks[-2]), start, end, tuple(t for t in ticks if t <= high), float(10**bottom))


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


def _step(rough: float) -> float:
    power = 10 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def number(value: float, digits: int = 3) -> str:
    """A number for people: few digits, no exponent where it can be avoided."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text
    if abs(value) < 0.999e-5:
        return text.replace("e-0", "e-")
    return f"{value:.{digits - 1 - math.floor(math.log10(abs(value)))}f}".rstrip("0")
