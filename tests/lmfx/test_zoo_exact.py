"""A few random plans on torchvision's networks at small sizes; `benchmarks/promises/exactness.py` is the full run."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.promises.exactness import MODELS, build, check_model
from benchmarks.shared.random_plans import random_plan
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import one_thread as one_thread
from tests.helpers import run

SMALL = ("resnet18", "mobilenet_v2", "squeezenet1_1", "regnet_x_400mf", "mnasnet1_0")


pytestmark = pytest.mark.usefixtures("one_thread")

# Random plans of wide networks would hold dense 7 x 7 kernels of a thousand channels: exact too, but slow to make.
QUICK = SpanOptions(max_kernel_size=3)


@pytest.mark.parametrize("name", SMALL)
def test_random_plans_on_torchvision_networks_are_exact(name: str) -> None:
    outcome = check_model(name, 64, (75,), plans=2, options=QUICK)
    assert outcome.problems == []
    assert outcome.spans > 0
    assert outcome.keep_error <= 1e-14 and outcome.worst <= 1e-12
    assert outcome.passed


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_random_plans_of_networks_traced_at_an_odd_size_are_exact(name: str) -> None:
    assert check_model(name, 75, plans=2, options=QUICK).passed


@pytest.mark.slow
@pytest.mark.parametrize("name", [m for m in MODELS if m not in SMALL])
def test_random_plans_on_the_other_networks_are_exact(name: str) -> None:
    outcome = check_model(name, 64 if name != "googlenet" else 75, (96,), plans=3)
    assert outcome.passed, outcome


def test_an_adaptive_pool_keeps_its_place_at_other_sizes() -> None:
    # vgg pools to 7 x 7 for its classifier: at 224 that looks like the identity, and is not at 160.
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.pool, self.relu = nn.AdaptiveAvgPool2d((7, 7)), nn.ReLU()
            self.classifier = nn.Linear(147, 2)

        def forward(self, x: Any) -> Any:
            return self.classifier(torch.flatten(self.pool(self.relu(self.b(self.relu(self.a(x))))), 1))

    model = Head().double().eval()
    gm = trace(model, torch.randn(1, 3, 7, 7, dtype=torch.float64))
    spans = enumerate_spans(Network(gm))
    other = torch.randn(1, 3, 12, 9, dtype=torch.float64)
    for seed in range(20):
        plan = random_plan(spans, random.Random(seed))
        assert run(merge(rewrite(gm, plan)), other).shape == (1, 2)
    assert relative_error(run(model, other), run(merge(rewrite(gm, MergePlan())), other)) <= 1e-14


def test_tracing_and_enumerating_a_zoo_network_is_deterministic() -> None:
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    keys = [[c.key for c in enumerate_spans(Network(trace(build("mobilenet_v2"), x)))] for _ in range(2)]
    assert keys[0] == keys[1]
