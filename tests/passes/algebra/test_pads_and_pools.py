"""Pads of every kind and average pools with their options: which of them a merged conv takes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.passes.graph.verify import relative_error
from lmfx.passes.spans.enumeration import enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, check_trace, double, ops_of, pick, run, spans_of
from tests.passes.trace.test_trace import conv, net

X = torch.randn(2, 4, 11, 9, dtype=torch.float64)


class SamePadded(nn.Conv2d):
    """Computes its pads from the size of its input, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for i in (1, 0):
            size, k, s = x.shape[2 + i], self.kernel_size[i], self.stride[i]
            total = max((-(-size // s) - 1) * s + k - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Blur(nn.Module):
    """Pads by reflection, and averages with fixed weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filter", (row[:, None] * row).repeat(channels, 1, 1, 1))
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filter, stride=2, groups=self.channels)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2, divisor_override=3),
        nn.AvgPool2d(3, 2, 1, divisor_override=5),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False, divisor_override=5),
        nn.AvgPool2d(3, 2, count_include_pad=False),
        nn.AvgPool2d((3, 2), (1, 2), (1, 0)),
    ],
    ids=str,
)
def test_average_pools_that_are_convs_merge(pool: nn.Module) -> None:
    model = double(nn.Sequential(nn.Conv2d(4, 6, 3), pool, nn.ReLU(), nn.Conv2d(6, 5, 1)))
    check_rewrite(model, X, pick(realization="compose", convs=("0", "3")), after=["Conv2d"])


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2, ceil_mode=True)], ids=str
)
def test_average_pools_that_divide_by_fewer_at_the_edge_do_not(pool: nn.Module) -> None:
    spans = spans_of(double(nn.Sequential(nn.Conv2d(4, 6, 3), pool, nn.Conv2d(6, 5, 1))), X)
    assert not [c for c in spans if c.realization == "compose" and len(c.convs) > 1]


def test_pads_that_are_computed_from_the_size_stay_so_where_the_tracer_can() -> None:
    model = double(nn.Sequential(SamePadded(4, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), SamePadded(6, 5, 2, 2)))
    gm = trace(model, X, ("export",))
    for size in (X.shape[-1], X.shape[-1] + 3, X.shape[-1] + 6):
        other = torch.randn(3, 4, size, size + 1, dtype=torch.float64)
        assert relative_error(run(model, other), run(gm, other)) < 1e-12


def test_pads_that_are_computed_from_the_size_are_folded() -> None:
    first, second = SamePadded(4, 6, 3, 2), SamePadded(6, 5, 2, 2)
    model = double(nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU(), second, nn.Conv2d(5, 4, 1)))
    gm = trace(model, X, ("shapes",))
    kinds = ["ConstantPad2d", "Conv2d", "BatchNorm2d", "ReLU", "ConstantPad2d", "Conv2d", "Conv2d"]
    assert ops_of(gm) == kinds
    spans = enumerate_spans(Network(gm))
    whole = [c for c in spans if c.realization == "compose" and len(c.convs) == 3]
    assert whole and whole[0].conv is not None and whole[0].conv.stride == (4, 4)
    check_rewrite(model, X, lambda s: whole[:1], spans=spans, edits=1)


def test_a_pad_by_reflection_is_composed_and_fitted_across() -> None:
    model = double(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), Blur(6), nn.Conv2d(6, 5, 1)))
    gm = check_trace(model, X, ["Conv2d", "ReLU", "ReflectionPad2d", "Conv2d", "Conv2d"])
    spans = spans_of(model, X)
    assert ops_of(gm) == ops_of(spans.network.gm)
    found = [c.conv for c in spans if c.realization == "compose" and c.convs == ("2.conv2d", "3")]
    assert found and all(c is not None and c.padding_mode == "reflect" for c in found)
    fits = [c for c in spans if c.realization == "fit" and len(c.convs) == 3]
    assert fits and all(c.conv is not None and c.conv.stride == (2, 2) for c in fits)
    check_rewrite(model, X, pick(realization="compose", convs=("2.conv2d", "3")), edits=1)


def test_a_pad_mode_of_a_conv_stays_with_it() -> None:
    model = double(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.Conv2d(6, 5, 1)))
    check_trace(model, X, ["Conv2d", "Conv2d"])
    spans = spans_of(model, X)
    found = [c.conv for c in spans if c.realization == "compose"]
    assert found and all(c is not None and c.padding_mode == "circular" for c in found)
    check_rewrite(model, X, pick(realization="compose"), edits=1)


@pytest.mark.parametrize(
    ("mode", "kind"), [("reflect", "Reflection"), ("replicate", "Replication"), ("circular", "Circular")]
)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_pads_of_all_modes_and_ranks_are_modules(mode: str, kind: str, ndim: int) -> None:
    x = torch.randn(2, 3, *(5, 6, 7)[:ndim], dtype=torch.float64)
    body: Any = lambda m, x: F.pad(x, (1, 2, 0, 1, 1, 0)[: 2 * ndim], mode) * 2  # noqa: E731
    check_trace(net(body), x, [f"{kind}Pad{ndim}d", "ChannelAffine"])


def test_the_last_dimension_alone_is_padded_by_reflection_where_torch_can() -> None:
    check_trace(net(lambda m, x: m.c(F.pad(x, (1, 1, 0, 0), "reflect")), c=conv()), X, ["ReflectionPad2d", "Conv2d"])
