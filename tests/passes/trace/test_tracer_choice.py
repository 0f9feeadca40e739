"""Of several graphs of a network the one is taken that hides least and is right at most sizes; what it leaves alone."""

from __future__ import annotations

import copy
import importlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import lmfx
from lmfx.passes.errors import SizeError
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import MergePlan
from lmfx.passes.model.size_limits import limits_of
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.trace.tracing import TRACERS, trace
from tests.helpers import double, ops_of, run, spans_of
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self, tail: Callable[[Any, Tensor], Any], middle: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.middle, self.last, self.tail = middle or nn.ReLU(), nn.Conv2d(6, 4, 1), tail

    def forward(self, x: Tensor) -> Any:
        return self.tail(self, self.b(self.middle(self.norm(self.a(x)))))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


# --- what is understood -----------------------------------------------------------------------------------------------


class ChannelChecked(nn.BatchNorm2d):
    """A norm that compares channels, which are the same at every size."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.num_features or x.size(1) != len(self.weight) or x.shape[-3:][0] != self.num_features:
            raise ValueError("channels")
        return super().forward(x)


class Halved(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[1] == 6 else 0 * x


class ByPixels(nn.Module):
    """What it computes depends on the size."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) if x.shape[2] > self.least else torch.tanh(x)


class ByImages(nn.Module):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) if len(x) > self.most else torch.tanh(x)


class Strided(nn.Module):
    """Asks for strides, which the shape tracer knows and which are the same at every size up to their order."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(F.hardtanh(x)) if not (x.stride(-1) > x.stride(1)) else x


@pytest.mark.parametrize(("middle", "word"), [(ChannelChecked(6), "BatchNorm2d"), (Halved(), "ReLU")])
def test_a_forward_that_compares_channels_is_seen_at_every_size(middle: nn.Module, word: str) -> None:
    model = double(Net(lambda net, y: net.last(y).reshape(y.shape[0], -1), copy.deepcopy(middle)))
    graph = trace(model, drawn(1, 3, 12, 12))
    assert ops_of(graph)[:4] == ["Conv2d", "BatchNorm2d", word, "Conv2d"]
    assert (noted(graph).tracer, noted(graph).opaque) == ("symbolic", {})
    assert relative_error(run(model, drawn(3, 3, 7, 9)), run(graph, drawn(3, 3, 7, 9))) <= 1e-13


@pytest.mark.parametrize("middle", [ByPixels(3), ByPixels(9), ByPixels(100), ByPixels(400), ByImages(1), ByImages(40)])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_a_size_decides_is_not_taken_for_what_it_is_at_the_examples(middle: nn.Module, batch: int) -> None:
    model = double(Net(lambda net, y: net.last(y), middle))
    graph = trace(model, drawn(batch, 3, 12, 12))
    for shape in (
        (1, 3, 12, 12),
        (2, 3, 12, 12),
        (3, 3, 12, 12),
        (50, 3, 4, 4),
        (1, 3, 2, 3),
        (1, 3, 120, 8),
        (1, 3, 500, 2),
    ):
        try:
            assert relative_error(run(model, drawn(*shape)), run(graph, drawn(*shape))) <= 1e-13
        except SizeError:
            assert shape != (batch, 3, 12, 12)


def test_the_tracer_that_hides_fewer_ops_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    for name, tracer in list(TRACERS.items()):
        monkeypatch.setitem(TRACERS, name, lambda *a, n=name, t=tracer: (tried.append(n), t(*a))[1])
    model = double(Net(lambda net, y: net.last(y), Strided()))
    graph = trace(model, drawn(2, 3, 12, 12))
    assert tried == ["symbolic", "shapes"] and noted(graph).tracer == "shapes"
    assert ops_of(graph) == ["Conv2d", "BatchNorm2d", "Hardtanh", "SiLU", "Conv2d", "Conv2d"]
    tried.clear()
    trace(double(Net(lambda net, y: net.last(y))), drawn(2, 3, 12, 12))
    assert tried == ["symbolic"]  # understood, and right at every size: nobody else is asked


# --- free sizes -------------------------------------------------------------------------------------------------------


def kept_size(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    if getattr(net, "size", None) != (h, w):
        net.size = (h, w)
    return y.view(b, c, -1)


def padded(net: Any, y: Tensor) -> Tensor:
    h, w = y.shape[2:]
    return net.last(F.pad(y, (0, -w % 8, 0, -h % 8)) if h % 8 or w % 8 else y)


def zeros(net: Any, y: Tensor) -> Tensor:
    return net.last(y + torch.zeros(y.shape[0], 6, *y.shape[2:], dtype=y.dtype).fill_(0.5))


def channels(net: Any, y: Tensor) -> Tensor:
    parts = [F.silu(y[:, i : i + 1]) * (i + 1) if y.shape[2] > 1 else y[:, i : i + 1] for i in range(y.shape[1])]
    return net.last(torch.cat(parts, 1)).view(y.shape[0], -1)


def written(net: Any, y: Tensor) -> Tensor:
    z = y.new_zeros(y.shape[0], 8, *y.shape[2:])
    z[:, 1:7] = y
    return z[:, ::2].flatten(1)


FREE = [kept_size, padded, zeros, channels, written]


@pytest.mark.parametrize("tail", FREE)
@pytest.mark.parametrize("batch", [1, 3])
def test_sizes_are_values_of_the_graph(tail: Any, batch: int, tmp_path: Path) -> None:
    model = double(Net(tail))
    x = drawn(batch, 3, 16, 12)
    run(model, x)  # caches of the size are filled
    # An image size alone is no reason for torch.export, unless it is asked for.
    graph = trace(model, x, ("export",) if tail in (padded, zeros) else tuple(TRACERS))
    assert noted(graph).sizes == {"batch": "any", "size": "any"}
    again = importlib.import_module("pickle").loads(importlib.import_module("pickle").dumps(graph))
    for shape in ((1, 3, 16, 12), (2, 3, 16, 12), (5, 3, 9, 22)):
        expected = run(model, drawn(*shape))
        for one in (graph, again, copy.deepcopy(graph), trace(graph, x)):
            assert relative_error(expected, run(one, drawn(*shape))) <= 1e-13


@pytest.mark.parametrize("tail", [kept_size, written])
def test_sizes_stay_values_in_merged_saved_and_exported_networks(tail: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Net(tail, nn.Identity()).eval()
    x = torch.randn(1, 3, 16, 12)
    model(x)
    options: dict[str, Any] = {"latency": "roofline", "progress": False, "importance": "magnitude"}
    net = lmfx.compress(model, x, 0.95, realize=("compose",), **options)
    assert [c for c in lmfx.result_of(net).plan.candidates if len(c.all_convs) > 1]
    loaded = lmfx.load(lmfx.save(net, tmp_path / "saved"), model)
    file = lmfx.export_onnx(net, x, tmp_path / "net.onnx", dynamic_batch=True)
    session = onnxruntime.InferenceSession(str(file))
    for shape in ((4, 3, 16, 12), (2, 3, 11, 9)):
        other = torch.randn(shape)
        assert net(other).shape == model(other).shape
        assert torch.equal(net(other), loaded(other))
        if shape[2:] == x.shape[2:]:
            (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
            assert torch.allclose(torch.from_numpy(got), net(other), atol=1e-4)


def test_a_size_that_must_be_a_number_leaves_the_others_free() -> None:
    def loop(net: Any, y: Tensor) -> Tensor:
        rows = [F.pad(net.last(y[i : i + 1])[0], (0, -y.shape[3] % 4)) for i in range(y.shape[0])]
        return torch.stack(rows) if y.shape[3] > 1 else y

    model = double(Net(loop))
    graph = trace(model, drawn(2, 3, 8, 10))
    assert noted(graph).sizes == {"batch": "fixed", "size": "any"}
    assert relative_error(run(model, drawn(2, 3, 9, 17)), run(graph, drawn(2, 3, 9, 17))) <= 1e-13
    with pytest.raises(SizeError, match="batch of 2, and x has a batch of 3"):
        graph(drawn(3, 3, 8, 10))


# --- several inputs ---------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, meet: Callable[[Tensor, Tensor], Tensor], padding: int = 1) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 3, padding=padding), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.meet = meet

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(self.b(self.meet(self.a(x), y)))


def test_an_input_that_changes_alone_is_tried() -> None:
    model = double(Two(lambda z, y: z if y.shape[2] == 1 else z * y))
    graph = trace(model, (drawn(2, 3, 8, 8), drawn(2, 3, 8, 8)))
    assert [(v.name, v.kind) for v in limits_of(graph)] == [("y", "size")]
    assert (
        relative_error(model(drawn(5, 3, 8, 8), drawn(5, 3, 8, 8)), graph(drawn(5, 3, 8, 8), drawn(5, 3, 8, 8))) < 1e-13
    )
    with pytest.raises(SizeError, match="8 x 8, and y has images of 1 x 1"):
        graph(drawn(2, 3, 8, 8), drawn(2, 3, 1, 1))


def test_inputs_that_broadcast_need_no_limit() -> None:
    graph = trace(double(Two(lambda z, y: z * y)), (drawn(2, 3, 8, 8), drawn(2, 3, 8, 8)))
    assert limits_of(graph) == ()


@pytest.mark.parametrize("realize", ["compose", "fit"])
def test_a_vector_that_is_a_map_at_other_sizes_is_never_merged_in_silence(realize: Any) -> None:
    model = double(Two(lambda z, y: z + y, padding=2))
    example = drawn(1, 3, 1, 1), drawn(1, 3, 1, 1)
    spans = spans_of(model, example, realize=(realize,), max_fit_unknowns=None)
    whole = [c for c in spans if c.realization == realize and c.span.entry == "x" and len(c.all_convs) > 1]
    assert whole
    for candidate in whole:
        trainable = rewrite(spans.network.gm, MergePlan((candidate,)))
        for net in (trainable, merge(trainable)):
            assert [v.name for v in limits_of(net)] == ["y"]
            assert net(*example).shape == model(*example).shape
            vector = drawn(1, 3, 6, 6), drawn(1, 3, 1, 1)
            assert relative_error(trainable(*vector), net(*vector)) <= 1e-12
            assert model(drawn(1, 3, 4, 4), drawn(1, 3, 6, 6)).shape == (1, 2, 6, 6)
            with pytest.raises(SizeError, match="1 x 1, and y has images of 6 x 6"):
                net(drawn(1, 3, 4, 4), drawn(1, 3, 6, 6))


# --- the caller's random numbers --------------------------------------------------------------------------------------


def test_tracing_draws_none_of_the_callers_random_numbers() -> None:
    def noisy(net: Any, y: Tensor) -> Tensor:
        torch.rand(3), random.random(), np.random.rand()
        return net.last(y) if y.shape[2] > 4 else y

    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]

    model = double(Net(noisy, nn.Dropout(0.5)))
    x = drawn(1, 3, 8, 8)
    before = states()
    graph = trace(model, x)
    assert isinstance(graph, fx.GraphModule) and states() == before
    drops = double(Net(lambda net, y: F.dropout(y, 0.5, training=True)))
    before = states()
    with pytest.raises(lmfx.LmfxError):
        trace(drops, x)
    assert states() == before
