"""What depends on parameters alone is one tensor, at the path of the module that computes it, and equal to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lmfx.passes.canonical.constants import fold_constants
from lmfx.passes.spans.enumeration import enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.annotation import annotate
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, check_trace, double, ops_of, pick, run

X = torch.randn(2, 4, 7, 9, dtype=torch.float64)
TRACERS = ("symbolic", "shapes", "export")


class Standardized(nn.Conv2d):
    """A conv whose weight is normalised by a batch norm before each use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=(self.gain * 0.3).view(-1),
            training=True,
            momentum=0.0,
            eps=1e-6,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Blur(nn.Module):
    """A fixed filter, repeated for each channel."""

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("filt", (row[:, None] * row[None, :] / 16)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filt.expand(4, 1, 3, 3), stride=2, padding=1, groups=4)


class Scale(nn.Module):
    """Layer scale: one number a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(1, -1, 1, 1)


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def net(body: Callable[..., Any], **modules: Any) -> nn.Module:
    return double(Net(body, **modules))


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op in ("call_module", "get_attr")]


@pytest.mark.parametrize("tracer", TRACERS)
def test_a_standardised_weight_is_a_plain_conv_at_the_modules_path(tracer: str) -> None:
    model = net(
        lambda m, x: m.d(m.block(x)), block=nn.Sequential(Standardized(4, 4, 3, padding=1)), d=nn.Conv2d(4, 4, 1)
    )
    gm = trace(model, X, tracers=(tracer,))
    assert ops_of(gm) == ["Conv2d", "Conv2d"] and targets(gm) == ["block.0", "d"]
    conv = gm.get_submodule("block.0")
    assert type(conv) is nn.Conv2d and isinstance(conv.weight, nn.Parameter) and conv.weight.requires_grad
    assert not torch.equal(conv.weight, model.block[0].weight) and "gain" not in dict(conv.named_parameters())
    assert torch.equal(run(gm, X), run(model, X))


def test_a_standardised_conv_is_merged_with_its_neighbour() -> None:
    model = net(lambda m, x: m.d(m.r(m.c(x))), c=Standardized(4, 4, 3, padding=1), r=nn.ReLU(), d=nn.Conv2d(4, 4, 3))
    check_rewrite(model, X, pick(realization="compose", convs=("c", "d"), kernel=(5, 5)), after=["Conv2d"], edits=1)


@pytest.mark.parametrize("tracer", TRACERS)
def test_a_folded_weight_of_a_module_that_is_called_twice_stays_one_tensor(tracer: str) -> None:
    model = net(lambda m, x: m.c(m.r(m.c(x))), c=Standardized(4, 4, 3, padding=1), r=nn.ReLU())
    gm = trace(model, X, tracers=(tracer,))
    assert targets(gm) == ["c", "r", "c"]
    spans = enumerate_spans(Network(gm))
    assert {s.convs for s in spans if s.realization == "compose"} == {("c", "c")}  # both calls, or none
    assert any("is called elsewhere as well" in r.reason for r in spans.refusals)


def test_equal_weights_of_two_modules_are_two_tensors() -> None:
    a, b = Standardized(4, 4, 3, padding=1), Standardized(4, 4, 3, padding=1)
    b.load_state_dict(a.state_dict())
    model = net(lambda m, x: m.b(m.r(m.a(x))), a=a, b=b, r=nn.ReLU())
    gm = check_trace(model, X, ["Conv2d", "ReLU", "Conv2d"])
    assert gm.get_submodule("a").weight is not gm.get_submodule("b").weight
    check_rewrite(model, X, pick(realization="compose", convs=("a", "b"), kernel=(5, 5)), after=["Conv2d"], edits=1)


@pytest.mark.parametrize("tracer", TRACERS)
def test_a_repeated_filter_is_a_depthwise_conv(tracer: str) -> None:
    model = net(lambda m, x: m.blur(m.c(x)), c=nn.Conv2d(4, 4, 3), blur=Blur())
    gm = trace(model, X, tracers=(tracer,))
    assert ops_of(gm) == ["Conv2d", "Conv2d"]
    assert gm.get_submodule(targets(gm)[1]).groups == 4
    assert torch.equal(run(gm, X), run(model, X))


@pytest.mark.parametrize("tracer", TRACERS)
def test_a_reshaped_scale_is_a_channel_affine(tracer: str) -> None:
    model = net(lambda m, x: m.s(m.c(x)), c=nn.Conv2d(4, 4, 3), s=Scale())
    gm = trace(model, X, tracers=(tracer,))
    assert ops_of(gm) == ["Conv2d", "ChannelAffine"]
    assert torch.equal(run(gm, X), run(model, X))


def test_a_weight_that_others_read_keeps_its_name() -> None:
    class Both(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * 0.5) + x.mean() * F.conv2d(x, self.weight)

    model = net(lambda m, x: m.c(x), c=Both(4, 4, 3))
    gm = check_trace(model, X)
    assert ops_of(gm).count("Conv2d") == 2


def test_arithmetic_of_constants_is_done_while_compiling() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        table = torch.linspace(0, 1, 4, dtype=x.dtype).cumsum(0) + torch.arange(4)
        return m.c(x) + table.view(4, 1, 1)

    check_trace(net(body, c=nn.Conv2d(4, 4, 3)), X, ["Conv2d", "ChannelAffine"])
    check_trace(net(lambda m, x: m.c(x) * 2 + 1, c=nn.Conv2d(4, 4, 3)), X, ["Conv2d", "ChannelAffine", "ChannelAffine"])


# --- on graphs by hand: what is constant and what is not --------------------------------------------------------------


def graph_of(build: Callable[[fx.Graph], fx.Node], **tensors: Tensor) -> fx.GraphModule:
    """A graph of one input `x` and what `build` makes of it, on a module with some buffers."""
    root, graph = nn.Module(), fx.Graph()
    for name, tensor in tensors.items():
        root.register_buffer(name, tensor)
    graph.output(build(graph))
    gm = fx.GraphModule(root, graph)
    annotate(gm, ((torch.ones(3),), {}))
    return gm


def names(gm: fx.GraphModule) -> list[str]:
    return [n.op if n.op in ("placeholder", "output") else str(n.target) for n in gm.graph.nodes]


def test_a_chain_of_constants_becomes_one_tensor() -> None:
    def build(g: fx.Graph) -> fx.Node:
        x = g.placeholder("x")
        w = g.call_method("exp", (g.call_method("mul", (g.get_attr("w"), 2)),))
        return g.call_method("add", (x, w))

    gm = graph_of(build, w=torch.arange(3.0))
    expected = gm(torch.ones(3))
    assert fold_constants(gm) == 1
    assert names(gm) == ["placeholder", "constant", "add", "output"] and torch.equal(gm(torch.ones(3)), expected)
    assert fold_constants(gm) == 0


def test_parts_of_a_constant_are_folded_and_the_whole_is_gone() -> None:
    def build(g: fx.Graph) -> fx.Node:
        x = g.placeholder("x")
        parts = g.call_method("chunk", (g.get_attr("w"), 2))
        first, second = (g.call_function(lambda v, i: v[i], (parts, i)) for i in range(2))
        return g.call_method("add", (g.call_method("mul", (x, first)), second))

    gm = graph_of(build, w=torch.arange(6.0))
    expected = gm(torch.ones(3))
    assert fold_constants(gm) == 2 and "chunk" not in names(gm)
    assert torch.equal(gm(torch.ones(3)), expected)


def test_a_constant_number_is_written_into_its_reader() -> None:
    def build(g: fx.Graph) -> fx.Node:
        x = g.placeholder("x")
        return g.call_method("mul", (x, g.call_method("size", (g.get_attr("w"), 0))))

    gm = graph_of(build, w=torch.zeros(5, 2))
    assert fold_constants(gm) == 0 and names(gm) == ["placeholder", "mul", "output"]
    assert torch.equal(gm(torch.ones(3)), torch.full((3,), 5.0))


@pytest.mark.parametrize(
    "method", ["bernoulli", "rand_like", "empty_like", "new_empty", "add_"], ids=lambda m: m.strip("_")
)
def test_what_is_random_uninitialised_or_writes_is_never_folded(method: str) -> None:
    def build(g: fx.Graph) -> fx.Node:
        x, w = g.placeholder("x"), g.get_attr("w")
        if method == "rand_like":
            made = g.call_function(torch.rand_like, (w,))
        elif method == "empty_like":
            made = g.call_function(torch.empty_like, (w,))
        else:
            made = g.call_method(method, (w, *({"new_empty": (3,), "add_": (1,)}.get(method, ()))))
        return g.call_method("mul", (x, made))

    gm = graph_of(build, w=torch.full((3,), 0.5))
    state = torch.get_rng_state()
    assert fold_constants(gm) == 0
    assert any(method in n for n in names(gm)) and torch.equal(torch.get_rng_state(), state)


def test_a_dropout_of_a_constant_is_folded_in_eval_mode_only() -> None:
    def build(g: fx.Graph) -> fx.Node:
        x, w = g.placeholder("x"), g.get_attr("w")
        off = g.call_function(F.dropout, (w, 0.5, False))
        on = g.call_function(F.dropout, (w, 0.5, True))
        return g.call_method("add", (g.call_method("mul", (x, off)), on))

    gm = graph_of(build, w=torch.ones(3))
    assert fold_constants(gm) == 1
    assert [n.args[2] for n in gm.graph.nodes if n.target is F.dropout] == [True]


def test_a_batch_norm_that_updates_its_statistics_is_not_constant() -> None:
    def build(g: fx.Graph) -> fx.Node:
        x = g.placeholder("x")
        args = (g.get_attr("w"), g.get_attr("mean"), g.get_attr("var"))
        normed = g.call_function(F.batch_norm, args, {"training": True})
        return g.call_method("add", (x, g.call_method("sum", (normed,))))

    gm = graph_of(build, w=torch.randn(5, 3), mean=torch.zeros(3), var=torch.ones(3))
    assert fold_constants(gm) == 0


def test_an_op_that_does_not_run_stays() -> None:
    def build(g: fx.Graph) -> fx.Node:
        return g.call_method("add", (g.placeholder("x"), g.get_attr("w")))

    gm = graph_of(build, w=torch.ones(3))
    with gm.graph.inserting_before(next(iter(reversed(gm.graph.nodes)))):
        bad = gm.graph.call_method("view", (next(n for n in gm.graph.nodes if n.op == "get_attr"), 7))
        out = gm.graph.call_method("mul", (next(n for n in gm.graph.nodes if n.target == "add"), bad))
    next(n for n in gm.graph.nodes if n.op == "output").args = (out,)
    assert fold_constants(gm) == 0 and "view" in names(gm)


def test_an_instance_norm_that_updates_its_statistics_is_not_constant() -> None:
    def build(g: fx.Graph) -> fx.Node:
        x = g.placeholder("x")
        args = (g.get_attr("w"), g.get_attr("mean"), g.get_attr("var"))
        normed = g.call_function(torch.instance_norm, (*args[:1], None, None, *args[1:], True, 0.1, 1e-5, False))
        return g.call_method("add", (x, g.call_method("sum", (normed,))))

    gm = graph_of(build, w=torch.randn(5, 3, 4), mean=torch.zeros(3), var=torch.ones(3))
    before = gm.mean.clone()
    assert fold_constants(gm) == 0
    assert torch.equal(gm.mean, before), "nor is it changed by trying"


@pytest.mark.parametrize("what", ["dtype", "device"])
def test_a_table_in_the_type_or_on_the_device_of_a_value_is_a_constant(what: str) -> None:
    def build(g: fx.Graph) -> fx.Node:
        x = g.placeholder("x")
        table = g.call_method("to", (g.get_attr("w"), g.call_function(getattr, (x, what))))
        return g.call_method("add", (x, g.call_method("exp", (table,))))

    gm = graph_of(build, w=torch.ones(3))
    assert fold_constants(gm) == 1 and "exp" not in names(gm)
