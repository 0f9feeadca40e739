"""Padding that is not zeros: a composed span pads once, in the way of its first op that pads."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from benchmarks.shared.random_plans import random_plan
from lmfx.passes.algebra.linear_span import fill_pad, pad_module
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import ConvConfig, MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, double, run

MODES = ["reflect", "replicate", "circular"]
X = torch.randn(2, 4, 11, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def spans_of(model: nn.Module, **options: Any) -> SpanSet:
    return enumerate_spans(Network(trace(double(model), X)), SpanOptions(realize=("compose",), **options))


def conv(mode: str, kernel: int = 3) -> nn.Module:
    return nn.Conv2d(4, 4, kernel, padding=kernel // 2, padding_mode=mode)


class Ones(nn.Module):
    """F.pad with a constant, then a conv."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.conv = value, nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (1, 2, 0, 1), value=self.value))


@pytest.mark.parametrize("mode", MODES)
def test_a_single_layer_that_pads_from_the_map_is_composed_exactly(mode: str) -> None:
    pads: Any = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "circular": nn.CircularPad2d}[mode]
    model = nn.Sequential(pads((1, 2, 0, 1)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    spans = spans_of(model)
    (whole,) = [c for c in spans if c.realization == "compose" and c.kept]
    assert whole.conv is not None and whole.conv.padding_mode == mode and mode in whole.key
    merged = merge(rewrite(spans.network.gm, MergePlan((whole,))))
    for x in (X, torch.randn(1, 4, 15, 16, dtype=torch.float64)):
        assert relative_error(run(model, x), run(merged, x)) <= 1e-12


@pytest.mark.parametrize("value", [1.5, -0.25])
def test_a_single_layer_that_pads_with_a_constant_is_composed_exactly(value: float) -> None:
    model = nn.Sequential(Ones(value), nn.BatchNorm2d(4))
    spans = spans_of(model)
    (whole,) = [c for c in spans if c.realization == "compose" and c.kept]
    assert whole.conv is not None and whole.conv.padding_value == value
    merged = merge(rewrite(spans.network.gm, MergePlan((whole,))))
    assert relative_error(run(model, X), run(merged, X)) <= 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_merged_equals_trainable_whatever_fills_the_padding(mode: str, seed: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = conv(mode), conv(mode, 1), conv("zeros", 5), conv(mode)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x))
            return self.c(F.relu(self.b(F.silu(self.d(y))) + y))

    model = double(Block())
    spans = spans_of(model, max_kernel_size=None)
    check_rewrite(model, X, random_plan(spans, random.Random(seed)), others=[X[:1, :, :10]], spans=spans)


def test_a_map_that_is_smaller_than_its_reflection_is_refused() -> None:
    spans = spans_of(nn.Sequential(*(conv("reflect", 7) for _ in range(4))), max_kernel_size=None)
    assert max(len(c.kept) for c in spans if c.realization == "compose") == 2  # padding 6 of 9 pixels, then 9 of 9
    assert any("too much to reflect" in r.reason for r in spans.refusals)


def test_branches_that_pad_in_different_ways_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv("reflect"), conv("zeros")

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    spans = spans_of(Two())
    assert any(r.reason == "the branches pad in different ways: 0 and reflect" for r in spans.refusals)


@pytest.mark.parametrize("mode", [*MODES, "zeros"])
def test_the_pad_module_is_what_the_span_does(mode: Any) -> None:
    config = ConvConfig(4, 4, (3, 3), (1, 1), ((1, 2), (3, 0)), (1, 1), 1, mode, 0.5 if mode == "zeros" else 0.0)
    assert torch.equal(pad_module(config)(X), fill_pad(X, config))
    assert fill_pad(X, config).shape == (2, 4, 14, 12)


def test_the_pipeline_keeps_the_padding_mode(tmp_path: Any) -> None:
    torch.manual_seed(0)
    widths = [4, 6, 5, 7, 3]  # no conv can be dropped
    convs = [nn.Conv2d(a, b, 3, padding=1, padding_mode="reflect") for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*(m for c in convs for m in (c, nn.ReLU()))).eval()
    x = torch.randn(2, 4, 20, 20)
    net = lmfx.compress(model, x, 0.85, latency="roofline", realize=("compose",), max_kernel_size=5, progress=False)
    assert any(isinstance(m, nn.ReflectionPad2d) for m in net.modules())
    lmfx.save(net, tmp_path / "out")
    assert torch.equal(run(lmfx.load(tmp_path / "out", model), x), run(net, x))
    lmfx.export_onnx(net, x, tmp_path / "net.onnx")  # compared with ONNX Runtime
