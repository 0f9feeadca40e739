"""The published baselines are modes of one compiler: other candidates, the same tables and solver."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from benchmarks.shared.random_plans import random_plan
from lmfx.passes.errors import OptionError
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, double, run
from tests.toys import compress


class Residual(nn.Module):
    """A stem, a block with a skip, a strided block with a conv on its skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.d, self.down = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(4, 8, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        return torch.relu(self.down(x) + self.d(torch.relu(self.c(x))))


class Inverted(nn.Module):
    """Two blocks of 1 x 1, depthwise 3 x 3, 1 x 1 that end linearly; the second with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = self.block(), self.block()

    def block(self) -> nn.Sequential:
        convs = nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 4, 1)
        acts = nn.ReLU6(), nn.ReLU6(), nn.Identity()
        return nn.Sequential(*(m for conv, act in zip(convs, acts, strict=True) for m in (conv, act)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return x + self.two(x)


NETS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "residual": (Residual, torch.randn(2, 3, 13, 12, dtype=torch.float64)),
    "inverted": (Inverted, torch.randn(2, 4, 11, 10, dtype=torch.float64)),
}


def spans_of(name: str, method: Any, **options: Any) -> tuple[nn.Module, SpanSet]:
    torch.manual_seed(0)
    kind, x = NETS[name]
    model = double(kind())
    return model, enumerate_spans(Network(trace(model, x)), SpanOptions(method=method, **options))


def changed(spans: SpanSet) -> list[Any]:
    return [c for c in spans if c.realization != "keep"]


# --- depth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_depth_composes_all_convs_of_a_span_and_nothing_else(name: str) -> None:
    _, spans = spans_of(name, "depth")
    _, everything = spans_of(name, "layermerge")
    full = {(c.span.series, c.span.start, c.span.stop) for c in everything if c.realization == "compose"}
    found = changed(spans)
    assert found and {c.realization for c in found} == {"compose"}
    assert all(c.kept == c.all_convs for c in found)
    places = [(c.span.series, c.span.start, c.span.stop) for c in found]
    assert len(places) == len(set(places)) and set(places) <= full  # one candidate a span


def test_depth_on_a_residual_network_has_these_spans() -> None:
    _, spans = spans_of("residual", "depth")
    found = {(c.convs, c.conv.kernel_size[0], c.conv.stride[0]) for c in changed(spans)}
    assert (("a", "b"), 5, 1) in found and (("c", "d"), 7, 2) in found
    assert (("stem", "a", "b"), 7, 1) in found
    assert not [c for c in found if len(c[0]) == 1]  # one conv is kept as it is


def test_depth_on_an_inverted_network_has_these_spans() -> None:
    _, spans = spans_of("inverted", "depth")
    one = {c.convs: c for c in changed(spans) if all(n.startswith("one") for n in c.convs)}
    assert sorted(one) == [("one.0", "one.2"), ("one.0", "one.2", "one.4"), ("one.2", "one.4")]
    assert all(c.conv.kernel_size == (3, 3) and c.conv.groups == 1 for c in one.values())


# --- layeronly --------------------------------------------------------------------------------------------------------


def test_layeronly_removes_single_convs_that_can_go() -> None:
    _, spans = spans_of("residual", "layeronly")
    found = changed(spans)
    assert {c.realization for c in found} == {"drop"} and all(c.span.stop - c.span.start == 1 for c in found)
    # The stem, c and down change the channels or the size; the block may go as a whole and is its skip then.
    assert sorted(c.convs for c in found) == [("a",), ("a", "b"), ("b",), ("d",)]
    _, inverted = spans_of("inverted", "layeronly")
    assert sorted(c.convs for c in changed(inverted)) == [("one.2",), ("two.0", "two.2", "two.4"), ("two.2",)]


def test_layeronly_keeps_the_activation_and_merges_nothing() -> None:
    model, spans = spans_of("residual", "layeronly")
    (drop,) = [c for c in changed(spans) if c.convs == ("d",)]
    net: Any = model
    x = NETS["residual"][1]
    with torch.no_grad():
        h = torch.relu(net.bn(net.stem(x)))
        h = torch.relu(h + net.b(torch.relu(net.a(h))))
        expected = torch.relu(net.down(h) + torch.relu(net.c(h)))
    assert relative_error(expected, run(merge(rewrite(spans.network.gm, MergePlan((drop,)))), x)) <= 1e-12


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["depth", "layeronly"])
@pytest.mark.parametrize("name", NETS)
def test_plans_of_a_method_are_rewritten_exactly(name: str, method: str) -> None:
    model, spans = spans_of(name, method)
    for seed in range(3):
        check_rewrite(model, NETS[name][1], random_plan(spans, random.Random(seed)), spans=spans)


@pytest.mark.parametrize("method", ["depth", "layeronly"])
def test_compress_takes_a_method(method: Any) -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 32, 32)
    # By hand, to see that the whole pipeline solves over this method's candidates alone.
    graph = lmfx.trace(model, x)
    spans = lmfx.spans(graph, method=method)
    latency = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    score = lmfx.score(graph, spans=spans, latency=latency, calibration=x, progress=False)
    fastest = lmfx.solve(graph, latency, score, spans=spans)
    budget = float(fastest.latency[0] / fastest.original) * 0.5 + 0.5
    net = compress(model, x, budget, method=method)
    result = lmfx.result_of(net)
    assert result.plan.candidates and result.ratio <= budget
    wanted = {"depth": "compose", "layeronly": "drop"}[method]
    assert {c.realization for c in result.plan.candidates} == {wanted}


def test_the_default_is_everything() -> None:
    _, spans = spans_of("residual", "layermerge")
    assert {c.realization for c in changed(spans)} == {"compose", "fit", "drop"}
    assert SpanOptions() == SpanOptions(method="layermerge")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "depth", "realize": ("fit",)}, "method='depth' composes all convs.*has no 'compose'"),
        ({"method": "layeronly", "realize": ("fit",)}, "method='layeronly' removes convs and merges nothing"),
        ({"method": "layeronly", "activation_after": "relu"}, "activation_after= say nothing"),
        ({"method": "pruning"}, "method='pruning': use one of 'layermerge', 'depth', 'layeronly'"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        SpanOptions(**options)
    with pytest.raises(OptionError, match=text):
        compress(Residual().eval(), torch.randn(1, 3, 16, 16), 0.8, **options)
