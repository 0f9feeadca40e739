"""Exactness where pads meet crops: which of them one conv with all its padding in front does as well."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, enumerate_spans
from lmfx.passes.spans.layers import Network
from tests.helpers import double


class Sum(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (b(x) for b in self.branches)
        return first + second


class Crop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 1:-1, 1:-1]


class Strided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::2]


class StridedFromOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 1::2, 1::2]


class CropLastStrided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :-1:2, :-1:2]


class Pad(nn.Module):
    """Pads or crops by F.pad."""

    def __init__(self, *pads: int) -> None:
        super().__init__()
        self.pads = pads

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads)


class Roll(nn.Module):
    """Takes pixels of one side to the other."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 0, 1, 0), mode="circular")[:, :, :-1, :-1]


def conv(k: int, p: int, bias: bool = False, s: int = 1, mode: str = "zeros") -> nn.Module:
    return nn.Conv2d(4, 4, k, s, p, bias=bias, padding_mode=mode)


# name -> layers, and whether all of them together are one conv (None: they are, and it is refused)
CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], bool | None]] = {
    "a crop before a padded conv": (lambda: [Crop(), conv(3, 1)], False),
    "a crop before a conv that does not pad": (lambda: [Crop(), conv(3, 0)], True),
    "a negative pad before a padded conv": (lambda: [Pad(-1, -1, -1, -1), conv(3, 1)], False),
    "a negative pad on one side before a padded conv": (lambda: [Pad(0, -1, 0, 0), conv(3, 1)], False),
    "a pad on one side, a crop on the other": (lambda: [Pad(1, -1, 1, -1), conv(3, 1)], False),
    "a pad on one side, a crop on the other, no pad after": (lambda: [Pad(1, -1, 1, -1), conv(3, 0)], True),
    "a crop after a padded conv": (lambda: [conv(3, 1), Crop()], True),
    "a crop of more than the pad": (lambda: [conv(3, 1), Pad(-2, -2, -2, -2)], True),
    "a crop after a padded conv, then a pad": (lambda: [conv(3, 1), Crop(), conv(3, 1)], False),
    "a crop that takes a pixel conv's pad away": (lambda: [conv(1, 1), Crop(), conv(3, 1)], True),
    "the same with a bias": (lambda: [conv(1, 1, bias=True), Crop(), conv(3, 1)], False),
    "a crop of less than the pad": (lambda: [Pad(2, 2, 2, 2), Crop(), conv(3, 1)], True),
    "a crop before a pad of its own": (lambda: [Crop(), Pad(1, 1, 1, 1), conv(3, 0)], False),
    "every second pixel before a padded conv": (lambda: [Strided(), conv(3, 1)], True),
    "every second pixel but the first, before a pad": (lambda: [StridedFromOne(), Pad(1, 0, 1, 0), conv(3, 0)], True),
    "every second pixel without the last, before a pad": (lambda: [CropLastStrided(), conv(3, 1)], None),
    "a padded conv of stride two, cropped": (lambda: [conv(3, 1, s=2), Crop()], True),
    "a reflected pad after a crop": (lambda: [Crop(), conv(3, 1, mode="reflect")], False),
    "a replicated pad after a crop": (lambda: [Crop(), conv(3, 1, mode="replicate")], False),
    "a crop after a reflected pad": (lambda: [conv(3, 1, mode="reflect"), Crop()], None),
    "a crop in one branch of a sum": (lambda: [Sum(conv(3, 0), Crop()), conv(1, 0)], True),
    "a crop in one branch, then a pad": (lambda: [Sum(conv(3, 0), Crop()), conv(3, 1)], False),
    "a crop and a pad in one branch": (lambda: [Sum(conv(3, 1), nn.Sequential(Crop(), conv(3, 2))), Crop()], False),
}


@pytest.mark.parametrize("size", [(11, 13), (12, 10)])
@pytest.mark.parametrize("name", CHAINS)
def test_a_span_is_called_exact_only_if_it_is_the_model_at_the_border(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    make, whole = CHAINS[name]
    model = double(nn.Sequential(*make()))
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    graph = lmfx.trace(model, x)
    found = []
    for c in enumerate_spans(Network(graph, fine=True), SpanOptions(realize=("compose",), max_kernel_size=None)):
        if c.realization != "compose" or len(c.kept) < len(c.all_convs):
            continue
        student = rewrite(graph, lmfx.MergePlan((c,), fine=True))
        with torch.no_grad():
            expected, trained, merged = model(x), student(x), merge(student)(x)
        assert (trained - merged).abs().max() < 1e-12
        error = float((merged - expected).abs().max() / expected.abs().max())
        assert not c.exact or error < 1e-12, (c.key, error)
        if c.span.entry == graph.graph.find_nodes(op="placeholder")[0].name and c.span.exit == _last(graph):
            found.append(c.exact)
            assert c.exact == bool(whole) and (c.exact or whole is None or error > 1e-6), (c.key, error)
    assert found or not whole


def _last(graph: Any) -> str:
    return str(graph.graph.output_node().all_input_nodes[0].name)


@pytest.mark.parametrize("name", CHAINS)
def test_simplify_takes_exactly_these(name: str) -> None:
    torch.manual_seed(0)
    make, whole = CHAINS[name]
    model = double(nn.Sequential(*make()))
    before = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    net = lmfx.simplify(model, torch.randn(2, 4, 12, 10, dtype=torch.float64), growth=math.inf)
    after = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert after == 1 if whole else after <= before
    for size in ((12, 10), (11, 13), (25, 18)):
        x = torch.randn(1, 4, *size, dtype=torch.float64)
        with torch.no_grad():
            assert (net(x) - model(x)).abs().max() < 1e-12


def test_a_roll_before_a_circular_pad_is_exact() -> None:
    model = double(nn.Sequential(Roll(), conv(3, 1, mode="circular")))
    net = lmfx.simplify(model, torch.randn(1, 4, 9, 9, dtype=torch.float64))
    x = torch.randn(1, 4, 8, 11, dtype=torch.float64)
    with torch.no_grad():
        assert (net(x) - model(x)).abs().max() < 1e-12


@pytest.mark.parametrize("joined", [False, True])
def test_a_crop_on_one_side_of_a_circular_pad_is_a_refusal_and_no_error(joined: bool) -> None:
    padded = conv(3, 1, mode="circular")
    first = Sum(padded, conv(3, 1, mode="circular")) if joined else padded
    model = double(nn.Sequential(first, Pad(0, -3, 0, 0), conv(3, 1)))
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    net = lmfx.simplify(model, x)
    assert "fills the rest from the map itself" in str(lmfx.report(net, full=True))
    with torch.no_grad():
        assert (net(x) - model(x)).abs().max() < 1e-12
    for fine in (False, True):
        assert enumerate_spans(Network(lmfx.trace(model, x), fine=fine)).candidates
