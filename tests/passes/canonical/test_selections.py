"""Parts and orders of channels, in whatever spelling, are selections that read the map itself; and they compose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.passes.algebra import linear
from lmfx.passes.algebra.linear_span import AffineChain, LinearSpan
from lmfx.passes.errors import OptionError
from lmfx.passes.graph.conv_configs import module_config
from lmfx.passes.graph.modules import ChannelSelect
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import fingerprint, trace
from tests.helpers import check_rewrite, check_trace, double, ops_of, pick, run, spans_of
from tests.passes.trace.test_trace import conv, net

Body = Callable[[Any, Tensor], Any]
X = torch.randn(2, 12, 5, 7, dtype=torch.float64)


def mapped(body: Body, x: Tensor = X, **modules: Any) -> nn.Module:
    """A network that runs `body` on the result of a conv, which is known to be a map."""
    first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[x.dim() - 3](x.shape[1], x.shape[1], 1)
    return net(lambda m, x: body(m, m.first(x)), first=first, **modules)


def selections(model: nn.Module, x: Tensor = X, ops: list[str] | None = None, **kwargs: Any) -> list[tuple[int, ...]]:
    """The indices of the selections that the model's graph has, which must all read its first map."""
    gm = check_trace(model, x, ops, **kwargs)
    found = [n for n in gm.graph.nodes if n.op == "call_module" and isinstance(_module(gm, n), ChannelSelect)]
    assert all(n.args[0].name == "first" for n in found)
    return [_module(gm, n).index for n in found]


def _module(gm: Any, node: Any) -> Any:
    return gm.get_submodule(node.target)


def shuffled(channels: int, groups: int) -> tuple[int, ...]:
    return tuple(torch.arange(channels).view(groups, -1).T.flatten().tolist())


def spelled(x: Tensor, g: int, split: str, turn: str, join: str, rank: int = 4) -> Tensor:
    """A shuffle in one of its spellings."""
    n, c = x.shape[0], x.shape[1]
    size = [x.shape[i] for i in range(2, rank)]
    v = {
        "view": lambda: x.view(n, g, c // g, *size),
        "reshape": lambda: x.reshape(n, g, -1, *size),
        "unflatten": lambda: x.unflatten(1, (g, c // g)),
        "flat": lambda: x.view(n, g, c // g, -1),
    }[split]()
    v = {
        "transpose": lambda: torch.transpose(v, 1, 2),
        "permute": lambda: v.permute(0, 2, 1, *range(3, 4 if split == "flat" else rank + 1)),
        "swapaxes": lambda: v.swapaxes(2, 1),
        "movedim": lambda: torch.movedim(v, 2, 1),
    }[turn]()
    return {
        "view": lambda: v.contiguous().view(n, c, *size),
        "reshape": lambda: v.reshape(n, -1, *size),
        "flatten": lambda: v.flatten(1, 2).view(n, c, *size) if split == "flat" else v.flatten(1, 2),
        "clone": lambda: v.clone(memory_format=torch.contiguous_format).view(x.shape),
    }[join]()


PARTS: dict[str, tuple[Body, list[tuple[int, ...]]]] = {
    "chunk": (lambda m, x: [x.chunk(3, 1)[i] + 1 for i in (2, 0)], [(0, 1, 2, 3), (8, 9, 10, 11)]),
    "uneven chunk": (lambda m, x: [torch.chunk(x, 5, dim=-3)[i] for i in (0, -1)], [(0, 1, 2), (9, 10, 11)]),
    "split by size": (lambda m, x: x.split(5, dim=1)[2], [(10, 11)]),
    "split by sizes": (lambda m, x: torch.split(x, [2, 10], 1)[0], [(0, 1)]),
    "tensor_split": (lambda m, x: torch.tensor_split(x, 5, 1)[1], [(3, 4, 5)]),
    "tensor_split at": (lambda m, x: x.tensor_split([1, 11], dim=1)[1], [tuple(range(1, 11))]),
    "slice": (lambda m, x: x[:, 2:5], [(2, 3, 4)]),
    "slice with dots": (lambda m, x: x[:, -3:, ...], [(9, 10, 11)]),
    "slice with colons": (lambda m, x: x[:, :4, :, :], [(0, 1, 2, 3)]),
    "steps": (lambda m, x: x[:, 1::4], [(1, 5, 9)]),
    "one": (lambda m, x: x[:, 7:8], [(7,)]),
    "half of the channels": (lambda m, x: x[:, x.shape[1] // 2 :], [tuple(range(6, 12))]),
    "by size()": (lambda m, x: x[:, : x.size(1) // 3], [(0, 1, 2, 3)]),
    "by all sizes": (lambda m, x: x[:, x.size()[1] - 2 :], [(10, 11)]),
    "narrow": (lambda m, x: x.narrow(1, 3, 4), [(3, 4, 5, 6)]),
    "narrow from behind": (lambda m, x: torch.narrow(x, -3, -5, 2), [(7, 8)]),
    "a list": (lambda m, x: x[:, [3, 1, 1]], [(3, 1, 1)]),
    "a part of a part": (lambda m, x: x[:, 2:8].chunk(2, 1)[1], [(5, 6, 7)]),
    "every second as a view": (lambda m, x: x.view(2, 6, 2, 5, 7)[:, :, 0], []),
    "the first group": (lambda m, x: x.unflatten(1, (3, 4))[:, 1], [(4, 5, 6, 7)]),
    "groups one by one": (lambda m, x: x.view(2, 3, 4, 5, 7).unbind(1)[2], [(8, 9, 10, 11)]),
    "cat of a chunk": (lambda m, x: torch.cat(x.chunk(2, 1), 1) * 2, [tuple(range(6)), tuple(range(6, 12))]),
}


@pytest.mark.parametrize(("body", "expected"), PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("tracer", ["symbolic", "shapes", "export"])
def test_a_part_of_the_channels_is_a_selection_from_the_map_itself(
    body: Body, expected: list[tuple[int, ...]], tracer: str
) -> None:
    model = mapped(body)
    gm = trace(model, X, (tracer,))
    assert relative_error(run(model, X), run(gm, X)) < 1e-15
    found = [m.index for m in gm.modules() if isinstance(m, ChannelSelect)]
    assert sorted(found) == expected
    names = set(ops_of(gm))
    if expected:
        assert names <= {"Conv2d", "ChannelSelect", "ChannelAffine", "cat"}


def test_an_index_tensor_is_a_selection_and_follows_the_network_to_its_dtype() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.tensor([4, 2, 9]))
            self.first = conv(12, 12, 1, padding=0)
            self.register_buffer("mask", torch.arange(12) % 5 == 0)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = self.first(x)
            return (
                x.index_select(1, self.order),
                x[:, self.order],
                torch.index_select(x, -3, self.order),
                x[:, self.mask],
            )

    for tracer in ("symbolic", "export"):
        gm = trace(double(Indexed()), X, (tracer,))
        assert [m.index for m in gm.modules() if isinstance(m, ChannelSelect)] == [(4, 2, 9)] * 3 + [(0, 5, 10)]
        assert set(ops_of(gm)) == {"Conv2d", "ChannelSelect"}
        assert not [k for k in gm.state_dict() if "gather" in k]


@pytest.mark.parametrize("split", ["view", "reshape", "unflatten", "flat"])
@pytest.mark.parametrize("turn", ["transpose", "permute", "swapaxes", "movedim"])
@pytest.mark.parametrize("join", ["view", "reshape", "flatten", "clone"])
def test_every_spelling_of_a_shuffle_is_one_selection(split: str, turn: str, join: str) -> None:
    model = mapped(lambda m, x: spelled(x, 3, split, turn, join))
    assert selections(model, X, ["Conv2d", "ChannelSelect"]) == [shuffled(12, 3)]


@pytest.mark.parametrize("shape", [(2, 6, 5), (1, 6, 4, 1), (1, 6, 1, 1), (2, 6, 3, 4, 5)])
@pytest.mark.parametrize("tracer", ["symbolic", "export"])
def test_shuffles_of_any_rank_and_size_are_selections(shape: tuple[int, ...], tracer: str) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    gm = trace(mapped(lambda m, x: spelled(x, 2, "view", "transpose", "reshape", len(shape)), x), x, (tracer,))
    assert ops_of(gm)[1:] == ["ChannelSelect"]
    for body in (lambda m, x: F.channel_shuffle(x, 3), lambda m, x: m.s(x)):
        gm = trace(mapped(body, x, s=nn.ChannelShuffle(3)), x, (tracer,))
        assert ops_of(gm)[1:] == ["ChannelSelect"]
        assert next(m.index for m in gm.modules() if isinstance(m, ChannelSelect)) == shuffled(6, 3)


def test_a_shuffle_that_was_traced_symbolically_runs_at_other_batches_and_sizes() -> None:
    model = net(lambda m, x: spelled(m.c(x), 4, "view", "transpose", "view").chunk(2, 1)[1], c=conv(12, 8, 3))
    gm = trace(model, X, ("symbolic",))
    assert ops_of(gm) == ["Conv2d", "ChannelSelect", "ChannelSelect"]
    for shape in ((1, 12, 9, 4), (3, 12, 6, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        assert relative_error(run(model, x), run(gm, x)) < 1e-14


NOT: dict[str, Body] = {
    "a part of the rows": lambda m, x: x[:, :, 1:3],
    "all rows, but only here": lambda m, x: x[:, :, :5],
    "a part of the batch": lambda m, x: x[:1],
    "a chunk of the batch": lambda m, x: x.chunk(2)[0],
    "a channel without its dimension": lambda m, x: x[:, 3],
    "channels by the height": lambda m, x: x[:, : x.shape[2]],
    "other channels for each image": lambda m, x: x[[0, 1], [3, 2]],
    "a new dimension": lambda m, x: x[:, None, 2],
    "rows and columns changed": lambda m, x: x.transpose(2, 3),
    "a shuffle of pixels": lambda m, x: x.reshape(2, 12, 7, 5).transpose(2, 3),
    "a shuffle with the rows": lambda m, x: x.view(2, 4, 3, 5, 7).transpose(2, 3).reshape(2, 12, 5, 7),
    "a shuffle across images": lambda m, x: x.view(3, 8, 5, 7).transpose(0, 1).reshape(2, 12, 5, 7),
    "channels to pixels": lambda m, x: F.pixel_shuffle(x[:, :], 2),
    "roll": lambda m, x: x.roll(1, 1),
    "flip": lambda m, x: x.flip(1),
    "another dtype": lambda m, x: x.view(torch.int64)[:, :3],
}


@pytest.mark.parametrize("body", NOT.values(), ids=NOT.keys())
@pytest.mark.parametrize("tracer", ["symbolic", "export"])
def test_what_is_not_channels_alone_stays_as_it_is(body: Body, tracer: str) -> None:
    if tracer == "export" and body is NOT["channels by the height"]:
        pytest.skip("torch.export makes it a constant")
    gm = trace(mapped(body), X, (tracer,))
    assert "ChannelSelect" not in ops_of(gm) and len(ops_of(gm)) > 1


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (lambda m, x: x.transpose(2, 3), (1, 4, 1, 1)),  # at other sizes it turns the map
        (lambda m, x: x.transpose(0, 1).reshape(x.shape), (1, 4, 2, 3)),  # mixes the images of a larger batch
        (  # at other heights it mixes rows and channels
            lambda m, x: x.view(2, 2, 2, x.shape[2], 5).permute(0, 3, 2, 1, 4).reshape(x.shape),
            (2, 4, 1, 5),
        ),
        (lambda m, x: x.flatten(2).unsqueeze(2), (2, 4, 1, 5)),  # the rows of a higher map come one after the other
        (lambda m, x: x.reshape(2, 2, x.shape[2], x.shape[3]).transpose(0, 1).reshape(x.shape), (1, 4, 2, 3)),
    ],
)
def test_what_only_looks_like_a_selection_at_this_size_stays_as_it_is(body: Body, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    gm = trace(mapped(body, x), x, ("symbolic",))
    assert "ChannelSelect" not in ops_of(gm) and len(ops_of(gm)) > 1


def test_parts_of_tokens_are_not_channels_and_follow_the_size() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).relu()
        return tokens[:, 1:] + tokens[:, :35][:, 1:].mean()

    model = mapped(body)
    gm = trace(model, X, ("symbolic",))
    assert "ChannelSelect" not in ops_of(gm)
    x = torch.randn(1, 12, 6, 8, dtype=torch.float64)
    assert relative_error(run(model, x), run(gm, x)) < 1e-15


def test_the_rows_of_a_channels_last_value_are_not_channels() -> None:
    model = mapped(lambda m, x: x.permute(0, 2, 3, 1).softmax(-1).chunk(2, 1)[0][:, :, :, 2:])
    assert "ChannelSelect" not in ops_of(check_trace(model, X, tolerance=1e-15))


def test_a_part_of_the_input_is_a_selection_if_a_conv_reads_it_even_later() -> None:
    body = lambda m, x: m.c(x[:, 2:8].relu().chunk(2, 1)[1])  # noqa: E731
    check_trace(net(body, c=conv(3, 4, 3)), X, ["ChannelSelect", "ReLU", "ChannelSelect", "Conv2d"])


def test_all_channels_in_their_order_are_no_node_at_all() -> None:
    check_trace(net(lambda m, x: m.c(x[:, :]).chunk(1, 1)[0], c=conv(12, 4, 3)), X, ["Conv2d"])


def test_a_chunk_that_is_mutated_is_seen_by_who_reads_the_map_afterwards() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        a, b = y.chunk(2, 1)
        a.mul_(2)
        return torch.cat([y, b], 1)

    model = net(body, c=conv(12, 4, 3))
    check_trace(model, X)

    def shuffle(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        z = F.channel_shuffle(y, 1)  # may give back the memory of y
        z.mul_(2)
        return y + z

    check_trace(net(shuffle, c=conv(12, 4, 3)), X)


def test_a_view_of_a_part_asks_nothing_of_its_memory() -> None:
    model = mapped(lambda m, x: x.chunk(2, 1)[0].contiguous().view(2, -1))
    check_trace(model, X, ["Conv2d", "ChannelSelect", "reshape"])


def test_contiguous_is_dropped_between_convs_and_kept_for_a_module_that_nobody_knows() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:  # not traceable
                return x
            return x.view(x.shape[0], -1)

    check_trace(net(lambda m, x: m.d(m.c(x).contiguous()), c=conv(12, 4, 3), d=conv(4, 4, 3)), X, ["Conv2d", "Conv2d"])
    model = net(lambda m, x: m.o(m.c(x).permute(0, 2, 3, 1).contiguous()), c=conv(12, 4, 3), o=Odd())
    check_trace(model, X, ["Conv2d", "permute", "contiguous", "Odd"])


# the module


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (range(3, 9), "3:9:1"),
        (range(1, 12, 4), "1:10:4"),
        ([5], "5:6:1"),
        (shuffled(12, 3), "12, groups=3"),
        (shuffled(12, 6), "12, groups=6"),
        ([3, 1, 1], "[3, 1, 1]"),
        ([1, 0, 3, 2], "[1, 0, 3, 2]"),
        ([2, 1, 0], "[2, 1, 0]"),
        ([0, 2, 1, 3, 4], "[0, 2, 1, 3, 4]"),
    ],
)
@pytest.mark.parametrize("shape", [(2, 12, 4), (2, 12, 3, 4)])
def test_a_selection_gives_the_channels_that_it_names(index: Any, text: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).transpose(2, -1)
    module = ChannelSelect(index)
    assert torch.equal(module(x), x[:, list(index)])
    assert module.extra_repr() == text and not module.state_dict()


def test_a_range_is_a_view_of_its_map() -> None:
    assert ChannelSelect(range(3, 9, 2))(X).data_ptr() == X[:, 3:].data_ptr()


@pytest.mark.parametrize("index", [[], [0, -1]])
def test_a_selection_of_nothing_or_from_behind_is_an_error(index: list[int]) -> None:
    with pytest.raises(OptionError, match="one input channel or more, counted from 0"):
        ChannelSelect(index)


# the algebra


def op(*args: Any, **kwargs: Any) -> linear.LinearOp:
    return linear.from_conv(nn.Conv2d(*args, **kwargs).double())


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("index", [(4, 1), (5, 0, 0, 3, 2, 1, 4), range(6), range(1, 6, 2)])
def test_select_takes_rows_and_spread_places_columns(groups: int, index: Any) -> None:
    index = tuple(index)
    first = op(6, 6, 3, stride=2, padding=1, groups=groups)
    x = X[:, :6]
    after = linear.select(first, index)
    assert relative_error(first(x)[:, list(index)], after(x)) < 1e-15
    config = module_config(ChannelSelect(index), 6, 2)
    assert after.config == linear.compose_config(first.config, config)
    second = op(len(index), 6, 3, padding=1, groups=groups if len(index) % groups == 0 else 1)
    before = linear.spread(second, index, 6)
    assert relative_error(second(x[:, list(index)]), before(x)) < 1e-14
    assert before.config == linear.compose_config(config, second.config)


def test_spread_and_select_are_differentiable() -> None:
    weight = torch.randn(4, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    base = linear.LinearOp(weight, torch.zeros(4, dtype=torch.float64), (1, 1), ((0, 0),) * 2, (1, 1))
    linear.select(linear.spread(base, (0, 5, 5), 6), (1, 2)).weight.sum().backward()
    assert torch.equal(weight.grad, torch.tensor([0.0, 1, 1, 0]).view(4, 1, 1, 1).expand_as(weight).double())


def test_indices_outside_of_the_channels_are_errors() -> None:
    with pytest.raises(OptionError, match=r"\[6\] of the 6"):
        linear.select(op(6, 6, 1), [6])
    with pytest.raises(OptionError, match=r"\[-1\] of the 6"):
        linear.select(op(6, 6, 1), [-1])
    with pytest.raises(OptionError, match=r"3 input channels cannot read the channels \[0, 1\] of 6"):
        linear.spread(op(3, 6, 1), [0, 1], 6)
    with pytest.raises(OptionError, match=r"cannot read the channels \[0, 1, 6\] of 6"):
        linear.spread(op(3, 6, 1), [0, 1, 6], 6)


@pytest.mark.parametrize(
    "chain",
    [
        lambda: [ChannelSelect(range(2, 6)), nn.Conv2d(4, 5, 3)],
        lambda: [nn.Conv2d(6, 6, 3, groups=6), ChannelSelect(shuffled(6, 2)), nn.Conv2d(6, 8, 3, groups=2)],
        lambda: [nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, stride=2), ChannelSelect([3, 0])],
        lambda: [ChannelSelect(range(0, 6, 2)), ChannelSelect([2, 0])],
        lambda: [ChannelSelect([5, 3, 4, 1]), ChannelSelect([1, 0]), nn.AvgPool2d(3), nn.Conv2d(2, 2, 1)],
        lambda: [ChannelSelect([0, 1, 0])],
        lambda: [nn.Conv2d(6, 6, 3), ChannelSelect([5, 1]), ChannelSelect([1, 1, 0])],
    ],
)
def test_a_chain_with_selections_first_in_the_middle_or_last_is_one_conv(chain: Any) -> None:
    body = double(AffineChain(chain()))
    assert isinstance(body, AffineChain)
    x = X[:, :6]
    assert relative_error(body(x), body.linear_op(6, 2)(x)) < 1e-14


# whole networks


class Shuffled(nn.Module):
    """Half of the channels as they are, half through convs, concatenated and shuffled."""

    def __init__(self, channels: int, ndim: int = 2, groups: int = 2) -> None:
        super().__init__()
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
        norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[ndim - 1]
        self.rest = channels // 2
        self.groups, self.rank = groups, ndim + 2
        self.one = nn.Sequential(kind(self.rest, self.rest, 1, bias=False), norm(self.rest), nn.ReLU())
        self.two = nn.Sequential(kind(self.rest, self.rest, 3, padding=1, groups=self.rest), norm(self.rest))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split([x.shape[1] - self.rest, self.rest], 1)
        y = torch.cat([a, self.two(self.one(b))], 1)
        return spelled(y, self.groups, "view", "transpose", "view", self.rank)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_shuffle_units_merge_whole_and_exactly(ndim: int) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
    model = double(
        nn.Sequential(kind(3, 9, 3), nn.ReLU(), Shuffled(9, ndim, 3), Shuffled(9, ndim, 3), kind(9, 4, 1, padding=1))
    )
    x = torch.randn(2, 3, *(9, 8, 7)[:ndim], dtype=torch.float64)
    names = ("2.one.0", "2.two.0", "3.one.0", "3.two.0", "4")
    check_rewrite(model, x, pick(realization="compose", kept=names, convs=names), edits=1)
    check_rewrite(model, x, pick(realization="compose", convs=names, kernel=(3,) * ndim), edits=1)
    check_rewrite(model, x, pick(realization="compose", kept=("3.one.0", "3.two.0")), edits=1)


def test_a_selection_is_a_layer_of_its_own_and_a_span_may_start_behind_it() -> None:
    model = net(
        lambda m, x: m.c(m.r(m.b(m.a(x)[:, 1:4]))), a=conv(12, 6, 3), b=conv(3, 5, 3), c=conv(5, 5, 3), r=nn.ReLU()
    )
    gm = trace(model, X)
    series = Network(gm).regions[0].series
    assert [tuple(lay.nodes) for lay in series.layers] == [("a",), ("select",), ("b", "r"), ("c",)]
    check_rewrite(
        model, X, pick(realization="compose", convs=("b", "c"), start=2), after=["Conv2d", "ChannelSelect", "Conv2d"]
    )
    check_rewrite(model, X, pick(realization="compose", convs=("b", "c"), start=1), after=["Conv2d", "Conv2d"])
    check_rewrite(
        model, X, pick(realization="compose", convs=("a",), stop=2), after=["Conv2d", "Conv2d", "ReLU", "Conv2d"]
    )
    check_rewrite(model, X, pick(realization="compose", convs=("a", "b", "c")), after=["Conv2d"])


def test_convs_on_halves_that_meet_in_a_cat_are_one_conv() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([m.a(a), m.b(b).relu()], 1)

    model = net(body, a=conv(6, 4, 3), b=conv(6, 3, 5, padding=2))
    merged = check_rewrite(model, X, pick(realization="compose", kept=("a", "b")), after=["Conv2d"])
    weight = next(m.weight for m in merged.modules() if isinstance(m, nn.Conv2d))
    assert weight.shape == (7, 12, 5, 5) and not weight[:4, 6:].any() and not weight[4:, :6].any()


def test_nested_splits_merge() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b, c = x.chunk(3, 1)
        d, e = m.a(b).chunk(2, 1)
        inner = torch.cat([m.b(d), m.c(e)[:, ::2]], 1)
        return m.d(torch.cat([c, a, inner], 1))

    model = net(body, a=conv(4, 4, 3), b=conv(2, 2, 3), c=conv(2, 3, 1, padding=0), d=conv(12, 4, 3))
    check_rewrite(model, X, pick(realization="compose", kept=("a", "b", "c", "d")), after=["Conv2d"])


def test_a_span_with_a_selection_reparameterizes_on_its_own_and_trains() -> None:
    model = net(
        lambda m, x: m.b(F.channel_shuffle(m.a(x), 3).relu()), a=conv(12, 6, 3, groups=3), b=conv(6, 6, 3, groups=3)
    )
    spans = spans_of(model, X)
    gm = spans.network.gm
    plan = MergePlan(tuple(pick(realization="compose", convs=("a", "b"))(spans)), fingerprint(gm))
    trainable = rewrite(gm, plan)
    span = next(m for m in trainable.modules() if isinstance(m, LinearSpan))
    trainable(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in span.parameters())
    merged = merge(trainable)
    assert relative_error(run(trainable, X), run(merged, X)) < 1e-12
    assert "Conv2d" in ops_of(merged) and "ChannelSelect" not in ops_of(merged)


def test_a_network_with_selections_is_traced_again_after_it_was_compressed() -> None:
    model = double(nn.Sequential(nn.Conv2d(12, 8, 3), Shuffled(8), Shuffled(8)))
    merged = check_rewrite(model, X, pick(realization="compose", convs=("1.one.0", "1.two.0")))
    again = trace(merged, X)
    assert ops_of(again) == ops_of(merged) and relative_error(run(merged, X), run(again, X)) < 1e-14


def test_what_is_read_elsewhere_stays_two_selections() -> None:
    model = mapped(lambda m, x: (m.a(x.chunk(2, 1)[0]), x.chunk(2, 1)[1] + 1), a=conv(6, 3, 3))
    assert selections(model) == [tuple(range(6)), tuple(range(6, 12))]


def test_an_op_is_made_on_the_device_of_its_span() -> None:
    # Skips, pools and selections have no parameter that says where they are; "meta" refuses to be mixed like a GPU.
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(torch.cat([y[:, [3, 0]], F.avg_pool2d(y, 3, 1, 1), y], 1)) + x

    model = net(body, a=conv(12, 12, 3), b=conv(26, 12, 3))
    spans = spans_of(model, X)
    gm = spans.network.gm
    plan = MergePlan(tuple(pick(realization="compose", kept=("a", "b"))(spans)), fingerprint(gm))
    trainable = rewrite(gm, plan).to("meta")
    (span,) = (m for m in trainable.modules() if isinstance(m, LinearSpan))
    assert span.linear_op().weight.is_meta and span.linear_op().bias.is_meta
    assert all(p.is_meta for p in span.reparameterize().parameters())


@pytest.mark.parametrize("blocks_first", [False, True])
@pytest.mark.parametrize("factor", [2, 3])
def test_a_pixel_shuffle_by_hand_is_one_and_another_order_of_channels_a_selection_before_it(
    factor: int, blocks_first: bool
) -> None:
    x = torch.randn(2, 2 * factor**2, 3, 5, dtype=torch.float64)

    def body(m: Any, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        if blocks_first:
            return x.view(b, factor, factor, 2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, 2, h * factor, w * factor)
        return x.view(b, 2, factor, factor, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, 2, h * factor, w * factor)

    words = ops_of(check_trace(mapped(body, x), x))
    assert [w for w in words if w != "Conv2d"] == ["ChannelSelect"] * blocks_first + ["PixelShuffle"]
