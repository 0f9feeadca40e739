"""Which channels only one span sees, and at which widths it is offered."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.spans.narrowing import widths_of
from tests.helpers import spans_of


def found(model: nn.Module, x: Tensor | None = None, **options: Any) -> SpanSet:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 12, 10) if x is None else x
    return spans_of(model.eval(), example, realize=("narrow",), **options)


def cuts(spans: SpanSet) -> dict[str, tuple[str, ...]]:
    """reader -> producers, by module names."""
    network = spans.network
    return {
        network.path(r): tuple(network.path(p) for p in cut.space.producers)
        for r, cut in network.narrowing.cuts.items()
    }


def why(spans: SpanSet) -> str:
    return "; ".join(r.reason for r in spans.refusals if r.reason.startswith("not narrowed"))


def conv(i: int, o: int, k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Gated(nn.Module):
    """An inverted residual with a squeeze-excite gate."""

    def __init__(self, pixels: bool = False) -> None:
        super().__init__()
        self.expand, self.norm = conv(3, 32), nn.BatchNorm2d(32)
        self.deep = conv(32, 32, 3, groups=32)
        self.squeeze, self.excite = conv(32, 8), conv(8, 32)
        self.project = conv(32, 3)
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(self.norm(self.expand(x)).relu())
        pooled = y if self.pixels else y.mean((2, 3), keepdim=True)
        return x + self.project(y * self.excite(self.squeeze(pooled).relu()).sigmoid())


def test_an_inverted_residual_is_narrowed_with_its_gate() -> None:
    spans = found(Gated())
    assert cuts(spans) == {"project": ("expand", "excite"), "excite": ("squeeze",)}
    space = next(c.space for r, c in spans.network.narrowing.cuts.items() if spans.network.path(r) == "project")
    assert [spans.network.path(g) for g in space.gates] == ["squeeze"]
    assert [c.cuts[0].width for c in spans if c.cuts and c.cuts[0].reader == "project"] == [8, 16, 24]


def test_what_reads_all_pixels_beside_the_reader_is_no_gate() -> None:
    assert "2 convs read the channels" in why(found(Gated(pixels=True)))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_chains_of_any_dimension_are_narrowed(kind: Any) -> None:
    ndim = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    model = nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 8, 3), nn.ReLU(), kind(8, 4, 1))
    spans = found(model, torch.randn((2, 3, *[9] * ndim)))
    assert cuts(spans) == {"2": ("0",), "4": ("2",)}
    both = [tuple(cut.width for cut in c.cuts) for c in spans if len(c.cuts) == 2]
    assert (2, 2) in both and (4, 6) in both and (2, 6) not in both, "pairs are about alike"


def test_linears_on_vectors_are_narrowed() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 4))
    assert cuts(found(model)) == {"4": ("2",)}


def test_groups_stay_or_go_as_a_whole() -> None:
    grouped = nn.Sequential(
        conv(3, 32), nn.ReLU(), conv(32, 64, 3, groups=8), nn.GroupNorm(8, 64), nn.ReLU(), conv(64, 3)
    )
    spans = found(grouped)
    (cut,) = spans.network.narrowing.cuts.values()
    assert (cut.space.units, cut.space.per_unit, cut.space.of) == (8, 8, 64)
    assert all(w % 8 == 0 for w in cut.widths)


def test_shuffles_and_concatenations_are_followed() -> None:
    class Fire(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 16), conv(3, 16, 3), conv(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([self.a(x), self.b(x)], 1).relu()
            return self.c(nn.functional.channel_shuffle(y, 4))

    spans = found(Fire())
    assert cuts(spans) == {"c": ("a", "b")}


def test_channels_that_others_see_are_refused_with_the_reason() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 16), conv(16, 16), conv(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return self.c((y + self.b(y)).relu())

    class Returned(Residual):
        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return self.b(y), y

    class Mixed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y.amax(1, keepdim=True)

    class Layered(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(1, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)))

    assert "2 convs read the channels" in why(found(Residual()))
    assert "returns these channels" in why(found(Returned()))
    assert "amax does not keep channels apart" in why(found(Mixed()))
    assert "all of the channels go together" in why(found(Layered()))


def test_a_module_that_is_called_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = conv(3, 16), conv(16, 3), nn.BatchNorm2d(16)
            self.c = conv(3, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)).relu()) + self.b(self.norm(self.c(x)).relu())

    assert "called elsewhere" in why(found(Twice()))


def test_dense_blocks_are_no_private_channels() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 16), conv(16, 16), conv(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.c(torch.cat([y, self.b(y).relu()], 1))

    assert "read the channels" in why(found(Dense()))


def test_options_bound_what_is_offered() -> None:
    model = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 3))
    assert {c.realization for c in found(model)} == {"keep", "narrow"}
    assert not any(c.cuts for c in found(model, exclude=("2",)))
    assert "max_fit_unknowns" in why(found(model, max_fit_unknowns=8))
    for method in ("depth", "layeronly"):
        options: Any = {"method": method}
        assert not any(c.cuts for c in spans_of(model.eval(), torch.randn(1, 3, 8, 8), **options))


def test_widths_are_on_the_grid_of_runtimes() -> None:
    assert widths_of(144) == (16, 32, 56, 72, 88, 112, 128)
    assert widths_of(16) == (4, 8, 12) and widths_of(4) == (1, 2, 3) and widths_of(2) == (1,)
    assert widths_of(64, 16) == (16, 32, 48) and widths_of(1) == () and widths_of(12, 12) == ()


class SideBySide(nn.Module):
    """Two convs whose channels lie side by side, of which one makes a single channel."""

    def __init__(self, few: int) -> None:
        super().__init__()
        self.wide, self.few, self.head = conv(3, 16), conv(3, few), conv(16 + few, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.wide(x), self.few(x)], 1).relu())


@pytest.mark.parametrize("few", [1, 2])
def test_every_conv_whose_channels_lie_beside_others_keeps_one(few: int) -> None:
    spans = found(SideBySide(few))
    (cut,) = spans.network.narrowing.cuts.values()
    assert len(cut.space.parts) == 2 and min(cut.widths) >= 2
    alone = frozenset(range(16, 16 + few))
    for worth in ([0.0] * cut.space.units, [float(u) for u in range(cut.space.units)]):
        stay = cut.space.indispensable(worth)
        assert len(stay & alone) == 1 and len(stay - alone) == 1
    assert max(cut.space.indispensable([float(u == 5) for u in range(cut.space.units)]) - alone) == 5


class ManySides(nn.Module):
    """Eight convs of two channels each, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.sides, self.head = nn.ModuleList(conv(3, 2) for _ in range(8)), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([side(x) for side in self.sides], 1).relu())


def test_no_width_is_below_the_number_of_convs_whose_channels_lie_beside_others() -> None:
    (cut,) = found(ManySides()).network.narrowing.cuts.values()
    assert widths_of(16) == (4, 8, 12) and cut.widths == (8, 12)


class Squeezed(nn.Module):
    """A head after a squeeze, of all dimensions of one or of those that are written."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.a, self.b, self.head, self.dims = conv(3, 8), conv(8, 8), nn.Linear(8, 2), dims

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).relu().mean((2, 3), keepdim=True)
        return self.head(y.squeeze(-1).squeeze(-1) if self.dims else y.squeeze())


def test_a_squeeze_without_dimensions_would_take_the_last_channel_too() -> None:
    assert set(cuts(found(Squeezed(-1)))) == {"b", "head"}
    assert set(cuts(found(Squeezed()))) == {"b"}


class Counting(nn.Module):
    """Works with how many channels `a` makes, in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.other, self.way = conv(3, 16), conv(16, 3), conv(3, 16), way
        self.squeeze, self.excite = nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        b, c, h, w = y.shape
        if self.way == "scale":
            return self.b(y) * c**-0.5
        if self.way == "other value":
            return self.b(y).sum() + self.other(x).reshape(b, c, h, w)
        if self.way == "shape":
            return self.b(y).sum() + torch.zeros(y.shape)
        if self.way == "chance":
            return self.b(y * y.mean((2, 3), keepdim=True).view(b, h, 1, 1))
        if self.way == "size":
            return self.b(y) / y.size(1)
        if self.way == "mixing":
            return self.b(y.reshape(b, -1, c).transpose(1, 2).reshape(b, c, h, w))
        if self.way == "gate":
            gate = self.excite(self.squeeze(y.mean((2, 3)).view(b, c)).relu()).sigmoid().view(b, c, 1, 1)
            return self.b(y * gate)
        return self.b(y) + torch.zeros(y.shape[-2:])


@pytest.mark.parametrize("way", ["scale", "other value", "shape", "size", "mixing"])
def test_channels_whose_number_is_worked_with_are_refused(way: str) -> None:
    spans = found(Counting(way))
    assert "a" not in {p for producers in cuts(spans).values() for p in producers}
    assert way == "mixing" or "works with how many channels" in why(spans)


def test_another_size_that_is_the_number_of_channels_by_chance_is_none() -> None:
    """The image is as high as the map has channels, and with fewer channels it still would be."""
    spans = found(Counting("chance"), torch.randn(2, 3, 16, 10))
    assert "a" not in {p for producers in cuts(spans).values() for p in producers}


@pytest.mark.parametrize("way", ["gate", "map"])
def test_a_number_of_channels_may_be_read_for_a_reshape_that_loses_the_same(way: str) -> None:
    assert cuts(found(Counting(way)))["b"] == (("a", "excite") if way == "gate" else ("a",))


class Headed(nn.Module):
    """A classifier that reads all pixels of a map, which a reshape lays side by side."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.head = conv(3, 16), nn.Linear(16 * size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).relu().view(x.size(0), -1))


def test_pixels_side_by_side_stay_or_go_with_their_channel() -> None:
    spans = found(Headed(120))
    assert cuts(spans) == {"head": ("a",)}
    assert spans.network.narrowing.cuts["head"].space.per_unit == 120
