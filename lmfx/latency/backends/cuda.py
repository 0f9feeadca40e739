"""Times on a GPU: CUDA graph replays between two events, so that the clock is the GPU's and the CPU is out of the way.

    capture     call call ... call                 `inner` calls in one graph, as layers stand in a network
    time        delay | start | replay ... | end   the delay keeps the GPU busy until all replays are queued

One launch of a graph costs some microseconds, as much as a small layer; with several calls in a graph it is shared, and
what is between two calls is what is between two kernels of one network. A call that cannot be captured is run as it
is: then launches count, and the row's conditions say so. Nothing is copied to or from the host in the timed part, and
the host waits by asking again and again, because a thread that sleeps lets the clocks fall.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from lmfx.latency.backends.gpu_state import Conditions, Monitor

__all__ = ["CudaRunner"]

GRAPH_MS = 0.2  # a graph is at least this long
MOST_INNER = 20
BUSY_MS = 20.0  # of warm-up: clocks rise within milliseconds
STEADY = 0.03
WARM_UP_SECONDS = 0.5
DELAY_CYCLES = 20_000  # for each replay that is to be queued; about 10 us


class CudaRunner:
    """One prepared call on the current CUDA device; a `Runner` of `lmfx.latency.sampling`.

    `call` launches kernels on torch's current stream. With `graph` it is captured, if it can be. `cuda` is the module
    `torch.cuda`, or what stands for it in a test.
    """

    def __init__(
        self,
        call: Callable[[], Any],
        nbytes: int = 0,
        *,
        graph: bool = True,
        monitor: Monitor | None = None,
        on_close: Callable[[], None] | None = None,
        cuda: Any = torch.cuda,
    ) -> None:
        self.nbytes, self._on_close, self._cuda = nbytes, on_close, cuda
        self._stream = cuda.Stream()
        self._stream.wait_stream(cuda.current_stream())
        self._call = call  # a graph reads the tensors of its call by their addresses, so they must stay
        self._run, self.inner, self.captured = call, 1, False
        with cuda.stream(self._stream):  # libraries choose their kernels, and runtimes compile, outside of the capture
            for _ in range(3):
                call()
        self._stream.synchronize()
        if graph:
            self._capture(call)
        self._conditions = Conditions(monitor, {"cuda_graph": self.captured})
        self._warm_up()

    @property
    def conditions(self) -> dict[str, Any]:
        """SM clock and throttle reasons where they are known, and whether the call runs as a CUDA graph."""
        return self._conditions.as_dict()

    def time(self, repeats: int) -> float:
        """The time of `repeats` calls in ms: whole graphs are replayed, and the result is scaled."""
        replays = math.ceil(repeats / self.inner)
        elapsed = self._elapsed(replays)
        self._conditions.sample()
        return elapsed * repeats / (replays * self.inner)

    def close(self) -> None:
        """Lets go of the graph and of all that the call holds."""
        self._run = self._call = _closed
        if self._on_close is not None:
            self._on_close()

    def _capture(self, call: Callable[[], Any]) -> None:
        """One call first, which tells how many make a graph that is long enough."""
        self._record(call, 1)
        if self.captured:
            once = min(self._elapsed(1) for _ in range(3))
            inner = min(MOST_INNER, math.ceil(GRAPH_MS / max(once, 1e-6)))
            if inner > 1:
                self._record(call, inner)

    def _record(self, call: Callable[[], Any], inner: int) -> None:
        try:
            graph = self._cuda.CUDAGraph()
            with self._cuda.graph(graph, stream=self._stream):
                for _ in range(inner):
                    call()
        except RuntimeError:  # it synchronizes, or allocates outside of torch
            self._cuda.synchronize()
            return
        self._run, self.inner, self.captured = graph.replay, inner, True

    def _elapsed(self, replays: int) -> float:
        cuda = self._cuda
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        with cuda.stream(self._stream):
            if self.captured and hasattr(cuda, "_sleep"):
                cuda._sleep(DELAY_CYCLES * (replays + 1))
            start.record()
            for _ in range(replays):
                self._run()
            end.record()
        while not end.query():
            pass
        return float(start.elapsed_time(end))

    def _warm_up(self) -> None:
        """Until the GPU was busy for a while and two timings agree: while a row was built, its clocks fell."""
        busy, last, deadline = 0.0, math.inf, time.monotonic() + WARM_UP_SECONDS
        while time.monotonic() < deadline:
            now = self._elapsed(1)
            busy += now
            if busy >= BUSY_MS and abs(now - last) <= STEADY * last:
                return
            last = now


def _closed() -> None:
    raise RuntimeError("this runner is closed")
