"""A network whose plain attributes decide what the next call gives is refused by name; what is only kept is not."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmfx.passes.errors import ModelError
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.model.attributes import changed_attributes, plain_attributes
from lmfx.passes.trace.tracing import trace
from tests.helpers import double, run
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(2, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Keeps(nn.Module):
    """Two convs, with something between them that may remember."""

    total = 0
    seen: Any

    def __init__(self, between: Callable[[Any, Tensor], Tensor], **kept: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.between = between
        for name, value in kept.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))


def counted(net: Any, y: Tensor) -> Tensor:
    net.seen += 1
    return y * net.seen


def every_tenth(net: Any, y: Tensor) -> Tensor:
    net.seen += 1
    return y * 2 if net.seen % 10 == 0 else y


def mean_so_far(net: Any, y: Tensor) -> Tensor:
    net.seen = 0.9 * net.seen + 0.1 * y.mean()
    return y - net.seen


def first_mean(net: Any, y: Tensor) -> Tensor:
    if net.seen is None:
        net.seen = y.mean()
    return y - net.seen


def grows(net: Any, y: Tensor) -> Tensor:
    net.seen.append(y.mean())
    return y - sum(net.seen) / len(net.seen)


def of_an_object(net: Any, y: Tensor) -> Tensor:
    net.seen.step += 1
    return y + net.seen.step


def from_a_counter(net: Any, y: Tensor) -> Tensor:
    return y + next(net.seen)


def by_name(net: Any, y: Tensor) -> Tensor:
    net.seen["calls"] = net.seen.get("calls", 0) + 1
    return y * net.seen["calls"]


STATEFUL: list[tuple[Callable[[Any, Tensor], Tensor], Any]] = [
    (counted, 0),
    (every_tenth, 0),
    (mean_so_far, 0.0),
    (first_mean, None),
    (grows, []),
    (of_an_object, types.SimpleNamespace(step=0)),
    (from_a_counter, itertools.count(1)),
    (by_name, {}),
]


@pytest.mark.filterwarnings(
    "ignore:Pickle, copy, and deepcopy support will be removed:DeprecationWarning"
)  # of counters
@pytest.mark.parametrize(("between", "start"), STATEFUL, ids=[f.__name__ for f, _ in STATEFUL])
def test_a_network_that_remembers_is_refused_and_the_attribute_named(between: Any, start: Any) -> None:
    model = double(Keeps(between, seen=start))
    with pytest.raises(ModelError, match=r"changes while it is run.*into seen, .*take it as an input"):
        trace(model, X)


def test_a_part_that_remembers_is_named_with_its_path() -> None:
    model = double(nn.Sequential(nn.Conv2d(3, 3, 1), Keeps(counted, seen=0)))
    with pytest.raises(ModelError, match=r"into 1\.seen"):
        trace(model, X)


def test_a_class_that_remembers_is_named() -> None:
    class Shared(Keeps):
        total = 0

    def between(net: Any, y: Tensor) -> Tensor:
        Shared.total += 1
        return y + Shared.total

    with pytest.raises(ModelError, match=r"into Shared\.total"):
        trace(double(Shared(between)), X)


def last(net: Any, y: Tensor) -> Tensor:
    net.seen = y
    return y


def listed(net: Any, y: Tensor) -> Tensor:
    net.seen.append(tuple(y.shape))
    return y


def only_counted(net: Any, y: Tensor) -> Tensor:
    net.seen += 1
    return y


def for_the_size(net: Any, y: Tensor) -> Tensor:
    if net.seen is None:
        net.seen = torch.linspace(0, 1, 5, dtype=y.dtype)
    return y + net.seen.mean()


@pytest.mark.parametrize(
    ("between", "start"),
    [(last, None), (listed, []), (only_counted, 0), (for_the_size, None)],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_what_is_kept_and_changes_nothing_is_no_state(between: Any, start: Any) -> None:
    model = double(Keeps(between, seen=start))
    graph = trace(model, X)
    assert model.seen is start or model.seen == start  # the caller's network was not run
    assert relative_error(run(model, X), run(graph, X)) <= 1e-14


def test_a_network_that_draws_and_counts_is_not_said_to_remember() -> None:
    def between(net: Any, y: Tensor) -> Tensor:
        net.seen += 1
        return y + torch.rand(1, dtype=y.dtype)

    with pytest.raises(ModelError, match="rand in its forward draws random numbers"):
        trace(double(Keeps(between, seen=0)), X)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_in_an_attribute_changes_when_it_is_written_or_exchanged(device: str) -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = [torch.ones(2, device=device)]

    model = Holding()
    before = plain_attributes(model)
    assert changed_attributes(before, plain_attributes(model)) == []
    model.held[0] = torch.zeros(2, device=device)
    assert changed_attributes(before, plain_attributes(model)) == ["held"]
