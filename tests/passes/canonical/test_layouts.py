"""Channels-last parts between two permutes become channels-first as a whole, or stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.passes.graph.modules import ChannelLayerNorm
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, check_trace, double, ops_of, pick, run, spans_of
from tests.passes.trace.test_trace import conv, net

X = torch.randn(2, 4, 5, 7, dtype=torch.float64)
CONVS: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class OwnNorm(nn.LayerNorm):
    """Computes the same by a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RootNorm(nn.LayerNorm):
    """Looks like the others, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).add(self.eps).sqrt() * self.weight


class Block(nn.Module):
    """A depthwise conv, then norm and two Linear layers over the channels, scaled and added."""

    def __init__(self, width: int, ndim: int = 2, norm: Any = nn.LayerNorm, scale: bool = True) -> None:
        super().__init__()
        self.conv = CONVS[ndim - 1](width, width, 3, padding=1, groups=width)
        self.norm = norm(width, eps=1e-3)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.gamma = nn.Parameter(torch.randn(width)) if scale else None
        self.drop = nn.Dropout(0.1)
        self.enter, self.leave = (0, *range(2, ndim + 2), 1), (0, ndim + 1, *range(1, ndim + 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(self.enter))
        y = self.fc2(self.drop(F.gelu(self.fc1(y))))
        if self.gamma is not None:
            y = self.gamma * y
        return x + y.permute(*self.leave)


def weighted(model: nn.Module) -> nn.Module:
    """In float64, with norms that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.weight is not None:
            for parameter in module.parameters():
                nn.init.normal_(parameter)
    return double(model)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("norm", [nn.LayerNorm, OwnNorm])
@pytest.mark.parametrize("tracer", ["symbolic", "export"])
def test_a_channels_last_block_is_convs_and_norms_of_the_map(ndim: int, norm: Any, tracer: str) -> None:
    model = weighted(nn.Sequential(Block(4, ndim, norm), Block(4, ndim, norm)))
    x = torch.randn(2, 4, *(5, 7, 6)[:ndim], dtype=torch.float64)
    gm = trace(model, x, (tracer,))
    kind = f"Conv{ndim}d"
    assert ops_of(gm) == [kind, "ChannelLayerNorm", kind, "GELU", kind, "ChannelAffine", "add"] * 2
    assert relative_error(run(model, x), run(gm, x)) < 1e-14
    names = dict(gm.named_parameters())
    assert names["0.fc1.weight"].shape == (8, 4, *[1] * ndim) and names["1.fc1.bias"].shape == (8,)
    assert names["0.norm.weight"].shape == (4,) and names["0.fc1.weight"].requires_grad
    larger = torch.randn(1, 4, *(9, 6, 8)[:ndim], dtype=torch.float64)
    if tracer == "symbolic":
        assert relative_error(run(model, larger), run(gm, larger)) < 1e-14


def test_the_convs_of_an_island_merge() -> None:
    model = weighted(nn.Sequential(conv(4, 4, 1, padding=0), Block(4), conv(4, 3, 3)))
    check_rewrite(model, X, pick(realization="compose", convs=("1.fc1", "1.fc2")), edits=1)
    assert len([c for c in spans_of(model, X) if c.realization == "fit" and c.convs[:2] == ("1.conv", "1.fc1")]) > 0


def last(body: Callable[..., Any], **modules: Any) -> nn.Module:
    """`body` on the channels-last form of a conv's result, and back."""
    inner = lambda m, x: m.c(body(m, m.c(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))  # noqa: E731
    return weighted(net(inner, c=conv(4, 4, 3), **modules))


ISLANDS: dict[str, tuple[Callable[..., Any], dict[str, Any], list[str]]] = {
    "nothing": (lambda m, y: y, {}, []),
    "contiguous": (lambda m, y: y.contiguous(), {}, []),
    "F.linear": (lambda m, y: F.linear(y, m.l.weight, m.l.bias), {"l": nn.Linear(4, 4)}, ["Conv2d"]),
    "F.layer_norm": (lambda m, y: F.layer_norm(y, (4,), m.n.weight), {"n": nn.LayerNorm(4)}, ["ChannelLayerNorm"]),
    "a norm without weights": (
        lambda m, y: m.n(y),
        {"n": nn.LayerNorm(4, elementwise_affine=False)},
        ["ChannelLayerNorm"],
    ),
    "a norm without a bias": (lambda m, y: m.n(y), {"n": nn.LayerNorm(4, bias=False)}, ["ChannelLayerNorm"]),
    "a skip": (lambda m, y: y + m.l(y), {"l": nn.Linear(4, 4)}, ["Conv2d", "add"]),
    "twice itself": (lambda m, y: y + y, {}, ["add"]),
    "a gate": (lambda m, y: m.l(y) * torch.sigmoid(m.k(y)), {"l": nn.Linear(4, 4), "k": nn.Linear(4, 4)}, []),
    "numbers": (lambda m, y: 2 - y * 0.5, {}, ["ChannelAffine"] * 2),
    "a constant a channel": (lambda m, y: y / m.g + m.g, {"g": nn.Parameter(torch.rand(4) + 1)}, ["ChannelAffine"] * 2),
    "one slope": (lambda m, y: m.p(y), {"p": nn.PReLU()}, ["PReLU"]),
    "in and out again": (
        lambda m, y: m.l(y.permute(0, 3, 1, 2).relu().movedim(1, -1)),
        {"l": nn.Linear(4, 4)},
        ["ReLU", "Conv2d"],
    ),
}


@pytest.mark.parametrize("name", ISLANDS)
def test_islands_of_understood_ops_are_rewritten(name: str) -> None:
    body, modules, words = ISLANDS[name]
    gm = check_trace(last(body, **modules), X)
    seen = ops_of(gm)[1:-1]
    assert not {"permute", "movedim"} & set(seen)
    assert seen == (words or seen if name == "a gate" else words)


def test_an_island_may_have_several_ways_in_and_out() -> None:
    def body(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        a, b = m.a(x).permute(0, 2, 3, 1), m.b(x).movedim(1, 3)
        y = m.l(a + b)
        return m.a(y.permute(0, 3, 1, 2)), m.b((y * b).movedim(-1, 1)), m.a(a.relu().permute(0, 3, 1, 2))

    model = net(body, a=conv(4, 4, 3), b=conv(4, 4, 3), l=nn.Linear(4, 4))
    words = ops_of(check_trace(model, X))
    assert not {"permute", "movedim", "Linear"} & set(words) and words.count("Conv2d") == 6


KEPT: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "softmax over the channels": (lambda m, y: m.l(y).softmax(-1), {"l": nn.Linear(4, 4)}),
    "a norm over rows too": (lambda m, y: m.l(m.n(y)), {"l": nn.Linear(4, 4), "n": nn.LayerNorm((7, 4))}),
    "a norm that is another": (lambda m, y: m.l(m.n(y)), {"l": nn.Linear(4, 4), "n": RootNorm(4)}),
    "a slope a row": (lambda m, y: m.l(m.p(y)), {"l": nn.Linear(4, 4), "p": nn.PReLU(5)}),
    "a constant a row": (lambda m, y: m.l(y) * m.g, {"l": nn.Linear(4, 4), "g": nn.Parameter(torch.randn(5, 1, 1))}),
    "a constant a pixel": (lambda m, y: m.l(y) * m.g, {"l": nn.Linear(4, 4), "g": nn.Parameter(torch.randn(5, 7, 1))}),
    "a mean over the pixels": (lambda m, y: m.l(y) * y.mean((1, 2), keepdim=True), {"l": nn.Linear(4, 4)}),
    "a shared Linear": (lambda m, y: m.l(m.l(y)), {"l": nn.Linear(4, 4)}),
    "rolled rows": (lambda m, y: m.l(y.roll(1, 1)), {"l": nn.Linear(4, 4)}),
    "a conv over rows": (lambda m, y: m.r(m.l(y)), {"l": nn.Linear(4, 4), "r": nn.Conv2d(5, 5, 1)}),
}


@pytest.mark.parametrize("name", KEPT)
def test_islands_with_anything_else_stay_whole(name: str) -> None:
    body, modules = KEPT[name]
    gm = check_trace(last(body, **modules), X)
    words = ops_of(gm)
    assert noted(gm).tracer == "symbolic"  # a wrong rewrite would only be seen by the check of the output
    assert words.count("permute") == 2 and "Linear" in words and "ChannelLayerNorm" not in words


def test_a_value_that_is_returned_channels_last_keeps_its_island() -> None:
    model = net(lambda m, x: m.l(m.c(x).permute(0, 2, 3, 1)), c=conv(4, 4, 3), l=nn.Linear(4, 4))
    check_trace(model, X, ["Conv2d", "permute", "Linear"])


def test_a_permute_of_no_map_and_other_permutes_are_left_alone() -> None:
    swapped = net(lambda m, x: m.c(m.c(x).permute(0, 3, 2, 1).relu().permute(0, 3, 2, 1)), c=conv(4, 4, 3))
    check_trace(swapped, X, ["Conv2d", "permute", "ReLU", "permute", "Conv2d"])
    unknown = net(lambda m, x: m.l(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).sin(), l=nn.Linear(4, 4))
    check_trace(unknown, X, ["permute", "Linear", "permute", "Pointwise"])


def test_an_island_that_is_not_understood_does_not_spoil_the_next_one() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        bad = m.c(m.c(x).permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2))
        return m.c(m.l(bad.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    words = ops_of(check_trace(net(body, c=conv(4, 4, 3), l=nn.Linear(4, 4)), X))
    assert words == ["Conv2d", "permute", "softmax", "permute", "Conv2d", "Conv2d", "Conv2d"]


def test_tied_weights_keep_their_island() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.l, self.k = conv(4, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)
            self.k.weight = self.l.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.k(self.c(self.l(self.c(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).mean((2, 3)))

    assert "permute" in ops_of(check_trace(double(Tied()), X))


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 6, 3, 6), (1, 6, 2, 3, 6)])
def test_a_norm_over_the_channels_is_layer_norm_of_the_permuted_map(shape: tuple[int, ...]) -> None:
    norm = weighted(ChannelLayerNorm(6, eps=1e-2))
    x = torch.randn(shape, dtype=torch.float64)
    plain = nn.LayerNorm(6, eps=1e-2).double()
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), plain(x.movedim(1, -1)).movedim(-1, 1))


def test_a_compressed_island_is_traced_again_as_it_is() -> None:
    model = weighted(nn.Sequential(Block(4), Block(4)))
    merged = check_rewrite(model, X, pick(realization="compose", convs=("0.fc1", "0.fc2")))
    again = trace(merged, X)
    assert ops_of(again) == ops_of(merged) and relative_error(run(merged, X), run(again, X)) < 1e-14
