"""TensorRT: builds an engine for every workload and times it with CUDA events.

One file for `tensorrt` and `tensorrt_rtx`, whose Python API is shared.
"""

from __future__ import annotations

from typing import Any

import torch

from lmfx.export.emit import to_onnx_bytes
from lmfx.export.tensorrt import import_tensorrt, serialize_engine
from lmfx.latency.base import TimedBackend
from lmfx.latency.host import host_facts
from lmfx.latency.rounds import Runner, Sampling, Session
from lmfx.latency.torch_backend import CudaRunner
from lmfx.latency.workload import Workload, sentinel_workload
from lmfx.passes.errors import DeviceError, ExportError

__all__ = ["TensorRTBackend"]


class TensorRTBackend(TimedBackend):
    """Times workloads as TensorRT engines on the first GPU; `fp16` lets TensorRT choose half precision.

    Raises `MissingExtra` without tensorrt, `DeviceError` without a GPU.
    """

    name = "tensorrt"

    def __init__(self, fp16: bool = False, sampling: Sampling | None = None) -> None:
        super().__init__(sampling)
        self.trt = import_tensorrt()
        if not torch.cuda.is_available():
            raise DeviceError("the tensorrt backend needs a CUDA device, and torch sees none; use onnxruntime on a CPU")
        self.fp16 = fp16
        self.runtime = self.trt.Runtime(self.trt.Logger(self.trt.Logger.ERROR))

    def identity(self) -> dict[str, Any]:
        """Backend, package and version, device, precision and the facts of the host."""
        return {
            "backend": self.name,
            "package": self.trt.__name__,
            "version": self.trt.__version__,
            "device": torch.cuda.get_device_name(),
            "precision": "fp16" if self.fp16 else "fp32",
            "threads": 1,
            **host_facts(),
        }

    def prepare(self, workload: Workload) -> Runner:
        data = to_onnx_bytes(workload.build(), workload.inputs, fill=0.01, precision="fp16" if self.fp16 else "fp32")
        engine = self.runtime.deserialize_cuda_engine(serialize_engine(self.trt, data))
        if engine is None:
            raise ExportError("TensorRT could not load the engine that it has just built")
        context = engine.create_execution_context()
        tensors = []
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            kind = getattr(torch, {"HALF": "float16", "FLOAT": "float32"}[engine.get_tensor_dtype(name).name])
            tensors.append(torch.rand(tuple(engine.get_tensor_shape(name)), device="cuda").to(kind))
            if not context.set_tensor_address(name, tensors[-1].data_ptr()):
                raise ExportError(f"TensorRT refused the address of {name}")

        def call() -> None:
            assert tensors  # the engine writes into them, so they live as long as the call
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise ExportError("TensorRT could not run the engine")

        return CudaRunner(call, len(data))

    def session(self) -> Session:
        sentinel = self.prepare(sentinel_workload())
        sentinel.time(20)
        return Session(sentinel, self.sampling)
