"""A backend of somebody else's may give anything for a whole network: what is no time is refused, with its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import lmfx
from lmfx.latency.backends.roofline import RooflineBackend
from lmfx.latency.whole_times import time_wholes
from lmfx.latency.workload import sentinel_workload
from lmfx.passes.errors import DeviceError
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(1, 3, 9, 7)


class Foreign(RooflineBackend):
    """Rows as the roofline has them, and whole networks as `change` makes of them."""

    name = "stopwatch"

    def __init__(self, change: Callable[[list[list[float]]], Any]) -> None:
        super().__init__()
        self.change = change

    def measure_interleaved(self, modules: Sequence[Any], repeats: int = 5) -> Any:
        return self.change(super().measure_interleaved(modules, repeats))


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    return nn.Sequential(*layers).eval()


def last_is(value: Any) -> Callable[[list[list[float]]], Any]:
    """One round of the last network is `value`."""
    return lambda times: [*times[:-1], [*times[-1][:-1], value]]


WRONG = {
    "NaN": (last_is(math.nan), "nan ms"),
    "infinite": (last_is(math.inf), "inf ms"),
    "zero": (last_is(0.0), "0.0 ms"),
    "negative": (last_is(-2.5), "-2.5 ms"),
    "a text": (last_is("fast"), "'fast'"),
    "None": (last_is(None), "None"),
    "no list": (lambda times: None, "None"),
    "numbers": (lambda times: [row[0] for row in times], "no list of lists"),
    "a network too few": (lambda times: times[:-1], "networks were timed"),
    "a round too few": (lambda times: [times[0][:-1], *times[1:], times[0]], "lists of"),
    "no rounds": (lambda times: [[] for _ in times], "lists of"),
}


@pytest.mark.parametrize(("change", "seen"), WRONG.values(), ids=WRONG)
def test_a_time_that_is_none_is_refused_with_the_backend_and_the_value(change: Any, seen: str) -> None:
    conv = nn.Conv2d(3, 4, 3).eval()
    with pytest.raises(DeviceError, match="'stopwatch'") as caught:
        time_wholes(Foreign(change), [sentinel_workload(), (conv, [X])], 3)
    assert seen in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0])
@pytest.mark.parametrize("merged_only", [True, False])
def test_the_search_divides_by_no_such_time(value: float, merged_only: bool) -> None:
    change = lambda times: last_is(value)(times) if len(times) > 1 or not merged_only else times  # noqa: E731
    with pytest.raises(DeviceError, match=f"'stopwatch' measured {value} ms"):
        lmfx.compress(network(), X, 0.7, latency=Foreign(change), importance="magnitude", progress=False)


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_a_calibration_divides_by_no_such_time(value: float) -> None:
    backend = Foreign(last_is(value))
    with pytest.raises(DeviceError, match=f"'stopwatch' measured {value} ms"):
        lmfx.profile(lmfx.trace(network(), X), backend, progress=False)


def test_nothing_to_merge_names_no_such_time() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Softmax(2)).eval()
    with pytest.raises(DeviceError, match="'stopwatch' measured nan ms"):
        lmfx.compress(model, X, 0.5, latency=Foreign(last_is(math.nan)), realize=("compose",), progress=False)


def test_numbers_of_numpy_and_a_network_without_weights_in_no_time_are_taken() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    empty = fx.GraphModule(nn.Module(), graph)
    times = time_wholes(RooflineBackend(), [(nn.Conv2d(3, 4, 3).eval(), [X]), (empty, [X])], 2)
    assert times[1] == [0.0, 0.0] and times[0][0] == times[0][1] > 0
    given = time_wholes(Foreign(lambda t: np.array(t, dtype=np.float32)), [(nn.Conv2d(3, 4, 3).eval(), [X])], 2)
    assert type(given[0][0]) is float and given[0] == pytest.approx(times[0])
