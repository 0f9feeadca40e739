"""Parts that are no series of layers: replaced whole or kept, with their inside compressed for itself."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from benchmarks.shared.random_plans import random_plan
from lmfx.latency.candidate_workloads import Workloads
from lmfx.passes.graph.map_shapes import follows, observed_geometry, spatial_maps, values_at
from lmfx.passes.ir import ConvConfig
from lmfx.passes.spans.enumeration import SpanOptions, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, double, run
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")


def conv(inner: int, outer: int, kernel: int = 3) -> nn.Module:
    padding = kernel // 2
    return nn.Sequential(nn.Conv2d(inner, outer, kernel, padding=padding), nn.BatchNorm2d(outer), nn.ReLU())


class Cells(nn.Module):
    """Branches that exchange values, a vector from a second input, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(3, 12), conv(4, 4), conv(4, 4), conv(4, 4)
        self.out, self.embed, self.qkv, self.head = conv(12, 12, 1), nn.Linear(5, 12), conv(12, 36, 1), conv(12, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.stem(x)
        first, second, third = torch.split(y, 4, 1)
        a = self.a(first)
        b = self.b(a + second)
        y = self.out(torch.cat([a, b, self.c(torch.maximum(b, third))], 1)) + y
        y = y + self.embed(t)[:, :, None, None]
        n, c, h, w = y.shape
        q, k, v = self.qkv(y).reshape(n, 3, c, h * w).unbind(1)
        return self.head(y + (v @ (q.transpose(1, 2) @ k).softmax(-1)).reshape(n, c, h, w))


def example(size: int = 9, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return (
        torch.randn(batch, 3, size, size + 1, dtype=torch.float64, generator=generator),
        torch.randn(batch, 5, dtype=torch.float64, generator=generator),
    )


@pytest.fixture
def cells() -> nn.Module:
    torch.manual_seed(0)
    return double(Cells())


def test_a_mesh_and_what_is_inside_it_are_candidates(cells: nn.Module) -> None:
    spans = enumerate_spans(Network(trace(cells, example())))
    assert len(spans.network.regions) == 2  # the Linear that makes the vector, and all the rest
    found = {c.convs for c in spans if c.realization == "fit"}
    assert ("a.0", "b.0", "c.0") in found and ("a.0",) in found and ("qkv.0",) in found
    assert ("a.0", "b.0", "c.0", "out.0") in found


@pytest.mark.parametrize("seed", range(6))
def test_random_plans_over_meshes_are_exact_and_run_at_other_sizes(cells: nn.Module, seed: int) -> None:
    spans = enumerate_spans(Network(trace(cells, example())), SpanOptions(realize=("compose", "fit", "drop")))
    plan = random_plan(spans, random.Random(seed))
    check_rewrite(cells, example(), plan, others=[example(12, 1)], spans=spans)


def test_a_kept_mesh_is_timed_with_all_that_its_branches_read(cells: nn.Module) -> None:
    spans = enumerate_spans(Network(trace(cells, example())))
    make = Workloads(spans.network)
    (mesh,) = [
        c
        for c in spans
        if c.realization == "keep"
        and (p := spans.network.series[c.span.series].layers[c.span.start].parallel) is not None
        and p.join == "mesh"
        and p.node.startswith("cat")
    ]
    workload = make(mesh)
    assert workload is not None
    values = [torch.randn(shape, dtype=dtype) for shape, dtype in workload.inputs]
    outputs: Any = run(workload.build(), tuple(values))
    assert isinstance(outputs, tuple)
    shapes = [tuple(o.shape) for o in outputs]
    # a + second and maximum(b, third) are read by branches, the concatenation leaves.
    assert sorted(shapes) == [(2, 4, 9, 10)] * 2 + [(2, 12, 9, 10)]


def test_a_network_with_meshes_and_a_second_input_is_compressed_end_to_end(cells: nn.Module) -> None:
    model, x = cells.float(), tuple(v.float() for v in example())
    net = lmfx.compress(model, x, 0.7, latency="roofline", progress=False)
    out: Any = run(net, x)
    assert out.shape == run(model, x).shape
    assert "values meet in" in str(lmfx.report(net))


def test_values_in_a_channels_last_part_are_no_maps() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.softmax(self.a(x).permute(0, 2, 3, 1), -1)
            return self.b(torch.exp(y.permute(0, 3, 1, 2)))

    gm = trace(Last().eval(), torch.randn(1, 4, 4, 4))  # all dimensions equal: shapes tell nothing
    assert spatial_maps(gm) == {"x", "a", "permute_1", "exp_1", "b"}
    spans = enumerate_spans(Network(gm))
    cuts = {(c.span.entry, c.span.output) for c in spans if c.realization in ("fit", "drop")}
    assert ("a", "b") in cuts or ("x", "b") in cuts
    assert not any("softmax" in pair or "permute" in pair for pair in cuts)


def test_sizes_at_other_inputs_are_seen_without_computing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    gm = trace(model.eval(), torch.randn(1, 3, 9, 11))
    assert values_at(gm, 8) == {
        "input_1": (1, 3, 17, 19), "_0": (1, 4, 8, 9), "_1": (1, 4, 8, 9), "_2": (1, 4, 2, 2),
    }  # fmt: skip


def test_a_value_that_is_only_there_at_the_examples_size_is_left_out() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).reshape(1, 3, 30)[..., None])

    assert set(values_at(trace(Fixed().eval(), torch.randn(1, 3, 5, 6)), 3)) == {"x", "conv"}


@pytest.mark.parametrize("rule", ["same", "floor", "ceil"])
def test_the_size_rule_of_a_part_is_found(rule: str) -> None:
    half = {"same": lambda n: n, "floor": lambda n: n // 2, "ceil": lambda n: -(-n // 2)}[rule]
    pairs = [((2, 3, n, n + 1), (2, 5, half(n), half(n + 1))) for n in (8, 40, 45)]
    found = observed_geometry(pairs)
    assert found is not None and all(follows(found, before, after) for before, after in pairs)
    assert found.stride == ((1, 1) if rule == "same" else (2, 2))


def test_a_size_of_its_own_a_larger_map_and_another_batch_follow_no_rule() -> None:
    assert observed_geometry([((1, 3, 8), (1, 3, 8)), ((1, 3, 40), (1, 3, 8))]) is None
    assert observed_geometry([((1, 3, 8), (1, 3, 16))]) is None
    assert observed_geometry([((4, 3, 8), (1, 3, 8))]) is None
    one = ConvConfig(3, 3, (3,), (1,), ((0, 0),), (1,))
    assert not follows(one, (1, 3, 2), (1, 3, 0))


def test_an_opaque_op_of_one_pixel_is_not_taken_for_one_that_keeps_the_size() -> None:
    strided = nn.Conv2d(4, 4, 1, stride=3)
    strided.register_forward_hook(lambda m, i, o: o * 1.5)
    model = double(nn.Sequential(nn.Conv2d(4, 4, 5), strided, nn.Conv2d(4, 4, 3, padding=1)))
    spans = enumerate_spans(Network(trace(model, torch.randn(1, 4, 5, 5, dtype=torch.float64))))
    assert not [c for c in spans if c.realization in ("fit", "drop") and len(c.convs) > 1]
