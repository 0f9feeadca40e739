"""What last layers read in a network for smaller images is brought to what they read at the own size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import lmfx
from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import record_batches
from lmfx.passes.model.model_copy import deep_copy
from lmfx.quality import Judge
from lmfx.quality.last_layer_fit import _affine, fit_last_layers
from lmfx.quality.output_scale import best_temperature

COARSE = torch.randn(96, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def at(size: int, rows: slice = slice(None)) -> Tensor:
    return F.interpolate(COARSE[rows], size=(size, size), mode="bilinear", antialias=True)


OWN, SMALL = 24, 11
FIT, CHOOSE = slice(0, 64), slice(64, 96)


class Net(nn.Module):
    """Padding with zeros and strides: averages of small maps are others than those of large ones."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.second = nn.Conv2d(8, 12, 5, padding=2)
        self.head = nn.Linear(12, 7, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x) + 0.7)) + 0.4)
        return self.head(x.mean((2, 3)))


def networks(bias: bool = True) -> tuple[fx.GraphModule, fx.GraphModule, Judge]:
    """(the network for small images, the original, its judge)."""
    torch.manual_seed(0)
    model = Net(bias).double().eval()
    with torch.no_grad():  # scores that differ from image to image
        features: list[Tensor] = []
        handle = model.head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
        model(at(OWN))
        handle.remove()
        model.head.weight /= features[0].std(0).clamp_min(1e-2)
        model.head.weight -= model.head.weight @ torch.outer(mean := features[0].mean(0), mean) / mean.square().sum()
    graph = lmfx.trace(model, at(OWN, CHOOSE)[:1])
    return deep_copy(lmfx.trace(model, at(SMALL, CHOOSE)[:1])), graph, Judge(graph, images_of(at(OWN, CHOOSE)))


def images_of(x: Tensor) -> Calibration:
    return Calibration((x,), ())


def outputs(judge: Judge) -> Callable[[fx.GraphModule], list[Tensor]]:
    return lambda net: judge.outputs_of(net, images_of(at(SMALL, CHOOSE)))


def fit(net: fx.GraphModule, graph: fx.GraphModule, judge: Judge, seen: Tensor | None = None, **options: Any) -> None:
    small = at(SMALL, FIT) if seen is None else seen
    fit_last_layers(net, graph, images_of(small), images_of(at(OWN, FIT)), judge, outputs(judge), **options)


def kl(net: fx.GraphModule, graph: fx.GraphModule) -> float:
    with torch.no_grad():
        wanted, seen = graph(at(OWN, CHOOSE)).log_softmax(1), net(at(SMALL, CHOOSE)).log_softmax(1)
    return float((wanted.exp() * (wanted - seen)).sum(1).mean())


def test_a_network_for_smaller_images_loses_less_and_nothing_else_changes() -> None:
    net, graph, judge = networks()
    before, state = kl(net, graph), {k: v.clone() for k, v in net.state_dict().items()}
    fit(net, graph, judge)
    assert kl(net, graph) < 0.6 * before
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {"head.weight", "head.bias"}


def test_scale_and_shift_are_folded_into_the_layer_and_scores_have_their_scale() -> None:
    net, graph, judge = networks()
    head = net.get_submodule("head")
    with torch.no_grad():
        head.weight.mul_(3)  # too sure
        head.bias.mul_(3)
    weight, bias = head.weight.clone(), head.bias.clone()
    seen = [
        record_batches(g, images_of(x), {"flatten"})["flatten"]
        for g, x in ((net, at(SMALL, FIT)), (graph, at(OWN, FIT)))
    ]
    scale, shift = _affine(*seen)
    fit(net, graph, judge)
    ratio = head.weight / (weight * scale)
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio)) and 0.2 < ratio[0, 0].item() < 0.6
    assert torch.allclose(head.bias, (bias + weight @ shift) * ratio[0, 0])
    with torch.no_grad():
        _, gain = best_temperature(graph(at(OWN, CHOOSE)), net(at(SMALL, CHOOSE)))
    assert gain < 0.02


def test_the_fit_is_the_least_squares_of_its_docstring() -> None:
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [1.0, 3.0, 0.1]
    )
    wanted = 2 * x + torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 5
    scale, shift = _affine(x, wanted)
    ridge = 0.3 * x.var(0, correction=0).mean()

    def cost(s: Tensor, t: Tensor) -> float:
        return float(((x * s + t - wanted).square().mean(0) + ridge * (s - 1).square()).sum())

    least = cost(scale, shift)
    for other in (1.01, 0.99):
        assert cost(scale * other, shift) > least and cost(scale, shift * other) > least


def test_a_channel_that_is_the_same_in_all_images_takes_a_finite_scale() -> None:
    scale, shift = _affine(torch.zeros(9, 2, dtype=torch.float64), torch.ones(9, 2, dtype=torch.float64))
    assert scale.tolist() == [1, 1] and shift.tolist() == [1, 1]


def test_a_fit_that_makes_it_worse_is_taken_back() -> None:
    net, graph, judge = networks()
    weight, bias = net.get_submodule("head").weight.clone(), net.get_submodule("head").bias.clone()
    fit(net, graph, judge, at(SMALL, FIT).flip(0) * 30)  # images of another kind
    head = net.get_submodule("head")
    ratio = head.weight / weight  # but for the scale of the scores
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio)) and torch.allclose(head.bias, bias * ratio[0, 0])


@pytest.mark.parametrize("case", ["excluded", "no bias", "few images"])
def test_where_it_cannot_be_fitted_the_last_layer_stays(case: str) -> None:
    net, graph, judge = networks(bias=case != "no bias")
    weight = net.get_submodule("head").weight.clone()
    if case == "few images":
        fit_last_layers(net, graph, images_of(at(SMALL, FIT)[:4]), images_of(at(OWN, FIT)[:4]), judge, outputs(judge))
    else:
        fit(net, graph, judge, **({"free": lambda node: False} if case == "excluded" else {}))
    now = net.get_submodule("head").weight
    ratio = now / weight
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio))
    assert case != "excluded" or torch.equal(now, weight)
