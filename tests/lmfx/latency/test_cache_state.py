"""In which caches a row is timed: that depends on the network that it is a row of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lmfx
from lmfx.latency import get_backend
from lmfx.latency.backends.onnxruntime import OnnxRuntimeBackend
from lmfx.latency.cache_state import suited, touched_bytes
from lmfx.latency.sampling import Sampling, Session
from lmfx.passes.errors import OptionError
from tests.lmfx.latency.test_latency import FakeBackend, Machine
from tests.toys import images, toy

MB = 2**20


@pytest.mark.parametrize(
    ("megabytes", "caches"),
    [(0.01, "hot"), (1, "hot"), (4, "hot"), (8, 0.25), (16, 0.5), (32, 0.75), (64, "network"), (500, "network")],
)
def test_the_larger_a_network_the_colder_its_rows(megabytes: float, caches: str | float) -> None:
    assert Sampling().for_network(int(megabytes * MB)).caches == caches


@pytest.mark.parametrize("caches", ["hot", "network", 0.3])
def test_what_was_asked_for_is_not_changed(caches: Any) -> None:
    sampling = Sampling(caches=caches)
    assert sampling.for_network(1) == sampling.for_network(2**40) == sampling


@pytest.mark.parametrize("caches", ["cold", 0.0, 1.0, 2.0, float("nan"), True, None])
def test_what_is_no_state_is_refused(caches: Any) -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        Sampling(caches=caches)


def test_a_network_touches_its_weights_and_its_largest_op() -> None:
    graph = lmfx.trace(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval(), torch.randn(2, 3, 10, 10))
    assert touched_bytes(graph) == 4 * (3 * 8 * 9 + 8 + 2 * 100 * (8 + 8))
    wide = lmfx.trace(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval(), torch.randn(8, 3, 10, 10))
    assert touched_bytes(wide) > touched_bytes(graph)


def test_a_mixture_is_so_much_of_a_single_run_and_the_rest_of_a_loop() -> None:
    """A row that takes 5 ms where it is run once, right after its inputs were written, and 1 ms in a loop."""
    machine = Machine()
    row = machine.runner("a", 1.0)
    row.refresh = lambda: None
    row.once = lambda: 5.0  # type: ignore[method-assign]
    for caches, ms in (("network", 5.0), ("hot", 1.0), (0.25, 2.0), (0.75, 4.0), ("auto", 5.0)):
        session = Session(machine.runner("S", 1.0), Sampling(min_ms=0.0, caches=caches))  # type: ignore[arg-type]
        taken = session.time({"a": row}, {"a": 1.0})["a"]
        assert taken.samples == pytest.approx([ms] * len(taken.samples)) and len(taken.samples) > 2, caches


def test_rows_of_different_states_are_told_apart_and_the_backend_stays_as_it_is() -> None:
    pytest.importorskip("onnxruntime")
    backend = get_backend("onnxruntime")
    assert isinstance(backend, OnnxRuntimeBackend)
    found = [backend.for_network(n * MB).identity() for n in (1, 8, 16, 500)]
    assert [i["caches"] for i in found] == ["hot", 0.25, 0.5, "network"]
    assert backend.identity() == found[-1], "rows of no network in particular are those of a large one"
    assert backend.sampling.caches == "auto"
    graph = lmfx.trace(toy(), images(1))
    small = suited(backend, graph)
    assert small.identity()["caches"] == "hot" and suited(small, graph) is small


def test_a_backend_that_says_nothing_of_caches_and_one_of_somebody_else_are_taken_as_they_are() -> None:
    graph, fake = lmfx.trace(toy(), images(1)), FakeBackend()
    assert suited(fake, graph) is fake
    roofline = get_backend("roofline")
    assert suited(roofline, graph) is roofline

    class OnDevice(FakeBackend):
        """Replays its rows in a loop, whatever the sampling says, as a GPU does."""

        def identity(self) -> dict[str, Any]:
            return {"caches": "hot"}

    device = OnDevice()
    assert suited(device, graph) is device


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1.0), ("fp16", 0.5), ("int8", 0.25)])
def test_a_network_in_a_smaller_type_touches_less(precision: str, share: float) -> None:
    asked: list[int] = []

    class InPrecision(FakeBackend):
        def identity(self) -> dict[str, Any]:
            return {"precision": precision}

        def for_network(self, nbytes: int) -> InPrecision:
            asked.append(nbytes)
            return self

    graph = lmfx.trace(toy(), images(1))
    suited(InPrecision(), graph)
    assert asked == [int(share * touched_bytes(graph))]


def test_profile_and_compress_time_rows_as_the_network_runs_them() -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 4, 12, 12)
    graph = lmfx.trace(model, x)
    spans = lmfx.spans(graph, realize=("compose",))
    for caches, found in (("auto", "hot"), ("network", "network")):
        sampling = Sampling(caches=caches, rounds=1, visits=3)  # type: ignore[arg-type]
        table = lmfx.profile(graph, "onnxruntime", spans=spans, sampling=sampling, calibrate=False, progress=False)
        assert table.identity["caches"] == found
    options: dict[str, Any] = {"importance": "magnitude", "realize": ("compose",), "progress": False}
    net = lmfx.compress(model, x, 0.9, **options)
    assert lmfx.result_of(net).backend["caches"] == "hot"
