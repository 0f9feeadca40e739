"""Ways to fit a factor a channel to a map: one spelling for all, and an expansion goes only where it must be right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import lmfx
from lmfx.passes.graph.raw_nodes import op_name
from lmfx.passes.model.trace_facts import noted


class Gated(nn.Module):
    """A block as MobileNet has it, whose gate is written in one of many ways."""

    def __init__(self, fit: Callable[[Tensor, Tensor], Tensor], pool: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 1)
        self.gate = nn.Sequential(nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 24), nn.Sigmoid())
        self.out, self.fit, self.pool = nn.Conv2d(24, 8, 1), fit, pool or POOLS["mean"]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.wide(x))
        return x + self.out(y * self.fit(self.gate(self.pool(y)), y))


def _expand(g: Tensor, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return g.unsqueeze(-1).unsqueeze(-1).expand(b, c, h, w)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "subscript": lambda g, y: g[:, :, None, None],
    "dots": lambda g, y: g[..., None, None],
    "dots last": lambda g, y: g[:, None, ...].transpose(1, 2)[..., None],
    "unflatten": lambda g, y: g.unflatten(1, (-1, 1, 1)),
    "unflatten from the end": lambda g, y: g.unflatten(-1, (24, 1, 1)),
    "expand_as": lambda g, y: g.view(g.size(0), g.size(1), 1, 1).expand_as(y),
    "expand": _expand,
    "expand -1": lambda g, y: g[:, :, None, None].expand(-1, -1, y.size(2), y.size(3)),
    "expand shape": lambda g, y: g[:, :, None, None].expand(y.shape),
    "whole": lambda g, y: g[:][:, :, None, None][..., :][...].expand(y.size()),
    "broadcast_to": lambda g, y: torch.broadcast_to(g[:, :, None, None], y.shape[:2] + y.shape[2:]),
}
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.mean((2, 3)),
    "mean of a row": lambda y: y.flatten(2).mean(2),
    "mean of a view": lambda y: y.view(y.size(0), y.size(1), -1).mean(-1),
    "one after another": lambda y: y.mean(-1).mean(-1),
    "view": lambda y: nn.functional.adaptive_avg_pool2d(y, 1).view(y.size(0), y.size(1)),
    "view -1": lambda y: nn.functional.adaptive_avg_pool2d(y, 1).view(y.size(0), -1),
    "squeeze": lambda y: nn.functional.adaptive_avg_pool2d(y, 1).squeeze(-1).squeeze(-1),
}
NARROWED = [way for way in WAYS if way not in ("dots last", "broadcast_to")]


@pytest.mark.parametrize("way", WAYS)
def test_the_values_stay_at_any_batch_and_size(way: str) -> None:
    model = Gated(WAYS[way]).double().eval()
    graph = lmfx.trace(model, torch.randn(1, 3, 9, 8, dtype=torch.float64))
    assert noted(graph).tracer == "symbolic"  # no other one had to be taken for what this one's graph gave
    for shape in ((1, 3, 9, 8), (3, 3, 9, 8), (2, 3, 13, 11), (1, 3, 1, 1)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize("program", [False, True])
@pytest.mark.parametrize(("way", "pool"), [(w, "mean") for w in NARROWED] + [("expand_as", p) for p in POOLS])
def test_the_channels_of_a_gated_block_are_followed(way: str, pool: str, program: bool) -> None:
    model = Gated(WAYS[way], POOLS[pool]).eval()
    x = torch.randn(2, 3, 9, 8)
    given = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)) if program else model
    graph = lmfx.trace(given, x)
    names = {op_name(n) for n in graph.graph.nodes if n.op in ("call_function", "call_method")}
    assert not names & {"expand", "expand_as", "broadcast_to", "unflatten"}
    found = [c.all_convs for c in lmfx.spans(graph, realize=("narrow",)) if c.realization == "narrow"]
    assert any({"wide", "out"} <= set(convs) for convs in found)


def _kept(forward: Callable[..., Tensor], *inputs: Tensor, batch: int = 4) -> set[str]:
    """Which such ops the graph of a conv and a part still has; its values are those of the model at another batch."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one = nn.Conv2d(3, 4, 3, padding=1), nn.Parameter(torch.randn(1, 4, 6, 6))

        def forward(self, *xs: Tensor) -> Tensor:
            return forward(self, *xs)

    model = Net().double().eval()
    inputs = tuple(i.double() for i in inputs)
    graph: fx.GraphModule = lmfx.trace(model, inputs)
    assert noted(graph).tracer == "symbolic"
    more = tuple(torch.randn(batch, *i.shape[1:], dtype=i.dtype) for i in inputs)
    torch.testing.assert_close(graph(*more), model(*more))
    names = [op_name(n) for n in graph.graph.nodes if n.op in ("call_function", "call_method")]
    return {"expand", "expand_as", "reshape", "unflatten"}.intersection(names)


def test_an_expansion_that_only_the_example_does_not_need_stays() -> None:
    """With one image the parameter has the batch already, by chance."""
    x = torch.randn(1, 3, 6, 6)

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x)
        wide = y.mean((0, 2, 3), keepdim=True).expand(x.size(0), -1, 6, 6)
        return torch.cat([wide * torch.tanh(net.one), y], 1)

    assert _kept(forward, x) == {"expand"}


def test_an_expansion_that_something_else_reads_stays() -> None:
    x = torch.randn(2, 3, 6, 6)

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x)
        wide = y.mean((2, 3), keepdim=True).expand_as(y)
        return y * wide + torch.cumsum(wide, 3)

    assert _kept(forward, x) == {"expand_as"}


def test_an_expansion_to_a_third_value_stays() -> None:
    """The product alone has the size of neither operand."""

    def forward(net: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        y = net.conv(x).mean((0, 2, 3), keepdim=True)
        return y.expand_as(z) * torch.tanh(net.one)

    assert _kept(forward, torch.randn(1, 3, 6, 6), torch.randn(1, 4, 6, 6)) == {"expand_as"}


def test_what_is_no_sum_or_product_gets_the_expansion() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x)
        return torch.matmul(y.mean((2, 3), keepdim=True).expand_as(y), y)

    assert _kept(forward, torch.randn(2, 3, 6, 6)) == {"expand_as"}


def test_unflatten_into_parts_stays() -> None:
    x = torch.randn(2, 3, 6, 6)
    assert _kept(lambda net, x: net.conv(x).unflatten(1, (2, 2)).flatten(1, 2), x) == {"unflatten"}
    assert _kept(lambda net, x: net.conv(x).unflatten(1, (2, 1, 2)).flatten(1, 3), x) == {"unflatten"}


@pytest.mark.parametrize("program", [False, True])
def test_subscripts_that_take_less_are_no_new_dimensions(program: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            parts = (
                y[:, 1:, None],
                y[:, :3, None],
                y[:, 1:, None, :, ::2].repeat_interleave(2, -1),
                y[:, 0, None, None],
            )
            return torch.cat(parts, 1)

    model, x = Net().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = lmfx.trace(torch.export.export(model, (x,)) if program else model, x)
    assert noted(graph).tracer == "symbolic"
    torch.testing.assert_close(graph(x), model(x))


def test_a_product_of_two_expansions_expands_nothing() -> None:
    x = torch.randn(2, 3, 6, 6)

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x)
        wide = y.mean((2, 3), keepdim=True).expand_as(y)
        return torch.cat([wide * wide, y], 1)

    assert _kept(forward, x) == {"expand_as"}


def test_a_batch_that_is_written_as_a_number_is_repeated() -> None:
    """Two rows of one image: a network of two images, which takes one as well."""
    x = torch.randn(2, 3, 6, 6)

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x)
        return y.mean((0, 2, 3), keepdim=True).expand(2, -1, 6, 6) * y

    assert _kept(forward, x, batch=1) == {"expand"}


def test_reshapes_that_do_more_stay() -> None:
    x = torch.randn(2, 3, 6, 6)

    def turned(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x).mean((2, 3))
        return y.reshape(4, y.size(0), 1).flatten(1).t() + y

    def frames(net: nn.Module, x: Tensor) -> Tensor:
        return net.conv(x).reshape(-1, 4, 72).softmax(2).reshape(-1, 4, 6, 6)

    def halves(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x)
        return y.reshape(y.size(0), 8, 18).softmax(2).reshape(-1, 4, 6, 6)

    assert _kept(turned, x) == {"reshape"}
    assert _kept(halves, x) == {"reshape"}
    assert _kept(frames, x) == {"reshape"}


def test_sizes_of_an_earlier_value_of_the_same_size_are_sizes_of_the_operand() -> None:
    """`torch.export` reads them where they are first known. Found by the fuzzer: the second `simplify` saw more."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.out(y)
            seen = y.expand_as(y)
            return torch.cat([z, seen * y.add_(1)], 1)

    model, x = Net().double().eval(), torch.randn(2, 2, 7, 7, dtype=torch.float64)
    once = lmfx.simplify(model, x)
    twice = lmfx.simplify(once, x)
    torch.testing.assert_close(once(x), model(x))
    assert [n.op for n in twice.graph.nodes] == [n.op for n in once.graph.nodes]
