"""Says which powers of ten a drawing of losses keeps apart: from the largest down to the least that is not 0.

Beneath the lowest of them a scale is linear down to 0 (symlog), so what lies there cannot be told from the original.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["loss_decades"]

FEWEST, MOST = 3, 7  # decades; losses that are smaller by more than that are rounding, or nothing that matters


def loss_decades(losses: Iterable[float]) -> tuple[int, int]:
    """The exponents of the lowest and of the highest power of ten; the highest is not below any loss."""
    positive = [v for v in losses if v > 0]
    top = math.ceil(math.log10(max(positive, default=1e-12)) - 1e-9)
    least = math.floor(math.log10(min(positive, default=1e-12)) + 1e-9)
    return max(min(least, top - FEWEST), top - MOST), top
