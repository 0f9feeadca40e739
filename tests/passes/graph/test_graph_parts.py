"""Small parts that several stages share: classes of nodes, dead nodes, arguments of torch's ops as tuples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lmfx.passes.graph import ops
from lmfx.passes.graph.graph_edit import drop_dead
from lmfx.passes.graph.shapes import conv_pads, per_dimension
from lmfx.passes.graph.union_find import UnionFind


def nodes(count: int) -> list[fx.Node]:
    graph = fx.Graph()
    return [graph.placeholder(f"x{i}") for i in range(count)]


def test_united_classes_have_one_root_and_the_rest_keep_theirs() -> None:
    a, b, c, d, e = nodes(5)
    found = UnionFind()
    found.unite(a, b)
    found.unite(c, d)
    assert found.root(a) is found.root(b) is b and found.root(c) is found.root(d) is d
    found.unite(b, d)
    assert {found.root(n) for n in (a, b, c, d)} == {d}
    assert found.root(e) is e and e not in found and list(found) == [a, b, c, d]


def test_adding_a_node_twice_does_not_take_it_out_of_its_class() -> None:
    a, b = nodes(2)
    found = UnionFind()
    found.unite(a, b)
    found.add(a)
    assert found.root(a) is b


def test_the_root_of_a_chain_of_a_hundred_thousand_is_found() -> None:
    chain = nodes(100_000)
    found = UnionFind()
    for i in range(len(chain) - 1):
        found.unite(chain[i], chain[i + 1])
    assert all(found.root(n) is chain[-1] for n in chain)


def test_dead_nodes_go_also_impure_ones_and_inputs_stay() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, unread: Tensor) -> Tensor:
            F.dropout(x, 0.5, True)
            x.add_(1)
            return x * 2

    gm = fx.symbolic_trace(Net())
    drop_dead(gm)
    assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == ["x", "unread"]
    assert [n.name for n in gm.graph.nodes if n.op not in ("placeholder", "output")] == ["mul"]


@pytest.mark.parametrize(("value", "ndim", "wanted"), [(3, 2, (3, 3)), ((1, 2), 2, (1, 2)), ([4], 1, (4,)), (5, 0, ())])
def test_a_number_is_meant_for_each_dimension(value: object, ndim: int, wanted: tuple[int, ...]) -> None:
    assert per_dimension(value, ndim) == wanted


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("conv", "wanted"),
    [
        (nn.Conv2d(1, 1, (4, 3), padding="same"), ((1, 2), (1, 1))),
        (nn.Conv1d(1, 1, 4, padding="same", dilation=3), ((4, 5),)),
        (nn.Conv2d(1, 1, 5, padding="valid"), ((0, 0), (0, 0))),
        (nn.Conv3d(1, 1, 3, padding=(0, 1, 2)), ((0, 0), (1, 1), (2, 2))),
    ],
)
def test_the_pads_of_a_conv_are_those_that_torch_reads(conv: nn.Module, wanted: tuple[tuple[int, int], ...]) -> None:
    assert conv_pads(conv) == wanted
    flat = [p for pair in reversed(wanted) for p in pair]
    x = torch.randn(1, 1, *(11, 9, 8)[: len(wanted)], dtype=torch.float64)
    by_hand = F.pad(x, flat)
    conv = conv.double()
    expected = conv(x)
    conv.padding = (0,) * len(wanted)
    torch.testing.assert_close(conv(by_hand), expected)


@pytest.mark.parametrize(
    "made, wanted",
    [
        (nn.AdaptiveAvgPool2d(3), True), (nn.Upsample(size=(4, 4)), True), (nn.Flatten(), True), (nn.ReLU(), False),
        (nn.MaxPool2d(2), False), (F.interpolate, True), (torch.flatten, True), (F.adaptive_avg_pool2d, True),
        (torch.relu, False), ("view", True), ("relu", False),
    ],
)  # fmt: skip
def test_what_gives_a_size_of_its_own_is_known(made: Any, wanted: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    root = nn.Module()
    if isinstance(made, nn.Module):
        root.add_module("m", made)
        node = graph.call_module("m", (x,))
    elif isinstance(made, str):
        node = graph.call_method(made, (x,))
    else:
        node = graph.call_function(made, (x,))
    graph.output(node)
    assert ops.resizes(node, fx.GraphModule(root, graph)) == wanted
