"""Measures with PyTorch: inference mode on a CPU (CPU time for one thread, else wall time), CUDA graphs on a GPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from lmfx.environment.caller_state import check_threads
from lmfx.environment.host import cpu_name, host_facts
from lmfx.export.precision import check_precision
from lmfx.export.specs import off_meta
from lmfx.latency.backend import Measurement, Prune, TimedBackend, Whole
from lmfx.latency.backends.cuda import CudaRunner
from lmfx.latency.backends.gpu_state import monitor_of, sampling_on
from lmfx.latency.sampling import CallRunner, Runner, Sampling, Session, cpu_clock, wall_clock
from lmfx.latency.workload import Workload, sentinel_workload
from lmfx.passes.errors import DeviceError, OptionError
from lmfx.store.rows import Store

__all__ = ["TorchBackend"]


class TorchBackend(TimedBackend):
    """Times workloads in PyTorch on `device`, with `threads` on a CPU.

    `precision` casts float32 workloads ("fp16", "bf16"); `channels_last` is the memory format of 4-d inputs and weights
    (None: on a GPU); `cuda_graph` replays CUDA graphs, else launches count; `compile` runs `torch.compile` first, which
    takes seconds a row. Rows and whole networks are timed under the same settings.

    Raises `DeviceError` if the device is not there, `OptionError` for what cannot be had together.
    """

    name = "torch"

    def __init__(
        self,
        threads: int = 1,
        device: str = "cpu",
        precision: str = "fp32",
        channels_last: bool | None = None,
        cuda_graph: bool = True,
        compile: bool = False,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(sampling)
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            raise OptionError(f"threads must be a positive integer, not {threads!r}")
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise OptionError(f"{device!r} is not a torch device; use 'cpu' or 'cuda'") from error
        if self.device.type not in ("cpu", "cuda"):
            raise OptionError(f"the torch backend times 'cpu' and 'cuda', not {device!r}")
        self.dtype = check_precision(precision)
        for option, value in (("channels_last", channels_last), ("cuda_graph", cuda_graph), ("compile", compile)):
            if not isinstance(value, bool) and not (option == "channels_last" and value is None):
                raise OptionError(f"{option} must be True or False, not {value!r}")
        self.cuda = self.device.type == "cuda"
        if self.cuda and not torch.cuda.is_available():
            raise DeviceError(f"device {device!r} was asked for, and torch sees no CUDA device; use device='cpu'")
        if self.cuda and (self.device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"there is no {device!r}, only {torch.cuda.device_count()} CUDA devices")
        if self.cuda:
            self.sampling = sampling_on(self.device.index or 0, sampling)
        self.threads, self.precision = threads, precision
        self.channels_last = self.cuda if channels_last is None else channels_last
        self.cuda_graph, self.compile = cuda_graph and self.cuda, compile

    def identity(self) -> dict[str, Any]:
        """Backend, version, device, threads, clock, every setting that changes times, and the facts of the host."""
        facts: dict[str, Any] = {
            "backend": self.name,
            "version": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.cuda else cpu_name(),
            "threads": self.threads,
            "clock": "cpu" if self.threads == 1 else "wall",
            "caches": "hot" if self.cuda else self.sampling.state,
            **host_facts(),
        }
        if self.cuda:
            facts |= {
                "clock": "cuda graph" if self.cuda_graph else "cuda events",
                "driver": monitor_of(self.device.index or 0).driver,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "cudnn_benchmark": torch.backends.cudnn.benchmark,
                "tf32": {"conv": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32},
            }
        chosen = {"precision": self.precision, "channels_last": self.channels_last, "compile": self.compile}
        plain = {"precision": "fp32", "channels_last": False, "compile": False}
        # rows of a CPU that were made before there was a choice stay good
        return facts | {k: v for k, v in chosen.items() if self.cuda or v != plain[k]}

    def prepare(self, workload: Workload) -> Runner:
        module = workload.build()
        module = copy.deepcopy(module) if (ready := off_meta(module)) is module else ready
        module = module.eval().to(self.device)
        if self.dtype != torch.float32:
            module = _cast(module, self.dtype)
        if self.channels_last:
            for parameter in (*module.parameters(), *module.buffers()):
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(0)
        inputs = [self._input(torch.rand(s, generator=generator), d) for s, d in workload.inputs]
        sizes = [sum(t.numel() * t.element_size() for t in tensors) for tensors in (module.parameters(), inputs)]
        nbytes = sizes[0] + (3 * sizes[1] if self.cuda else 0)  # a graph holds what is between, too
        run = self._callable(module, inputs, workload)

        def call() -> None:
            with torch.inference_mode():
                run(*inputs)

        if self.cuda:
            with torch.cuda.device(self.device):
                call()  # which compiles
                return CudaRunner(call, nbytes, graph=self.cuda_graph, monitor=monitor_of(self.device.index or 0))
        if self.compile:
            self._compile(call)

        def refresh() -> None:
            for tensor in (t for t in inputs if t.is_floating_point()):
                torch.sub(1.0, tensor, out=tensor)

        return CallRunner(call, cpu_clock if self.threads == 1 else wall_clock, nbytes, refresh=refresh)

    def _callable(self, module: nn.Module, inputs: list[torch.Tensor], workload: Workload) -> Any:
        """What is called in the timed part."""
        return torch.compile(module) if self.compile else module

    def _input(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        dtype = self.dtype if dtype == torch.float32 else dtype
        tensor = values.to(self.device, dtype)
        return (
            tensor.contiguous(memory_format=torch.channels_last) if self.channels_last and tensor.dim() == 4 else tensor
        )

    @staticmethod
    def _compile(call: Any) -> None:
        try:
            call()
        except Exception as error:  # no C++ compiler, or an op that it has no code for: many kinds
            reason = " ".join(str(error).split())[:300]
            raise OptionError(
                f"torch.compile could not compile a workload ({type(error).__name__}: {reason}); on a CPU it needs a "
                "C++ compiler. Use compile=False"
            ) from error

    def session(self) -> Session:
        sentinel = self.prepare(sentinel_workload())
        sentinel.time(5)
        if self.cuda:
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
        check_threads(self.threads, "latency='torch'")
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The float32 parameters and buffers in another dtype; whatever else there is stays."""
    return module._apply(lambda t: t.to(dtype) if t.dtype == torch.float32 else t)
