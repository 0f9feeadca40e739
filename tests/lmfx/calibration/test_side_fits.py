"""Vectors from the side are fitted with the conv: what they say about an image is not lost with the span."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from lmfx.calibration.fitting import fit_groups
from lmfx.calibration.images import Calibration
from lmfx.calibration.plan_fits import fit_plan
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.errors import InputError
from lmfx.passes.fit.closed_form import Gram, evaluate, solve
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.span_modules import span_sides
from lmfx.passes.rewrite.trainable import merge, rewrite, span_names
from lmfx.passes.spans.enumeration import SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import run
from tests.passes.algebra.test_sides import Sided, inputs


def spans_and_data(model: nn.Module, images: int = 48, size: int = 9) -> tuple[SpanSet, tuple[Tensor, Tensor]]:
    data = inputs(2, images, size)
    return enumerate_spans(Network(trace(model.double().eval(), data))), data


def pick(spans: SpanSet, convs: tuple[str, ...], size: int, depthwise: bool = False) -> Candidate:
    found = [c for c in spans if c.realization == "fit" and c.convs == convs and c.conv is not None]
    alike = [c for c in found if c.conv and c.conv.kernel_size == (size, size) and (c.conv.groups > 1) == depthwise]
    one = min(alike, key=lambda c: c.span.stop)  # another one takes the activation after it, too
    return one


def fitted(spans: SpanSet, candidate: Candidate, data: tuple[Tensor, ...]) -> Any:
    plan = MergePlan((candidate,))
    return fit_plan(spans.network, rewrite(spans.network.gm, plan), plan, Calibration(data))


def affine() -> Sided:
    """`a`, a vector, `b`: affine in the map and in the vector. The ReLU after them ends the span."""
    torch.manual_seed(0)
    return Sided(lambda m, x, t: m.c(F.relu(m.b(m.a(x) + m.wide(m.embed(t))))))


def test_a_span_that_is_affine_in_map_and_vector_is_recovered_and_merges_exactly() -> None:
    model = affine()
    spans, data = spans_and_data(model)
    candidate = pick(spans, ("a", "b"), 5)
    assert span_sides(spans.network, candidate)
    net = fitted(spans, candidate, data)
    fresh = inputs(2, 6, 12)
    # The vectors are damped as their few samples ask for, so this is close, not exact.
    assert relative_error(run(model, fresh), run(net, fresh)) < 0.15
    assert relative_error(run(net, fresh), run(merge(net), fresh)) < 1e-12
    name = span_names(spans.network.gm, MergePlan((candidate,)))[0]
    span: Any = net.get_submodule(name)
    assert isinstance(span, LinearSpan)
    with torch.no_grad():
        span.body[1].weight.zero_()
    assert relative_error(run(model, fresh), run(net, fresh)) > 0.3  # so much was in the vector


def test_more_images_bring_the_vectors_matrix_nearer() -> None:
    model = affine()
    errors = []
    for images in (12, 48, 384):
        spans, data = spans_and_data(model, images)
        net = fitted(spans, pick(spans, ("a", "b"), 5), data)
        errors.append(relative_error(run(model, inputs(2, 6, 12)), run(net, inputs(2, 6, 12))))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02


def test_a_depthwise_fit_takes_the_vector_too() -> None:
    torch.manual_seed(0)
    model = Sided(lambda m, x, t: m.a(F.relu(m.d(m.d(x) + m.wide(m.other(t))))))
    for i in (0, 1, 2, 3):  # a depthwise conv, as a dense one
        model.d.weight.data[i, [j for j in range(4) if j != i]] = 0
    spans, data = spans_and_data(model, 256)
    net = fitted(spans, pick(spans, ("d", "d"), 5, True), data)
    # Its corners see less padding than two convs do.
    assert relative_error(run(model, inputs(2, 6, 24)), run(net, inputs(2, 6, 24))) < 0.15


def test_a_vector_that_no_image_changes_is_no_trouble() -> None:
    model = affine()
    data = inputs(2, 16)
    held = (data[0], data[1][:1].expand(16, -1).contiguous())
    spans = enumerate_spans(Network(trace(model.double().eval(), held)))
    net = fitted(spans, pick(spans, ("a", "b"), 5), held)
    assert relative_error(run(model, held), run(net, held)) < 1e-6


def test_conjugate_gradients_fit_the_vectors_to_what_they_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    model = affine()
    spans, data = spans_and_data(model, 128)
    candidate = pick(spans, ("a", "b"), 5)
    whole = run(fitted(spans, candidate, data), data)
    monkeypatch.setattr("lmfx.calibration.fitting.MAX_UNKNOWNS", 10)
    monkeypatch.setitem(__import__("lmfx.calibration.fitting", fromlist=["x"]).CG_IMAGES, False, 128)
    # Not both at once, so it is near the joint fit, not equal to it; without the vector it would be 0.3 off.
    assert relative_error(whole, run(fitted(spans, candidate, data), data)) < 0.15


def test_groups_have_one_set_of_vectors_and_name_what_they_need() -> None:
    spans, _ = spans_and_data(affine())
    fits = [c for c in spans if c.realization == "fit"]
    for group in fit_groups(spans.network, fits):
        assert {span_sides(spans.network, c) for c in group.candidates} == {group.sides}
        assert set(group.sides) < group.names
    assert any(g.sides for g in fit_groups(spans.network, fits))


def test_a_fit_that_is_exact_in_map_and_vector_scores_near_zero() -> None:
    model = affine().eval()
    x = tuple(v.float() for v in inputs(2, 256))
    graph = lmfx.trace(model, x)
    spans = lmfx.spans(graph)
    table = lmfx.score(graph, spans=spans, calibration=x, progress=False, exact=True)
    assert table[pick(spans, ("a", "b"), 5).key] > -1e-3


def test_sums_refuse_vectors_of_another_width_and_judge_convs_without_them() -> None:
    x = torch.randn(8, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram = Gram(2, (1, 1), (1, 1), ((0, 0), (0, 0)), {"y": 2}, sides=3)
    for wrong in (None, v[:, :2], v[:4]):
        with pytest.raises(InputError, match="vectors"):
            gram.update(x, {"y": x}, vectors=wrong)
    gram.update(x, {"y": 2 * x + v[:, :2, None, None]}, vectors=v)
    found = solve(gram, "y", (1, 1), damping=0.0)
    assert found.side is not None and found.side.shape == (2, 3)
    seen = evaluate(gram, "y", 2 * torch.eye(2, dtype=torch.float64)[:, :, None, None], v[:, :2].mean(0))
    assert torch.allclose(seen, (v[:, :2] - v[:, :2].mean(0)).square().mean(0))
