"""Reads a budget: a fraction, a latency or a speed-up, written in any of the usual ways.

    written              kind         means
    0.6, "0.6", "60%"    fraction     at most 0.6 of the original's measured latency
    "4.5ms", "300us"     ms           at most that, on the backend that is asked for
    "2x"                 speedup      at least twice as fast as the original

`1.0`, `"100%"` and `"1x"` ask for no change. A number above 1 without a unit could mean any of the three, so it is
refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from .passes.errors import BudgetError

__all__ = ["Budget"]

_FORMS = 'Write 0.6 or "60%" (of the original), "4.5ms", or "2x" (faster).'
_TEXT = re.compile(r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(?P<unit>%|[a-zµμ]*)", re.IGNORECASE)
_MS_PER_UNIT = {"us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ms": 1.0, "s": 1e3}  # both Unicode mu's are typed by keyboards


@dataclass(frozen=True)
class Budget:
    """A latency budget; make one with `Budget.parse`.

    `value` is a share of the original's latency in (0, 1] for kind `fraction`, milliseconds for `ms`, and a factor of
    at least 1 for `speedup`. Raises `BudgetError` for a value outside its range.
    """

    kind: Literal["fraction", "ms", "speedup"]
    value: float

    def __post_init__(self) -> None:
        if self.kind not in ("fraction", "ms", "speedup"):
            raise BudgetError(f"A budget of kind {self.kind!r} is unknown. {_FORMS}")
        seen, value = str(self), self.value
        if not math.isfinite(value):
            raise BudgetError(f"The budget {seen} is not a finite number. {_FORMS}")
        if value <= 0:
            raise BudgetError(f"The budget {seen} is not positive: a latency is more than 0. {_FORMS}")
        if self.kind == "fraction" and value > 1:
            raise BudgetError(
                f"The budget {seen} is more than the original's latency. A fraction is at most 1. "
                f'Did you mean "{value:g}%", "{value:g}ms" or "{value:g}x"?'
            )
        if self.kind == "speedup" and value < 1:
            raise BudgetError(
                f"The budget {seen} is slower than the original; a speed-up is at least 1x. "
                f'Did you mean {value:g} (a fraction), or "{1 / value:g}x"?'
            )

    @classmethod
    def parse(cls, value: Budget | float | str) -> Budget:
        """A budget from `0.6`, `"60%"`, `"4.5ms"`, `"2x"` or a `Budget`. Raises `BudgetError` for all else."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            return cls._parse_text(value)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise BudgetError(f"A budget cannot be {value!r} ({type(value).__name__}). {_FORMS}")
        try:
            return cls("fraction", float(value))
        except OverflowError:
            raise BudgetError(f"The budget is too large a number. {_FORMS}") from None

    @classmethod
    def _parse_text(cls, text: str) -> Budget:
        found = _TEXT.fullmatch(text.strip())
        if found is None:
            comma = (
                f"Did you mean {text.strip().replace(',', '.')}? "
                if re.fullmatch(r"\d+,\d+\s*\S*", text.strip())
                else ""
            )
            raise BudgetError(f"The budget {text!r} is not understood. {comma}{_FORMS}")
        number, unit = float(found["number"]), found["unit"].lower()
        if unit == "":
            return cls("fraction", number)
        if unit == "x":
            return cls("speedup", number)
        if unit in _MS_PER_UNIT:
            return cls("ms", number * _MS_PER_UNIT[unit])
        if unit != "%":
            raise BudgetError(
                f"The budget {text!r} has the unknown unit {unit!r}; known are %, x, us, ms and s. {_FORMS}"
            )
        if number > 100:
            raise BudgetError(
                f"The budget {text!r} is more than the original's latency; a share is at most 100%. {_FORMS}"
            )
        return cls("fraction", number / 100)

    def resolve(self, original_ms: float) -> float:
        """The budget in ms, for an original that takes `original_ms`. Raises `BudgetError` if that is no time."""
        if not (math.isfinite(original_ms) and original_ms > 0):
            raise BudgetError(
                f"The original's latency was measured as {original_ms} ms, so a budget relative to it means nothing. "
                "Measure it again."
            )
        if self.kind == "fraction":
            return self.value * original_ms
        if self.kind == "speedup":
            return original_ms / self.value
        return self.value

    def __str__(self) -> str:
        unit = {"fraction": "", "ms": "ms", "speedup": "x"}.get(self.kind, "")
        return f"{self.value:g}{unit}"
