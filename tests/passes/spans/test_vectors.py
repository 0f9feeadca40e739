"""Linear layers on vectors: series of their own, composed, fitted and dropped like convolutions."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from benchmarks.shared.random_plans import random_plan
from lmfx.passes.algebra import linear
from lmfx.passes.errors import ModelError
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, double, run

X = torch.randn(3, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """Convs, then a head of Linear layers with a norm and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        x = torch.relu(self.norm(self.a(x)))
        x = x + self.c(torch.relu(self.b(self.dropout(x))))
        return self.d(x * 0.5)


@pytest.fixture
def head() -> nn.Module:
    torch.manual_seed(0)
    return double(Head())


def spans_of(model: nn.Module, **options: Any) -> SpanSet:
    return enumerate_spans(Network(trace(model, X)), SpanOptions(**options))


def test_linear_layers_are_spans(head: nn.Module) -> None:
    spans = spans_of(head)
    composed = {(c.convs, c.kept) for c in spans if c.realization == "compose"}
    assert (("a", "b", "c", "d"), ("a", "b", "c", "d")) in composed
    assert (("b", "c"), ("b", "c")) in composed
    assert (("b", "c"), ("b",)) not in composed  # the same one Linear, with less in it
    fits = [c for c in spans if c.realization == "fit" and c.convs == ("b", "c")]
    assert {c.conv.kernel_size for c in fits if c.conv} == {()}
    crossing = [c for c in spans if "conv.2" in c.convs and "a" in c.convs]
    assert not crossing  # from a map to a vector there is no conv


@pytest.mark.parametrize("seed", range(5))
def test_merged_equals_trainable_with_linear_layers(head: nn.Module, seed: int) -> None:
    spans = spans_of(head, realize=("compose", "fit", "drop"))
    plan = random_plan(spans, random.Random(seed))
    check_rewrite(head, X, plan, others=[X[:1, :, :7, :6]], spans=spans)


def test_without_its_activation_a_head_is_one_linear_layer() -> None:
    torch.manual_seed(0)
    head = nn.Linear(84, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)
    model = double(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), *head))
    spans = spans_of(model, realize=("compose",))
    (whole,) = [c for c in spans if c.realization == "compose" and c.kept == ("2", "4")]
    merged = merge(rewrite(spans.network.gm, MergePlan((whole,))))
    assert [m.weight.shape for m in merged.modules() if isinstance(m, nn.Linear)] == [(4, 84)]
    assert relative_error(run(model, X), run(merged, X)) <= 1e-13


def test_a_fit_of_a_linear_head_is_least_squares() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 16), nn.Linear(16, 4)).double().eval()
    x = torch.randn(600, 3, 8, 8, dtype=torch.float64)
    graph = lmfx.trace(model, x[:2])
    (fit,) = [c for c in lmfx.spans(graph) if c.realization == "fit" and c.convs == ("2", "3")]
    net = lmfx.rewrite(graph, MergePlan((fit,)), calibration=x)
    assert relative_error(run(model, x), run(net, x)) <= 1e-3  # two Linear layers are one


def test_a_head_alone_is_compressed_end_to_end(tmp_path: Any) -> None:
    torch.manual_seed(0)
    widths = [64, 256, 256, 256, 10]
    linears = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *linears[:-1]).eval()
    x = torch.randn(64, 3, 8, 8)
    net = lmfx.compress(
        model, x, 0.8, latency="roofline", include=("4", "6", "8", "10"), realize=("fit",), progress=False
    )
    assert sum(isinstance(m, nn.Linear) for m in net.modules()) < 4
    assert "8" in str(lmfx.report(net))
    lmfx.save(net, tmp_path / "out")
    assert torch.equal(run(lmfx.load(tmp_path / "out", model), x), run(net, x))
    lmfx.export_onnx(net, x, tmp_path / "net.onnx")


def test_a_linear_layer_on_tokens_is_no_vector() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(self.conv(x).flatten(2).transpose(1, 2))))

    assert not [c for c in spans_of(double(Tokens())) if "a" in c.convs and c.realization != "keep"]


def test_the_algebra_holds_for_vectors() -> None:
    first, second = (nn.Linear(5, 6).double(), nn.Linear(6, 3).double())
    x = torch.randn(4, 5, dtype=torch.float64)
    one, two = linear.from_linear(first), linear.from_linear(second)
    assert torch.allclose(linear.compose(one, two)(x), second(first(x)), rtol=1e-13)
    skip = linear.add([one, linear.compose(one, linear.identity(6, 0))], [1.0, -1.0])
    assert float(skip(x).detach().abs().max()) <= 1e-15
    assert torch.allclose(linear.cat([one, one])(x), torch.cat([first(x)] * 2, 1), rtol=1e-13)
    norm = nn.BatchNorm1d(6).double().eval()
    assert torch.allclose(linear.compose(one, linear.from_batch_norm(norm, 0))(x), norm(first(x)), rtol=1e-12)
    module = linear.to_conv(one, torch.float32)
    assert isinstance(module, nn.Linear) and module.weight.dtype == torch.float32
    with pytest.raises(ModelError, match="Conv2d is not an nn.Linear"):
        linear.from_linear(nn.Conv2d(2, 2, 1))
