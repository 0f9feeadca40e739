"""Convolutions that read one value become one: the same function, fewer convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.rewrite.siblings import merge_siblings
from lmfx.passes.trace.tracing import trace
from tests.helpers import assert_unchanged, double, ops_of, run, snapshot

X = torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Cell(nn.Module):
    """1 x 1 convs that read one value, each with its norm and activation, before different branches."""

    def __init__(self, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.a, self.b, self.c = (self.conv(width, 1, act) for width in (3, 5, 2))
        self.wide = nn.Conv2d(5, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 3, 3, padding=1)

    @staticmethod
    def conv(width: int, kernel: int, act: Callable[[], nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, width, kernel, bias=False), nn.BatchNorm2d(width), act())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.wide(self.b(x)), self.c(x), self.other(x)], 1)


def test_equal_convs_of_one_value_are_one_and_their_activation_too() -> None:
    model = double(Cell())
    gm = trace(model, X)
    before, text = snapshot(gm), gm.code
    merged = merge_siblings(gm)
    assert_unchanged(before, gm)
    assert gm.code == text
    assert relative_error(run(model, X), run(merged, X)) <= 1e-13
    words = ops_of(merged)
    assert words.count("Conv2d") == 3 and words.count("ReLU") == 1 and words.count("ChannelSelect") == 3
    assert "BatchNorm2d" not in words


def test_different_activations_stay_behind_the_split() -> None:
    model = double(Cell())
    model.b[2] = nn.SiLU()
    merged = merge_siblings(trace(model, X))
    assert relative_error(run(model, X), run(merged, X)) <= 1e-13
    words = ops_of(merged)
    assert words.count("Conv2d") == 3 and words.count("ReLU") == 2 and words.count("SiLU") == 1


def test_an_activation_with_parameters_stays_behind_the_split() -> None:
    model = double(Cell(lambda: nn.PReLU()))
    merged = merge_siblings(trace(model, X))
    assert relative_error(run(model, X), run(merged, X)) <= 1e-13
    assert ops_of(merged).count("PReLU") == 3


class Two(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module, body: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.a, self.b = a, b
        self.body = body or (lambda m, x: (m.a(x), m.b(x)))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def conv(width: int = 4, kernel: int = 3, **options: Any) -> nn.Module:
    return nn.Conv2d(4, width, kernel, **options)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Two(conv(kernel=3), conv(kernel=1)), "kernels"),
        (Two(conv(stride=1), conv(stride=2)), "strides"),
        (Two(conv(padding=1), conv(padding=0)), "paddings"),
        (Two(conv(groups=2), conv(groups=2)), "groups"),
        (Two(conv(padding=1, padding_mode="reflect"), conv(padding=1)), "padding modes"),
        (Two(conv(), conv(), lambda m, x: (m.a(x), m.a(x * 2))), "other values"),
        (Two(conv(), conv(), lambda m, x: (m.a(x), m.b(x), m.a(x * 2))), "a shared conv"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_convs_that_differ_are_left(model: nn.Module, why: str) -> None:
    model = double(model)
    gm = trace(model, X)
    merged = merge_siblings(gm)
    assert ops_of(merged) == ops_of(gm), why


def test_a_value_between_conv_and_norm_that_is_read_is_kept() -> None:
    model = double(Two(conv(), conv(), lambda m, x: (m.norm(y := m.a(x)), y, m.b(x))))
    model.norm = double(nn.Sequential(nn.BatchNorm2d(4)))[0]
    merged = merge_siblings(trace(model, X))
    expected, actual = run(model, X), run(merged, X)
    assert all(relative_error(e, a) <= 1e-13 for e, a in zip(expected, actual, strict=True))
    assert ops_of(merged).count("Conv2d") == 1 and ops_of(merged).count("BatchNorm2d") == 1


@pytest.mark.parametrize("ndim", [1, 3])
def test_other_numbers_of_dimensions(ndim: int) -> None:
    make: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
    model = double(Two(make(4, 3, 2), make(4, 6, 2)))
    x = torch.randn(1, 4, *(5, 6, 4)[:ndim], dtype=torch.float64)
    merged = merge_siblings(trace(model, x))
    assert all(relative_error(e, a) <= 1e-13 for e, a in zip(run(model, x), run(merged, x), strict=True))
    assert ops_of(merged) == [f"Conv{ndim}d", "ChannelSelect", "ChannelSelect"]


def test_a_compressed_network_is_merged_further_and_exported(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Cell(), nn.ReLU(), nn.Conv2d(12, 4, 3)).eval()
    x = torch.randn(2, 3, 16, 16)
    net = lmfx.compress(model, x, 1.0, latency="roofline", progress=False)
    merged = lmfx.merge_siblings(net)
    assert relative_error(run(net, x), run(merged, x)) <= 1e-5
    lmfx.export_onnx(merged, x, tmp_path / "net.onnx")
    assert "lmfx" not in merged.meta and "lmfx" in net.meta


def test_anything_but_a_graph_is_refused() -> None:
    with pytest.raises(lmfx.InputError, match="merge_siblings takes a network from lmfx.compress or lmfx.trace"):
        lmfx.merge_siblings(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]
