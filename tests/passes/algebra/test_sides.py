"""Vectors that enter a span from the side: carried through the algebra as re-weighted vectors, exactly."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from benchmarks.shared.random_plans import random_plan
from lmfx.latency.candidate_workloads import Workloads
from lmfx.passes.algebra.linear_span import AffineChain
from lmfx.passes.algebra.side_vectors import SideAdd
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, double, run


class Sided(nn.Module):
    """Three convs in a row and one beside them; `body` says where the vectors enter."""

    def __init__(self, body: Callable[..., Any], ndim: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
        self.a, self.b, self.c, self.d = conv(4, 6, 3), conv(6, 6, 3), conv(6, 4, 2), conv(4, 4, 3, padding=1)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[ndim - 1](6)
        self.embed, self.other = nn.Linear(5, 6), nn.Linear(5, 4)
        self.body, self.ndim = body, ndim

    def wide(self, v: Tensor) -> Tensor:
        return v[(..., *[None] * self.ndim)]

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.body(self, x, t)


def bodies() -> dict[str, Callable[..., Any]]:
    return {
        "after the first": lambda m, x, t: m.c(F.relu(m.b(F.relu(m.a(x) + m.wide(m.embed(t)))))),
        "twice the same": lambda m, x, t: m.c(m.b(m.a(x) + (v := m.wide(m.embed(t)))) - v),
        "two vectors": lambda m, x, t: (
            m.c(m.norm(m.b(F.relu(m.norm(m.a(x))) + m.wide(m.embed(t))))) + m.wide(m.other(t))
        ),
        "in a branch": lambda m, x, t: m.a(x + m.d(x + m.wide(m.other(t)))),
        "in a concatenation": lambda m, x, t: torch.cat([m.d(x), m.d(x).neg() * 0 + x, x + m.wide(m.other(t))], 1),
        "before a selection": lambda m, x, t: m.c(torch.cat((m.a(x) + m.wide(m.embed(t))).chunk(2, 1)[::-1], 1)),
        "in a difference": lambda m, x, t: x - m.d(F.silu(m.wide(m.other(t)) + m.d(x))),
    }


def inputs(ndim: int, batch: int = 2, size: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(batch, 4, *(size + i for i in range(ndim)), dtype=torch.float64, generator=generator)
    return x, torch.randn(batch, 5, dtype=torch.float64, generator=generator)


def composed(spans: SpanSet) -> list[Any]:
    return [c for c in spans if c.realization == "compose"]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("name", list(bodies()))
def test_merged_equals_trainable_with_vectors_from_the_side(name: str, ndim: int) -> None:
    torch.manual_seed(0)
    model = double(Sided(bodies()[name], ndim))
    gm = trace(model, inputs(ndim))
    spans = enumerate_spans(Network(gm), SpanOptions(realize=("compose",), max_kernel_size=None))
    for seed in range(4):
        plan = random_plan(spans, random.Random(seed))
        check_rewrite(model, inputs(ndim), plan, others=[inputs(ndim, 1, 11)], spans=spans)


def test_a_span_without_activations_is_the_same_function_of_the_map_and_of_the_vector() -> None:
    model = double(Sided(lambda m, x, t: m.c(m.norm(m.b(m.a(x) + m.wide(m.embed(t)))))))
    gm = trace(model, inputs(2))
    spans = enumerate_spans(Network(gm), SpanOptions(realize=("compose",), max_kernel_size=None))
    (whole,) = [c for c in composed(spans) if c.convs == ("a", "b", "c") and c.kept == c.convs]
    merged = merge(rewrite(gm, MergePlan((whole,))))
    for x in (inputs(2), inputs(2, 1, 13)):
        assert relative_error(run(model, x), run(merged, x)) <= 1e-12
    convs = [m for m in merged.modules() if isinstance(m, nn.Conv2d)]
    assert sorted(c.kernel_size for c in convs) == [(1, 1), (6, 6)]  # V, and the merged conv


def test_a_pruned_conv_takes_its_vector_with_it() -> None:
    model = double(Sided(lambda m, x, t: m.a(F.relu(m.d(x) + m.wide(m.other(t))))))
    gm = trace(model, inputs(2))
    spans = enumerate_spans(Network(gm), SpanOptions(realize=("compose",)))
    (pruned,) = [c for c in composed(spans) if c.convs == ("d", "a") and c.kept == ("a",)]
    merged = merge(rewrite(gm, MergePlan((pruned,))))
    assert not any("side" in name for name, _ in merged.named_modules())


def test_a_vector_that_gates_or_has_pixels_is_no_side_input_of_a_span() -> None:
    for body in (
        lambda m, x, t: m.d(m.d(x) * m.wide(m.other(t))),
        lambda m, x, t: m.d(m.d(x) + m.wide(m.other(t)).expand(-1, -1, 9, 1)),
        lambda m, x, t: m.d(m.wide(m.other(t)) - m.d(x)),
    ):
        spans = enumerate_spans(Network(trace(double(Sided(body)), inputs(2))), SpanOptions(realize=("compose",)))
        assert not [c for c in composed(spans) if len(c.kept) > 1]


def test_a_composed_candidate_is_scored_with_its_vector() -> None:
    # Nothing is removed but a norm's and a vector's place in the order, so the exact divergence is zero.
    model = Sided(lambda m, x, t: m.c(m.norm(m.b(m.a(x) + m.wide(m.embed(t)))))).eval()
    x = tuple(v.float() for v in inputs(2, 4))
    graph = lmfx.trace(model, x)
    spans = lmfx.spans(graph, realize=("compose",))
    table = lmfx.score(graph, spans=spans, calibration=x, exact=True, progress=False)
    whole = [c.key for c in composed(spans) if c.convs == ("a", "b", "c") and c.kept == c.convs]
    assert whole and all(abs(table[key]) <= 1e-9 for key in whole)


def test_a_timed_row_has_the_vectors_conv_and_sum() -> None:
    model = Sided(lambda m, x, t: m.c(F.relu(m.b(m.a(x) + m.wide(m.embed(t))))))
    spans = enumerate_spans(Network(trace(double(model), inputs(2))), SpanOptions(realize=("compose", "fit")))
    make = Workloads(spans.network)
    for kind in ("compose", "fit"):
        rows = {c.convs: make(c) for c in spans if c.realization == kind}
        sided, plain = rows[("a", "b")], rows[("b", "c")]
        assert sided is not None and len(sided.inputs) == 2 and "add(" in sided.signature
        assert plain is not None and len(plain.inputs) == 1 and "add(" not in plain.signature


def test_the_whole_pipeline_keeps_a_vector_from_the_side(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Sided(lambda m, x, t: m.c(F.silu(m.b(F.silu(m.a(x) + m.wide(m.embed(t))))))).eval()
    x = tuple(v.float() for v in inputs(2, 2, 16))
    net = lmfx.compress(model, x, 0.8, latency="roofline", realize=("compose",), progress=False)
    assert any("side" in name for name, _ in net.named_modules())
    lmfx.save(net, tmp_path / "out")
    assert torch.equal(run(lmfx.load(tmp_path / "out", model), x), run(net, x))
    lmfx.export_onnx(net, x, tmp_path / "net.onnx")  # compared with ONNX Runtime
    changed = run(net, (x[0], x[1] + 1.0))
    assert relative_error(run(net, x), changed) > 1e-3  # the vector still matters


def test_the_matrices_of_vectors_are_where_they_are_asked_for() -> None:
    """On a device without memory, so that one that is made elsewhere is seen."""
    meta = torch.device("meta")
    plain = AffineChain([SideAdd(0, 3, -1.0)])
    for chain in (plain, AffineChain([plain]), AffineChain([AffineChain([plain]), nn.Conv2d(3, 4, 1, device=meta)])):
        (matrix,) = chain.side_maps(3, 2, meta).values()
        assert matrix.device == meta and matrix.shape == (len(matrix), 3)
    (matrix,) = plain.side_maps(3, 2, None).values()
    assert torch.equal(matrix, -torch.eye(3, dtype=torch.float64))
