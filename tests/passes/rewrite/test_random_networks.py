"""Random series-parallel conv networks under random plans: merged equals trainable, and trainable equals the oracle."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.shared.random_plans import random_plan
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import MergePlan
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import assert_unchanged, check_rewrite, double, linearized, run, snapshot
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")

CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS: tuple[Any, ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


@dataclass
class Step:
    """One part of a random network: `kind` and what it needs."""

    kind: str
    args: dict[str, Any] = field(default_factory=dict)
    branches: list[list[Step]] = field(default_factory=list)


class Build(nn.Module):
    """A network from steps; every way to write an op that eager PyTorch offers turns up in `forward`."""

    def __init__(self, steps: list[Step], ndim: int, channels: int) -> None:
        super().__init__()
        self.steps, self.ndim = steps, ndim
        self.parts = nn.ModuleList()
        self.shared_act = nn.ReLU(inplace=True)
        for step in steps:
            part, channels = self.part(step, channels)
            self.parts.append(part)
        self.channels = channels

    def part(self, step: Step, channels: int) -> tuple[nn.Module, int]:
        a = step.args
        if step.kind == "conv":
            width = a["width"] or channels
            groups = channels if a["depthwise"] else 2 if a["grouped"] and channels % 2 == 0 and width % 2 == 0 else 1
            width = channels if a["depthwise"] else width
            extent = a["dilation"] * (a["kernel"] - 1)
            padding = extent // 2 if a["padded"] else 0
            conv = CONVS[self.ndim - 1](
                channels, width, a["kernel"], a["stride"], padding, a["dilation"], groups, bias=a["bias"]
            )
            return (nn.Sequential(conv, NORMS[self.ndim - 1](width)) if a["norm"] else conv), width
        if step.kind == "pool":
            return POOLS[self.ndim - 1](a["kernel"], a["stride"], a["kernel"] // 2), channels
        if step.kind == "norm":
            return NORMS[self.ndim - 1](channels), channels
        if step.kind == "join":
            built = [Build(branch, self.ndim, channels) for branch in step.branches]
            if a["join"] == "cat":
                return nn.ModuleList(built), sum(b.channels for b in built)
            fixed = [
                b if b.channels == channels else nn.Sequential(b, CONVS[self.ndim - 1](b.channels, channels, 1))
                for b in built
            ]
            return nn.ModuleList(fixed), channels
        return nn.Identity(), channels

    def forward(self, x: Tensor) -> Tensor:
        for step, part in zip(self.steps, self.parts, strict=True):
            x = self.step(step, part, x)
        return x

    def step(self, step: Step, part: Any, x: Tensor) -> Tensor:
        a = step.args
        if step.kind == "act":
            # In place: other branches that read x afterwards see it mutated, and so must the graph.
            return {
                "module": lambda: self.shared_act(x),
                "method": lambda: x.relu(),
                "function": lambda: F.leaky_relu(x, 0.3),
                "in place": lambda: x.relu_(),
                "silu": lambda: F.silu(x, inplace=False),
            }[a["form"]]()
        if step.kind == "pad":
            return F.pad(x, a["pad"] * self.ndim)
        if step.kind == "affine":
            return x * 0.5 if a["number"] else x + 1.5
        if step.kind == "join":
            values = [branch(x) for branch in part]
            if a["join"] == "cat":
                return torch.cat(values, 1)
            total = values[0]
            for value in values[1:]:
                if a["join"] == "sub":
                    total = total - value
                elif a["in_place"]:
                    total = total + 0.0
                    total += value
                else:
                    total = torch.add(total, value)
            return total
        return part(x)


@st.composite
def conv_steps(draw: st.DrawFn, stride: int = 1, same: bool = False) -> Step:
    return Step(
        "conv",
        {
            "kernel": draw(st.sampled_from([1, 3, 3, 5] if same else [1, 2, 3, 3, 4])),
            "stride": stride,
            "dilation": draw(st.sampled_from([1, 1, 1, 2])),
            "padded": True if same else draw(st.booleans()),
            "width": draw(st.sampled_from([None, None, None, 4, 6])),
            "depthwise": draw(st.integers(0, 3)) == 0,
            "grouped": draw(st.integers(0, 3)) == 0,
            "norm": draw(st.booleans()),
            "bias": draw(st.booleans()),
        },
    )


def acts() -> st.SearchStrategy[Step]:
    forms = st.sampled_from(["module", "method", "function", "in place", "silu"])
    return forms.map(lambda form: Step("act", {"form": form}))


def singles(same: bool) -> st.SearchStrategy[Step]:
    return st.one_of(
        st.just(Step("norm")),
        st.booleans().map(lambda number: Step("affine", {"number": number})),
        *([] if same else [st.tuples(st.integers(0, 2), st.integers(0, 2)).map(lambda p: Step("pad", {"pad": p}))]),
        st.just(Step("pool", {"kernel": 3, "stride": 1})),
    )


@st.composite
def branch(draw: st.DrawFn, depth: int, stride: int) -> list[Step]:
    """Steps that keep the size, or divide it by the stride with the usual rule."""
    if stride == 1 and draw(st.integers(0, 2)) == 0:
        return []
    steps: list[Step] = []
    for i in range(draw(st.integers(1, 2))):
        steps.append(draw(conv_steps(stride if i == 0 else 1, same=True)))
        if draw(st.booleans()):
            steps.append(draw(acts()))
        if draw(st.integers(0, 4)) == 0:
            steps.append(draw(singles(same=True)))
    if depth and draw(st.integers(0, 2)) == 0:
        steps.append(draw(joins(depth - 1, 1)))
    return steps


@st.composite
def joins(draw: st.DrawFn, depth: int, stride: int | None = None) -> Step:
    stride = stride or draw(st.sampled_from([1, 1, 2]))
    count = draw(st.sampled_from([2, 2, 3]))
    kind = draw(st.sampled_from(["add", "add", "add", "sub", "cat"]))
    branches = [draw(branch(depth, stride)) for _ in range(count)]
    return Step("join", {"join": kind, "in_place": draw(st.booleans())}, branches)


@st.composite
def networks(draw: st.DrawFn, ndim: int) -> nn.Module:
    steps: list[Step] = []
    for _ in range(draw(st.integers(2, 5))):
        part = draw(st.sampled_from(["conv", "conv", "join", "act", "single"]))
        if part == "conv":
            steps.append(draw(conv_steps(draw(st.sampled_from([1, 1, 2])))))
        elif part == "join":
            steps.append(draw(joins(depth=1)))
        elif part == "act":
            steps.append(draw(acts()))
        else:
            steps.append(draw(singles(same=False)))
        if draw(st.booleans()):
            steps.append(draw(acts()))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return double(Build(steps, ndim, 4))


def runs(model: nn.Module, x: Tensor) -> bool:
    """Whether the network can take an input at all: an even kernel may leave nothing."""
    try:
        return run(model, x).numel() > 0
    except RuntimeError:
        return False


SIZES = {1: [37, 40], 2: [21, 24], 3: [13, 12]}
EXAMPLES = {1: 25, 2: 30, 3: 8}


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_merged_equals_trainable_on_random_networks(ndim: int) -> None:
    tried = 0

    @settings(max_examples=EXAMPLES[ndim], suppress_health_check=list(HealthCheck))
    @given(networks(ndim), st.integers(0, 10**6))
    def check(model: nn.Module, seed: int) -> None:
        nonlocal tried
        first, second = SIZES[ndim]
        sizes = (first, second, first)[:ndim]  # height and width differ
        x = torch.randn(2, 4, *sizes, dtype=torch.float64)
        other = torch.randn(1, 4, *(s + 3 for s in sizes), dtype=torch.float64)
        if not (runs(model, x) and runs(model, other)):
            return
        gm = trace(model, x)
        assert noted(gm).tracer == "symbolic"
        spans = enumerate_spans(Network(gm), SpanOptions(max_kernel_size=9))
        keys = [c.key for c in spans]
        assert len(set(keys)) == len(keys)
        if seed % 4 == 0:
            assert keys == [c.key for c in enumerate_spans(Network(trace(model, x)), spans.options)]
        check_rewrite(model, x, MergePlan(), others=[other], spans=spans)
        for i in range(3):
            plan = random_plan(spans, random.Random(seed + i))
            check_rewrite(model, x, plan, others=[other], spans=spans)
            tried += bool(plan.candidates)

    check()
    assert tried > EXAMPLES[ndim] // 2


@pytest.mark.parametrize("ndim", [1, 2])
def test_the_trainable_form_is_the_network_without_its_activations_and_pruned_convs(ndim: int) -> None:
    tried = 0

    @settings(max_examples=EXAMPLES[ndim], suppress_health_check=list(HealthCheck))
    @given(networks(ndim), st.integers(0, 10**6))
    def check(model: nn.Module, seed: int) -> None:
        nonlocal tried
        # Borders differ (zeros between layers are not zeros before them), so compare the middle of a large map.
        size = {1: 401, 2: 121}[ndim]
        x = torch.randn(1, 4, *(size,) * ndim, dtype=torch.float64)
        if not runs(model, x):
            return
        before = snapshot(model)
        gm = trace(model, x)
        spans = enumerate_spans(Network(gm), SpanOptions(realize=("compose",), max_kernel_size=None))
        plan = random_plan(spans, random.Random(seed), ("compose", "drop"))
        expected = run(linearized(gm, plan), x)
        trainable = rewrite(gm, plan)
        actual = run(trainable, x)
        assert_unchanged(before, model)
        assert expected.shape == actual.shape
        middle = tuple(slice(n // 2 - 1, n // 2 + 2) for n in expected.shape[2:])
        assert relative_error(expected[(..., *middle)], actual[(..., *middle)]) <= 1e-11
        assert relative_error(actual, run(merge(trainable), x)) <= 1e-12
        tried += any(c.realization == "compose" for c in plan.candidates)

    check()
    assert tried > EXAMPLES[ndim] // 3


def test_the_oracle_and_the_rewrite_disagree_when_a_conv_is_lost() -> None:
    # Negative control: the comparison above can fail.
    torch.manual_seed(0)
    model = double(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    x = torch.randn(1, 4, 21, 21, dtype=torch.float64)
    gm = trace(model, x)
    spans = enumerate_spans(Network(gm), SpanOptions(realize=("compose",)))
    (two,) = [c for c in spans if c.realization == "compose" and c.convs == ("0", "2") and len(c.kept) == 2]
    plan = MergePlan((two,))
    good = rewrite(gm, plan)
    assert relative_error(run(linearized(gm, plan), x), run(good, x)) <= 1e-14
    assert relative_error(run(gm, x), run(good, x)) > 1e-3
