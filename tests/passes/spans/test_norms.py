"""Norms whose statistics come from the map: kept at a cut, replaced by an affine op inside a composed span."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lmfx
from lmfx.calibration.images import as_calibration
from lmfx.calibration.surrogates import affine_surrogates
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import double, run


def net(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    modules = (nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 6, 2), nn.ReLU(), nn.Conv2d(6, 4, 1))
    model = double(nn.Sequential(*modules))
    for parameter in norm.parameters():
        parameter.data.uniform_(0.5, 1.5)
    return model


def two(spans: SpanSet) -> MergePlan:
    return MergePlan(tuple(c for c in spans if c.convs == ("0", "2") and c.realization == "compose")[-1:])


X = torch.randn(1, 3, 11, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_on_one_image_the_surrogate_of_a_norm_of_each_channel_is_exact() -> None:
    model = net(nn.InstanceNorm2d(6, affine=True))
    gm = trace(model, X)
    spans = enumerate_spans(Network(gm), SpanOptions(realize=("compose",)))
    surrogates = affine_surrogates(spans.network, as_calibration(X, X))
    student = rewrite(gm, two(spans), surrogates)
    assert any(isinstance(m, LinearSpan) for m in student.modules())
    assert relative_error(run(model, X), run(merge(student), X)) <= 1e-12  # nothing pads, nothing else is removed


@pytest.mark.parametrize("affine", [True, False])
def test_without_calibration_a_norm_keeps_its_own_scale_and_bias(affine: bool) -> None:
    model = net(nn.GroupNorm(2, 6, affine=affine))
    gm = trace(model, X)
    spans = enumerate_spans(Network(gm), SpanOptions(realize=("compose",)))
    student = rewrite(gm, two(spans))
    own = nn.Sequential(*(m for i, m in enumerate(model) if i != 1))  # type: ignore[arg-type]
    if affine:
        weight, bias = (p.detach().view(1, -1, 1, 1) for p in (model[1].weight, model[1].bias))  # type: ignore[index]
        expected = run(own[1:], run(own[0], X) * weight + bias)
    else:
        expected = run(own, X)
    assert relative_error(expected, run(merge(student), X)) <= 1e-12


def test_a_norm_at_the_end_of_a_span_stays() -> None:
    model = net(nn.GroupNorm(2, 6))
    gm = trace(model, X)
    spans = enumerate_spans(Network(gm), SpanOptions(realize=("fit",)))
    (candidate, *_) = [c for c in spans if c.convs == ("0",) and c.realization == "fit" and c.span.activation == "_1"]
    merged = rewrite(gm, MergePlan((candidate,)))
    assert any(isinstance(m, nn.GroupNorm) for m in merged.modules())


def test_a_network_of_group_norms_is_composed_end_to_end() -> None:
    torch.manual_seed(0)
    blocks = [m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks).eval()
    x = torch.randn(2, 3, 20, 20)
    merged = lmfx.compress(model, x, 0.7, latency="roofline", realize=("compose",), progress=False)
    assert run(merged, x).shape == run(model, x).shape
    assert sum(isinstance(m, nn.GroupNorm) for m in merged.modules()) < 4
