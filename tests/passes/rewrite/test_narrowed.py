"""Narrowed spans in a network: the same nodes and names, fewer channels."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.shared.random_plans import random_plan
from lmfx.passes.errors import PlanError
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.trace.tracing import fingerprint
from tests.helpers import double, spans_of
from tests.passes.spans.test_narrowing import Counting, Gated, Headed, SideBySide, conv


class Wide(nn.Module):
    """All that keeps channels apart, between two convs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = conv(3, 32, bias=False), nn.BatchNorm2d(32)
        self.act = nn.PReLU(32)
        self.grouped, self.group_norm = conv(32, 64, 3, groups=16), nn.GroupNorm(16, 64)
        self.instance = nn.InstanceNorm2d(64, affine=True)
        self.scale = nn.Parameter(torch.rand(64, 1, 1) + 0.5)
        self.b, self.after = conv(64, 6, 3, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.a(x)))
        y = self.instance(self.group_norm(self.grouped(y))) * self.scale
        return self.after(self.b(nn.functional.channel_shuffle(nn.functional.max_pool2d(y, 2), 8)))


def narrow(model: nn.Module, x: Tensor) -> SpanSet:
    return spans_of(model, x, realize=("narrow",))


def plan_of(spans: SpanSet, *candidates: Candidate) -> MergePlan:
    return MergePlan(candidates, fingerprint(spans.network.gm))


@pytest.mark.parametrize("make", [Gated, Wide, lambda: Counting("gate"), lambda: Headed(117)])
def test_channels_that_are_zero_change_nothing(make: Any) -> None:
    """Channels whose reader has no weight may go: the narrowed network is the original."""
    torch.manual_seed(1)
    model, x = double(make()), torch.randn(2, 3, 13, 9, dtype=torch.float64)
    spans = narrow(model, x)
    for c in [c for c in spans if c.cuts]:
        private = spans.network.narrowing.of(c.cuts[0])
        assert private is not None
        per, units = private.space.per_unit, random.Random(0).sample(range(private.space.units), private.space.units)
        kept = frozenset(units[: c.cuts[0].width // per])
        channels = tuple(private.space.kept(private.space.source, kept))
        gone = [i for i in range(c.cuts[0].of) if i not in channels]
        state = {k: v.clone() for k, v in model.state_dict().items()}
        graph = spans.network.gm
        with torch.no_grad():
            for name in (private.space.reader, *private.space.gates):
                source = spans.network.nodes[name].all_input_nodes[0].name
                rows = [i for i, u in enumerate(private.space.labels[source]) if u not in kept]
                graph.get_submodule(spans.network.path(name)).weight[:, rows] = 0
        cut = replace(c.cuts[0], channels=channels)
        student = rewrite(graph, plan_of(spans, replace(c, cuts=(cut,))))
        assert gone and student.get_submodule(cut.reader).weight.shape[1] == c.cuts[0].width
        torch.testing.assert_close(student(x), graph(x), rtol=1e-12, atol=1e-12)
        model.load_state_dict(state)
        spans = narrow(model, x)


def test_names_and_shapes_are_those_of_the_network() -> None:
    model, x = double(Wide()), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    spans = narrow(model, x)
    c = next(c for c in spans if c.cuts)
    student = rewrite(spans.network.gm, plan_of(spans, c))
    assert [n.name for n in student.graph.nodes] == [n.name for n in spans.network.gm.graph.nodes]
    assert set(student.state_dict()) - {"b.bias"} == set(spans.network.gm.state_dict()) - {"scale"}
    values: dict[str, Any] = {}

    class Shapes(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Shapes(student).run(x)
    noted = {n.name: n.meta.get("shape") for n in student.graph.nodes}
    assert all(tuple(v.shape) == noted[n] for n, v in values.items() if isinstance(v, Tensor) and noted[n] is not None)


def test_merged_is_trainable_whatever_training_has_made_of_it() -> None:
    torch.manual_seed(0)
    model = double(nn.Sequential(Gated(), conv(3, 16, 3), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 4)))
    spans = spans_of(model, torch.randn(2, 3, 9, 9, dtype=torch.float64), realize=("compose", "fit", "narrow"))
    seen = set()
    for seed in range(12):
        plan = random_plan(spans, random.Random(seed))
        seen |= {c.realization for c in plan.candidates}
        student = rewrite(spans.network.gm, plan).train()
        for size in (9, 14):
            student(torch.randn(3, 3, size, size, dtype=torch.float64)).square().sum().backward()
        student.eval()
        with torch.no_grad():
            for p in student.parameters():
                p.mul_(1 + 0.1 * torch.randn_like(p))
            x = torch.randn(2, 3, 14, 11, dtype=torch.float64)
            torch.testing.assert_close(merge(student)(x), student(x), rtol=1e-12, atol=1e-12)
    assert {"narrow", "fit"} <= seen


def test_the_graph_and_its_modules_are_not_changed() -> None:
    model, x = double(Wide()), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    spans = narrow(model, x)
    before = {k: v.clone() for k, v in spans.network.gm.state_dict().items()}
    student = rewrite(spans.network.gm, plan_of(spans, next(c for c in spans if c.cuts)), share_tensors=True)
    with torch.no_grad():
        for name in ("a", "norm", "act", "grouped", "group_norm", "instance", "b"):
            for tensor in student.get_submodule(name).state_dict().values():
                tensor.mul_(2)
    after = spans.network.gm.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert spans.network.gm.get_submodule("grouped").groups == 16


@pytest.mark.parametrize(
    "broken",
    [
        {"channels": (0, 1, 2)},
        {"channels": tuple(range(7, -1, -1))},
        {"channels": (*range(7), 32)},
        {"channels": (-1, *range(7))},
        {"width": 5},
        {"width": 64},
        {"of": 16},
        {"reader": "squeeze"},
        {"reader": "nothing"},
    ],
)
def test_a_cut_that_the_graph_does_not_have_is_refused(broken: dict[str, Any]) -> None:
    spans = narrow(double(nn.Sequential(conv(3, 32), nn.ReLU(), conv(32, 3))), torch.randn(1, 3, 8, 8).double())
    c = next(c for c in spans if c.cuts and c.cuts[0].width == 8)
    if "width" in broken and broken["width"] == 5:
        spans.network.narrowing.of(c.cuts[0])
        broken = {"width": 0}
    wrong = replace(c, cuts=(replace(c.cuts[0], **broken),))
    with pytest.raises(PlanError):
        rewrite(spans.network.gm, plan_of(spans, wrong))


def test_half_a_group_is_refused() -> None:
    spans = narrow(double(Wide()), torch.randn(1, 3, 12, 12).double())
    c = next(c for c in spans if c.cuts)
    cut = c.cuts[0]
    wrong = replace(c, cuts=(replace(cut, channels=tuple(range(1, cut.width + 1))),))
    with pytest.raises(PlanError, match="whole groups"):
        rewrite(spans.network.gm, plan_of(spans, wrong))


def test_no_conv_beside_another_loses_all_of_its_channels() -> None:
    model = double(SideBySide(1)).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model.few.weight.data.mul_(1e-6)  # the first to go by any measure
    model.head.weight.data[:, 16:] *= 1e-6
    spans = narrow(model, x)
    for c in (c for c in spans if c.cuts):
        student = rewrite(spans.network.gm, plan_of(spans, c))
        assert student.get_submodule("few").out_channels == 1
        assert student(x).shape == model(x).shape
    (c, *_) = (c for c in spans if c.cuts)
    wrong = replace(c, cuts=(replace(c.cuts[0], channels=tuple(range(c.cuts[0].width))),))
    with pytest.raises(PlanError, match="no channels"):
        rewrite(spans.network.gm, plan_of(spans, wrong))
