"""Times rows on a machine that is not quiet, and in the state in which a network runs them.

    round 1    S a b c d S e f g S        S is the sentinel, one fixed workload, with a sweep over `sweep_bytes`
    round 2    S g e a ... S              another order

Every round times every row once, so that a slow minute touches all rows alike. A sample is divided by how slow the
sentinels before and after it were compared with the reference. The machine counts as *busy* where the sentinels differ
from each other or from the reference by more than `max_drift`, or where the sweep (which feels other processes' traffic
in the shared caches, as the sentinel does not) took `max_sweep` times its usual time: samples of a busy spell are taken
again, and a row that has none but those is marked. Rows whose spread stays large get more rounds. The result is the
median, the spread the interquartile range, both in ms.

Inside a network a row finds its input where the row before has just written it, and its weights and code where the rest
of the network has left them. A row that is run in a loop finds everything in the nearest cache, and is too fast.
So (`caches="network"`) a sample is a single run, right after the inputs were written, with all other rows and
the sweep between two samples of a row. Runners that cannot time a single run (GPU events) are looped until `min_ms`.

A network that is no larger than one sweep throws nothing out, though: all of its rows do find their weights in the
nearer caches, and there a loop (`caches="hot"`) is right. Between that and `FAR` sweeps both are timed and mixed:

    ms = t single run + (1 - t) loop        t = log(bytes of the network / sweep) / log FAR, in quarters, from 0 to 1

"auto" is what suits the network (`for_network`); `caches=0.5` is a mixture that was asked for.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from lmfx.passes.errors import OptionError

__all__ = ["CallRunner", "Runner", "Sampling", "Session", "Taken", "cpu_clock", "summary", "wall_clock"]

FAR = 16  # sweeps from which on a network throws out all that its rows need
CallClock = Callable[[Callable[[], Any], int], float]


class Runner(Protocol):
    """One prepared workload. `nbytes` is roughly what it holds in memory."""

    nbytes: int

    def time(self, repeats: int) -> float:
        """Runs `repeats` times and returns the total time in ms."""

    def close(self) -> None:
        """Gives its memory back."""


@dataclass(frozen=True)
class Sampling:
    """How much to sample: `max_spread` and `max_drift` as fractions, a sentinel `every` rows.

    `rounds` samples of at least `min_ms` where a row is looped, `visits` of a single run where it is not.
    """

    rounds: int = 5
    extra_rounds: int = 5
    visits: int = 15
    extra_visits: int = 15
    min_ms: float = 2.0
    max_repeats: int = 1000
    max_spread: float = 0.1
    max_drift: float = 0.25
    max_sweep: float = 1.5
    every: int = 8
    batch_rows: int = 64
    batch_bytes: int = 768 * 2**20
    caches: Literal["auto", "network", "hot"] | float = "auto"
    sweep_bytes: int = 4 * 2**20

    def __post_init__(self) -> None:
        named = self.caches in ("auto", "network", "hot")
        if not named and not (isinstance(self.caches, float) and 0 < self.caches < 1):
            raise OptionError(f'caches is "auto", "network", "hot" or a number between 0 and 1, not {self.caches!r}')

    @property
    def single(self) -> float:
        """The share of single runs in a row's time. Rows of no network in particular are not looped."""
        return self.caches if isinstance(self.caches, float) else 0.0 if self.caches == "hot" else 1.0

    @property
    def state(self) -> str | float:
        """What `caches` means for rows that are timed now: what tells their times from others."""
        return "network" if self.caches == "auto" else self.caches

    def for_network(self, nbytes: int) -> Sampling:
        """With `caches` decided for a network that touches so many bytes."""
        if self.caches != "auto":
            return self
        share = round(4 * math.log(max(nbytes, 1) / self.sweep_bytes, FAR)) / 4
        if 0 < share < 1:
            return replace(self, caches=share)
        return replace(self, caches="hot" if share <= 0 else "network")


@dataclass
class Taken:
    """The samples of one row, ms a run. `busy`: the machine was never quiet while they were taken."""

    samples: list[float] = field(default_factory=list)
    busy: bool = False

    def mixed(self, looped: Taken, share: float) -> Taken:
        """So much of these samples, and the rest of what the row takes in a loop."""
        other = (1 - share) * summary(looped.samples)[0]
        return Taken([share * ms + other for ms in self.samples], self.busy or looped.busy)


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
    """A runner that times a plain call. `refresh` writes the call's inputs again, as the op before it would."""

    call: Callable[[], Any]
    clock: CallClock = cpu_clock
    nbytes: int = 0
    on_close: Callable[[], None] | None = None
    refresh: Callable[[], None] | None = None
    conditions: dict[str, Any] = field(default_factory=dict)

    def time(self, repeats: int) -> float:
        return self.clock(self.call, repeats)

    def once(self) -> float:
        """ms of a single run right after its inputs were written."""
        assert self.refresh is not None
        self.refresh()
        return self.clock(self.call, 1)

    def close(self) -> None:
        self.call = _closed  # what it timed may go now
        self.refresh = None
        if self.on_close is not None:
            self.on_close()


@dataclass
class Session:
    """One series of measurements that share a sentinel.

    `reference` is the sentinel's time in ms on the quiet machine (None: it is taken at the start), so that the rows of
    an earlier session compare. `nothing` is an empty call, timed as the rows are and taken off each of them.
    """

    sentinel: Runner
    sampling: Sampling = field(default_factory=Sampling)
    reference: float | None = None
    nothing: Runner | None = None
    _sweeps: list[float] = field(default_factory=list)
    _empty: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    _buffer: np.ndarray | None = None

    def start(self) -> float:
        """The reference, taken now if there is none."""
        if self.reference is None:
            self.reference = float(np.percentile([self._sentinel() for _ in range(15)], 25))
        return self.reference

    def quick(self, runner: Runner) -> float:
        """ms of one run after one warm-up."""
        if self.nothing is not None and not self._empty[False]:
            self._empty[False] = [self._empty_call(self.nothing, False) for _ in range(15)]
        first = runner.time(1)
        return self._net(min(first, runner.time(1)), False)

    def time(self, rows: Mapping[str, Runner], quick: Mapping[str, float]) -> dict[str, Taken]:
        """Samples for every row; more where the spread is large or the machine was busy, see `Sampling`."""
        share = self.sampling.single
        if not 0 < share < 1:
            return self._time(rows, quick, share == 1)
        single, looped = (self._time(rows, quick, once) for once in (True, False))
        return {k: single[k].mixed(looped[k], share) for k in rows}

    def _time(self, rows: Mapping[str, Runner], quick: Mapping[str, float], by_one: bool) -> dict[str, Taken]:
        """The same in one of the two ways: single runs, of runners that can be run once, or loops."""
        reference, s = self.start(), self.sampling
        once = {k: by_one and getattr(r, "refresh", None) is not None for k, r in rows.items()}
        single = all(once.values())
        least, most = (s.visits, s.extra_visits) if single else (s.rounds, s.extra_rounds)
        taken: dict[str, list[float]] = {k: [] for k in rows}
        bad: dict[str, list[float]] = {k: [] for k in rows}
        order = list(rows)
        shuffle = random.Random(0)
        for attempt in range(least + most):
            due = [k for k in order if len(taken[k]) < least]
            if attempt >= least:
                due += [k for k in order if k not in set(due) and _relative_spread(taken[k]) > s.max_spread]
            if not due:
                break
            shuffle.shuffle(due)
            before = self._sentinel()
            for i in range(0, len(due), s.every):
                sweep = self._sweep(sum(r.nbytes for r in rows.values())) if single else 0.0
                group = due[i : i + s.every]
                middle = shuffle.randrange(len(group))
                if single:  # the code that every row needs is not what the sweep is to throw out
                    self.sentinel.time(1)
                part = []
                for at, k in enumerate(group):
                    if single and self.nothing is not None and at == middle:
                        self._empty[True].append(self._empty_call(self.nothing, True))
                    part.append((k, self._sample(rows[k], once[k], quick[k])))
                after = self._sentinel()
                slow = 0.5 * (before + after) / reference
                steady = abs(after - before) <= s.max_drift * min(before, after) and abs(slow - 1) <= s.max_drift
                for k, ms in part:
                    (taken if steady and not self._disturbed(sweep) else bad)[k].append(ms / slow)
                before = after
        result = {}
        for k in rows:
            quiet = 2 * len(taken[k]) >= least
            samples = taken[k] if quiet else [*taken[k], *bad[k]]
            result[k] = Taken([self._net(ms, once[k]) for ms in samples] or [quick[k]], busy=not quiet)
        return result

    def close(self) -> None:
        """Gives the memory of the sentinel and of the empty call back."""
        self.sentinel.close()
        if self.nothing is not None:
            self.nothing.close()

    def _sample(self, runner: Any, once: bool, quick: float) -> float:
        if once:
            return float(runner.once())
        s = self.sampling
        repeats = min(s.max_repeats, max(1, math.ceil(s.min_ms / max(quick, 1e-6))))
        return float(runner.time(repeats)) / repeats

    def _sweep(self, held: int) -> float:
        """Throws old data out of the nearer caches; ms. The fewer rows there are to do that, the more of it."""
        if self._buffer is None:
            self._buffer = np.zeros(max(1, self.sampling.sweep_bytes // 8))
        times = 1 + max(0, min(3, (4 * self.sampling.sweep_bytes - held) // max(1, self.sampling.sweep_bytes)))
        start = time.thread_time_ns()
        for _ in range(times):
            self._buffer += 1.0
        ms = (time.thread_time_ns() - start) / 1e6 / times
        self._sweeps.append(ms)
        return ms

    def _disturbed(self, sweep: float) -> bool:
        return len(self._sweeps) >= 8 and sweep > self.sampling.max_sweep * float(np.percentile(self._sweeps, 25))

    def _sentinel(self) -> float:
        self.sentinel.time(1)  # other rows have just thrown it out of the caches
        return self.sentinel.time(2) / 2

    def _empty_call(self, nothing: Any, once: bool) -> float:
        return float(nothing.once()) if once else float(nothing.time(20)) / 20

    def _net(self, ms: float, once: bool) -> float:
        empty = self._empty[once] or self._empty[False]
        return max(ms - (float(np.median(empty)) if empty else 0.0), 0.02 * ms)


def summary(samples: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, median, high = np.percentile(np.asarray(samples, dtype=float), [25, 50, 75])
    return float(median), float(high - low)


def _relative_spread(samples: Sequence[float]) -> float:
    median, spread = summary(samples)
    return spread / median if median > 0 else 0.0
