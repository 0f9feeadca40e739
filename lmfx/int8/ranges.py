"""Finds the range of every value from calibration images, and names those that 8 bits do badly.

    minmax       all that was seen
    percentile   all but the rarest values     the calibrators of onnxruntime.quantization,
    entropy      least lost information        fed a batch at a time, so that nothing is kept but their histograms

Named are values that never change (a dead layer), channels that are dead where others are not, and outliers: a channel
or a value that makes the step so large that the others have few levels left.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lmfx.int8.graph_view import require_onnxruntime
from lmfx.int8.qdq import Range
from lmfx.passes.errors import InputError, OptionError

__all__ = ["METHODS", "RangeMethod", "Ranges"]

RangeMethod = Literal["minmax", "percentile", "entropy"]
METHODS = ("minmax", "percentile", "entropy")
PERCENTILE = 99.999
BINS, QUANTIZED_BINS = 2048, 128
WIDE_CHANNEL = 24.0  # a channel of so many times the usual range leaves the others about ten levels
RARE = 16.0  # the largest value over the root of the mean square of those that are not 0, of a channel's own


@dataclass
class _Extremes:
    low: float = np.inf
    high: float = -np.inf
    lows: np.ndarray | None = None  # of channels
    highs: np.ndarray | None = None
    squares: float = 0.0
    count: int = 0


@dataclass
class Ranges:
    """Collects values batch by batch. `method` is "minmax", "percentile" or "entropy"."""

    method: RangeMethod = "minmax"
    percentile: float = PERCENTILE
    seen: dict[str, _Extremes] = field(default_factory=dict)
    _collector: Any = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"ranges={self.method!r}: use one of {', '.join(METHODS)}")
        if self.method != "minmax":
            require_onnxruntime()
            from onnxruntime.quantization.calibrate import HistogramCollector

            self._collector = HistogramCollector(self.method, False, BINS, QUANTIZED_BINS, self.percentile, "same")

    def add(self, values: dict[str, np.ndarray]) -> None:
        """One batch. Raises `InputError` for values that are not finite."""
        for name, value in values.items():
            seen = self.seen.setdefault(name, _Extremes())
            axes = tuple(i for i in range(value.ndim) if i != 1)
            lows, highs = (value.min(axes), value.max(axes)) if value.ndim > 1 else (value, value)
            low, high = float(lows.min()), float(highs.max())
            if not np.isfinite(low + high):
                raise InputError(f"the value {name} is not finite on the calibration images: check model and images")
            seen.low, seen.high = min(seen.low, low), max(seen.high, high)
            if seen.lows is not None and seen.highs is not None and seen.lows.shape == lows.shape:
                lows, highs = np.minimum(seen.lows, lows), np.maximum(seen.highs, highs)
            seen.lows, seen.highs = lows, highs
            seen.squares += float(np.square(value, dtype=np.float64).sum())
            seen.count += int(np.count_nonzero(value))
        if self._collector is not None:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints
                self._collector.collect({n: np.asarray(v, np.float32) for n, v in values.items()})

    def found(self) -> dict[str, Range]:
        """The range of every value."""
        plain = {n: (s.low, s.high) for n, s in self.seen.items()}
        if self._collector is None:
            return plain
        with contextlib.redirect_stdout(io.StringIO()):
            made = self._collector.compute_collection_result()
        return {n: (float(made[n][0]), float(made[n][1])) for n in plain}

    def warnings(self, name: str, layer: str, kernel: bool) -> list[str]:
        """What is bad about a value, which `layer` gives; `kernel` if its channels are those of a convolution."""
        seen = self.seen[name]
        if seen.high == seen.low:
            return [f"{layer}: dead, it always gives {seen.low:.4g} on the calibration images"]
        found = []
        lows, highs = seen.lows, seen.highs
        if lows is not None and highs is not None and lows.size > 1 and kernel:
            dead = int((highs == lows).sum())
            if dead:
                names = ", ".join(map(str, np.flatnonzero(highs == lows)[:5]))
                found.append(f"{layer}: {dead} of {lows.size} channels are dead (always the same value): {names}")
            size = np.maximum(np.abs(lows), np.abs(highs))
            usual = float(np.median(size[size > 0])) if bool((size > 0).any()) else 0.0
            worst = int(size.argmax())
            if usual > 0 and size[worst] > WIDE_CHANNEL * usual:
                found.append(
                    f"{layer}: channel {worst} reaches {size[worst]:.4g}, the median channel {usual:.4g} "
                    f"({size[worst] / usual:.0f} times): the others have about {255 * usual / size[worst]:.0f} levels"
                )
        typical = (seen.squares / max(seen.count, 1)) ** 0.5
        largest = max(abs(seen.low), abs(seen.high))
        if not found and largest > RARE * typical:
            found.append(
                f"{layer}: the largest value is {largest:.4g}, the root mean square {typical:.4g} "
                f"({largest / typical:.0f} times): try ranges='percentile'"
            )
        return found
