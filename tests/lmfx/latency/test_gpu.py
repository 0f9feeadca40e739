"""GPU timing without a GPU: what is captured, what is between the events, what is recorded, what is refused."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from lmfx.latency import Store, Workload, get_backend
from lmfx.latency.backends import cuda as cuda_module
from lmfx.latency.backends import gpu_state as gpu
from lmfx.latency.backends import tensorrt as tensorrt_module
from lmfx.latency.backends.cuda import CudaRunner
from lmfx.latency.backends.gpu_state import Conditions, Monitor
from lmfx.latency.backends.tensorrt import TensorRTBackend
from lmfx.latency.sampling import Sampling
from lmfx.passes.errors import DeviceError, ExportError, OptionError
from tests.fake_cuda import LAUNCH_MS, FakeCuda, fake_nvml, fake_tensorrt

IMAGE = ((1, 8, 12, 12), torch.float32)


def runner(fake: FakeCuda, ms: float, **options: Any) -> CudaRunner:
    return CudaRunner(lambda: fake.kernel(ms), cuda=fake, **options)


# the runner


def test_a_short_call_is_captured_several_times_and_launches_do_not_count() -> None:
    fake = FakeCuda()
    row = runner(fake, 0.045)
    assert row.captured and row.inner == 5
    assert row.time(20) == pytest.approx(20 * 0.045)
    assert row.time(1) == pytest.approx(0.045), "one graph is five calls, and the time of one is told"
    assert row.conditions == {"cuda_graph": True}


def test_a_long_call_is_captured_once() -> None:
    row = runner(FakeCuda(), 3.0)
    assert row.inner == 1 and row.time(4) == pytest.approx(12.0)


def test_nothing_but_replays_stands_between_the_events() -> None:
    fake = FakeCuda()
    row = runner(fake, 0.055)
    fake.log.clear()
    fake.queries = 0
    row.time(12)
    assert fake.log == ["sleep", "event", "replay 4", "replay 4", "replay 4", "event"]
    assert fake.queries == 3, "the host asks until the GPU is done"


def test_what_can_not_be_captured_is_run_as_it_is_and_says_so() -> None:
    fake = FakeCuda(capturable=False)
    row = runner(fake, 0.05)
    assert not row.captured and row.conditions == {"cuda_graph": False}
    assert row.time(10) == pytest.approx(10 * (0.05 + LAUNCH_MS)) and "sleep" not in fake.log
    plain = runner(FakeCuda(), 0.05, graph=False)
    assert plain.time(10) == pytest.approx(10 * (0.05 + LAUNCH_MS)) and not plain.captured


def test_a_gpu_that_was_asleep_is_woken_before_anything_is_told() -> None:
    fake = FakeCuda(cold=4.0)
    assert runner(fake, 0.05).time(1) == pytest.approx(0.05)
    assert fake.now > 10


def test_a_gpu_that_is_never_steady_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    clock = iter(range(1000))
    monkeypatch.setattr(cuda_module.time, "monotonic", lambda: 0.05 * next(clock))
    calls = iter(range(100000))
    CudaRunner(lambda: fake.kernel(1.0 + next(calls) % 2), cuda=fake, graph=False)
    assert next(calls) < 50


def test_what_a_graph_reads_stays_until_the_runner_is_closed() -> None:
    fake = FakeCuda()
    weights = nn.Linear(2, 2)
    alive = weakref.ref(weights)

    def call(weights: nn.Module = weights) -> None:
        fake.kernel(0.05)

    row = CudaRunner(call, cuda=fake)
    del call, weights
    gc.collect()
    assert row.captured and alive() is not None
    row.close()
    gc.collect()
    assert alive() is None


def test_a_closed_runner_lets_go_of_everything() -> None:
    closed: list[int] = []
    row = runner(FakeCuda(), 0.05, on_close=lambda: closed.append(1))
    row.close()
    with pytest.raises(RuntimeError, match="closed"):
        row.time(1)
    assert closed == [1]


# conditions


def monitor(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> Monitor:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return Monitor()


def test_clocks_and_throttle_reasons_are_taken_after_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = monitor(monkeypatch, fake_nvml([1980, 1200, 1980], bits=0x1 | 0x4 | 0x20))
    row = runner(FakeCuda(), 0.5, monitor=watching)
    for _ in range(3):
        row.time(2)
    expected = {"sm_mhz": [1200, 1980], "throttle": ["power cap", "thermal slowdown"], "cuda_graph": True}
    assert row.conditions == expected and watching.driver == "580.1"


def test_a_gpu_that_tells_nothing_gives_no_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    row = runner(FakeCuda(), 0.5, monitor=monitor(monkeypatch, fake_nvml([1], broken=True)))
    row.time(1)
    assert row.conditions == {"cuda_graph": True}


def smi(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> list[str]:
    """Only nvidia-smi, which knows some queries."""
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        query = next(c for c in command if c.startswith("--query-gpu=")).partition("=")[2]
        asked.append(query)
        return types.SimpleNamespace(returncode=int(query not in answers), stdout=answers.get(query, "unknown field\n"))

    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_nvidia_smi_is_asked_once_a_row_where_there_is_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"clocks.sm,clocks_throttle_reasons.active": "1350, 0x0000000000000008\n", "driver_version": "470.2\n"}
    asked = smi(monkeypatch, answers)
    watching = Monitor(1)
    seen = Conditions(watching)
    for _ in range(5):
        seen.sample()
    assert asked == [] and not watching.fast
    assert seen.as_dict() == {"sm_mhz": [1350, 1350], "throttle": ["hardware slowdown"]} == seen.as_dict()
    assert asked == ["clocks.sm,clocks_event_reasons.active", "clocks.sm,clocks_throttle_reasons.active"]
    assert watching.driver == "470.2"


@pytest.mark.parametrize("answer", ["[N/A], [N/A]\n", "", "1350\n"])
def test_an_answer_that_is_none_is_no_condition(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(monkeypatch, {"clocks.sm,clocks_event_reasons.active": answer})
    assert Conditions(Monitor()).as_dict() == {} and Monitor().driver == ""


def test_a_batch_of_rows_may_fill_a_quarter_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    large = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: large)
    assert gpu.sampling_on(0, None).batch_bytes == 20 * 2**30
    assert gpu.sampling_on(0, Sampling(batch_bytes=5)).batch_bytes == 5
    large.total_memory = 2**20
    assert gpu.sampling_on(0, None) == Sampling()


def test_without_nvml_and_nvidia_smi_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("nvidia-smi")

    smi(monkeypatch, {})
    monkeypatch.setattr(subprocess, "run", absent)
    assert Conditions(Monitor(), {"a": 1}).as_dict() == {"a": 1} == Conditions(None, {"a": 1}).as_dict()


# TensorRT


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A machine with a GPU, as far as torch and TensorRT's backend see it."""
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200 (fake)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current_stream)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([1980]))
    gpu.monitor_of.cache_clear()
    make = tensorrt_module.CudaRunner
    monkeypatch.setattr(tensorrt_module, "CudaRunner", lambda *a, **k: make(*a, cuda=fake, **k))
    yield fake
    gpu.monitor_of.cache_clear()


def backend(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda, trt: Any, **options: Any) -> TensorRTBackend:
    pytest.importorskip("onnx")
    trt.cuda = fake
    monkeypatch.setitem(sys.modules, trt.__name__, trt)
    return TensorRTBackend(package=trt.__name__, **options)


def workload(channels: int = 8) -> Workload:
    return Workload.of(fx.symbolic_trace(nn.Sequential(nn.Conv2d(8, channels, 3))), IMAGE)


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_rows_are_engines_replayed_as_graphs(package: str, machine: FakeCuda, monkeypatch: Any, tmp_path: Path) -> None:
    trt = fake_tensorrt(package)
    made = backend(monkeypatch, machine, trt, precision="fp16")
    with Store.open(tmp_path) as store:
        (row,) = made.measure([workload()], store).values()
        assert made.measure([workload()], store) == {workload().signature: row}
    assert row.ms == pytest.approx(0.05) and row.backend == "tensorrt" and row.device == "NVIDIA H200 (fake)"
    assert row.conditions == {"sm_mhz": [1980, 1980], "throttle": [], "cuda_graph": True}
    assert "network 3" in trt.log, "explicit batch and strongly typed"
    import onnx

    model = onnx.load_model_from_string(trt.model)
    assert {t.data_type for t in model.graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_every_setting_is_in_the_identity(machine: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, Any]] = [{}, {"precision": "bf16"}, {"tf32": False}, {"cuda_graph": False}]
    found = [backend(monkeypatch, machine, fake_tensorrt(), **o).identity() for o in options]
    found.append(backend(monkeypatch, machine, fake_tensorrt("tensorrt_rtx")).identity())
    assert len({str(identity) for identity in found}) == 5
    assert found[0]["driver"] == "580.1" and found[0]["capability"] == "sm90" and found[0]["version"] == "10.9.0.34"


def test_without_tf32_the_builder_is_told_so(machine: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    for tf32 in (True, False):
        trt = fake_tensorrt()
        backend(monkeypatch, machine, trt, tf32=tf32).prepare(workload())
        assert ("clear TF32" in trt.log) is not tf32


def test_one_timing_cache_is_shared_kept_beside_the_store_and_read_again(
    machine: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trt = fake_tensorrt()
    with Store.open(tmp_path) as store:
        backend(monkeypatch, machine, trt).measure([workload(8), workload(9)], store)
        (file,) = tmp_path.glob("*.timing")
        assert file.name == "tensorrt_10.9.0.34_NVIDIA_H200_fake_.timing"
        assert file.read_bytes() == b"good+++" and [line for line in trt.log if "cache" in line] == [
            "timing cache of b''"
        ]
        again = fake_tensorrt()
        backend(monkeypatch, machine, again).measure([workload(10)], store)
        assert "timing cache of b'good+++'" in again.log and file.read_bytes() == b"good+++++"


def test_whole_networks_use_the_cache_of_the_rows(
    machine: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = backend(monkeypatch, machine, fake_tensorrt())
    with Store.open(tmp_path) as store:
        made.measure([workload()], store)
    (file,) = tmp_path.glob("*.timing")
    before = file.read_bytes()
    (times,) = made.measure_interleaved([workload(20)], 3)
    assert times == pytest.approx([0.05] * 3) and file.read_bytes() == before + b"+"


@pytest.mark.parametrize("blob", [b"damaged", b"foreign"])
def test_a_timing_cache_that_is_not_ours_is_begun_anew(
    blob: bytes, machine: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "tensorrt_10.9.0.34_NVIDIA_H200_fake_.timing"
    file.write_bytes(blob)
    with Store.open(tmp_path) as store:
        backend(monkeypatch, machine, fake_tensorrt()).measure([workload()], store)
    assert file.read_bytes() == b"good++"


def test_rtx_builds_for_this_gpu_and_keeps_what_it_has_compiled(
    machine: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trt = fake_tensorrt("tensorrt_rtx")
    with Store.open(tmp_path) as store:
        backend(monkeypatch, machine, trt).measure([workload()], store)
        assert "capability CURRENT at 0 of 1" in trt.log and "context with config" in trt.log
        (file,) = tmp_path.glob("*.runtime")
        assert file.read_bytes() == b"good kernels" and not list(tmp_path.glob("*.timing"))
        again = fake_tensorrt("tensorrt_rtx")
        backend(monkeypatch, machine, again).measure([workload(9)], store)
    assert "runtime cache b'good kernels'" in again.log


def test_no_store_no_file(machine: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    backend(monkeypatch, machine, fake_tensorrt()).measure([workload()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "faults", "error", "reason"),
    [
        ("tensorrt", {"build": "no kernel\nfor it"}, ExportError, "could not build an engine: no kernel for it"),
        ("tensorrt", {"builder": False}, ExportError, 'needs an NVIDIA driver and a GPU.*"lmfx.trt-rtx.".*sm89'),
        ("tensorrt", {"engine": False}, ExportError, "could not load the engine"),
        ("tensorrt", {"context": False}, ExportError, "execution context; is there enough GPU memory"),
        ("tensorrt", {"address": False}, ExportError, "refused the address of tensor0"),
        ("tensorrt", {"execute": False}, ExportError, "could not run the engine"),
        ("tensorrt", {"dtype": "FP8"}, ExportError, "of type FP8"),
        ("tensorrt", {"shape": (-1, 3)}, ExportError, r"shape \(-1, 3\)"),
        ("tensorrt_rtx", {"capability": False}, DeviceError, "has no code for NVIDIA H200"),
    ],
)
def test_what_tensorrt_answers_with_false_is_an_error(
    package: str, faults: Any, error: type, reason: str, machine: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=reason):
        backend(monkeypatch, machine, fake_tensorrt(package, **faults)).prepare(workload())


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"precision": "int4"}, OptionError, "fp32, fp16, bf16.*not 'int4'"),
        ({"package": "trt"}, OptionError, "tensorrt, tensorrt_rtx, not 'trt'"),
        ({"device": "cpu"}, OptionError, "not on 'cpu'"),
        ({"device": "gpu7"}, OptionError, "not a torch device"),
    ],
)
def test_options_of_tensorrt_are_checked(options: Any, error: type, reason: str, machine: FakeCuda) -> None:
    with pytest.raises(error, match=reason):
        get_backend("tensorrt", **options)


def test_tensorrt_without_a_gpu_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="torch sees none"):
        get_backend("tensorrt")


# torch


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}, {"precision": "fp16"}], ids=str)
def test_settings_of_torch_are_in_its_identity_and_its_tensors(options: dict[str, Any]) -> None:
    seen: list[Any] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((x.dtype, self.conv.weight.dtype, x.is_contiguous(memory_format=torch.channels_last)))
            return self.conv(x)

    made = get_backend("torch", **options)
    net = Spy()
    (row,) = made.measure([Workload.of(net, IMAGE)], rounds=1).values()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.get("precision", ""), torch.float32)
    assert row.ms > 0 and set(seen) == {(dtype, dtype, bool(options.get("channels_last")))}
    assert net.conv.weight.dtype == torch.float32 and net.conv.weight.is_contiguous()
    plain = get_backend("torch").identity()
    assert made.identity() == {**plain, **made.identity()} and made.identity() != plain
    assert not {"precision", "compile", "channels_last"} & set(plain), "rows of older stores stay good"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": "int8"}, "fp32, fp16, bf16"),
        ({"compile": "yes"}, "compile must be True or False, not 'yes'"),
        ({"cuda_graph": None}, "cuda_graph must be True or False"),
        ({"channels_last": 1}, "channels_last must be True or False, not 1"),
    ],
)
def test_options_of_torch_are_checked(options: Any, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        get_backend("torch", **options)


def test_what_torch_can_not_compile_is_refused_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(module: nn.Module) -> Any:
        def run(*_: Any) -> None:
            raise RuntimeError("InvalidCxxCompiler: no g++")

        return run

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(OptionError, match=r"InvalidCxxCompiler.*needs a C\+\+ compiler. Use compile=False"):
        get_backend("torch", compile=True).measure([workload()])


@pytest.mark.slow
def test_torch_compile_works_on_a_cpu() -> None:
    (row,) = get_backend("torch", compile=True).measure([workload()], rounds=1).values()
    assert row.ms > 0


# ONNX Runtime on a GPU


class FakeOrt:
    """An onnxruntime with GPU providers; `log` lists what is bound and run."""

    __version__ = "1.30.0"

    def __init__(self, starts: bool = True) -> None:
        self.log: list[Any] = []
        self.starts = starts
        self.SessionOptions = types.SimpleNamespace
        self.ExecutionMode = types.SimpleNamespace(ORT_SEQUENTIAL=0)
        self.GraphOptimizationLevel = types.SimpleNamespace(ORT_ENABLE_ALL=99)
        self.OrtValue = types.SimpleNamespace(
            ortvalue_from_numpy=lambda array, device, i: (str(array.dtype), device, i)
        )

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, data: bytes, options: Any, providers: list[Any]) -> Any:
        self.log.append(providers)
        value = types.SimpleNamespace(name="input_0", shape=[1, 8, 12, 12], type="tensor(float16)")
        binding = types.SimpleNamespace(
            bind_ortvalue_input=lambda name, held: self.log.append(("in", name, held)),
            bind_output=lambda name, device: self.log.append(("out", name, device)),
            synchronize_inputs=lambda: self.log.append("inputs are there"),
            synchronize_outputs=lambda: self.log.append("outputs are there"),
        )
        return types.SimpleNamespace(
            io_binding=lambda: binding,
            get_inputs=lambda: [value],
            get_outputs=lambda: [types.SimpleNamespace(name="output_0")],
            get_providers=lambda: [providers[0][0] if self.starts else "CPUExecutionProvider", "CPUExecutionProvider"],
            run_with_iobinding=lambda binding: self.log.append("run"),
        )


@pytest.fixture
def gpu_runtime(machine: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeOrt:
    fake = FakeOrt()
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return fake


def test_on_a_gpu_inputs_and_outputs_stay_there_and_a_run_ends_when_it_is_done(gpu_runtime: FakeOrt) -> None:
    pytest.importorskip("onnx")
    options = {"cudnn_conv_algo_search": "HEURISTIC"}
    made = get_backend("onnxruntime", provider="cuda", precision="fp16", provider_options=options)
    row = made.prepare(workload())  # type: ignore[attr-defined]
    assert gpu_runtime.log[:4] == [
        [("CUDAExecutionProvider", options), "CPUExecutionProvider"],
        ("in", "input_0", ("float16", "cuda", 0)),
        ("out", "output_0", "cuda"),
        "inputs are there",
    ]
    assert gpu_runtime.log[4:] == ["run", "outputs are there"] * 3, "it is warm before it is timed"
    gpu_runtime.log.clear()
    assert row.time(2) >= 0 and gpu_runtime.log[:4] == ["run", "outputs are there"] * 2
    assert getattr(row, "refresh", None) is None, "its inputs are not written by the host"


def test_the_options_of_a_provider_are_in_the_identity(gpu_runtime: FakeOrt) -> None:
    found = [
        get_backend("onnxruntime", provider=provider, **options).identity()
        for provider in ("cuda", "tensorrt")
        for options in ({}, {"precision": "fp16"}, {"provider_options": {"trt_max_workspace_size": "1"}})
    ]
    assert len({str(identity) for identity in found}) == 6
    assert {(i["layout"], i["caches"], i["clock"], i["driver"]) for i in found} == {
        ("isolated", "hot", "wall", "580.1")
    }


def test_a_provider_that_falls_back_to_the_cpu_is_an_error(gpu_runtime: FakeOrt) -> None:
    pytest.importorskip("onnx")
    gpu_runtime.starts = False
    with pytest.raises(DeviceError, match="could not start its CUDAExecutionProvider, and would run on the CPU"):
        get_backend("onnxruntime", provider="cuda").prepare(workload())  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"precision": "bf16"}, {"provider_options": {"a": "b"}}])
def test_what_only_a_gpu_has_is_refused_on_a_cpu(options: Any) -> None:
    with pytest.raises(OptionError, match="on the providers cuda and tensorrt|go with the providers"):
        get_backend("onnxruntime", **options)


# where there is a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_more_work_takes_more_time_on_a_gpu(precision: str) -> None:
    shape = ((8, 64, 56, 56), torch.float32)
    works = [Workload.of(fx.symbolic_trace(nn.Sequential(nn.Conv2d(64, 64, k, padding=k // 2))), shape) for k in (1, 7)]
    made = get_backend("torch", device="cuda", precision=precision)
    small, large = made.measure(works).values()
    assert 0 < small.ms < large.ms and small.conditions["cuda_graph"]
    whole = made.measure_interleaved(works, 3)
    assert min(whole[1]) > min(whole[0]) > 0


@pytest.mark.tensorrt
@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_times_engines_on_a_gpu(package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    made = get_backend("tensorrt", package=package, precision="fp16")
    with Store.open(tmp_path) as store:
        (row,) = made.measure([workload()], store).values()
    assert row.ms > 0 and row.conditions["cuda_graph"]
