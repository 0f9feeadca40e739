"""Measures with ONNX Runtime, the default backend without a GPU.

One thread by default, timed by its CPU time, because other processes on the machine then cost (nearly) nothing; several
threads and other providers are timed by the wall clock. Sessions are made from bytes in memory, with every graph
optimisation.

A workload is timed as what it costs *inside* a network, without the layout changes at its ends (`layout="network"`, see
`lmfx.latency.blocked_layout`; `"isolated"` keeps them). An isolated row pays two
layout changes that the network does not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from lmfx.environment.caller_state import one_line
from lmfx.environment.host import cpu_name, host_facts
from lmfx.export.emit import to_onnx_bytes
from lmfx.latency.backend import TimedBackend
from lmfx.latency.backends.gpu_state import monitor_of
from lmfx.latency.backends.int8_models import ChosenForms, Int8Models
from lmfx.latency.backends.roofline import RooflineBackend
from lmfx.latency.blocked_layout import in_network
from lmfx.latency.sampling import CallRunner, Runner, Sampling, Session, cpu_clock, wall_clock
from lmfx.latency.workload import Workload, sentinel_workload
from lmfx.passes.errors import DeviceError, ExportError, MissingExtra, OptionError

__all__ = ["OnnxRuntimeBackend"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
FILL = 0.01
LARGE_BYTES = 2**16
FASTER_THAN_SENTINEL = 2.0  # no op runs at more than this many times the FLOP/s of the sentinel
INT8_FASTER = 8.0  # the same in 8 bits, on top
DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    # a time step or an image in bytes, say: random numbers below one become 0
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


class OnnxRuntimeBackend(TimedBackend):
    """Times workloads in ONNX Runtime. `provider` is "cpu", "cuda" or "tensorrt", the last two with their
    `provider_options` and a `precision` ("fp32", "fp16"), and without any copy to or from the host in the timed part.
    On "cpu" the precision is "fp32" or "int8": with Q/DQ nodes around all that runs faster so (`int8_models`).

    Raises `MissingExtra` without onnxruntime, `DeviceError` if this build of it does not have the provider.
    """

    name = "onnxruntime"

    def __init__(
        self,
        threads: int = 1,
        provider: str = "cpu",
        layout: str = "network",
        precision: str = "fp32",
        provider_options: Mapping[str, str] | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(sampling)
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            raise OptionError(f"threads must be a positive integer, not {threads!r}")
        if provider not in PROVIDERS:
            raise OptionError(f"unknown provider {provider!r}; choose one of {', '.join(PROVIDERS)}")
        if layout not in ("network", "isolated"):
            raise OptionError(f'layout must be "network" or "isolated", not {layout!r}')
        self.gpu = provider != "cpu"
        if precision not in ("fp32", "fp16", "int8") or precision == ("int8" if self.gpu else "fp16"):
            raise OptionError(
                'precision is "fp32", or "int8" on the provider cpu, or "fp16" on the providers cuda and tensorrt, '
                f"not {precision!r}"
            )
        if provider_options and not self.gpu:
            raise OptionError("provider_options go with the providers cuda and tensorrt: leave them out")
        self.ort = _import()
        if PROVIDERS[provider] not in self.ort.get_available_providers():
            raise DeviceError(
                f"this onnxruntime ({self.ort.__version__}) has no {PROVIDERS[provider]}, only "
                f"{', '.join(self.ort.get_available_providers())}; pip install onnxruntime-gpu on a machine with a GPU"
            )
        if self.gpu and not torch.cuda.is_available():
            raise DeviceError(f"provider {provider!r} needs a CUDA device, and torch sees none; use provider='cpu'")
        self.threads, self.provider, self.precision = threads, provider, precision
        self.layout = "isolated" if self.gpu else layout  # the blocked layout is the CPU's
        self.provider_options = {str(k): str(v) for k, v in (provider_options or {}).items()}
        self.int8 = Int8Models(self._optimize, self._int8_runner) if precision == "int8" else None

    def identity(self) -> dict[str, Any]:
        """Backend, version, provider and its options, device, threads, clock, layout and the facts of the host."""
        more: dict[str, Any] = {"precision": self.precision} if self.gpu or self.int8 is not None else {}
        if self.gpu:
            more |= {"provider_options": self.provider_options}
            more |= {"driver": monitor_of(torch.cuda.current_device()).driver}
        return {
            "backend": self.name,
            "version": self.ort.__version__,
            "provider": self.provider,
            "device": torch.cuda.get_device_name() if self.gpu else cpu_name(),
            "threads": self.threads,
            "clock": "cpu" if self._cpu_time else "wall",
            "pinned": bool(self._pinned()),
            "layout": self.layout,
            "caches": "hot" if self.gpu else self.sampling.state,
            **more,
            **host_facts(),
        }

    def prepare(self, workload: Workload) -> Runner:
        data = self._model(workload)
        if self.layout == "isolated":
            return self._runner(data if self.int8 is None else self.int8.whole(data)[0])
        left: list[str] = []
        if self.int8 is None:
            model = in_network(data, self._optimize)
        else:
            model, left = self.int8.row(data)
        nbytes = model.ByteSize()
        options = self._options()
        options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        held = self._lend_weights(model, options)
        runner = self._runner(model.SerializeToString(), options)
        runner.nbytes, runner.on_close = nbytes, held.clear
        if left:
            runner.conditions = {"stays float": left}
        return runner

    def prepare_whole(self, workload: Workload) -> Runner:
        data = self._model(workload)
        return self._runner(data if self.int8 is None else self.int8.whole(data)[0])

    def _model(self, workload: Workload) -> bytes:
        precision = "fp32" if self.int8 is not None else self.precision
        return to_onnx_bytes(workload.build(), workload.inputs, fill=FILL, precision=precision)

    def int8_forms(self, model: bytes) -> ChosenForms:
        """Which units of a float network run in 8 bits, and what both networks take (with precision="int8")."""
        assert self.int8 is not None
        return self.int8.whole(model)[1]

    def _int8_runner(self, data: bytes, optimized: bool) -> CallRunner:
        options = self._options()
        if optimized:
            options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return self._runner(data, options)

    def lower_bound(self, module: nn.Module, workload: Workload, session: Session) -> float:
        """The time of its FLOPs at a rate that no op reaches."""
        if not isinstance(module, fx.GraphModule) or self.gpu:
            return 0.0
        sentinel = sentinel_workload()
        flat_out = RooflineBackend(1.0, bandwidth_gbs=1e9, overhead_us=0.0)  # at 1 GFLOP/s
        rate = flat_out.ms(sentinel.build(), sentinel.inputs) / session.start()
        faster = FASTER_THAN_SENTINEL * (INT8_FASTER if self.int8 is not None else 1.0)
        return flat_out.ms(module, workload.inputs) / (faster * rate)

    def session(self) -> Session:
        sentinel = self.prepare_whole(sentinel_workload())
        nothing = self.prepare_whole(Workload.of(fx.symbolic_trace(nn.Sequential(nn.ReLU())), ((1, 1), torch.float32)))
        sentinel.time(20)
        nothing.time(100)
        return Session(sentinel, self.sampling, nothing=nothing)

    @property
    def _cpu_time(self) -> bool:
        return not self.gpu and self.threads == 1

    def _pinned(self) -> str:
        """One core for each thread besides the caller's, by ONNX Runtime's count from 1; "" where there are too few."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        return ";".join(str(c + 1) for c in cores[1 : self.threads]) if 1 < self.threads <= len(cores) else ""

    def _options(self) -> Any:
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        if pinned := self._pinned():
            options.add_session_config_entry("session.intra_op_thread_affinities", pinned)
        options.execution_mode = self.ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        return options

    def _optimize(self, data: bytes) -> Any:
        """The model after ONNX Runtime's graph optimisations; it only gives it out as a file."""
        import onnx

        with tempfile.TemporaryDirectory(prefix="lmfx-") as folder:
            path = Path(folder) / "optimized.onnx"
            options = self._options()
            options.optimized_model_filepath = str(path)
            self._session(data, options)
            return onnx.load(path)

    def _lend_weights(self, model: Any, options: Any) -> list[Any]:
        """Takes large weights out of the protobuf and lends them to the session, which saves it two copies."""
        import numpy as np

        lent: dict[str, Any] = {}
        arrays: list[Any] = []
        for tensor in model.graph.initializer:
            if tensor.data_type != tensor.FLOAT or len(tensor.raw_data) < LARGE_BYTES:
                continue
            values = np.frombuffer(tensor.raw_data, np.float32).reshape(list(tensor.dims))
            arrays.append(values)
            lent[tensor.name] = self.ort.OrtValue.ortvalue_from_numpy(values)
            tensor.ClearField("raw_data")
            tensor.data_location = tensor.EXTERNAL
            tensor.external_data.add(key="location", value="lent")
        if lent:
            options.add_external_initializers(list(lent), list(lent.values()))
        return [*lent.values(), *arrays]

    def _runner(self, data: bytes, options: Any = None) -> CallRunner:
        import numpy as np

        random = np.random.default_rng(0)
        session = self._session(data, options)
        binding = session.io_binding()

        def run(bound: Any) -> None:
            try:
                session.run_with_iobinding(bound)
            except Exception as error:  # ONNX Runtime has errors of its own, all of them about this network
                raise _refused(error) from error

        inputs = []
        for value in session.get_inputs():
            drawn = np.asarray(random.random(value.shape, dtype=np.float32))
            if value.type not in DTYPES:
                raise OptionError(f"{value.name} is a {value.type}, which numpy cannot make: use latency='torch'")
            inputs.append(drawn.astype(DTYPES[value.type]))
            if self.gpu:
                held = self.ort.OrtValue.ortvalue_from_numpy(inputs[-1], "cuda", 0)
                binding.bind_ortvalue_input(value.name, held)
            else:
                binding.bind_cpu_input(value.name, inputs[-1])
        for value in session.get_outputs():
            binding.bind_output(value.name, "cuda" if self.gpu else "cpu")
        if self.gpu:
            return self._gpu_runner(lambda: run(binding), binding, len(data))

        def refresh() -> None:
            for array in inputs:
                if array.dtype.kind == "f":
                    np.subtract(1.0, array, out=array)
                elif array.dtype == np.uint8 and self.int8 is not None:
                    np.invert(array, out=array)

        return CallRunner(lambda: run(binding), cpu_clock if self._cpu_time else wall_clock, len(data), refresh=refresh)

    def _session(self, data: bytes, options: Any) -> Any:
        name = PROVIDERS[self.provider]
        if not self.gpu:
            try:
                return self.ort.InferenceSession(data, options or self._options(), providers=[name])
            except Exception as error:  # ONNX Runtime has errors of its own, all of them about this network
                raise _refused(error) from error
        providers = [(name, self.provider_options), "CPUExecutionProvider"]
        session = self.ort.InferenceSession(data, options or self._options(), providers=providers)
        if session.get_providers()[0] != name:  # it falls back to the CPU without an error
            raise DeviceError(
                f"onnxruntime {self.ort.__version__} could not start its {name}, and would run on the CPU; its CUDA, "
                "cuDNN or TensorRT libraries are missing or of another version: install those, or use provider='cpu'"
            )
        return session

    def _gpu_runner(self, run: Callable[[], Any], binding: Any, nbytes: int) -> CallRunner:
        """Inputs and outputs stay on the GPU. A run returns when the GPU has finished, so the wall clock is right."""
        binding.synchronize_inputs()

        def call() -> None:
            run()
            binding.synchronize_outputs()

        for _ in range(3):  # the first runs choose algorithms, or build TensorRT's engines
            call()
        return CallRunner(call, wall_clock, nbytes)


def _refused(error: Exception) -> ExportError:
    return ExportError(f"ONNX Runtime cannot run a part of the network: {one_line(error)}. Use latency='torch'")


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(
            f"the onnxruntime backend needs the package onnxruntime, which cannot be imported ({error}); "
            'pip install "lmfx[ort]"'
        ) from error
    return onnxruntime
