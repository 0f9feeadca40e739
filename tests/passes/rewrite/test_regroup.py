"""Sums that are added up in another order, so that what can be one convolution meets in one addition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.passes.rewrite.regrouped_sums import groups, regrouped
from lmfx.passes.spans.layers import Network
from tests.helpers import double, ops_of


class Net(nn.Module):
    """A function of a map with the branches that it needs."""

    def __init__(self, f: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f
        for name, k in (("a", 3), ("b", 1), ("c", 3), ("r", 3), ("s", 1)):
            part = nn.Sequential(nn.Conv2d(4, 4, k, padding=k // 2, bias=False), nn.BatchNorm2d(4))
            self.add_module(name, part)
        self.shifted = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x.sin())


# Sums and how many convs are left; the branches in a relu stay.
SUMS: dict[str, tuple[Callable[[Net, Tensor], Tensor], int]] = {
    "an activation between": (lambda n, x: n.a(x) + n.r(x).relu() + n.b(x), 2),
    "two groups": (lambda n, x: n.a(x) + n.r(y := x.cos()) + n.b(x) + n.s(y), 2),
    "nested on the right": (lambda n, x: n.a(x) + (n.b(x) + n.r(x).relu()), 2),
    "a skip at the end": (lambda n, x: n.a(x) + n.r(x).relu() + x, 2),
    "a branch that is not exact at the border": (lambda n, x: n.a(x) + n.shifted(x) + n.b(x), 3),
    "three and two": (lambda n, x: n.a(x) + n.r(x).relu() + n.b(x) + n.s(x).sigmoid() + n.c(x), 3),
}


@pytest.mark.parametrize("name", SUMS)
def test_what_can_be_one_conv_is_added_first(name: str) -> None:
    torch.manual_seed(0)
    f, count = SUMS[name]
    model = double(Net(f))
    net = lmfx.simplify(model, torch.randn(1, 4, 9, 11, dtype=torch.float64))
    assert ops_of(net).count("Conv2d") == count
    assert lmfx.result_of(net).plan.sums
    for size in ((9, 11), (12, 8)):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        with torch.no_grad():
            expected = model(x)
            assert (net(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    again = lmfx.simplify(net, torch.randn(1, 4, 9, 11, dtype=torch.float64))
    assert ops_of(again) == ops_of(net) and not lmfx.result_of(again).plan.candidates


KEPT: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "in order already": lambda n, x: n.a(x) + n.b(x) + n.r(x).relu(),
    "all from one map": lambda n, x: n.a(x) + n.b(x) + x,
    "two operands": lambda n, x: n.a(x) + n.r(x).relu(),
    "a difference": lambda n, x: n.a(x) - n.r(x).relu() + n.b(x),
    "the inner sum is read elsewhere": lambda n, x: (t := n.a(x) + n.r(x).relu()) + n.b(x) + t.relu() * 2,
    "an operand that is read elsewhere": lambda n, x: (t := n.a(x)) + n.r(x).relu() + n.b(x) + t.relu(),
    "one operand twice": lambda n, x: (t := n.a(x)) + n.r(x).relu() + t,
    "a vector among them": lambda n, x: n.a(x) + x.mean((2, 3), keepdim=True) + n.b(x),
}


@pytest.mark.parametrize("name", KEPT)
def test_any_other_sum_stays_in_its_order(name: str) -> None:
    torch.manual_seed(0)
    model = double(Net(KEPT[name]))
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    assert groups(Network(lmfx.trace(model, x), fine=True)) == ()
    net = lmfx.simplify(model, x)
    with torch.no_grad():
        expected = model(x)
        assert (net(x) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_an_order_that_merges_nothing_is_not_taken() -> None:
    torch.manual_seed(0)
    model = double(Net(lambda n, x: n.a(x) + n.r(x).relu() + n.b(x)))
    net = lmfx.simplify(model, torch.randn(1, 4, 9, 11, dtype=torch.float64), exclude=("b.*",))
    assert lmfx.result_of(net).plan.sums == ()
    assert ops_of(net).count("Conv2d") == 3


def test_a_plan_with_sums_is_saved_and_loaded_for_other_weights_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = double(Net(SUMS["an activation between"][0]))
    x = torch.randn(1, 4, 9, 11, dtype=torch.float64)
    net = lmfx.simplify(model, x)
    folder = lmfx.save(net, tmp_path / "out")
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.5)
        assert torch.equal(lmfx.load(folder, model)(x), net(x))
    graph = lmfx.trace(model, x)
    student = lmfx.rewrite(graph, lmfx.result_of(net).plan)
    with torch.no_grad():
        expected = model(x)
        assert (lmfx.merge(student)(x) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ([["nowhere", "a", "b"]], "is not in this graph"),
        ([["sin", "a_1"]], "is not in this graph"),
        ([["ROOT", "nowhere"]], "is not in this graph"),
        ([["ROOT", "a_1", "a_1"]], "is not in this graph"),
        ([[1]], "plan.sums[0][0] is not of type str"),
        ("all", "plan.sums is not a list"),
        ([7], "plan.sums[0] is not a list"),
    ],
)
def test_damaged_sums_are_refused(sums: object, message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = double(Net(SUMS["an activation between"][0]))
    x = torch.randn(1, 4, 9, 11, dtype=torch.float64)
    net = lmfx.simplify(model, x)
    path = lmfx.save(net, tmp_path / "out") / "plan.json"
    text = json.loads(path.read_text())
    root = text["plan"]["sums"][0][0]
    wrong = json.loads(json.dumps(sums).replace("ROOT", root))
    text["plan"]["sums"] = text["save"]["result"]["plan"]["sums"] = wrong
    path.write_text(json.dumps(text))
    with pytest.raises(lmfx.PlanError, match=message.replace("[", r"\[")):
        lmfx.load(tmp_path / "out", model)


def test_regrouping_leaves_the_graph_that_it_was_given() -> None:
    torch.manual_seed(0)
    model = double(Net(SUMS["three and two"][0]))
    x = torch.randn(1, 4, 9, 11, dtype=torch.float64)
    graph = lmfx.trace(model, x)
    before, sums = graph.code, groups(Network(graph, fine=True))
    other = regrouped(graph, sums)
    assert graph.code == before != other.code and regrouped(graph, ()) is graph
    with torch.no_grad():
        assert torch.allclose(other(x), graph(x), rtol=1e-12, atol=1e-12)
