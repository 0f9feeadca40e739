"""PyTorch itself: inference mode on a CPU (CPU time for one thread, wall time for several), CUDA graphs on a GPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from lmfx.export.emit import off_meta
from lmfx.latency.base import Measurement, Prune, TimedBackend, Whole
from lmfx.latency.host import cpu_name, host_facts
from lmfx.latency.rounds import CallRunner, Runner, Sampling, Session, cpu_clock, wall_clock
from lmfx.latency.store import Store
from lmfx.latency.workload import Workload, sentinel_workload
from lmfx.passes.errors import DeviceError, OptionError

__all__ = ["CudaRunner", "TorchBackend"]


class TorchBackend(TimedBackend):
    """Times workloads in PyTorch on `device`, with `threads` on a CPU.

    Raises `DeviceError` if the device is not there.
    """

    name = "torch"

    def __init__(self, threads: int = 1, device: str = "cpu", sampling: Sampling | None = None) -> None:
        super().__init__(sampling)
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            raise OptionError(f"threads must be a positive integer, not {threads!r}")
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise OptionError(f"{device!r} is not a torch device; use 'cpu' or 'cuda'") from error
        if self.device.type not in ("cpu", "cuda"):
            raise OptionError(f"the torch backend times 'cpu' and 'cuda', not {device!r}")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceError(f"device {device!r} was asked for, and torch sees no CUDA device; use device='cpu'")
        self.threads = threads

    def identity(self) -> dict[str, Any]:
        """Backend, torch version, device, threads, clock and the facts of the host."""
        cuda = self.device.type == "cuda"
        return {
            "backend": self.name,
            "version": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if cuda else cpu_name(),
            "threads": self.threads,
            "clock": "cuda graph" if cuda else "cpu" if self.threads == 1 else "wall",
            "caches": "hot" if cuda else self.sampling.caches,
            **host_facts(),
        }

    def prepare(self, workload: Workload) -> Runner:
        module = workload.build()
        module = copy.deepcopy(module) if (ready := off_meta(module)) is module else ready
        module = module.eval().to(self.device)
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.rand(s, generator=generator).to(self.device, d) for s, d in workload.inputs]
        nbytes = sum(p.numel() * p.element_size() for p in module.parameters())

        def call() -> None:
            with torch.inference_mode():
                module(*inputs)

        if self.device.type == "cuda":
            return CudaRunner(call, nbytes)

        def refresh() -> None:
            for tensor in inputs:
                torch.sub(1.0, tensor, out=tensor)

        return CallRunner(call, cpu_clock if self.threads == 1 else wall_clock, nbytes, refresh=refresh)

    def session(self) -> Session:
        sentinel = self.prepare(sentinel_workload())
        sentinel.time(5)
        if self.device.type == "cuda":
            return Session(sentinel, self.sampling)
        nothing = self.prepare(Workload.of(fx.symbolic_trace(nn.Sequential(nn.Identity())), ((1,), torch.float32)))
        return Session(sentinel, self.sampling, nothing=nothing)

    def measure(
        self,
        workloads: Iterable[Workload],
        store: Store | None = None,
        progress: bool = False,
        rounds: int | None = None,
        prune: Prune | None = None,
    ) -> dict[str, Measurement]:
        """See `Backend.measure`. torch's number of threads is set for the time of the call."""
        with self._threads():
            return super().measure(workloads, store, progress, rounds, prune)

    def measure_interleaved(self, modules: Sequence[Whole], repeats: int = 5) -> list[list[float]]:
        """See `Backend.measure_interleaved`."""
        with self._threads():
            return super().measure_interleaved(modules, repeats)

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class CudaRunner:
    """Captures a call as a CUDA graph (or runs it as it is, if it can not be captured) and times it with events."""

    def __init__(self, call: Callable[[], Any], nbytes: int) -> None:
        self.nbytes = nbytes
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their kernels outside of the capture
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self._run = call
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            self._run = graph.replay
        except RuntimeError:
            torch.cuda.synchronize()

    def time(self, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            self._run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def close(self) -> None:
        del self._run
