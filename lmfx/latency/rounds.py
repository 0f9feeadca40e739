"""Noise is the enemy: how rows are timed on a machine that is not quiet.

    round 1    S a b c d S e f g S        S is the sentinel, one fixed workload
    round 2    S g e a ... S              another order

Every round times every row once, so that a slow minute touches all rows alike; one sample repeats its row until it
takes `min_ms`. A sample is divided by how slow the sentinels before and after it were compared with the reference; if
they were off by more than `max_drift`, the sample is not used and taken again. Rows whose spread stays large get more
rounds. The result is the median, the spread the interquartile range, both in ms.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

__all__ = ["CallRunner", "Runner", "Sampling", "Session", "cpu_clock", "summary", "wall_clock"]

Clock = Callable[[Callable[[], Any], int], float]


class Runner(Protocol):
    """One prepared workload. `nbytes` is roughly what it holds in memory."""

    nbytes: int

    def time(self, repeats: int) -> float:
        """Runs `repeats` times and returns the total time in ms."""

    def close(self) -> None:
        """Gives its memory back."""


@dataclass(frozen=True)
class Sampling:
    """How much to sample: `min_ms` a sample, `max_spread` and `max_drift` as fractions, a sentinel `every` rows."""

    rounds: int = 5
    extra_rounds: int = 5
    min_ms: float = 2.0
    max_repeats: int = 1000
    max_spread: float = 0.1
    max_drift: float = 0.25
    every: int = 8
    batch_rows: int = 64
    batch_bytes: int = 768 * 2**20


def cpu_clock(call: Callable[[], Any], repeats: int) -> float:
    """CPU time of this thread in ms: right for one thread, and blind to other processes taking the core away."""
    start = time.thread_time_ns()
    for _ in range(repeats):
        call()
    return (time.thread_time_ns() - start) / 1e6


def wall_clock(call: Callable[[], Any], repeats: int) -> float:
    """Wall time in ms, taken again (up to four times) if the scheduler took a core from this process meanwhile."""
    best = math.inf
    for _ in range(5):
        switches = _involuntary_switches()
        start = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter_ns() - start) / 1e6)
        if _involuntary_switches() == switches:
            break
    return best


def _closed() -> None:
    raise RuntimeError("this runner is closed")


def _involuntary_switches() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@dataclass
class CallRunner:
    """A runner that times a plain call."""

    call: Callable[[], Any]
    clock: Clock = cpu_clock
    nbytes: int = 0
    on_close: Callable[[], None] | None = None

    def time(self, repeats: int) -> float:
        return self.clock(self.call, repeats)

    def close(self) -> None:
        self.call = _closed  # what it timed may go now
        if self.on_close is not None:
            self.on_close()


@dataclass
class Session:
    """One series of measurements that share a sentinel. `reference` is its time in ms on the quiet machine (None: it is
    taken at the start), so that the rows of an earlier session compare."""

    sentinel: Runner
    sampling: Sampling = field(default_factory=Sampling)
    reference: float | None = None
    overhead: float = 0.0  # ms of an empty call, taken off every row

    def start(self) -> float:
        """The reference, taken now if there is none."""
        if self.reference is None:
            self.reference = float(np.percentile([self._sentinel() for _ in range(15)], 25))
        return self.reference

    def quick(self, runner: Runner) -> float:
        """ms of one run after one warm-up."""
        first = runner.time(1)
        return self._net(min(first, runner.time(1)))

    def time(self, rows: Mapping[str, Runner], quick: Mapping[str, float]) -> dict[str, list[float]]:
        """Samples (ms a run) for every row: `rounds` each, and up to `extra_rounds` more where the spread is large."""
        reference = self.start()
        s = self.sampling
        repeats = {k: min(s.max_repeats, max(1, math.ceil(s.min_ms / max(quick[k], 1e-6)))) for k in rows}
        samples: dict[str, list[float]] = {k: [] for k in rows}
        order = list(rows)
        shuffle = random.Random(0)
        for attempt in range(s.rounds + s.extra_rounds):
            due = [k for k in order if len(samples[k]) < s.rounds]
            if attempt >= s.rounds:
                due += [k for k in order if k not in set(due) and _relative_spread(samples[k]) > s.max_spread]
            shuffle.shuffle(due)
            last_attempt = attempt == s.rounds + s.extra_rounds - 1
            before = self._sentinel() if due else 0.0
            for i in range(0, len(due), s.every):
                part = [(k, rows[k].time(repeats[k]) / repeats[k]) for k in due[i : i + s.every]]
                after = self._sentinel()
                slow = 0.5 * (before + after) / reference
                steady = abs(after - before) <= s.max_drift * min(before, after)
                if (steady and abs(slow - 1) <= s.max_drift) or last_attempt:
                    for k, ms in part:
                        samples[k].append(self._net(ms / slow))
                before = after
        return {k: v if v else [quick[k]] for k, v in samples.items()}

    def _sentinel(self) -> float:
        self.sentinel.time(1)  # other rows have just thrown it out of the caches
        return self.sentinel.time(2) / 2

    def _net(self, ms: float) -> float:
        return max(ms - self.overhead, 0.02 * ms)


def summary(samples: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, median, high = np.percentile(np.asarray(samples, dtype=float), [25, 50, 75])
    return float(median), float(high - low)


def _relative_spread(samples: Sequence[float]) -> float:
    median, spread = summary(samples)
    return spread / median if median > 0 else 0.0
