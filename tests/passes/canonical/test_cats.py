"""A concatenation that repeats the operands of an earlier one reads that one, so that dense blocks are series."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lmfx.passes.spans.enumeration import SpanOptions
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, check_trace, double, pick
from tests.passes.trace.test_trace import conv, net

X = torch.randn(2, 4, 6, 9, dtype=torch.float64)


class Dense(nn.Module):
    """Each layer reads the concatenation of the input and of all outputs before it."""

    def __init__(self, channels: int, growth: int, layers: int, single: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels + i * growth),
                nn.ReLU(),
                nn.Conv2d(channels + i * growth, growth, 3, padding=1, bias=False),
            )
            for i in range(layers)
        )
        self.single = single

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer in self.layers:
            values.append(layer(torch.cat(values, 1) if self.single or len(values) > 1 else x))
        return torch.cat(values, 1)


def reads(gm: torch.fx.GraphModule) -> list[tuple[str, list[str]]]:
    return [(n.name, [o.name for o in n.all_input_nodes]) for n in gm.graph.nodes if n.target is torch.cat]


@pytest.mark.parametrize("single", [False, True])
def test_a_dense_block_is_one_series_of_branches_with_a_skip(single: bool) -> None:
    model = double(nn.Sequential(nn.Conv2d(4, 5, 3), Dense(5, 3, 3, single), nn.Conv2d(14, 4, 1)))
    gm = check_trace(model, X)
    (one, first), (two, second), (_, third) = reads(gm)
    assert [len(v) for v in (first, second, third)] == [2, 2, 2]
    assert second[0] == one and third[0] == two
    (region,) = Network(gm).regions
    assert [lay.parallel.join for lay in region.series.layers if lay.parallel] == ["cat"] * 3
    convs = ("0", "1.layers.0.2", "1.layers.1.2", "1.layers.2.2", "2")
    wide = SpanOptions(max_kernel_size=None)
    check_rewrite(model, X, pick(realization="compose", kept=convs), after=["Conv2d"], options=wide)
    check_rewrite(model, X, pick(realization="compose", kept=convs[1:3]), edits=1)


def test_the_longest_prefix_is_shared_and_equal_concatenations_are_one() -> None:
    def body(m: object, x: Tensor) -> tuple[Tensor, ...]:
        y, z = x.sin(), x.cos()
        two, three = torch.cat([x, y], 1), torch.cat([x, y, z], 1)
        again, four = torch.cat([x, y], 1), torch.cat([x, y, z, x], -3)
        return two, three, again * 2, four

    gm = check_trace(net(body), X)
    assert reads(gm) == [("cat", ["x", "sin_1"]), ("cat_1", ["cat", "cos_1"]), ("cat_3", ["cat_1", "x"])]


def test_other_operands_dimensions_or_dtypes_are_left_alone() -> None:
    def body(m: object, x: Tensor) -> tuple[Tensor, ...]:
        y, z = x.sin(), x.cos()
        half = x.to(torch.float32)
        return (
            torch.cat([x, y], 1),
            torch.cat([y, x, z], 1),
            torch.cat([x, z, y], 1),
            torch.cat([x, y, z], 2),
            torch.cat([half, half], 1),
            torch.cat([half, half, x], 1),
        )

    gm = check_trace(net(body), X)
    assert [len(n.args[0]) for n in gm.graph.nodes if n.target is torch.cat] == [2, 3, 3, 3, 2, 3]


def test_a_concatenation_that_nobody_reads_is_not_brought_back() -> None:
    def body(m: object, x: Tensor) -> Tensor:
        y = x.sin()
        torch.cat([x, y], 1)
        return torch.cat([x, y, x], 1)

    assert reads(trace(net(body), X)) == [("cat_1", ["x", "sin_1"])]


def test_a_skip_around_two_concatenations_is_not_lost() -> None:
    def body(m: object, x: Tensor) -> Tensor:
        a = m.a(x)  # type: ignore[attr-defined]
        b = m.b(torch.cat([x, a], 1))  # type: ignore[attr-defined]
        return m.c(torch.cat([x, a, b], 1)) + a  # type: ignore[attr-defined]

    model = net(body, a=conv(4, 4, 3), b=conv(8, 4, 3), c=conv(12, 4, 3))
    check_rewrite(model, X, pick(realization="compose", convs=("b",)), edits=1)
