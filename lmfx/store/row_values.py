"""Checks the values of stored rows, by kind: a row may come from another machine, or from anybody.

latency      a `Measurement`: ms from 0, the spread, how many samples, where, how good
whole        ms from 0
sentinel     ms over 0, to which the latencies are relative
importance   a score, or {"performance": ..., "seconds": ...} of a training; a performance may be "nan" or "inf"
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["KINDS", "check_value", "score_of"]

KINDS = ("latency", "whole", "sentinel", "importance")
_NOT_FINITE = ("nan", "inf", "-inf")
_QUALITIES = ("full", "noisy", "busy", "quick", "bound", "analytic")
_TEXTS = ("device", "backend", "quality")
_FIELDS = ("ms", "spread", "n", *_TEXTS, "conditions")


def check_value(kind: str, key: str, value: Any) -> Any:
    """The value of a row. Raises `ValueError`, which names the key, if it is not what rows of this kind hold."""
    if kind == "latency":
        _check_measurement(key, value)
    elif kind in ("whole", "sentinel"):
        if not _is_finite(value) or value < 0 or (kind == "sentinel" and value == 0):
            raise ValueError(f"{key!r} is {value!r} ms")
    elif kind == "importance":
        _check_score(key, value)
    else:
        raise ValueError(f"{key!r} is of the unknown kind {kind!r}")
    return value


def score_of(value: Any) -> float:
    """The number of an importance's row that was checked."""
    return float(value["performance"] if isinstance(value, dict) else value)


def _check_measurement(key: str, value: Any) -> None:
    if not isinstance(value, dict) or "ms" not in value:
        raise ValueError(f"{key!r} is {str(value)[:60]!r}, no measurement")
    if unknown := sorted(map(str, value.keys() - set(_FIELDS))):
        raise ValueError(f"{key!r} has the unknown {', '.join(unknown)[:60]}")
    for name in ("ms", "spread", "n"):
        number = value.get(name, 0)
        if not _is_finite(number) or number < 0 or (name == "n" and not isinstance(number, int)):
            raise ValueError(f"{key!r} is {number!r} ms" if name == "ms" else f"{key!r} has {name}={number!r}")
    for name in _TEXTS:
        if not isinstance(value.get(name, ""), str):
            raise ValueError(f"{key!r} has {name}={value[name]!r}")
    if value.get("quality", "full") not in _QUALITIES:
        raise ValueError(f"{key!r} has the unknown quality {value['quality']!r}")
    if not isinstance(value.get("conditions", {}), dict):
        raise ValueError(f"{key!r} has conditions={value['conditions']!r}")


def _check_score(key: str, value: Any) -> None:
    if not isinstance(value, dict):
        if not _is_finite(value):
            raise ValueError(f"{key!r} is {str(value)[:60]!r}, no score")
        return
    performance = value.get("performance")
    number = _is_finite(performance) or (isinstance(performance, str) and performance in _NOT_FINITE)
    if not number or not _is_finite(value.get("seconds", 0.0)) or value.keys() - {"performance", "seconds"}:
        raise ValueError(f"{key!r} is {str(value)[:60]!r}, no performance")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
