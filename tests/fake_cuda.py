"""Stand-ins for `torch.cuda` (with a clock that is known), TensorRT and NVML, where there is no GPU."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

LAUNCH_MS = 0.005


class FakeCuda:
    """A GPU with one queue. A kernel takes its time, and so does a launch, unless a delay hides it."""

    def __init__(self, capturable: bool = True, cold: float = 1.0) -> None:
        self.capturable, self.cold = capturable, cold  # `cold`: how much slower the first 10 ms are
        self.now = 0.0
        self.hidden = 0.0
        self.recording: list[float] | None = None
        self.log: list[str] = []
        self.queries = 0
        fake = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at, self.asked = 0.0, 0

            def record(self) -> None:
                self.at = fake.now
                fake.log.append("event")

            def query(self) -> bool:
                self.asked += 1
                fake.queries += 1
                return self.asked > 2

            def elapsed_time(self, other: Any) -> float:
                return float(other.at - self.at)

        class CUDAGraph:
            def __init__(self) -> None:
                self.kernels: list[float] = []

            def replay(self) -> None:
                fake.log.append(f"replay {len(self.kernels)}")
                fake.launch()
                for ms in self.kernels:
                    fake.run(ms)

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def Stream(self) -> Any:
        return types.SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None, cuda_stream=7)

    def current_stream(self) -> Any:
        return self.Stream()

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any = None) -> Iterator[None]:
        assert stream is not None, "a graph must be captured on a stream of its own"
        self.recording = []
        yield
        graph.kernels, self.recording = self.recording, None

    def synchronize(self) -> None:
        self.recording = None
        self.log.append("synchronize")

    def _sleep(self, cycles: int) -> None:
        self.hidden = cycles * 1e-6 * 0.5
        self.log.append("sleep")

    def kernel(self, ms: float) -> None:
        if self.recording is not None:
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.recording.append(ms)
            return
        self.launch()
        self.run(ms)

    def launch(self) -> None:
        if self.hidden >= LAUNCH_MS:
            self.hidden -= LAUNCH_MS
        else:
            self.now += LAUNCH_MS

    def run(self, ms: float) -> None:
        self.now += ms * (self.cold if self.now < 10 else 1.0)


class FakeCache:
    def __init__(self, blob: bytes = b"") -> None:
        self.blob = blob

    def serialize(self) -> bytes:
        return self.blob

    def deserialize(self, blob: bytes) -> bool:
        self.blob = blob if blob.startswith(b"good") else b""
        return bool(self.blob)


def fake_tensorrt(name: str = "tensorrt", **faults: Any) -> Any:
    """A module with the parts of TensorRT's API that lmfx calls. `log` lists the calls; `faults` are wrong results."""
    trt: Any = types.ModuleType(name)
    trt.__version__ = "10.9.0.34"
    trt.log = []
    rtx = name == "tensorrt_rtx"

    class Logger:
        ERROR, INTERNAL_ERROR = "ERROR", "INTERNAL_ERROR"

        def __init__(self, level: Any = None) -> None:
            pass

    class Network:
        num_layers = 1

        def get_layer(self, i: int) -> Any:
            return types.SimpleNamespace(type=types.SimpleNamespace(name="CONVOLUTION"))

    class Config:
        num_compute_capabilities = 0

        def clear_flag(self, flag: Any) -> None:
            trt.log.append(f"clear {flag}")

    def create_timing_cache(self: Any, blob: bytes) -> Any:
        trt.log.append(f"timing cache of {blob!r}")
        return None if blob == b"damaged" else FakeCache(blob)

    def set_timing_cache(self: Any, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.timing = cache
        return not cache.blob.startswith(b"foreign")

    def set_compute_capability(self: Any, capability: Any, index: int) -> bool:
        trt.log.append(f"capability {capability} at {index} of {self.num_compute_capabilities}")
        return bool(faults.get("capability", True))

    if rtx:
        Config.set_compute_capability = set_compute_capability  # type: ignore[attr-defined]
    else:
        Config.create_timing_cache = create_timing_cache  # type: ignore[attr-defined]
        Config.set_timing_cache = set_timing_cache  # type: ignore[attr-defined]

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def __bool__(self) -> bool:
            return bool(faults.get("builder", True))

        def create_network(self, flags: int) -> Any:
            trt.log.append(f"network {flags}")
            return Network()

        def create_builder_config(self) -> Any:
            return Config()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            if faults.get("build", True) is not True:
                self.logger.log("ERROR", faults["build"])
                return None
            if hasattr(config, "timing"):
                config.timing.blob = (config.timing.blob or b"good") + b"+"
            return b"plan"

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Any, logger: Any) -> None:
            pass

        def parse(self, model: bytes) -> bool:
            trt.model = model
            return True

    class RuntimeConfig:
        def create_runtime_cache(self) -> Any:
            return FakeCache()

        def set_runtime_cache(self, cache: Any) -> bool:
            trt.log.append(f"runtime cache {cache.blob!r}")
            cache.blob = cache.blob or b"good kernels"
            return True

    class Engine:
        num_io_tensors, device_memory_size_v2 = 2, 1000

        def get_tensor_name(self, i: int) -> str:
            return f"tensor{i}"

        def get_tensor_dtype(self, name: str) -> Any:
            return types.SimpleNamespace(name=faults.get("dtype", "HALF"))

        def get_tensor_shape(self, name: str) -> Any:
            return faults.get("shape", (1, 4))

        def create_execution_context(self, config: Any = None) -> Any:
            trt.log.append("context" if config is None else "context with config")
            return Context() if faults.get("context", True) else None

    if rtx:
        Engine.create_runtime_config = lambda self: RuntimeConfig()  # type: ignore[attr-defined]

    class Context:
        def set_tensor_address(self, name: str, address: int) -> bool:
            return bool(faults.get("address", True))

        def execute_async_v3(self, stream: int) -> bool:
            assert stream == 7, "the default stream would synchronize"
            if not faults.get("execute", True):
                return False
            trt.cuda.kernel(0.05)
            return True

    class Runtime:
        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            return Engine() if faults.get("engine", True) else None

    trt.ILogger, trt.Logger, trt.Builder, trt.OnnxParser, trt.Runtime = Logger, Logger, Builder, OnnxParser, Runtime
    trt.NetworkDefinitionCreationFlag = types.SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1)
    trt.BuilderFlag = types.SimpleNamespace(TF32="TF32")
    trt.ComputeCapability = types.SimpleNamespace(CURRENT="CURRENT", SM89="SM89")
    return trt


def fake_nvml(clocks: list[int], bits: int = 0, broken: bool = False) -> Any:
    """A `pynvml` that tells these clocks in turn, then the last one again."""
    nvml: Any = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.NVML_CLOCK_SM = 1
    left = list(clocks)

    def clock(handle: Any, which: int) -> int:
        if broken:
            raise nvml.NVMLError("not supported")
        return left.pop(0) if len(left) > 1 else left[0]

    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlSystemGetDriverVersion = lambda: b"580.1"
    nvml.nvmlDeviceGetClockInfo = clock
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: bits
    return nvml
