"""Borders that a network writes by hand: which of them are a pad before the norm, so that a diverse branch block is one
convolution as it was published."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from tests.helpers import double, ops_of


class NormAndPad(nn.Module):
    """A norm, a pad, and a border of what `border` says."""

    def __init__(self, channels: int, pad: int, wrong: str = "") -> None:
        super().__init__()
        self.bn, self.pad, self.wrong = nn.BatchNorm2d(channels), pad, wrong

    def forward(self, x: Tensor) -> Tensor:
        y, p = self.bn(x), self.pad
        scale = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)
        border = (self.bn.bias - self.bn.running_mean * scale).view(1, -1, 1, 1)
        if self.wrong == "value":
            border = border + 1e-3
        before = y
        y = F.pad(y, [p] * 4)
        padded = y.mean() if self.wrong == "the pad is read" else 0.0
        wide = p + (self.wrong == "width")
        y[:, :, 0:wide, :] = border
        y[:, :, -p:, :] = border
        y[:, :, :, 0:p] = border
        if self.wrong != "side":
            y[:, :, :, -p:] = border
        if self.wrong == "the norm is read":
            return y + F.pad(before, [p] * 4)
        return y + padded if self.wrong == "the pad is read" else y


class PixelConvAndPad(nn.Module):
    """The same after a convolution with a bias."""

    def __init__(self, channels: int, pad: int) -> None:
        super().__init__()
        self.conv, self.pad = nn.Conv2d(channels, channels, 1), pad

    def forward(self, x: Tensor) -> Tensor:
        y, p = F.pad(self.conv(x), [self.pad] * 4), self.pad
        assert self.conv.bias is not None
        border = self.conv.bias.view(1, -1, 1, 1)
        y[:, :, :p] = border
        y[:, :, -p:] = border
        y[..., :p] = border
        y[..., -p:] = border
        return y


def block(pad: nn.Module, k: int) -> nn.Module:
    first = [] if isinstance(pad, PixelConvAndPad) else [nn.Conv2d(4, 4, 1, bias=False)]
    return nn.Sequential(*first, pad, nn.Conv2d(4, 4, k, bias=False), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize(
    ("make", "k"),
    [(lambda: NormAndPad(4, 1), 3), (lambda: NormAndPad(4, 2), 5), (lambda: PixelConvAndPad(4, 1), 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_border_of_what_the_norm_makes_of_zeros_is_a_pad(
    make: Callable[[], nn.Module], k: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = double(block(make(), k)).to(dtype)
    net = lmfx.simplify(model, torch.randn(1, 4, 11, 13, dtype=dtype))
    assert ops_of(net) == ["Conv2d", "ReLU"]
    assert "in float64" in lmfx.result_of(net).checked
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for size in ((11, 13), (8, 16)):
        x = torch.randn(2, 4, *size, dtype=dtype)
        with torch.no_grad():
            expected = model(x)
            assert (net(x) - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("wrong", ["value", "side", "width", "the norm is read", "the pad is read"])
def test_any_other_border_stays(wrong: str) -> None:
    torch.manual_seed(0)
    model = double(block(NormAndPad(4, 1, wrong), 3))
    x = torch.randn(1, 4, 11, 13, dtype=torch.float64)
    net = lmfx.simplify(model, x)
    assert ops_of(net).count("Conv2d") == 2
    with torch.no_grad():
        expected = model(x)
        assert (net(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
