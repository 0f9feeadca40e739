"""Checks the latencies of whole networks that a backend gives, before anything is divided by them.

A backend may be anybody's. A NaN compares false with every budget, a 0 divides, and a list that is too short pairs one
network's rounds with another's; each is a fault of the backend, so the error names it and what it gave. Only a network
without weights, such as one that is an empty graph after all its layers were dropped, may take no time at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lmfx.latency.backend import Backend, Whole
from lmfx.latency.workload import Workload
from lmfx.passes.errors import DeviceError

__all__ = ["time_wholes"]

REPEATS = 5


def time_wholes(backend: Backend, networks: Sequence[Whole], repeats: int = REPEATS) -> list[list[float]]:
    """`backend.measure_interleaved`, in ms. Raises `DeviceError`, with backend and value, for what is no time."""
    given: Any = backend.measure_interleaved(networks, repeats)
    try:
        times = [list(row) for row in given]
    except TypeError:
        raise _error(backend, f"{given!r:.80}", "that is no list of lists") from None
    lengths = [len(row) for row in times]
    if len(times) != len(networks) or len(set(lengths)) > 1 or 0 in lengths:
        raise _error(backend, f"lists of {lengths} times", f"{len(networks)} networks were timed {repeats} times each")
    return [
        [_checked(backend, value, _may_be_free(network)) for value in row]
        for network, row in zip(networks, times, strict=True)
    ]


def _checked(backend: Backend, value: Any, free: bool) -> float:
    try:
        ms = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _error(backend, f"{value!r:.80}", "a latency is a number of ms") from None
    if not math.isfinite(ms) or ms < 0 or (ms == 0 and not free):
        raise _error(backend, f"{ms} ms", "a network takes a finite time over 0")
    return ms


def _may_be_free(network: Whole) -> bool:
    return not isinstance(network, Workload) and next(network[0].parameters(), None) is None


def _error(backend: Backend, seen: str, why: str) -> DeviceError:
    return DeviceError(
        f"the backend {backend.name!r} measured {seen} for a whole network, and {why}: mend its measure_interleaved, "
        "or measure with another one"
    )
