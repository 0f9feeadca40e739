"""Latencies: what is measured once, what is taken again, what is refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from lmfx.environment.progress import progress
from lmfx.latency import LatencyTable, Measurement, Store, Workload, calibrate, get_backend, signature
from lmfx.latency.backend import Backend, TimedBackend
from lmfx.latency.sampling import CallRunner, Sampling, Session, Taken
from lmfx.latency.table import kendall_tau
from lmfx.passes.errors import DeviceError, LmfxError, MissingExtra, OptionError, StoreError, TableError
from lmfx.passes.ir import Candidate, ConvConfig, MergePlan, Span

ROOT = Path(__file__).resolve().parents[3]
IMAGE = ((1, 8, 12, 12), torch.float32)


def chain(*modules: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(*modules).eval())


def residual(channels: int = 32) -> fx.GraphModule:
    """relu(conv(x) + y)"""
    root = nn.Module()
    root.conv, root.relu = nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()
    g = fx.Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    g.output(g.call_module("relu", (g.call_function(torch.add, (g.call_module("conv", (x,)), y)),)))
    return fx.GraphModule(root, g)


# a machine whose speed is known


class Machine:
    """A fake machine: `speed(now)` is how much slower than quiet it runs at a time in ms. Keeps a log of what ran."""

    def __init__(self, speed: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now, self.speed, self.log = 0.0, speed, [""]
        self.closed: list[str] = []

    def runner(self, name: str, ms: float, nbytes: int = 0) -> CallRunner:
        def clock(call: Callable[[], Any], repeats: int) -> float:
            start = self.now
            for _ in range(repeats):
                self.now += ms * self.speed(self.now)
            self.log.append(name)
            return self.now - start

        return CallRunner(lambda: None, clock, nbytes, lambda: self.closed.append(name))

    def session(self, **sampling: Any) -> Session:
        return Session(self.runner("S", 1.0), Sampling(**{"min_ms": 0.0, **sampling}))


def times(machine: Machine, session: Session, rows: dict[str, float]) -> dict[str, list[float]]:
    return {k: t.samples for k, t in taken(machine, session, rows).items()}


def taken(machine: Machine, session: Session, rows: dict[str, float]) -> dict[str, Taken]:
    return session.time({k: machine.runner(k, ms) for k, ms in rows.items()}, rows)


def test_every_round_runs_every_row_once_in_another_order() -> None:
    machine = Machine()
    rows = {name: 1.0 for name in "abcdefgh"}
    times(machine, machine.session(rounds=3, every=3), rows)
    ran = [name for name in machine.log if name in rows]
    thirds = [ran[i : i + 8] for i in (0, 8, 16)]
    assert len(ran) == 24 and all(sorted(third) == sorted(rows) for third in thirds)
    assert len({tuple(third) for third in thirds}) == 3


def test_a_sentinel_stands_before_and_after_every_few_rows() -> None:
    machine = Machine()
    session = machine.session(rounds=1, every=3)
    session.start()
    machine.log.clear()
    times(machine, session, {name: 1.0 for name in "abcdefg"})
    blocks = [block for block in "".join(machine.log).replace("SS", "S").split("S") if block]
    assert [len(block) for block in blocks] == [3, 3, 1]
    assert machine.log[0] == machine.log[-1] == "S"


def test_a_machine_that_slows_down_gives_the_same_latencies() -> None:
    machine = Machine(lambda now: 1.2 if now > 100 else 1.0)
    got = times(machine, machine.session(rounds=9), {"a": 2.0, "b": 7.0})
    assert machine.now > 150
    for name, ms in (("a", 2.0), ("b", 7.0)):
        assert got[name] == pytest.approx([ms] * 9, rel=0.15), "the sample in which it changed is between the two"
        assert sorted(got[name])[4] == pytest.approx(ms, rel=0.01)


def test_samples_from_a_slow_spell_are_not_used_but_taken_again() -> None:
    machine = Machine(lambda now: 3.0 if 60 < now < 140 else 1.0)
    got = times(machine, machine.session(rounds=5), {"a": 2.0, "b": 7.0})
    assert machine.log.count("a") > 5
    assert got["a"] == pytest.approx([2.0] * 5, rel=0.1) and got["b"] == pytest.approx([7.0] * 5, rel=0.1)


def test_the_reference_of_an_earlier_session_is_kept() -> None:
    machine = Machine(lambda now: 1.1)
    session = machine.session()
    session.reference = 1.0
    assert times(machine, session, {"a": 2.0})["a"] == pytest.approx([2.0] * 5)


def test_short_rows_are_repeated_until_a_sample_is_long_enough() -> None:
    machine = Machine()
    machine.session(rounds=1, min_ms=2.0).time({"a": (row := machine.runner("a", 0.01))}, {"a": 0.01})
    assert row.time(1) == pytest.approx(0.01)
    before = machine.now
    session = machine.session(rounds=1, min_ms=2.0)
    session.reference = 1.0
    session.time({"a": row}, {"a": 0.01})
    assert machine.now - before == pytest.approx(2.0 + 2 * 3.0)  # 200 runs of the row, two sentinels of three runs


def test_a_row_that_scatters_gets_more_rounds_than_a_steady_one() -> None:
    machine = Machine()
    wild = machine.runner("wild", 1.0)
    values = iter([1.0, 2.0] * 50)
    wild.clock = lambda call, repeats: next(values) * repeats
    got = machine.session(rounds=4, extra_rounds=3).time(
        {"wild": wild, "calm": machine.runner("calm", 1.0)}, {"wild": 1, "calm": 1}
    )
    assert len(got["wild"].samples) == 7 and len(got["calm"].samples) == 4


def test_the_cost_of_an_empty_call_is_taken_off() -> None:
    machine = Machine()
    session = machine.session()
    session.nothing = machine.runner("nothing", 0.5)
    session.quick(machine.runner("first", 2.0))
    assert times(machine, session, {"a": 2.0})["a"] == pytest.approx([1.5] * 5)
    assert session.quick(machine.runner("tiny", 0.1)) > 0


def test_a_row_that_can_be_run_once_is_timed_once_a_round_right_after_its_inputs_were_written() -> None:
    machine = Machine()
    rows = {name: machine.runner(name, 1.0) for name in "abc"}
    for name, runner in rows.items():
        runner.refresh = lambda name=name: machine.log.append(name.upper())
    got = machine.session(visits=4, min_ms=100.0).time(rows, dict.fromkeys("abc", 1.0))
    assert all(len(t.samples) == 4 and t.samples == pytest.approx([1.0] * 4) for t in got.values())
    for name in "abc":
        assert "".join(machine.log).count(name.upper() + name) == 4 == machine.log.count(name)
    hot = machine.session(rounds=4, min_ms=100.0, caches="hot").time(rows, dict.fromkeys("abc", 1.0))
    assert all(len(t.samples) == 4 for t in hot.values()) and machine.log.count("A") == 4, "a loop writes no inputs"


def test_the_empty_call_is_timed_like_the_rows() -> None:
    machine = Machine()
    session = machine.session(visits=4)
    session.nothing = machine.runner("nothing", 0.25)
    session.nothing.refresh = lambda: None
    row = machine.runner("a", 2.0)
    row.refresh = lambda: None
    assert session.time({"a": row}, {"a": 2.0})["a"].samples == pytest.approx([1.75] * 4)


def test_a_row_that_was_only_seen_on_a_busy_machine_is_marked() -> None:
    calm, busy = Machine(), Machine(lambda now: 3.0 if now > 60 else 1.0)
    assert not taken(calm, calm.session(), {"a": 2.0})["a"].busy
    busy_session = busy.session(rounds=30)
    got = taken(busy, busy_session, {"a": 2.0})["a"]
    assert got.busy and len(got.samples) > 5


class Sweeping(Session):
    """A session in which the sweep takes what the test says."""

    slow = False

    def _sweep(self, held: int) -> float:
        self._sweeps.append(3.0 if self.slow else 1.0)
        return self._sweeps[-1]


def test_traffic_in_the_shared_caches_makes_a_spell_busy_though_the_sentinel_does_not_feel_it() -> None:
    machine = Machine()
    session = Sweeping(machine.runner("S", 1.0), Sampling(min_ms=0.0, visits=6, extra_visits=6))
    row = machine.runner("a", 2.0)
    row.refresh = lambda: None
    for _ in range(2):
        assert not session.time({"a": row}, {"a": 2.0})["a"].busy
    session.slow = True
    before = machine.log.count("a")
    assert session.time({"a": row}, {"a": 2.0})["a"].busy
    assert machine.log.count("a") - before == 12, "it was tried again"


def test_a_backend_marks_rows_of_a_busy_machine() -> None:
    backend = FakeBackend()
    backend.machine.speed = lambda now: 5.0 if now > 260 else 1.0
    rows = backend.measure(named(*(f"{name}@10" for name in "abcdefgh")))
    assert {m.quality for m in rows.values()} == {"busy"}


# a backend on that machine


class FakeBackend(TimedBackend):
    """Reads the latency of a workload from its signature: "name@ms"."""

    name = "fake"

    def __init__(self, **sampling: Any) -> None:
        super().__init__(Sampling(**{"min_ms": 0.0, **sampling}))
        self.machine = Machine()
        self.prepared: list[str] = []
        self.bound = 0.0

    def identity(self) -> dict[str, Any]:
        return {"backend": "fake", "device": "nowhere"}

    def session(self) -> Session:
        return self.machine.session()

    def lower_bound(self, module: nn.Module, workload: Workload, session: Session) -> float:
        return self.bound

    def prepare(self, workload: Workload) -> CallRunner:
        self.prepared.append(workload.signature)
        if "broken" in workload.signature:
            raise KeyboardInterrupt
        return self.machine.runner(workload.signature, float(workload.signature.split("@")[1]), 100)


def named(*names: str) -> list[Workload]:
    return [Workload(name, nn.Identity, (IMAGE,)) for name in names]


def test_equal_configurations_are_measured_once() -> None:
    backend = FakeBackend()
    rows = backend.measure(named("a@1", "b@2", "a@1"))
    assert backend.prepared == ["a@1", "b@2"] and list(rows) == ["a@1", "b@2"]
    assert rows["b@2"] == Measurement(2.0, 0.0, 5, "nowhere", "fake", "full")


def test_what_a_runner_sees_besides_times_goes_into_its_row_and_the_store(tmp_path: Path) -> None:
    class Watching(FakeBackend):
        def prepare(self, workload: Workload) -> CallRunner:
            runner = super().prepare(workload)
            if workload.signature.startswith("a"):
                runner.conditions = {"sm_mhz": [1980, 1980]}  # type: ignore[attr-defined]
            return runner

    with Store.open(tmp_path) as store:
        rows = Watching().measure(named("a@1", "b@2"), store)
        assert [row.conditions for row in rows.values()] == [{"sm_mhz": [1980, 1980]}, {}]
        assert len(set(rows.values())) == 2
        assert Watching().measure(named("a@1", "b@2"), store) == rows


def test_rows_of_an_older_store_have_no_conditions(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        old = {"ms": 1.5, "spread": 0.1, "n": 5, "device": "nowhere", "backend": "fake", "quality": "full"}
        store.put("latency", FakeBackend().identity(), "a@1", old)
        assert FakeBackend().measure(named("a@1"), store)["a@1"] == Measurement(1.5, 0.1, 5, "nowhere", "fake")


def test_a_row_in_the_store_is_not_measured_again(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        first = FakeBackend().measure(named("a@1", "b@2"), store)
        backend = FakeBackend()
        again = backend.measure(named("b@2", "c@3", "a@1"), store)
        assert backend.prepared == ["c@3"] and {k: again[k] for k in first} == first
        assert set(store.times_put("latency").values()) == {1}


def test_a_stored_row_that_is_no_measurement_is_an_error(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.put("latency", FakeBackend().identity(), "a@1", {"seconds": 3})
        with pytest.raises(StoreError, match="delete the file"):
            FakeBackend().measure(named("a@1"), store)


def test_a_pruned_row_is_quick_and_measured_fully_for_somebody_who_needs_it(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        rows = FakeBackend().measure(named("a@1", "b@20"), store, prune=lambda key, ms: ms > 10)
        assert rows["b@20"].quality == "quick" and rows["b@20"].n == 2 and rows["a@1"].quality == "full"
        same = FakeBackend()
        assert same.measure(named("a@1", "b@20"), store, prune=lambda key, ms: ms > 15) == rows and not same.prepared
        other = FakeBackend()
        assert other.measure(named("b@20"), store, prune=lambda key, ms: ms > 30)["b@20"].quality == "full"
        assert FakeBackend().measure(named("b@20"), store)["b@20"].quality == "full"


def test_a_row_pruned_by_its_lower_bound_is_not_even_prepared() -> None:
    backend = FakeBackend()
    backend.bound = 11.0
    rows = backend.measure(named("a@20"), prune=lambda key, ms: ms > 10)
    assert not backend.prepared and rows["a@20"].quality == "bound" and rows["a@20"].ms == 11.0
    assert backend.measure(named("a@20"))["a@20"].quality == "full"


def test_memory_is_bounded_by_batches_and_everything_is_closed() -> None:
    backend = FakeBackend(batch_rows=2)
    backend.measure(named("a@1", "b@1", "c@1", "d@1", "e@1"))
    assert backend.machine.closed == ["a@1", "b@1", "c@1", "d@1", "e@1", "S"]
    backend = FakeBackend(batch_bytes=150)
    backend.measure(named("a@1", "b@1", "c@1"))
    assert backend.machine.closed[:2] == ["a@1", "b@1"]


def test_an_interrupt_keeps_the_finished_rows_and_closes_the_others(tmp_path: Path) -> None:
    backend = FakeBackend(batch_rows=2)
    with Store.open(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt):
            backend.measure(named("a@1", "b@2", "c@3", "broken@1"), store)
        assert set(store.get_many("latency", backend.identity())) == {"a@1", "b@2"}
        assert backend.machine.closed == ["a@1", "b@2", "c@3", "S"]


def test_whole_networks_are_run_in_turn_and_in_alternating_order() -> None:
    backend = FakeBackend()
    got = backend.measure_interleaved(named("a@1", "b@3"), 3)
    assert got == [pytest.approx([1, 1, 1]), pytest.approx([3, 3, 3])]
    assert backend.machine.log[-12::2] == backend.machine.log[-11::2], "each is run once before it is timed"
    assert backend.machine.log[-12::2] == ["a@1", "b@3", "b@3", "a@1", "a@1", "b@3"]


@pytest.mark.parametrize("rounds", [0, -1, 2.5, "3"])
def test_a_number_of_rounds_that_is_none_is_refused(rounds: Any) -> None:
    with pytest.raises(OptionError, match="positive integer"):
        FakeBackend().measure(named("a@1"), rounds=rounds)


# signatures


def test_names_values_and_flags_do_not_change_a_signature() -> None:
    a = chain(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU(inplace=True))
    b = chain(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    b.graph.find_nodes(op="placeholder")[0].name = "other"
    assert signature(a, [IMAGE]) == signature(b, [torch.zeros(IMAGE[0])])


def test_a_zero_pad_counts_as_the_convs_own_padding() -> None:
    inside = chain(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU())
    before = chain(nn.ZeroPad2d(1), nn.Identity(), nn.Conv2d(8, 4, 3), nn.ReLU())
    outer = chain(nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3), nn.ReLU())
    lopsided = chain(nn.ZeroPad2d((0, 2, 0, 2)), nn.Conv2d(8, 4, 3), nn.ReLU())
    assert signature(outer, [IMAGE]) == signature(inside, [IMAGE]) != signature(lopsided, [IMAGE])
    assert signature(before, [IMAGE]) != ""


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(8, 8, 5, padding=2),
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.MaxPool2d(3),
    ],
    ids=str,
)
def test_what_changes_the_time_changes_the_signature(other: nn.Module) -> None:
    base = signature(chain(nn.Conv2d(8, 8, 3, padding=1)), [IMAGE])
    assert signature(chain(other), [IMAGE]) != base


def test_shapes_dtypes_and_wiring_are_in_the_signature() -> None:
    gm = chain(nn.ReLU())
    assert len({signature(gm, [(s, d)]) for s in ((1, 8), (2, 8)) for d in (torch.float32, torch.float16)}) == 4
    g = fx.Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    g.output(g.call_function(torch.sub, (y, x)))
    h = fx.Graph()
    x, y = h.placeholder("x"), h.placeholder("y")
    h.output(h.call_function(torch.sub, (x, y)))
    graphs = [fx.GraphModule(nn.Module(), graph) for graph in (g, h)]
    assert signature(graphs[0], [IMAGE, IMAGE]) != signature(graphs[1], [IMAGE, IMAGE])


def test_a_module_that_is_no_graph_has_a_signature_of_its_own() -> None:
    assert Workload.of(nn.ReLU(), IMAGE).signature != Workload.of(module := nn.ReLU(), IMAGE).signature
    assert module is not None


# choosing a backend


@pytest.mark.parametrize(
    ("backend", "options", "error", "reason"),
    [
        ("tensorflow", {}, OptionError, "onnxruntime, torch, aotinductor, roofline, tensorrt"),
        (3, {}, OptionError, "a int is not"),
        ("roofline", {"threads": 2}, OptionError, "no option threads; it has peak_gflops"),
        ("roofline", {"peak_gflops": 0}, OptionError, "positive number, not 0"),
        ("roofline", {"bandwidth_gbs": math.nan}, OptionError, "not nan"),
        ("roofline", {"overhead_us": -1}, OptionError, "not -1"),
        ("torch", {"threads": 0}, OptionError, "positive integer, not 0"),
        ("torch", {"device": "tpu"}, OptionError, "not a torch device"),
        ("torch", {"device": "meta"}, OptionError, "not 'meta'"),
        ("onnxruntime", {"threads": True}, OptionError, "not True"),
        ("onnxruntime", {"provider": "rocm"}, OptionError, "cpu, cuda, tensorrt"),
        ("onnxruntime", {"layout": "nhwc"}, OptionError, "isolated"),
    ],
)
def test_a_backend_that_can_not_be_made_says_why(
    backend: Any, options: dict[str, Any], error: type[LmfxError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        get_backend(backend, **options)


def test_cuda_without_cuda_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="device='cpu'"):
        get_backend("torch", device="cuda")
    pytest.importorskip("onnxruntime")
    with pytest.raises(DeviceError):
        get_backend("onnxruntime", provider="cuda")


@pytest.mark.parametrize(
    ("backend", "packages"), [("onnxruntime", ["onnxruntime"]), ("tensorrt", ["tensorrt", "tensorrt_rtx"])]
)
def test_a_missing_package_is_named_with_its_pip_command(
    backend: str, packages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r'pip install "lmfx\['):
        get_backend(backend)


def test_a_backend_object_is_taken_as_it_is() -> None:
    backend = FakeBackend()
    assert isinstance(backend, Backend) and get_backend(backend) is backend
    with pytest.raises(OptionError, match="go with a backend's name"):
        get_backend(backend, threads=2)


# roofline


def test_the_roofline_of_one_conv_is_its_formula() -> None:
    backend: Any = get_backend("roofline", peak_gflops=1.0, bandwidth_gbs=1e9, overhead_us=3.0)
    flops = 2 * 16 * 12 * 12 * 8 * 9
    assert backend.ms(chain(nn.Conv2d(8, 16, 3, padding=1)), [IMAGE]) == pytest.approx(flops / 1e6 + 0.003)
    moved = 4 * (8 * 144 + 16 * 144 + 16 * 8 * 9 + 16)
    slow: Any = get_backend("roofline", peak_gflops=1e9, bandwidth_gbs=1.0, overhead_us=0.0)
    assert slow.ms(chain(nn.Conv2d(8, 16, 3, padding=1)), [IMAGE]) == pytest.approx(moved / 1e6)


def test_the_roofline_is_deterministic_and_grows_with_the_work(tmp_path: Path) -> None:
    backend = get_backend("roofline")
    sizes = [Workload.of(chain(nn.Conv2d(8, c, k, padding=k // 2)), IMAGE) for k in (1, 3, 5) for c in (8, 64)]
    with Store.open(tmp_path) as store:
        rows = backend.measure(sizes, store)
        assert backend.measure(sizes, store) == rows == backend.measure(reversed(sizes))
    ms = [rows[w.signature].ms for w in sizes]
    assert ms[0] < ms[2] < ms[4] and ms[1] < ms[3] < ms[5] and ms[0] < ms[1]
    assert {m.quality for m in rows.values()} == {"analytic"}
    assert backend.measure_interleaved([sizes[0], (chain(nn.Conv2d(8, 8, 1)), [IMAGE])], 2) == [[ms[0]] * 2] * 2


def test_a_runtime_fuses_what_follows_a_conv_but_not_a_second_conv() -> None:
    backend: Any = get_backend("roofline", overhead_us=1000.0)
    conv, bn, relu = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
    alone, fused = backend.ms(chain(conv), [IMAGE]), backend.ms(chain(conv, bn, relu), [IMAGE])
    assert alone <= fused < alone + 0.5
    assert backend.ms(chain(conv, relu, nn.Conv2d(8, 8, 1)), [IMAGE]) > 2.0
    joined = backend.ms(residual(8), [IMAGE, IMAGE])
    assert joined < 1.5, "an add whose other operand is there already runs with the conv"


def test_the_roofline_needs_a_graph() -> None:
    class Loops(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(OptionError, match="cannot trace Loops"):
        get_backend("roofline").measure([Workload.of(Loops(), IMAGE)])


# torch and ONNX Runtime, really


def small_and_large() -> list[Workload]:
    return [
        Workload.of(chain(nn.Conv2d(32, 32, k, padding=k // 2), nn.ReLU()), ((1, 32, 28, 28), torch.float32))
        for k in (1, 7)
    ]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_more_work_takes_more_time(backend: str) -> None:
    pytest.importorskip(backend)
    made = get_backend(backend)
    small, large = made.measure(small_and_large(), rounds=3).values()
    assert 0 < small.ms < large.ms
    whole = made.measure_interleaved(small_and_large(), 3)
    assert [len(row) for row in whole] == [3, 3] and min(whole[1]) > min(whole[0]) > 0
    assert made.identity()["threads"] == 1 and made.identity()["device"] == large.device


def test_torch_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    gm = chain(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).train()
    mean = gm.get_submodule("1").running_mean.clone()
    get_backend("torch").measure([Workload.of(gm, IMAGE)], rounds=1)
    assert torch.get_num_threads() == before and gm.training
    assert torch.equal(gm.get_submodule("1").running_mean, mean)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_workloads_may_be_built_without_values(backend: str) -> None:
    pytest.importorskip(backend)

    def build() -> fx.GraphModule:
        with torch.device("meta"):
            return chain(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU6())

    workload = Workload(signature(build(), [IMAGE]), build, (IMAGE,))
    (row,) = get_backend(backend).measure([workload], rounds=1).values()
    assert row.ms > 0


def test_threads_are_pinned_where_there_is_a_core_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    two = get_backend("onnxruntime", threads=2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 9}, raising=False)
    assert two._pinned() == "6" and two.identity()["pinned"] is True  # type: ignore[attr-defined]
    assert get_backend("onnxruntime", threads=3)._pinned() == "6;10"  # type: ignore[attr-defined]
    assert get_backend("onnxruntime", threads=1).identity()["pinned"] is False
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3}, raising=False)
    assert two.identity()["pinned"] is False


def test_several_threads_are_timed_by_the_wall_clock() -> None:
    pytest.importorskip("onnxruntime")
    one, two = get_backend("onnxruntime"), get_backend("onnxruntime", threads=2)
    assert (one.identity()["clock"], two.identity()["clock"]) == ("cpu", "wall")
    (row,) = two.measure(small_and_large()[:1], rounds=1).values()
    assert row.ms > 0


@pytest.mark.parametrize(
    ("gm", "inputs"),
    [
        (chain(nn.Conv2d(32, 32, 3), nn.ReLU()), [(1, 32, 12, 12)]),
        (chain(nn.Conv2d(24, 40, 1)), [(1, 24, 12, 12)]),
        (residual(32), [(1, 32, 12, 12)] * 2),
        (chain(nn.Conv2d(3, 32, 3, stride=2), nn.ReLU()), [(1, 3, 12, 12)]),
        (chain(nn.MaxPool2d(2)), [(1, 32, 12, 12)]),
        (chain(nn.AdaptiveAvgPool2d(1), nn.Flatten()), [(1, 32, 12, 12)]),
        (chain(nn.Linear(32, 10)), [(1, 32)]),
        (chain(nn.ReLU()), [(1, 32, 12, 12)]),
        (chain(nn.Conv1d(32, 32, 3)), [(1, 32, 12)]),
    ],
    ids=["conv", "odd channels", "residual", "stem", "pool", "head", "linear", "relu", "1d"],
)
def test_inside_a_network_a_workload_has_no_reorders_at_its_ends(
    gm: fx.GraphModule, inputs: list[tuple[int, ...]]
) -> None:
    pytest.importorskip("onnxruntime")
    from lmfx.export import to_onnx_bytes
    from lmfx.latency.blocked_layout import in_network

    backend: Any = get_backend("onnxruntime")
    specs = [(shape, torch.float32) for shape in inputs]
    model = in_network(to_onnx_bytes(gm, specs), backend._optimize)
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        assert not (node.op_type.startswith("Reorder") and ends & {*node.input, *node.output}), node
    assert len(model.graph.input) == len(inputs) and len(model.graph.output) == 1
    assert not any("stand_in" in name for node in model.graph.node for name in node.input)
    assert backend.prepare(Workload.of(gm, *specs)).time(2) > 0


def test_a_residual_add_is_fused_as_it_is_in_a_network() -> None:
    pytest.importorskip("onnxruntime")
    from lmfx.export import to_onnx_bytes
    from lmfx.latency.blocked_layout import in_network

    backend: Any = get_backend("onnxruntime")
    model = in_network(to_onnx_bytes(residual(), [((1, 32, 12, 12), torch.float32)] * 2), backend._optimize)
    if not any(node.domain == "com.microsoft.nchwc" for node in model.graph.node):
        pytest.skip("this CPU has no blocked layout")
    assert [node.op_type for node in model.graph.node] == ["Conv"]


@pytest.mark.gpu
def test_cuda_graphs_are_timed() -> None:
    made = get_backend("torch", device="cuda")
    small, large = made.measure(small_and_large()).values()
    assert small.ms > 0 and large.ms > 0


@pytest.mark.tensorrt
@pytest.mark.gpu
def test_tensorrt_engines_are_timed() -> None:
    rows = get_backend("tensorrt").measure(small_and_large())
    assert all(row.ms > 0 for row in rows.values())


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is a POSIX thing")
def test_a_killed_profile_resumes_and_measures_nothing_twice() -> None:
    pytest.importorskip("onnxruntime")
    script = ROOT / "benchmarks" / "promises" / "kill_resume.py"
    command = [sys.executable, str(script), "--kills", "2", "--rows", "24"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok   no finished row was measured twice" in done.stdout


# tables


def table(**identity: Any) -> LatencyTable:
    rows = {"a": Measurement(1.0, 0.1, 5, "cpu", "fake"), "b": Measurement(2.0)}
    return LatencyTable(rows, {"backend": "fake", "threads": 1, "batch": 1, **identity})


def test_a_table_is_a_mapping_that_refuses_what_it_does_not_have() -> None:
    t = table()
    assert len(t) == 2 and list(t) == ["a", "b"] and t.ms("b") == 2.0 and "c" not in t
    with pytest.raises(TableError, match="no row 'c'"):
        t["c"]


@pytest.mark.parametrize("other", [{"threads": 2}, {"batch": 8}, {"backend": "torch"}, {"dtype": "float16"}])
def test_tables_of_different_identities_do_not_mix(other: dict[str, Any]) -> None:
    (name,) = other
    with pytest.raises(TableError, match=f"{name}: .* and .*profile again"):
        table().merge(table(**other))
    with pytest.raises(TableError, match=name):
        table().check({**table().identity, **other})


def test_tables_of_one_identity_do() -> None:
    more = LatencyTable({"c": Measurement(3.0)}, dict(table().identity))
    assert set(table().merge(more)) == {"a", "b", "c"}


def test_a_table_is_saved_and_loaded_as_it_is(tmp_path: Path) -> None:
    path = table().save(tmp_path / "table.json")
    assert LatencyTable.load(path) == table() and [p.name for p in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "damaged"),
        ("[1, 2]", "not a latency table"),
        ('{"format": "other"}', "not a latency table"),
        ('{"format": "lmfx-latency-table", "version": 9}', "version 9"),
        ('{"format": "lmfx-latency-table", "version": 1, "rows": {}}', "damaged"),
        ('{"format": "lmfx-latency-table", "version": 1, "rows": {"a": {"s": 1}}, "identity": {}}', "damaged"),
        (
            '{"format": "lmfx-latency-table", "version": 1, "rows": {"a": {"ms": NaN}}, "identity": {}}',
            "NaN, which is no JSON",
        ),
    ],
)
def test_a_damaged_or_foreign_table_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(TableError, match=reason):
        LatencyTable.load(tmp_path / "table.json")


def test_a_truncated_or_missing_table_is_refused(tmp_path: Path) -> None:
    path = table().save(tmp_path / "table.json")
    path.write_text(path.read_text()[:-30])
    with pytest.raises(TableError, match="damaged"):
        LatencyTable.load(path)
    with pytest.raises(TableError, match="cannot read"):
        LatencyTable.load(tmp_path / "none.json")
    with pytest.raises(TableError, match="cannot write"):
        table().save(tmp_path / "none" / "table.json")
    assert json.loads(table().save(path).read_text())["identity"]["backend"] == "fake"


def nested() -> LatencyTable:
    """Two layers, of which the second has two branches, the first with a layer that has a branch of its own."""
    keeps = {"0:0-1": 1.0, "0:1-2": 2.0, "0/1.0:0-1": 4.0, "0/1.0/0.1:0-1": 8.0, "0/1.1:0-1": 16.0}
    rows = {f"{k}:keep": Measurement(ms) for k, ms in keeps.items()}
    return LatencyTable({**rows, "0:1-2:fit:3x3s1x1g1": Measurement(5.0)}, {"backend": "fake"})


def merged(table_key: str) -> MergePlan:
    series, run, *_ = table_key.split(":")
    start, stop = map(int, run.split("-"))
    conv = ConvConfig(1, 1, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    return MergePlan((Candidate(Span(series, start, stop, "x", "y", "y", None), "fit", conv),))


def test_the_sum_of_a_plan_has_its_rows_in_place_of_all_that_the_spans_held() -> None:
    table = nested()
    plan = merged("0:1-2:fit:3x3s1x1g1")
    assert table.total() == 31.0 and table.kept(plan.candidates[0]) == 30.0 and table.total(plan) == 6.0
    with pytest.raises(TableError, match="no row '0/1.1:0-1:fit"):
        table.total(merged("0/1.1:0-1:fit:3x3s1x1g1"))


def test_a_calibrated_table_predicts_whole_networks_and_travels_with_its_calibration(tmp_path: Path) -> None:
    table = nested()
    with pytest.raises(TableError, match="calibrate=True"):
        table.predict()
    line = calibrate([1.0, 2.0, 3.0], [2.5, 4.5, 6.5])
    known = replace(table, calibration=line)
    assert known.predict() == pytest.approx(62.5)
    assert known.predict(merged("0:1-2:fit:3x3s1x1g1")) == pytest.approx(12.5)
    again = LatencyTable.load(known.save(tmp_path / "t.json"))
    assert again.calibration == line and again.merge(table).calibration == line
    few = replace(table, calibration=calibrate([1.0], [2.5]))
    assert math.isnan(LatencyTable.load(few.save(tmp_path / "few.json")).calibration.held_out)  # type: ignore[union-attr]
    assert LatencyTable.load(table.save(tmp_path / "none.json")).calibration is None
    body = json.loads((tmp_path / "t.json").read_text())
    body["calibration"]["b"] = "1"
    (tmp_path / "t.json").write_text(json.dumps(body))
    with pytest.raises(TableError, match="damaged"):
        LatencyTable.load(tmp_path / "t.json")


# calibration


def test_calibration_finds_the_line_despite_one_bad_measurement() -> None:
    sums = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    wholes = [0.5 + 1.5 * x for x in sums]
    exact = calibrate(sums, wholes)
    assert (exact.a, exact.b, exact.mape, exact.held_out) == pytest.approx((0.5, 1.5, 0, 0)) and exact.kendall_tau == 1
    assert exact(10.0) == pytest.approx(15.5)
    wholes[2] *= 3
    robust = calibrate(sums, wholes)
    assert robust.b == pytest.approx(1.5, rel=0.1) and robust.mape > 0.05 and robust.kendall_tau < 1


def test_a_network_that_is_the_sum_of_its_rows_has_no_offset() -> None:
    rows = [0.1 + 0.2, 0.7, 1.1 * 1.1, 2.3]
    for some in itertools.combinations(rows, 2):
        assert calibrate(some, [1.7 * x for x in some]).a == 0.0
    assert calibrate(rows, [1.7 * x + 1e-9 for x in rows]).a == pytest.approx(1e-9, rel=1e-3)


def test_calibration_with_few_or_equal_points_is_an_offset() -> None:
    assert (calibrate([2.0], [2.5]).a, calibrate([2.0], [2.5]).b) == (0.5, 1.0)
    assert math.isnan(calibrate([2.0], [2.5]).held_out) and math.isnan(calibrate([2.0], [2.5]).worst)
    assert calibrate([2.0, 2.0], [2.5, 2.7]).b == 1.0
    assert math.isnan(calibrate([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]).held_out), "five promise nothing"


def test_held_out_networks_say_how_far_a_prediction_is_off_and_move_nothing() -> None:
    line = calibrate([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], held_out=[(4.0, 4.0), (6.0, 8.0)])
    assert (line.a, line.b, line.mape, line.plans) == pytest.approx((1.0, 1.0, 0.0, 5))
    assert (line.held_out, line.worst) == pytest.approx(((1 / 4 + 1 / 8) / 2, 1 / 4)) and line.kendall_tau == 1
    assert calibrate([1.0, 2.0], [1.0, 2.0], held_out=[(4.0, 4.0), (6.0, 3.0)]).kendall_tau == -1


def test_the_line_has_the_least_mean_relative_error() -> None:
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(1, 10, 9))
    y = (0.3 + 1.2 * x) * np.exp(0.05 * rng.normal(size=9))
    line = calibrate(x.tolist(), y.tolist())
    others = [(line.a + da, line.b + db) for da in (-0.05, 0, 0.05) for db in (-0.02, 0, 0.02)]
    assert min(float(np.mean(np.abs(a + b * x - y) / y)) for a, b in others) == pytest.approx(line.mape)


def test_calibration_never_turns_the_order_round() -> None:
    c = calibrate([1.0, 2.0], [2.0, 1.0])
    assert c.b > 0 and c.kendall_tau == -1


@pytest.mark.parametrize(("sums", "wholes"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([1.0], [-1.0])])
def test_calibration_refuses_what_is_no_latency(sums: list[float], wholes: list[float]) -> None:
    with pytest.raises(TableError, match="calibration needs"):
        calibrate(sums, wholes)


def test_kendall_tau_counts_pairs() -> None:
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert math.isnan(kendall_tau([1, 1], [1, 2]))


# progress


def test_progress_is_silent_when_disabled_and_on_stderr_when_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2], "quiet", enabled=False)) == [1, 2]
    assert capsys.readouterr() == ("", "")
    with progress(2, "loud") as bar:
        bar.update(2)
    out, err = capsys.readouterr()
    assert out == "" and "loud: 100%" in err


def test_progress_ends_its_line_on_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), progress(2, "loud"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.endswith("\n")
