"""ONNX Runtime: the default backend without a GPU.

One thread by default, timed by its CPU time, because other processes on the machine then cost (nearly) nothing; several
threads and other providers are timed by the wall clock. Sessions are made from bytes in memory, with every graph
optimisation.

A workload is timed as what it costs *inside* a network, without the layout changes at its ends (`layout="network"`, see
`lmfx.latency.layout`; `"isolated"` keeps them). An isolated row pays two
layout changes that the network does not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from lmfx.export.emit import to_onnx_bytes
from lmfx.latency.base import TimedBackend
from lmfx.latency.host import cpu_name, host_facts
from lmfx.latency.layout import in_network
from lmfx.latency.roofline import RooflineBackend
from lmfx.latency.rounds import CallRunner, Runner, Sampling, Session, cpu_clock, wall_clock
from lmfx.latency.workload import Workload, sentinel_workload
from lmfx.passes.errors import DeviceError, MissingExtra, OptionError

__all__ = ["OnnxRuntimeBackend"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
FILL = 0.01
LARGE_BYTES = 2**16
FASTER_THAN_SENTINEL = 2.0  # no op runs at more than this many times the FLOP/s of the sentinel
DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",  # a time step, say: random numbers below one become 0
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


class OnnxRuntimeBackend(TimedBackend):
    """Times workloads in ONNX Runtime. `provider` is "cpu", "cuda" or "tensorrt".

    Raises `MissingExtra` without onnxruntime, `DeviceError` if this build of it does not have the provider.
    """

    name = "onnxruntime"

    def __init__(
        self, threads: int = 1, provider: str = "cpu", layout: str = "network", sampling: Sampling | None = None
    ) -> None:
        super().__init__(sampling)
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            raise OptionError(f"threads must be a positive integer, not {threads!r}")
        if provider not in PROVIDERS:
            raise OptionError(f"unknown provider {provider!r}; choose one of {', '.join(PROVIDERS)}")
        if layout not in ("network", "isolated"):
            raise OptionError(f'layout must be "network" or "isolated", not {layout!r}')
        self.ort = _import()
        if PROVIDERS[provider] not in self.ort.get_available_providers():
            raise DeviceError(
                f"this onnxruntime ({self.ort.__version__}) has no {PROVIDERS[provider]}, only "
                f"{', '.join(self.ort.get_available_providers())}; pip install onnxruntime-gpu on a machine with a GPU"
            )
        if provider != "cpu" and not torch.cuda.is_available():
            raise DeviceError(f"provider {provider!r} needs a CUDA device, and torch sees none; use provider='cpu'")
        self.threads, self.provider, self.layout = threads, provider, layout

    def identity(self) -> dict[str, Any]:
        """Backend, version, provider, device, threads, clock, layout and the facts of the host."""
        return {
            "backend": self.name,
            "version": self.ort.__version__,
            "provider": self.provider,
            "device": cpu_name() if self.provider == "cpu" else torch.cuda.get_device_name(),
            "threads": self.threads,
            "clock": "cpu" if self._cpu_time else "wall",
            "layout": self.layout,
            "caches": self.sampling.caches,
            **host_facts(),
        }

    def prepare(self, workload: Workload) -> Runner:
        data = to_onnx_bytes(workload.build(), workload.inputs, fill=FILL)
        if self.layout == "isolated" or self.provider != "cpu":
            return self._runner(data)
        model = in_network(data, self._optimize)
        nbytes = model.ByteSize()
        options = self._options()
        options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        held = self._lend_weights(model, options)
        runner = self._runner(model.SerializeToString(), options)
        runner.nbytes, runner.on_close = nbytes, held.clear
        return runner

    def prepare_whole(self, workload: Workload) -> Runner:
        return self._runner(to_onnx_bytes(workload.build(), workload.inputs, fill=FILL))

    def lower_bound(self, module: nn.Module, workload: Workload, session: Session) -> float:
        """The time of its FLOPs at a rate that no op reaches."""
        if not isinstance(module, fx.GraphModule) or self.provider != "cpu":
            return 0.0
        sentinel = sentinel_workload()
        flat_out = RooflineBackend(1.0, bandwidth_gbs=1e9, overhead_us=0.0)  # at 1 GFLOP/s
        rate = flat_out.ms(sentinel.build(), sentinel.inputs) / session.start()
        return flat_out.ms(module, workload.inputs) / (FASTER_THAN_SENTINEL * rate)

    def session(self) -> Session:
        sentinel = self.prepare_whole(sentinel_workload())
        nothing = self.prepare_whole(Workload.of(fx.symbolic_trace(nn.Sequential(nn.ReLU())), ((1, 1), torch.float32)))
        sentinel.time(20)
        nothing.time(100)
        return Session(sentinel, self.sampling, nothing=nothing)

    @property
    def _cpu_time(self) -> bool:
        return self.provider == "cpu" and self.threads == 1

    def _options(self) -> Any:
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
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
            self.ort.InferenceSession(data, options, providers=[PROVIDERS[self.provider]])
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

        providers = [PROVIDERS[self.provider]] + (["CPUExecutionProvider"] if self.provider != "cpu" else [])
        session = self.ort.InferenceSession(data, options or self._options(), providers=providers)
        binding = session.io_binding()
        random = np.random.default_rng(0)
        inputs = []
        for value in session.get_inputs():
            drawn = np.asarray(random.random(value.shape, dtype=np.float32))
            inputs.append(drawn.astype(DTYPES[value.type]))
            binding.bind_cpu_input(value.name, inputs[-1])
        for value in session.get_outputs():
            binding.bind_output(value.name, "cpu")
        run = session.run_with_iobinding

        def refresh() -> None:
            for array in inputs:
                np.subtract(1.0, array, out=array)

        return CallRunner(lambda: run(binding), cpu_clock if self._cpu_time else wall_clock, len(data), refresh=refresh)


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(
            f"the onnxruntime backend needs the package onnxruntime, which can not be imported ({error}); "
            'pip install "lmfx[ort]"'
        ) from error
    return onnxruntime
