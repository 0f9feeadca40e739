"""Regions, layers and branches: what belongs together, and where a region ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.passes.ir import Region, Series
from lmfx.passes.spans.enumeration import enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.spans.regions import node_kind, refusal_of
from lmfx.passes.trace.tracing import trace

X = torch.randn(2, 4, 8, 6)


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name in "abcd":
            self.add_module(name, nn.Conv2d(4, 4, 3, padding=1))
        self.relu, self.norm = nn.ReLU(), nn.BatchNorm2d(4)
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def network(body: Callable[..., Any], x: Tensor = X, **modules: nn.Module) -> Network:
    return Network(trace(Net(body, **modules).eval(), x))


def words(series: Series) -> str:
    """`a relu | b | add(c, .)` : layers between bars, branches in brackets, a dot for a skip."""
    layers = []
    for layer in series.layers:
        parts = list(layer.nodes)
        if layer.parallel is not None:
            inside = ", ".join(words(b) or "." for b in layer.parallel.branches)
            parts[parts.index(layer.parallel.node)] = f"{layer.parallel.join}({inside})"
        layers.append(" ".join(parts) + ("!" if layer.opaque else ""))
    return " | ".join(layers)


def regions(body: Callable[..., Any], **modules: Any) -> list[str]:
    return [words(r.series) for r in network(body, **modules).regions]


def test_a_layer_is_a_conv_what_follows_it_and_one_activation() -> None:
    assert regions(lambda m, x: m.b(m.relu(m.norm(m.a(x))))) == ["a norm relu | b"]


def test_affine_ops_before_a_conv_belong_to_it() -> None:
    assert regions(lambda m, x: m.a(m.norm(x))) == ["norm a"]


def test_two_convs_in_a_row_are_two_layers() -> None:
    assert regions(lambda m, x: m.relu(m.b(m.a(x)))) == ["a | b relu"]


def test_an_activation_alone_is_a_layer() -> None:
    assert regions(lambda m, x: m.a(torch.sigmoid(torch.relu(m.b(x))))) == ["b relu_1 | sigmoid_1 | a"]


def test_a_residual_block_is_a_parallel_with_a_skip() -> None:
    found = regions(lambda m, x: m.relu(m.b(m.relu(m.a(x))) + x))
    assert found == ["add(a relu | b, .) relu_1"]


def test_branches_stand_in_operand_order() -> None:
    assert regions(lambda m, x: x - m.a(x)) == ["sub(., a)"]
    assert regions(lambda m, x: m.a(x) - x) == ["sub(a, .)"]
    assert regions(lambda m, x: torch.cat([m.b(x), x, m.a(x)], 1)) == ["cat(b, ., a)"]


def test_parallels_nest() -> None:
    found = regions(lambda m, x: m.d((lambda y: y + m.c(m.a(y) + m.b(y)))(m.relu(x))))
    assert found == ["relu | add(., add(a, b) | c) | d"]


def test_a_product_of_branches_is_a_region_too() -> None:
    assert regions(lambda m, x: m.a(x) * torch.sigmoid(m.b(x))) == ["mul(a, b sigmoid_1)"]


def test_a_sum_of_a_value_with_itself_is_a_parallel_of_two_skips() -> None:
    assert regions(lambda m, x: (lambda y: y + y)(m.a(x))) == ["a | add(., .)"]


def test_three_operands_are_one_join_or_two() -> None:
    assert regions(lambda m, x: m.a(x) + m.b(x) + m.c(x)) == ["add(add(a, b), c)"]
    assert regions(lambda m, x: torch.cat([m.a(x), m.b(x), m.c(x)], 1)) == ["cat(a, b, c)"]


def test_a_value_read_elsewhere_ends_a_region() -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.a(x)
        return m.b(m.relu(a)), a.mean()

    assert regions(body) == ["a", "relu | b"]


def test_an_output_in_the_middle_ends_a_region() -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.relu(m.a(x))
        return a, m.b(a)

    assert regions(body) == ["a relu", "b"]


def test_a_long_skip_around_whole_blocks_is_a_branch() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        z = m.b(y) + y
        return torch.cat([m.c(z) + z, y], 1)

    assert regions(body) == ["a | cat(add(b, .) | add(c, .), .)"]


def test_a_skip_into_the_middle_of_a_branch_is_not_series_parallel() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        z = m.b(y)
        return torch.cat([m.c(z) + y, m.d(z)], 1)  # the N graph

    assert regions(body) == ["a | add mesh(b, c, d)"]
    (layer,) = [lay for lay in network(body).series["0"].layers if lay.parallel]
    assert layer.parallel is not None and layer.parallel.inner == ("add",)
    assert [(b.entry, b.exit) for b in layer.parallel.branches] == [("a", "b"), ("b", "c"), ("b", "d")]


def test_a_mesh_that_is_read_from_outside_is_none() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        z = m.b(y)
        w = m.c(z) + y
        return torch.cat([w, m.d(z)], 1), w.mean()

    assert sorted(regions(body)) == ["a", "b", "c", "d"]


def test_a_mesh_in_a_mesh_is_a_layer_of_it() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        z = torch.maximum(m.b(m.relu(y)), m.c(y))
        return torch.matmul(torch.softmax(z, 1), m.d(y).transpose(2, 3))

    (found,) = regions(body)
    assert found.startswith("a | ") and "mesh(relu | b, c)" in found and found.count("mesh(") == 2


def test_a_part_without_convs_that_mixes_values_is_one_opaque_layer() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.b(torch.matmul(y, torch.softmax(y.transpose(2, 3), 1)) @ torch.exp(y))

    assert regions(body) == ["a | transpose softmax matmul exp_1 matmul_1! | b"]


def test_a_part_without_convs_is_no_region() -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.a(x)
        return a.mean(), F.relu(a).tanh() * 3

    assert regions(body) == ["a"]


def test_an_opaque_op_is_a_layer_of_its_own() -> None:
    found = regions(lambda m, x: m.b(m.p(m.relu(m.a(x)))), p=nn.MaxPool2d(2))
    assert found == ["a relu | p! | b"]


class ChannelsNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), ChannelsNorm(4)])
def test_a_norm_of_the_map_ends_a_layer_like_an_activation(norm: nn.Module) -> None:
    assert regions(lambda m, x: m.b(m.relu(m.n(m.a(x)))), n=norm) == ["a n | relu | b"]


def test_an_op_of_two_maps_that_is_no_join_closes_a_mesh() -> None:
    assert regions(lambda m, x: m.c(torch.maximum(m.a(x), m.b(x)))) == ["mesh(a, b) | c"]


def test_a_weighted_sum_closes_a_mesh() -> None:
    assert regions(lambda m, x: m.c(torch.add(m.a(x), m.b(x), alpha=0.5))) == ["mesh(a, b) | c"]


def test_a_vector_made_from_the_map_itself_is_a_branch() -> None:
    def body(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        return m.b(m.relu(h + h.mean((2, 3), keepdim=True)))

    assert regions(body) == ["a | add(., mean_1!) relu | b"]


class Embedded(nn.Module):
    def __init__(self, join: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.lin = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(5, 4)
        self.join = join

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b(F.silu(self.join(self.a(x), self.lin(t)[:, :, None, None])))


def test_a_vector_that_is_added_from_the_side_belongs_to_the_convs_layer() -> None:
    net = Network(trace(Embedded(torch.add).eval(), (X, torch.randn(2, 5))))
    assert [words(r.series) for r in net.regions] == ["lin | unsqueeze! | unsqueeze_1!", "a add silu_1 | b"]
    assert not [r for r in enumerate_spans(net).refusals if "side input" in r.reason]


def test_a_gate_from_the_side_is_an_opaque_layer_and_the_refusal_says_so() -> None:
    net = Network(trace(Embedded(torch.mul).eval(), (X, torch.randn(2, 5))))
    assert [words(r.series) for r in net.regions] == ["lin | unsqueeze! | unsqueeze_1!", "a | mul! | silu_1 | b"]
    reasons = [r for r in enumerate_spans(net).refusals if "side input" in r.reason]
    assert [r.reason for r in reasons] == ["mul multiplies by a side input of shape (2, 4, 1, 1) at the map of a"]
    assert reasons[0].nodes[0] == "mul"


def test_a_long_skip_is_named() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        w = m.b(y)
        return torch.cat([m.c(w), y], 1), m.d(w)

    reasons = [r.reason for r in enumerate_spans(network(body)).refusals]
    assert "the value of a is read by 2 ops that do not rejoin; cat takes it as a long skip" in reasons


def test_operands_that_leave_different_values_are_told() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        z = m.b(y)
        w = m.c(z) + y
        return torch.cat([w, m.d(z)], 1), w

    reasons = [r.reason for r in enumerate_spans(network(body)).refusals]
    assert any(r == "the operands of add leave different values, so it closes no block" for r in reasons)


def test_an_op_of_several_maps_that_is_no_join_is_told() -> None:
    found = enumerate_spans(network(lambda m, x: m.c(torch.maximum(m.a(x), m.b(x))))).refusals
    assert any(r.reason == "values meet in maximum in a way that is no series of layers" for r in found)
    both = enumerate_spans(network(lambda m, x: (m.c(torch.maximum(m.a(x), y := m.b(x))), y))).refusals
    assert any(r.reason == "maximum takes several values and is no sum, concatenation or product" for r in both)


def test_names_of_series_are_unique_and_tell_where_they_are() -> None:
    net = network(lambda m, x: m.d(m.c(m.relu(m.a(x))) + m.b(x)))
    assert list(net.series) == ["0", "0/0.0", "0/0.1"]
    assert [words(s) for s in net.series.values()][1:] == ["a relu | c", "b"]


def test_entries_and_exits_of_a_series_join_up() -> None:
    def check(series: Series) -> None:
        at = series.entry
        for layer in series.layers:
            assert layer.entry == at
            at = layer.exit
            if layer.parallel is not None:
                for branch in layer.parallel.branches:
                    assert branch.entry == layer.entry
                    check(branch)
        assert at == series.exit

    for region in network(lambda m, x: m.d(m.c(m.relu(m.a(x))) + m.b(x))).regions:
        assert isinstance(region, Region)
        check(region.series)


REFUSED: dict[str, tuple[Callable[..., Any], dict[str, Any], str, str]] = {
    "norm without statistics": (
        lambda m, x: m.n(m.a(x)),
        {"n": nn.BatchNorm2d(4, track_running_stats=False)},
        "n",
        "keeps no running statistics",
    ),
    "LayerNorm": (lambda m, x: m.n(m.a(x)), {"n": nn.LayerNorm(6)}, "n", "LayerNorm is not affine"),
    "max pool": (lambda m, x: m.p(m.a(x)), {"p": nn.MaxPool2d(2)}, "p", "MaxPool2d is not affine"),
    "average pool that rounds up": (
        lambda m, x: m.p(m.a(x)),
        {"p": nn.AvgPool2d(3, 2, ceil_mode=True)},
        "p",
        "rounds its output size up",
    ),
    "average pool that does not count": (
        lambda m, x: m.p(m.a(x)),
        {"p": nn.AvgPool2d(3, 1, 1, count_include_pad=False)},
        "p",
        "does not count its padding",
    ),
    "crop": (lambda m, x: m.p(m.a(x)), {"p": nn.ReflectionPad2d((-1, 1, 0, 0))}, "p", "the pad crops, and fills"),
    "size that is asked for": (
        lambda m, x: m.p(m.a(x), output_size=[16, 13]),
        {"p": nn.ConvTranspose2d(4, 4, 2, 2)},
        "p",
        "ConvTranspose2d is asked for an output size",
    ),
    "softmax": (lambda m, x: torch.softmax(m.a(x), 1), {}, "softmax", "softmax is not an affine op"),
    "adaptive pool": (
        lambda m, x: F.adaptive_avg_pool2d(m.a(x), 2),
        {},
        "adaptive_avg_pool2d_1",
        "AdaptiveAvgPool2d is not affine",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_affine_says_why(case: str) -> None:
    body, modules, node, reason = REFUSED[case]
    net = network(body, **modules)
    refusal = refusal_of(net.gm, net.nodes[node])
    assert refusal is not None and reason in refusal.reason and refusal.nodes == (node,)
    assert node_kind(net.gm, net.nodes[node]) == "opaque"


AFFINE: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(4),
    "BatchNorm without weights": lambda: nn.BatchNorm2d(4, affine=False),
    "average pool": lambda: nn.AvgPool2d(3, 1, 1),
    "average pool without padding": lambda: nn.AvgPool2d(2, count_include_pad=False),
    "zero pad": lambda: nn.ZeroPad2d((0, 1, 2, 0)),
    "crop": lambda: nn.ZeroPad2d((-1, 1, -2, 0)),
    "constant pad with zero": lambda: nn.ConstantPad2d(1, 0.0),
}


@pytest.mark.parametrize("case", AFFINE)
def test_what_is_affine_joins_its_conv(case: str) -> None:
    net = network(lambda m, x: m.p(m.a(x)), p=AFFINE[case]())
    assert node_kind(net.gm, net.nodes["p"]) == "affine"
    assert [words(r.series) for r in net.regions] == ["a p"]


def test_an_unbatched_map_is_refused() -> None:
    net = network(lambda m, x: m.b(m.a(x)), X[0])
    refusal = refusal_of(net.gm, net.nodes["a"])
    assert refusal is not None and "runs on an unbatched value of shape (4, 8, 6)" in refusal.reason


def test_a_conv_class_whose_name_ends_in_a_digit_is_not_misread() -> None:
    class Conv1d_(nn.Conv2d):
        pass

    class Block3x(nn.Conv2d):
        pass

    net = network(lambda m, x: m.f(m.e(x)), e=Conv1d_(4, 4, 1), f=Block3x(4, 4, 1))
    assert [words(r.series) for r in net.regions] == ["e | f"]
