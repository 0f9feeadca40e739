"""Whether 8 bits pay is measured until it is sure, and once: the network that is returned is what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import fx, nn

import lmfx
from lmfx.export import to_onnx_bytes
from lmfx.int8.compressed import int8_form
from lmfx.int8.graph_view import structure
from lmfx.latency import get_backend
from lmfx.latency.backends import int8_models
from tests.helpers import one_thread as one_thread
from tests.lmfx.int8.test_forms import Chain, compressed, forms_with, layers_in_8_bits, view

pytestmark = pytest.mark.usefixtures("one_thread")


def decider(monkeypatch: pytest.MonkeyPatch, times: Any) -> int8_models.Int8Models:
    monkeypatch.setattr(int8_models.Int8Models, "_times", times)
    models: int8_models.Int8Models = get_backend("onnxruntime", precision="int8").int8  # type: ignore[attr-defined]
    models.forms = forms_with(0.4)
    return models


def float_model(net: nn.Module, size: tuple[int, ...] = (1, 16, 20, 20)) -> bytes:
    return to_onnx_bytes(fx.symbolic_trace(net.eval()), [(size, torch.float32)])


def test_a_network_is_decided_once_whatever_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [[9.0, 5.0, 6.0], [2.0, 5.0, 6.0], [2.0, 5.0, 6.0]]  # the second would say that it does not pay
    models = decider(monkeypatch, lambda self, models, *longer: taken.pop(0))
    first, second = (models.whole(float_model(Chain())) for _ in range(2))
    assert len(taken) == 2 and first[0] != second[0]
    assert first[1].pays and second[1].pays and first[1].ms == second[1].ms
    assert not models.whole(float_model(Chain(), (1, 16, 12, 12)))[1].pays  # another network


def test_what_contradicts_the_rows_is_measured_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def times(self: Any, models: list[bytes], *longer: int) -> list[float]:
        asked.append(longer)
        return [4.0, 5.0, 5.0] if not longer else [6.0, 3.0, 5.0]  # a busy spell, and a quiet one

    model, found = decider(monkeypatch, times).whole(float_model(Chain()))
    assert asked == [(), (int8_models.MOST_WHOLE_SAMPLES,)]
    assert found.pays and found.ms == {"int8": 3.0, "float32": 4.0} and layers_in_8_bits(model) == 2


@pytest.mark.parametrize(
    ("samples", "sure"),
    [
        ([5.0, 5.05, 5.1, 9.0], True),
        ([5.0, 5.05, 9.0, 9.0], False),  # nothing came near to it often enough
        ([5.0, 5.2, 5.2, 5.2], False),
    ],
)
def test_a_least_time_counts_when_others_came_near_to_it(samples: list[float], sure: bool) -> None:
    assert int8_models._sure([(1.0, ms) for ms in samples]) == sure


def test_a_whole_network_is_timed_until_its_times_are_sure() -> None:
    class Noisy:
        def __init__(self, ms: list[float]) -> None:
            self.ms, self.closed = ms, False

        def time(self, repeats: int) -> float:
            return repeats * (self.ms.pop(0) if len(self.ms) > 1 else self.ms[0])

        def close(self) -> None:
            self.closed = True

    # two runs find how many make a sample; then five samples of a busy spell, each after a run that does not count
    busy = [3.9, 0.1, 3.3, 0.1, 4.4, 0.1, 3.6, 0.1, 4.1, 0.1]
    runners = [Noisy([2.0] * 12 + [1.0]), Noisy([3.0, 3.0, 0.1, *busy, 1.0])]
    waiting = iter(runners)
    models = int8_models.Int8Models(onnx.load_from_string, lambda model, optimised: next(waiting))  # type: ignore
    assert models._times([b"", b""]) == [1.0, 1.0]
    assert all(r.closed for r in runners)


def test_whole_networks_are_compared_with_their_weights_in_the_caches() -> None:
    """A float network has four times the weights to fetch again, and the budget is measured without that."""
    last: Any = None

    class Cold:
        def __init__(self, ms: float, fetching: float) -> None:
            self.ms, self.fetching = ms, fetching

        def time(self, repeats: int) -> float:
            nonlocal last
            cold, last = last is not self, self
            return repeats * self.ms + cold * self.fetching

        def close(self) -> None:
            pass

    waiting = iter([Cold(1.0, 0.5), Cold(1.05, 0.1)])
    models = int8_models.Int8Models(onnx.load_from_string, lambda model, optimised: next(waiting))  # type: ignore
    assert models._times([b"", b""]) == [1.0, 1.05]  # and not 1.5 and 1.15, by which 8 bits would pay


def test_long_networks_run_no_more_than_they_are_timed() -> None:
    class Long:
        runs = 0

        def time(self, repeats: int) -> float:
            self.runs += repeats
            return 40.0 * repeats

        def close(self) -> None:
            pass

    runner = Long()
    models = int8_models.Int8Models(onnx.load_from_string, lambda model, optimised: runner)  # type: ignore
    assert models._times([b""]) == [40.0] and runner.runs == 2 + int8_models.WHOLE_SAMPLES


def test_a_structure_is_ops_sizes_and_constants_but_no_weights_and_no_names() -> None:
    class Named(nn.Module):
        def __init__(self, high: float = 6.0, swap: bool = False, stride: int = 1) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, stride, 1), nn.Conv2d(3, 4, 3, stride, 1)
            self.high, self.swap = high, swap

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, z = self.a(x), nn.functional.hardtanh(self.b(x), 0.0, self.high)
            return torch.cat((z, y) if self.swap else (y, z), 1)

    class Renamed(Named):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d = self.a, self.b
            del self.a, self.b

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((self.c(x), nn.functional.hardtanh(self.d(x), 0.0, self.high)), 1)

    first = structure(view(Named(), (1, 3, 8, 8)))
    assert first == structure(view(Named(), (1, 3, 8, 8))) == structure(view(Renamed(), (1, 3, 8, 8)))
    others = [view(Named(high=5.0), (1, 3, 8, 8)), view(Named(swap=True), (1, 3, 8, 8))]
    others += [view(Named(stride=2), (1, 3, 8, 8)), view(Named(), (1, 3, 9, 8))]
    assert len({first, *map(structure, others)}) == 5


@pytest.mark.filterwarnings("ignore::lmfx.QualityWarning")
@pytest.mark.parametrize("refit", [False, True])
def test_the_network_that_is_returned_is_decided_by_what_the_search_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refit: bool
) -> None:
    calls = 0
    finishing = False

    def times(self: Any, models: list[bytes], *longer: int) -> list[float]:
        nonlocal calls
        calls += finishing
        return [4.0, *[2.0] * (len(models) - 1)]

    def form(*args: Any) -> Any:
        nonlocal finishing
        finishing = True
        return int8_form(*args)

    monkeypatch.setattr(int8_models.Int8Models, "_times", times)
    monkeypatch.setattr("lmfx.planning.finishing.int8_form", form)
    net = compressed(cache_dir=tmp_path, refit=refit)
    facts = lmfx.result_of(net).int8
    assert finishing and not calls
    assert facts is not None and facts.pays and facts.ms["int8"] == 2.0
