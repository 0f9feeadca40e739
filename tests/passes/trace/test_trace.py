"""Whatever a network is written in, its graph is made of plain torch.nn modules and joins, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.passes.errors import ModelError, TraceError
from lmfx.passes.graph.ops import ChannelAffine
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.spans.enumeration import enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.annotation import annotate
from lmfx.passes.trace.tracing import example_arguments, fingerprint, trace
from tests.helpers import check_rewrite, check_trace, double, ops_of, pick, run, snapshot
from tests.helpers import one_thread as one_thread

X = torch.randn(2, 4, 6, 9, dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def net(body: Callable[..., Any], **modules: Any) -> nn.Module:
    return double(Net(body, **modules))


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*(args or (4, 4, 3)), **({"padding": 1} | kwargs))


def norm(m: Any, x: Tensor) -> Tensor:
    b = m.norm
    return F.batch_norm(x, b.running_mean, b.running_var, b.weight, b.bias, m.training, 0.1, b.eps)


FORMS: dict[str, tuple[Callable[..., Any], dict[str, Any], list[str]]] = {
    "F.conv2d": (lambda m, x: F.conv2d(x, m.c.weight, m.c.bias, 1, 1), {"c": conv()}, ["Conv2d"]),
    "F.conv2d without a bias": (lambda m, x: F.conv2d(x, m.c.weight, padding=1), {"c": conv()}, ["Conv2d"]),
    "torch.conv2d": (lambda m, x: torch.conv2d(x, m.c.weight, m.c.bias, (2, 1)), {"c": conv()}, ["Conv2d"]),
    "all keywords": (lambda m, x: F.conv2d(weight=m.c.weight, input=x, bias=m.c.bias), {"c": conv()}, ["Conv2d"]),
    "module with a keyword": (lambda m, x: m.c(input=x), {"c": conv()}, ["Conv2d"]),
    "same padding": (lambda m, x: F.conv2d(x, m.c.weight, padding="same"), {"c": conv()}, ["Conv2d"]),
    "grouped": (lambda m, x: F.conv2d(x, m.c.weight, m.c.bias, groups=4), {"c": conv(4, 8, 3, groups=4)}, ["Conv2d"]),
    "F.batch_norm": (lambda m, x: norm(m, m.c(x)), {"c": conv(), "norm": nn.BatchNorm2d(4)}, ["Conv2d", "BatchNorm2d"]),
    "torch.batch_norm": (
        lambda m, x: torch.batch_norm(
            x, m.n.weight, m.n.bias, m.n.running_mean, m.n.running_var, False, 0.1, m.n.eps, True
        ),
        {"n": nn.BatchNorm2d(4)},
        ["BatchNorm2d"],
    ),
    "x.relu()": (lambda m, x: m.c(x).relu(), {"c": conv()}, ["Conv2d", "ReLU"]),
    "torch.relu": (lambda m, x: torch.relu(m.c(x)), {"c": conv()}, ["Conv2d", "ReLU"]),
    "F.relu(inplace=True)": (lambda m, x: F.relu(m.c(x), inplace=True), {"c": conv()}, ["Conv2d", "ReLU"]),
    "clamp": (lambda m, x: m.c(x).clamp(0, 6), {"c": conv()}, ["Conv2d", "ReLU6"]),
    "clip by keyword": (lambda m, x: torch.clip(m.c(x), min=-1, max=2), {"c": conv()}, ["Conv2d", "Hardtanh"]),
    "F.gelu": (lambda m, x: F.gelu(m.c(x), approximate="tanh"), {"c": conv()}, ["Conv2d", "GELU"]),
    "F.prelu": (
        lambda m, x: F.prelu(m.c(x), m.p),
        {"c": conv(), "p": nn.Parameter(torch.rand(4))},
        ["Conv2d", "PReLU"],
    ),
    "F.silu": (lambda m, x: F.silu(m.c(x)), {"c": conv()}, ["Conv2d", "SiLU"]),
    "F.pad": (lambda m, x: m.c(F.pad(x, (1, 2, 0, 3))), {"c": conv()}, ["ConstantPad2d", "Conv2d"]),
    "F.pad of one dimension": (lambda m, x: m.c(F.pad(x, (1, 2))), {"c": conv()}, ["ConstantPad2d", "Conv2d"]),
    "F.pad by reflection": (lambda m, x: F.pad(x, (1, 2, 0, 3), "reflect"), {}, ["ReflectionPad2d"]),
    "F.pad of the last dimension by replication": (
        lambda m, x: m.c(F.pad(x, (1, 2, 0, 0), mode="replicate")),
        {"c": conv()},
        ["ReplicationPad2d", "Conv2d"],
    ),
    "F.pad around": (lambda m, x: F.pad(x, (1, 2, 0, 3), mode="circular"), {}, ["CircularPad2d"]),
    "F.pad with ones": (lambda m, x: F.pad(x, (1, 2, 0, 3), value=1.0), {}, ["ConstantPad2d"]),
    "F.pad of nothing": (lambda m, x: m.c(F.pad(x, (0, 0, 0, 0))), {"c": conv()}, ["Conv2d"]),
    "mean of all pixels": (lambda m, x: x.mean((-1, -2), keepdim=True), {}, ["AdaptiveAvgPool2d"]),
    "torch.mean of all pixels": (lambda m, x: torch.mean(x, dim=[2, 3]), {}, ["AdaptiveAvgPool2d", "Flatten"]),
    "F.avg_pool2d": (lambda m, x: F.avg_pool2d(m.c(x), 2), {"c": conv()}, ["Conv2d", "AvgPool2d"]),
    "F.max_pool2d": (lambda m, x: F.max_pool2d(m.c(x), 3, 2, 1), {"c": conv()}, ["Conv2d", "MaxPool2d"]),
    "max pool by keywords": (
        lambda m, x: F.max_pool2d(m.c(x), kernel_size=3, stride=2, ceil_mode=True),
        {"c": conv()},
        ["Conv2d", "MaxPool2d"],
    ),
    "flatten and linear": (
        lambda m, x: F.linear(x.mean((2, 3)).flatten(1), m.l.weight, m.l.bias),
        {"l": nn.Linear(4, 2)},
        ["AdaptiveAvgPool2d", "Flatten", "Flatten", "Linear"],
    ),
    "torch.add": (lambda m, x: torch.add(m.c(x), x), {"c": conv()}, ["Conv2d", "add"]),
    "x.sub(y)": (lambda m, x: m.c(x).sub(x), {"c": conv()}, ["Conv2d", "sub"]),
    "torch.concat": (lambda m, x: torch.concat([m.c(x), x], dim=-3), {"c": conv()}, ["Conv2d", "cat"]),
    "cat by axis": (lambda m, x: torch.cat((m.c(x), x), axis=1), {"c": conv()}, ["Conv2d", "cat"]),
    "x * 0.5": (lambda m, x: m.c(x) * 0.5, {"c": conv()}, ["Conv2d", "ChannelAffine"]),
    "2 - x": (lambda m, x: 2 - m.c(x), {"c": conv()}, ["Conv2d", "ChannelAffine"]),
    "x / 3": (lambda m, x: m.c(x) / 3, {"c": conv()}, ["Conv2d", "ChannelAffine"]),
    "x + parameter": (
        lambda m, x: m.c(x) + m.b,
        {"c": conv(), "b": nn.Parameter(torch.randn(4, 1, 1))},
        ["Conv2d", "ChannelAffine"],
    ),
    "parameter * x": (
        lambda m, x: m.g * m.c(x),
        {"c": conv(), "g": nn.Parameter(torch.randn(1, 4, 1, 1))},
        ["Conv2d", "ChannelAffine"],
    ),
    "Dropout": (lambda m, x: m.d(m.c(x)), {"c": conv(), "d": nn.Dropout2d(0.5)}, ["Conv2d"]),
    "F.dropout": (lambda m, x: F.dropout(m.c(x), 0.5, m.training), {"c": conv()}, ["Conv2d"]),
    "F.dropout by keyword": (lambda m, x: F.dropout(m.c(x), training=m.training), {"c": conv()}, ["Conv2d"]),
    "Identity": (lambda m, x: m.d(m.c(x)), {"c": conv(), "d": nn.Identity()}, ["Conv2d"]),
    "clone": (lambda m, x: m.c(x).clone(), {"c": conv()}, ["Conv2d"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_becomes_its_module(form: str) -> None:
    body, modules, words = FORMS[form]
    check_trace(net(body, **modules), X, words, tolerance=1e-15)


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("flatten and linear", "all keywords")])
def test_a_form_becomes_its_module_through_torch_export_too(form: str) -> None:
    body, modules, words = FORMS[form]
    model = net(body, **modules)
    gm = trace(model, X, tracers=("export",))
    assert ops_of(gm) == words
    assert relative_error(run(model, X), run(gm, X)) <= 1e-15


class DropPath(nn.Module):
    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - self.p)


def test_drop_path_is_gone() -> None:
    check_trace(net(lambda m, x: m.d(m.c(x)) + x, c=conv(), d=DropPath()), X, ["Conv2d", "add"])


def test_stochastic_depth_of_torchvision_is_gone() -> None:
    from torchvision.ops import StochasticDepth, stochastic_depth

    model = net(
        lambda m, x: m.d(m.c(x)) + stochastic_depth(x, 0.5, "row", m.training), c=conv(), d=StochasticDepth(0.5, "row")
    )
    check_trace(model, X, ["Conv2d", "add"])


# --- what must not be taken for something simpler ---------------------------------------------------------------------

OPAQUE: dict[str, tuple[Callable[..., Any], dict[str, Any], list[str]]] = {
    "pad of the channels": (
        lambda m, x: m.c(F.pad(x, (0, 0, 0, 0, 1, 1))),
        {"c": conv(6, 4, 3)},
        ["ConstantPad3d", "Conv2d"],
    ),
    "mean of rows": (lambda m, x: x.mean(3, keepdim=True), {}, ["mean"]),
    "mean with the channels": (lambda m, x: x.mean((1, 2, 3), keepdim=True), {}, ["mean"]),
    "mean in another dtype": (lambda m, x: x.mean((2, 3), dtype=torch.float32), {}, ["mean"]),
    "mean of everything": (lambda m, x: x.mean(), {}, ["mean"]),
    "parameter over pixels": (lambda m, x: x + m.b, {"b": nn.Parameter(torch.randn(6, 9))}, ["add"]),
    "parameter over the last axis": (lambda m, x: x * m.b, {"b": nn.Parameter(torch.randn(9))}, ["mul"]),
    "number over a mean": (lambda m, x: 1 / (x.mean() + 1), {}, ["mean", "add", "div"]),
    "max pool with indices": (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0], {}, ["max_pool2d", "getitem"]),
    "weight that is computed": (
        lambda m, x: F.conv2d(x, m.c.weight * x.mean()),
        {"c": conv()},
        ["mean", "mul", "conv2d"],
    ),
    "norm over the batch": (lambda m, x: F.batch_norm(x, None, None, training=True), {}, ["batch_norm"]),
    "clamp by a tensor": (lambda m, x: torch.clamp(x, min=m.b), {"b": nn.Parameter(torch.tensor(0.5))}, ["clamp"]),
}


@pytest.mark.parametrize("form", OPAQUE)
def test_what_is_not_a_module_stays_as_it_is(form: str) -> None:
    body, modules, words = OPAQUE[form]
    gm = trace(net(body, **modules), X)
    assert [w.removesuffix("_with_indices").replace("boolean_dispatch", "max_pool2d") for w in ops_of(gm)] == words


def test_a_dropout_that_is_always_on_is_not_dropped() -> None:
    with pytest.raises(ModelError, match="different outputs for one input: dropout"):
        trace(net(lambda m, x: F.dropout(m.c(x), 0.5), c=conv()), X)


def test_a_weighted_sum_is_not_a_plain_sum() -> None:
    model = net(lambda m, x: torch.add(m.c(x), x, alpha=2), c=conv())
    gm = check_trace(model, X, ["Conv2d", "add"])
    spans = enumerate_spans(Network(gm))
    layers = [layer for region in spans.network.regions for layer in region.series.layers]
    assert not any(layer.parallel and layer.parallel.join != "mesh" for layer in layers)
    check_rewrite(model, X, lambda s: [c for c in s if c.realization == "fit"][:1])


def test_a_conv_subclass_with_its_own_forward_is_traced_through() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, w, self.bias, self.stride, self.padding)

    gm = check_trace(net(lambda m, x: m.c(x), c=Standardized(4, 4, 3)), X, ["Conv2d"])
    assert abs(gm.get_submodule("c").weight.mean((1, 2, 3))).max() < 1e-15


def test_a_conv_subclass_that_overrides_nothing_is_a_conv() -> None:
    class Conv2(nn.Conv2d):
        pass

    model = net(lambda m, x: m.d(m.r(m.c(x))), c=Conv2(4, 4, 3), r=nn.ReLU(), d=Conv2(4, 4, 1))
    check_rewrite(model, X, pick(realization="compose", convs=("c", "d")), after=["Conv2d"], edits=1)


def test_a_forward_that_was_replaced_on_one_module_is_traced_through() -> None:
    model = net(lambda m, x: m.d(m.r(m.c(x))), c=conv(), r=nn.ReLU(), d=conv())
    plain = model.c.forward
    model.c.forward = lambda x: plain(x) * 2 + x
    gm = trace(model, X)
    assert ops_of(gm) == ["Conv2d", "ChannelAffine", "add", "ReLU", "Conv2d"]
    assert relative_error(run(model, X), run(gm, X)) <= 1e-15


def test_a_subclass_of_an_identity_that_does_something_is_traced_through() -> None:
    class Scaled(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] > 1 else x

    check_trace(net(lambda m, x: m.d(m.c(x)), c=conv(), d=Scaled()), X, ["Conv2d", "Scaled"])


# --- calls, sharing, parametrizations ---------------------------------------------------------------------------------


def test_a_shared_activation_is_edited_by_call_site() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.r(m.c3(m.r(m.c2(m.r(m.c1(x))))))

    model = net(body, r=nn.ReLU(True), c1=conv(), c2=conv(), c3=conv())
    check_rewrite(
        model,
        X,
        pick(realization="compose", convs=("c1", "c2"), kernel=(5, 5)),
        before=["Conv2d", "ReLU"] * 3,
        after=["Conv2d", "ReLU"] * 2,
        edits=1,
    )


def test_a_conv_that_is_called_twice_is_merged_with_both_calls_or_not_at_all() -> None:
    model = net(lambda m, x: m.c(m.r(m.c(x))), c=conv(), r=nn.ReLU())
    spans = enumerate_spans(Network(check_trace(model, X, ["Conv2d", "ReLU", "Conv2d"])))
    assert {c.convs for c in spans if c.realization == "compose"} == {("c", "c")}
    check_rewrite(model, X, pick(realization="compose", convs=("c", "c"), kernel=(5, 5)), edits=1)
    assert any("is called elsewhere as well" in r.reason for r in spans.refusals)


def test_convs_that_share_a_weight_are_never_merged() -> None:
    a, b = conv(), conv()
    b.weight = a.weight
    model = net(lambda m, x: m.c(m.r(m.b(m.r(m.a(x))))), a=a, b=b, c=conv(), r=nn.ReLU())
    spans = enumerate_spans(Network(trace(model, X)))
    assert {c.convs for c in spans if c.realization == "compose"} == set()


def test_a_functional_conv_that_runs_twice_on_one_weight_is_shared() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(x, m.c.weight, padding=1)), m.c.weight, padding=1)

    spans = enumerate_spans(Network(check_trace(net(body, c=conv()), X, ["Conv2d", "ReLU", "Conv2d"])))
    assert all(len(set(c.convs)) == 1 and len(c.convs) == 2 for c in spans if c.realization == "compose")
    assert any("is called elsewhere as well" in r.reason for r in spans.refusals)


def test_weight_norm_is_evaluated() -> None:
    c = nn.utils.parametrizations.weight_norm(conv())
    model = net(lambda m, x: m.d(m.c(x)), c=c, d=conv())
    check_trace(model, X, ["Conv2d", "Conv2d"])
    assert nn.utils.parametrize.is_parametrized(model.c)
    check_rewrite(model, X, pick(realization="compose", convs=("c", "d")), edits=1)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_old_style_norms_of_weights_are_evaluated(wrap: Callable[..., nn.Module]) -> None:
    model = net(lambda m, x: m.c(x), c=wrap(conv()))
    run(model, X)
    gm = trace(model, X)
    assert ops_of(gm) == ["Conv2d"] and not gm.get_submodule("c")._forward_pre_hooks
    assert model.c._forward_pre_hooks
    assert relative_error(run(model, X), run(gm, X)) <= 1e-12


def test_a_module_with_a_forward_hook_is_opaque() -> None:
    c = conv()
    c.register_forward_hook(lambda module, args, out: out * 3)
    model = net(lambda m, x: m.d(m.r(m.c(x))), c=c, r=nn.ReLU(), d=conv())
    spans = enumerate_spans(Network(check_trace(model, X, ["Conv2d", "ReLU", "Conv2d"])))
    assert any("has forward hooks" in r.reason and r.nodes == ("c",) for r in spans.refusals)
    assert {c.convs for c in spans if c.realization == "compose"} == {("d",)}


def test_a_hook_on_a_container_makes_it_one_opaque_op() -> None:
    block = nn.Sequential(conv(), nn.ReLU())
    block.register_forward_hook(lambda module, args, out: out * 3)
    check_trace(net(lambda m, x: m.c(m.b(x)), c=conv(), b=block), X, ["Sequential", "Conv2d"])


class Undecided(nn.Module):
    """Its control flow depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.c = conv()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.c(x) if x.mean() < 1e9 else x * 2


def test_an_untraceable_part_becomes_a_leaf_and_the_rest_still_compresses() -> None:
    parts = {"a": conv(), "b": conv(), "u": Undecided(), "d": conv(), "e": conv(), "r": nn.ReLU()}
    model = net(lambda m, x: m.e(m.r(m.d(m.u(m.b(m.r(m.a(x))))))), **parts)
    gm = check_trace(model, X, ["Conv2d", "ReLU", "Conv2d", "Undecided", "Conv2d", "ReLU", "Conv2d"])
    assert noted(gm).opaque["u"].startswith("torch.fx cannot trace Undecided: symbolically traced variables")
    spans = enumerate_spans(Network(gm))
    assert any("torch.fx cannot trace Undecided" in r.reason and r.nodes == ("u",) for r in spans.refusals)

    def both(s: Any) -> list[Any]:
        return [*pick(realization="compose", convs=("a", "b"))(s), *pick(realization="compose", convs=("d", "e"))(s)]

    check_rewrite(model, X, both, after=["Conv2d", "Undecided", "Conv2d"], edits=2)


def test_a_model_whose_own_forward_depends_on_data_is_refused_with_every_tracers_reason() -> None:
    with pytest.raises(TraceError, match="could not be traced") as caught:
        trace(Undecided().double().eval(), X)
    text = str(caught.value)
    assert all(f"\n  {name}: " in text for name in ("symbolic", "shapes", "export"))
    assert "Pass the traceable part of the model" in text


# --- inputs, outputs, shapes ------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, image: Tensor, other: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        a = F.relu(self.a(image))
        total = self.b(a) + (image if other is None else other) * scale
        return {"map": total, "pair": (a, [total.mean((2, 3))])}


@pytest.mark.parametrize(
    "example",
    [X, (X,), (X, X * 2), {"image": X}, {"other": X * 2, "image": X}],
    ids=["one", "tuple", "two", "dict", "swapped"],
)
def test_inputs_are_a_tensor_a_tuple_or_a_dict_and_outputs_any_container(example: Any) -> None:
    gm = check_trace(Named().double().eval(), example)
    assert set(run(gm, example)) == {"map", "pair"}


def test_a_list_of_inputs_is_one_tuple_of_arguments() -> None:
    assert example_arguments([1, 2]) == ((1, 2), {})


def test_a_model_that_takes_a_tuple_is_traced() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()

        def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self.c(pair[0]), pair[1] * 2

    model = Pair().double().eval()
    gm = trace(model, ((X, X * 2),))
    with torch.no_grad():
        assert relative_error(model((X, X * 2)), gm((X, X * 2))) == 0


def test_shape_arithmetic_is_traced_for_every_size_where_it_can_be() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return m.c(x).view(n, c // 2, 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    model = net(body, c=conv())
    gm = check_trace(model, X)
    assert noted(gm).tracer == "symbolic"
    other = torch.randn(3, 4, 7, 5, dtype=torch.float64)
    assert relative_error(run(model, other), run(gm, other)) == 0


def test_a_branch_on_a_shape_is_resolved_by_the_shape_tracer() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        if y.shape[-1] > 4 and len(y) < 10:
            y = F.relu(y)
        for _ in range(y.shape[1] // 2):
            y = y + x
        return y

    gm = check_trace(net(body, c=conv()), X, ["Conv2d", "ReLU", "add", "add"])
    assert noted(gm).tracer in ("shapes", "symbolic", "export")


def test_every_node_knows_its_shape_type_and_path() -> None:
    model = net(lambda m, x: F.relu(m.block(x)).mean((2, 3)), block=nn.Sequential(conv(4, 8, 3, stride=2), nn.ReLU()))
    gm = trace(model, X)
    meta = {n.name: n.meta for n in gm.graph.nodes if n.op not in ("placeholder", "output")}
    assert meta["block_0"]["shape"] == (2, 8, 3, 5) and meta["block_0"]["dtype"] == torch.float64
    assert meta["flatten"]["shape"] == (2, 8) and meta["flatten"]["floating"]
    assert Network(gm).path("block_0") == "block.0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_graph_has_the_models_type(dtype: torch.dtype) -> None:
    model = net(lambda m, x: m.c(x) * 0.5 + 1, c=conv()).to(dtype)
    gm = trace(model, X.to(dtype))
    assert run(gm, X.to(dtype)).dtype == dtype
    assert all(p.dtype == dtype for p in gm.parameters())


def test_a_model_in_training_mode_stays_in_training_mode() -> None:
    model = net(lambda m, x: m.d(m.n(x)), n=nn.BatchNorm2d(4), d=nn.Dropout()).train()
    before = snapshot(model)
    gm = trace(model, X)
    assert snapshot(model)["modules"] == before["modules"]
    assert torch.equal(model.n.running_mean, before["state"]["n.running_mean"])
    assert not gm.training and ops_of(gm) == ["BatchNorm2d"]


def test_channel_affine_is_one_number_a_channel() -> None:
    affine = ChannelAffine(torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0]))
    x = torch.randn(3, 2, 4)
    assert torch.equal(affine(x), x * torch.tensor([1.0, 2.0]).view(2, 1) + torch.tensor([0.0, -1.0]).view(2, 1))


def test_fingerprints_depend_on_structure_and_not_on_weights() -> None:
    make = lambda c: net(lambda m, x: F.relu(m.c(x)), c=c)  # noqa: E731
    first, second = (fingerprint(trace(make(conv()), X)) for _ in range(2))
    assert first == second != fingerprint(trace(make(conv(4, 4, 5)), X))
    assert first == fingerprint(trace(make(conv()), torch.randn(1, 4, 20, 20).double()))


def test_annotating_again_gives_the_output() -> None:
    model = net(lambda m, x: m.c(x), c=conv())
    gm = trace(model, X)
    assert torch.equal(annotate(gm, ((X[:1],), {})), run(model, X[:1]))
    assert next(n for n in gm.graph.nodes if n.name == "c").meta["shape"][0] == 1


# --- torchvision ------------------------------------------------------------------------------------------------------

NAMES = [
    "shufflenet_v2_x0_5",
    "mobilenet_v3_small",
    pytest.param("efficientnet_b0", marks=pytest.mark.slow),
    pytest.param("convnext_tiny", marks=pytest.mark.slow),
    pytest.param("swin_t", marks=pytest.mark.slow),
    pytest.param("vit_b_16", marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
def test_torchvision_classifiers_trace_and_enumerate(name: str) -> None:
    import torchvision

    size = 224 if name == "vit_b_16" else 64
    model = double(torchvision.models.get_model(name))
    gm = check_trace(model, torch.randn(1, 3, size, size).double(), tolerance=1e-12)
    assert len(enumerate_spans(Network(gm))) > 0


@pytest.mark.parametrize(
    "body",
    [lambda x: x * torch.sigmoid(x), lambda x: torch.sigmoid(x) * x, lambda x: x.sigmoid().mul(x)],
    ids=["product", "other order", "methods"],
)
def test_a_value_times_its_sigmoid_is_one_activation(body: Any) -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return body(self.conv(x))

    gm = trace(Swish().double().eval(), torch.randn(1, 3, 5, 5, dtype=torch.float64))
    assert ops_of(gm) == ["Conv2d", "SiLU"]


def test_a_value_times_anothers_sigmoid_stays_a_product() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * torch.sigmoid(self.b(x))

    gm = trace(Gate().double().eval(), torch.randn(1, 3, 5, 5, dtype=torch.float64))
    assert "mul" in ops_of(gm) and "SiLU" not in ops_of(gm)


DROPOUTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "dropout": (F.dropout, (5, 6)),
    "dropout1d": (F.dropout1d, (5,)),
    "dropout2d": (F.dropout2d, (5, 6)),
    "dropout3d": (F.dropout3d, (3, 4, 5)),
    "alpha_dropout": (F.alpha_dropout, (5, 6)),
    "feature_alpha_dropout": (F.feature_alpha_dropout, (5, 6)),
    "torch.dropout": (torch.dropout, (5, 6)),
    "torch.alpha_dropout": (torch.alpha_dropout, (5, 6)),
    "torch.feature_dropout": (torch.feature_dropout, (5, 6)),
    "torch.feature_alpha_dropout": (torch.feature_alpha_dropout, (5, 6)),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_a_dropout_function_is_gone_in_eval_mode(name: str) -> None:
    function, size = DROPOUTS[name]

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1](3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(function(self.conv(x), 0.5, self.training))

    gm = check_trace(double(Drops()), torch.randn(2, 3, *size, dtype=torch.float64))
    assert len(ops_of(gm)) == 2 and ops_of(gm)[1] == "ReLU"
