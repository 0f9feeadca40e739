"""What ops cost, by hand: the figures by which loss-free plans are compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmfx.passes.spans.costs import kept_cost, span_ops
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace

PIXELS = 7 * 5


@pytest.mark.parametrize(
    "layers, cost, ops",
    [
        ([nn.Conv2d(3, 4, 3, padding=1)], PIXELS * 4 * 3 * 9 + 4 * 3 * 9 + 1 + 4, 1),
        ([nn.Conv2d(3, 4, 3, padding=1, bias=False)], PIXELS * 4 * 3 * 9 + 4 * 3 * 9 + 1, 1),
        ([nn.Conv2d(3, 6, 1, groups=3)], PIXELS * 6 * 1 + 6 + 1 + 6, 1),
        # A pad of one number a number of the map, and one for itself.
        ([nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")], PIXELS * 108 + 108 + 1 + 4 + PIXELS * 3 + 1, 2),
        ([nn.Conv2d(3, 4, 1, padding_mode="reflect")], PIXELS * 12 + 12 + 1 + 4, 1),
        ([nn.AvgPool2d(3, 1, 1)], PIXELS * 3 * 9 + 1, 1),
        ([nn.BatchNorm2d(3)], PIXELS * 3 + 6 + 1, 1),
    ],
    ids=["conv", "without bias", "groups", "reflect", "reflect without a pad", "pool", "norm"],
)
def test_a_layer_costs_its_multiply_adds_its_weights_and_one(layers: list[nn.Module], cost: int, ops: int) -> None:
    network = Network(trace(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(layers_out(layers), 2, 1)).eval(), X))
    first = network.regions[0].series.layers[:1]
    assert kept_cost(network, first) == cost
    assert span_ops(network, first) == ops


X = torch.randn(2, 3, 7, 5)


def layers_out(layers: list[nn.Module]) -> int:
    with torch.no_grad():
        return nn.Sequential(*layers).eval()(X).shape[1]
