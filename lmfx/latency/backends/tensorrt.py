"""Measures with TensorRT: an engine for each workload, replayed as a CUDA graph and timed by the GPU's own events.

    workload -> ONNX in the asked precision -> engine -> execution context -> `lmfx.latency.backends.cuda`

One backend for `tensorrt` (10 and 11) and `tensorrt_rtx`, whose Python API is shared; what one of them lacks is found
out with `hasattr`. Two caches lie beside the store, one file for each package, version and GPU:

    timing cache     tensorrt: how fast kernels were while engines were built, so that equal layers get equal kernels
    runtime cache    tensorrt_rtx: kernels that were compiled when engines were first run

Both only save time; a damaged or foreign one is not used, and written anew. Of two processes, the last one's is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lmfx.environment.atomic_files import atomic_write
from lmfx.environment.host import host_facts
from lmfx.export.emit import to_onnx_bytes
from lmfx.export.precision import check_precision
from lmfx.export.tensorrt import import_tensorrt, serialize_engine
from lmfx.int8.forms import made_up_int8
from lmfx.int8.units import SCHEMES
from lmfx.latency.backend import Measurement, Prune, TimedBackend, Whole
from lmfx.latency.backends.cuda import CudaRunner
from lmfx.latency.backends.gpu_state import monitor_of, sampling_on
from lmfx.latency.sampling import Runner, Sampling, Session
from lmfx.latency.workload import Workload, sentinel_workload
from lmfx.passes.errors import DeviceError, ExportError, OptionError
from lmfx.store.rows import Store

__all__ = ["TensorRTBackend"]

FILL = 0.01
DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
}


class TensorRTBackend(TimedBackend):
    """Times workloads as TensorRT engines on one GPU.

    `package` is "tensorrt" or "tensorrt_rtx" (None: the first that can be imported). Engines are strongly typed:
    `precision` ("fp32", "fp16", "bf16") is that of the ONNX they are built from, with "int8" with Q/DQ nodes around all
    that runs so (`lmfx.int8`); `tf32` lets float32 convolutions run on tensor cores, as TensorRT does by itself.
    `cuda_graph=False` counts the launches.

    Raises `MissingExtra` without TensorRT, `DeviceError` without a GPU that it can use.
    """

    name = "tensorrt"

    def __init__(
        self,
        precision: str = "fp32",
        package: str | None = None,
        tf32: bool = True,
        cuda_graph: bool = True,
        device: str = "cuda",
        sampling: Sampling | None = None,
    ) -> None:
        if precision != "int8":
            check_precision(precision)
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise OptionError(f"{device!r} is not a torch device; use 'cuda' or 'cuda:1'") from error
        if self.device.type != "cuda":
            raise OptionError(f"TensorRT runs on 'cuda' devices, not on {device!r}; use latency='onnxruntime' on a CPU")
        super().__init__(sampling_on(self.device.index or 0, sampling))
        self.trt = import_tensorrt(package)
        if not torch.cuda.is_available():
            raise DeviceError("the tensorrt backend needs a CUDA device, and torch sees none; use onnxruntime on a CPU")
        self.precision, self.tf32, self.cuda_graph = precision, tf32, cuda_graph
        self.index = self.device.index or 0
        self.logger = self.trt.Logger(self.trt.Logger.ERROR)
        self.runtime = self.trt.Runtime(self.logger)
        if not self.runtime:
            raise DeviceError(
                f"{self._package} could not make a runtime on {torch.cuda.get_device_name(self.device)}: update the "
                "driver, or use latency='torch'"
            )
        self._folder: Path | None = None
        self._timing = _Cache("timing")
        self._compiled = _Cache("runtime")

    @property
    def _package(self) -> str:
        return f"{self.trt.__name__} {self.trt.__version__}"

    def identity(self) -> dict[str, Any]:
        """Backend, package and version, device, driver, precision, every setting, and the facts of the host."""
        return {
            "backend": self.name,
            "package": self.trt.__name__,
            "version": self.trt.__version__,
            "device": torch.cuda.get_device_name(self.device),
            "capability": "sm{}{}".format(*torch.cuda.get_device_capability(self.device)),
            "driver": monitor_of(self.index).driver,
            "precision": self.precision,
            "tf32": self.tf32,
            "clock": "cuda graph" if self.cuda_graph else "cuda events",
            "threads": 1,
            **host_facts(),
        }

    def prepare(self, workload: Workload) -> Runner:
        data = self._model(workload, inside=True)
        return self._prepared(data)

    def prepare_whole(self, workload: Workload) -> Runner:
        return self._prepared(self._model(workload, inside=False))

    def _model(self, workload: Workload, inside: bool) -> bytes:
        """A workload as ONNX; in 8 bits one `inside` a network reads and gives 8 bits."""
        if self.precision != "int8":
            return to_onnx_bytes(workload.build(), workload.inputs, fill=FILL, precision=self.precision)
        return made_up_int8(to_onnx_bytes(workload.build(), workload.inputs, fill=FILL), SCHEMES["tensorrt"], inside)

    def _prepared(self, data: bytes) -> Runner:
        with torch.cuda.device(self.device):
            plan = serialize_engine(self.trt, data, configure=self._configure)
            engine = self.runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise ExportError(
                    f"{self._package} could not load the engine that it has just built; is there enough GPU memory?"
                )
            context = self._context(engine)
            tensors = [self._bind(engine, context, i) for i in range(engine.num_io_tensors)]
            held: list[Any] = [engine, context, *tensors]  # the engine writes into them, so they live as long as it

            def call() -> None:
                if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                    raise ExportError(f"{self._package} could not run the engine; is there enough GPU memory?")

            nbytes = len(plan) + sum(t.numel() * t.element_size() for t in tensors)
            nbytes += int(getattr(engine, "device_memory_size_v2", 0) or 0)
            monitor = monitor_of(self.index)
            return CudaRunner(call, nbytes, graph=self.cuda_graph, monitor=monitor, on_close=held.clear)

    def session(self) -> Session:
        sentinel = self.prepare(sentinel_workload())
        sentinel.time(20)
        return Session(sentinel, self.sampling)

    def measure(
        self,
        workloads: Iterable[Workload],
        store: Store | None = None,
        progress: bool = False,
        rounds: int | None = None,
        prune: Prune | None = None,
    ) -> dict[str, Measurement]:
        """See `Backend.measure`. The caches beside the store are read before, and written after."""
        self._folder = self._folder if store is None else store.path.parent
        self._load(self._folder)
        try:
            return super().measure(workloads, store, progress, rounds, prune)
        finally:
            self._save(self._folder)

    def measure_interleaved(self, modules: Sequence[Whole], repeats: int = 5) -> list[list[float]]:
        """See `Backend.measure_interleaved`. The caches are those of the last store that rows were measured into."""
        try:
            return super().measure_interleaved(modules, repeats)
        finally:
            self._save(self._folder)

    # --- building ------------------------------------------------------------------------------------------------

    def _configure(self, config: Any) -> None:
        trt = self.trt
        if not self.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if hasattr(config, "set_compute_capability"):  # builds for many GPUs unless it is told which
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(trt.ComputeCapability.CURRENT, 0):
                raise DeviceError(
                    f"{self._package} has no code for {torch.cuda.get_device_name(self.device)}: use another version, "
                    "or latency='torch'"
                )
        elif hasattr(config, "create_timing_cache"):
            if self._timing.cache is None:
                self._timing.cache = config.create_timing_cache(self._timing.blob) or config.create_timing_cache(b"")
            if self._timing.cache is None or not config.set_timing_cache(self._timing.cache, False):
                self._timing.cache = config.create_timing_cache(b"")  # made on another GPU
                if self._timing.cache is not None:
                    config.set_timing_cache(self._timing.cache, False)

    def _context(self, engine: Any) -> Any:
        context = None
        config = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        if config is not None and hasattr(config, "create_runtime_cache"):
            if self._compiled.cache is None:
                self._compiled.cache = config.create_runtime_cache()
                if self._compiled.blob:
                    self._compiled.cache.deserialize(self._compiled.blob)  # False: another driver; it stays empty
            if config.set_runtime_cache(self._compiled.cache):
                context = engine.create_execution_context(config)
        context = context or engine.create_execution_context()
        if context is None:
            raise ExportError(f"{self._package} could not make an execution context; is there enough GPU memory?")
        return context

    def _bind(self, engine: Any, context: Any, i: int) -> torch.Tensor:
        """A tensor on the GPU for an input or output, and its address for the engine."""
        name = engine.get_tensor_name(i)
        kind = engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise ExportError(f"the engine's tensor {name} is of type {kind}, which torch has not: use latency='torch'")
        shape = tuple(engine.get_tensor_shape(name))
        if any(n < 0 for n in shape):
            raise ExportError(
                f"the engine's tensor {name} has the shape {shape}, which is not fixed: use latency='torch'"
            )
        dtype = DTYPES[kind]
        tensor = torch.zeros(shape, dtype=dtype, device=self.device)
        if dtype.is_floating_point:
            tensor.uniform_()
        if not context.set_tensor_address(name, tensor.data_ptr()):
            raise ExportError(f"{self._package} refused the address of {name}: use latency='torch'")
        return tensor

    # --- caches --------------------------------------------------------------------------------------------------

    def _file(self, folder: Path, cache: _Cache) -> Path:
        parts = (self.trt.__name__, self.trt.__version__, torch.cuda.get_device_name(self.device))
        return folder / (re.sub(r"[^A-Za-z0-9.]+", "_", "-".join(parts)) + f".{cache.kind}")

    def _load(self, folder: Path | None) -> None:
        for cache in (self._timing, self._compiled):
            if folder is not None and cache.cache is None:
                try:
                    cache.blob = self._file(folder, cache).read_bytes()
                except OSError:
                    cache.blob = b""

    def _save(self, folder: Path | None) -> None:
        for cache in (self._timing, self._compiled):
            data = b"" if cache.cache is None or folder is None else bytes(cache.cache.serialize() or b"")
            if folder is not None and data and data != cache.blob:
                try:
                    atomic_write(self._file(folder, cache), data)
                except OSError:  # a full disk loses time, and no measurement
                    continue
                cache.blob = data


class _Cache:
    """A cache of TensorRT's and the bytes that are on disk."""

    def __init__(self, kind: str) -> None:
        self.kind, self.blob = kind, b""
        self.cache: Any = None
