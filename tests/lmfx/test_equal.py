"""How the result of `simplify` is compared with its model, and that the comparison can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.passes.model.model_copy import deep_copy, leaf_copy
from lmfx.planning.equality import check_equal, in_double, merged_form, rounded
from tests.helpers import double, ops_of

X = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """Two convs that merge, with something of one's own between or after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 3)
        self.scale, self.spread = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).relu()


class ByHand(Pair):
    """A norm written by hand, whose scale is computed in the model's dtype when it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * (self.scale / torch.sqrt(self.spread + 1e-5)).view(1, -1, 1, 1)
        return self.second(y).relu()


class Single(Pair):
    """A model that runs in float32 only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).relu() @ torch.ones(9, 2)


class Normalised(Pair):
    """A model whose values are in float32 until its mean, whatever its own dtype is; a conv takes the mean in."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.float() * 3.3 - self.mean)).relu()


class Rounds(Pair):
    """A model that computes its output in float32, whatever its own dtype is."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)).float() / 3).softmax(1).to(x.dtype)


class Mask(Pair):
    """A model with a value in float32 that is the same in any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * (x[:, :, 1:-1, 1:-1] > 0).float()


def simple(model: nn.Module) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = double(model).float()
    return model, lmfx.simplify(model, X, growth=3.0)


@pytest.mark.parametrize("kind", [Pair, ByHand])
def test_a_model_is_compared_in_float64_at_two_sizes(kind: type[nn.Module]) -> None:
    model, net = simple(kind())
    assert ops_of(net) == ["Conv2d", "ReLU"]
    assert lmfx.result_of(net).checked == "in float64, within 1e-09, on the example and at 13 pixels more"
    with torch.no_grad():
        assert torch.allclose(net(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_model_that_takes_one_dtype_is_compared_in_it_and_the_report_says_so() -> None:
    _, net = simple(Single())
    assert ops_of(net)[:1] == ["Conv2d"] and ops_of(net).count("Conv2d") == 1
    checked = lmfx.result_of(net).checked
    assert checked.startswith("in float32 only, within 0.001: in float64 the model stops at 'expected")
    assert f"  checked    {checked}" in str(lmfx.report(net)).splitlines()


@pytest.mark.parametrize("kind", [Normalised, Rounds])
def test_a_model_whose_values_are_rounded_in_float64_too_is_compared_in_its_own_dtype(kind: type[nn.Module]) -> None:
    _, net = simple(kind())
    assert ops_of(net).count("Conv2d") == 1
    said = "in float32 only, within 0.001: in float64 the model still has values in float32"
    assert lmfx.result_of(net).checked == said


def test_narrower_values_that_nobody_sees_in_the_output_make_no_check_weaker() -> None:
    _, net = simple(Mask())
    assert ops_of(net).count("Conv2d") == 1
    assert lmfx.result_of(net).checked.startswith("in float64, within 1e-09, on the example and at")


def test_a_merged_network_that_float64_stops_is_refused_where_its_model_has_no_narrower_values() -> None:
    model, net = simple(Pair())
    graph, plan = lmfx.trace(model, X), lmfx.result_of(net).plan
    traced = in_double(graph)
    wrong = merged_form(traced, plan)
    good = rounded(wrong, graph, plan)
    assert check_equal(model, X, traced, wrong, good, plan)
    with pytest.raises(RuntimeError):
        check_equal(model, X, traced, wrong.float(), good, plan)


def test_nothing_merged_is_said() -> None:
    _, net = simple(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))
    assert lmfx.result_of(net).checked.startswith("nothing was merged")


@pytest.mark.parametrize("kind", [Pair, ByHand, Single, Normalised, Rounds, Mask])
def test_another_weight_is_no_equal(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = double(kind()).float()
    graph = lmfx.trace(model, X)
    plan = lmfx.result_of(lmfx.simplify(model, X, growth=3.0)).plan
    traced = in_double(graph)
    merged = merged_form(traced, plan)
    net = rounded(merged, graph, plan)
    assert check_equal(model, X, traced, merged, net, plan)
    other = deep_copy(model)
    with torch.no_grad():
        other.first.weight[0, 0] += 1.0 if kind in (Single, Normalised, Rounds) else 1e-3
    with pytest.raises(lmfx.VerifyError, match="merging (changes the output|loses the weight)"):
        check_equal(other, X, traced, merged, net, plan)


def test_a_network_that_is_not_the_checked_one_rounded_is_refused() -> None:
    model, net = simple(Pair())
    graph, plan = lmfx.trace(model, X), lmfx.result_of(net).plan
    traced = in_double(graph)
    merged = merged_form(traced, plan)
    wrong = rounded(merged, graph, plan)
    with torch.no_grad():
        next(wrong.parameters()).mul_(1 + 1e-5)
    with pytest.raises(lmfx.VerifyError, match="loses the weight"):
        check_equal(model, X, traced, merged, wrong, plan)


def test_a_merged_weight_beyond_the_range_of_the_dtype_is_an_error() -> None:
    torch.manual_seed(0)
    model = double(Pair())
    with torch.no_grad():
        model.first.weight.mul_(3e4)  # type: ignore[union-attr, operator]
        model.second.weight.mul_(3e4)  # type: ignore[union-attr, operator]
    with pytest.raises(lmfx.LmfxError):
        lmfx.simplify(model.half(), X.half(), growth=3.0)


def test_a_copy_of_a_layer_shares_nothing_and_keeps_ties() -> None:
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    model = nn.Sequential(one, nn.BatchNorm1d(3), two, nn.ReLU())
    clone = deep_copy(model)
    assert clone[0].weight is clone[2].weight and clone[0].weight is not one.weight
    assert [type(m) for m in clone] == [type(m) for m in model]
    for mine, own in zip(clone.modules(), model.modules(), strict=True):
        assert mine is not own and mine._parameters is not own._parameters and mine._buffers is not own._buffers
        assert mine._forward_hooks is not own._forward_hooks and mine.extra_repr() == own.extra_repr()
    with torch.no_grad():
        clone[1].running_mean.add_(1.0)
    assert float(model[1].running_mean.sum()) == 0.0  # type: ignore[union-attr, operator]


def test_hooks_and_attributes_of_a_layer_are_copied_as_deeply_as_by_copy() -> None:
    layer: Any = nn.Conv2d(3, 4, 3, padding=(1, 2))
    layer.note = {"a": [1, 2]}
    layer.register_forward_hook(lambda *_: None)
    clone: Any = leaf_copy(layer)
    assert clone.note == layer.note and clone.note["a"] is not layer.note["a"] and len(clone._forward_hooks) == 1
    plain: Any = leaf_copy(nn.Conv2d(3, 4, 3, padding=(1, 2)))
    plain.register_forward_hook(lambda *_: None)
    assert plain.padding == (1, 2) and not nn.Conv2d(3, 4, 3)._forward_hooks
