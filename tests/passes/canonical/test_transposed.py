"""Transposed convolutions: those of stride 1 are convolutions, the others are kept and say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmfx.passes.canonical.transposed import as_conv
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.spans.enumeration import SpanOptions, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, check_trace, double, run

KINDS: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"padding": 1}, {"dilation": 2, "padding": 3}, {"bias": False, "padding": 2}], ids=str
)
def test_stride_one_is_a_convolution(ndim: int, groups: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = KINDS[ndim - 1](4, 8, (3, 4, 3)[:ndim], groups=groups, **options).double()
    x = torch.randn(2, 4, *(7, 6, 5)[:ndim], dtype=torch.float64)
    conv = as_conv(module)
    assert conv is not None
    assert relative_error(run(module, x), run(conv, x)) <= 1e-14


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 3}, {"stride": 2, "output_padding": 1}], ids=str)
def test_what_enlarges_or_crops_is_traced_as_it_is(options: dict[str, Any]) -> None:
    module = nn.ConvTranspose2d(4, 4, 3, **options)
    assert as_conv(module) is None
    model = double(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), module, nn.Conv2d(4, 4, 3)))
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    check_trace(model, x, ["Conv2d", "ReLU", "ConvTranspose2d", "Conv2d"])


def test_a_transposed_conv_is_composed_with_its_neighbours() -> None:
    up = nn.ConvTranspose2d(4, 5, 3, padding=1)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), up, nn.ReLU(), nn.Conv2d(5, 4, 1)
    model = double(nn.Sequential(*layers))
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    check_trace(model, x, ["Conv2d", "BatchNorm2d", "Conv2d", "ReLU", "Conv2d"])
    spans = enumerate_spans(Network(trace(model, x)), SpanOptions(realize=("compose",)))
    whole = [c for c in spans if c.kept == ("0", "2", "4")]
    assert whole and whole[0].conv is not None and whole[0].conv.kernel_size == (5, 5)
    check_rewrite(model, x, lambda s: whole[:1], spans=spans, edits=1)


def test_one_that_is_called_twice_stays_shared_and_the_model_stays_as_it_was() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(torch.relu(self.up(x)))

    model = double(Twice())
    gm = trace(model, torch.randn(1, 3, 6, 6, dtype=torch.float64))
    calls = [n for n in gm.graph.nodes if n.op == "call_module" and str(n.target) == "up"]
    assert len(calls) == 2 and set(Network(gm).shared) == {n.name for n in calls}
    assert isinstance(model.up, nn.ConvTranspose2d)


def test_a_size_that_is_asked_for_is_not_lost() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[x.shape[2] + 2, x.shape[3] + 2])

    check_trace(double(Sized()), torch.randn(1, 3, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_one_stays_frozen(frozen: bool) -> None:
    conv = as_conv(nn.ConvTranspose2d(3, 4, 3).requires_grad_(not frozen))
    assert conv is not None
    assert [p.requires_grad for p in conv.parameters()] == [not frozen] * 2
