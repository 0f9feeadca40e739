"""All loss-free merges: what is one conv afterwards, what is refused and why, and that it is the same function."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import fingerprint
from tests.helpers import double, ops_of

N = nn.BatchNorm2d


class Sum(nn.Module):
    """Branches that read one value, summed, with an activation."""

    def __init__(self, *branches: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return self.act(total)


class Cat(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([b(x) for b in self.branches], 1)


def conv(i: int, o: int, k: int | tuple[int, int], p: int | tuple[int, int] = 0, s: int = 1, g: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(i, o, k, s, p, groups=g, bias=False), N(o))


def repvgg(c: int, s: int = 1, g: int = 1) -> Sum:
    skip = [N(c)] if s == 1 else []
    return Sum(conv(c, c, 3, 1, s, g), conv(c, c, 1, 0, s, g), *skip)


def mobileone(c: int) -> nn.Module:
    deep = Sum(N(c), *(conv(c, c, 3, 1, g=c) for _ in range(3)), conv(c, c, 1, g=c))
    return nn.Sequential(deep, Sum(N(c), *(conv(c, c, 1) for _ in range(4))))


def acnet(c: int) -> Sum:
    return Sum(conv(c, c, 3, 1), conv(c, c, (3, 1), (1, 0)), conv(c, c, (1, 3), (0, 1)))


def dbb(c: int) -> Sum:
    """A diverse branch block whose inner pads are those of the 1x1 convs' inputs."""
    inner = nn.Sequential(nn.Conv2d(c, 5, 1, padding=1, bias=False), N(5), nn.Conv2d(5, c, 3, bias=False), N(c))
    pooled = nn.Sequential(nn.Conv2d(c, c, 1, padding=1, bias=False), N(c), nn.AvgPool2d(3, 1), N(c))
    return Sum(conv(c, c, 3, 1), conv(c, c, 1), inner, pooled)


def merged(model: nn.Module, x: Tensor, **options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    model = double(model)
    return model, lmfx.simplify(model, x.double(), **options)  # type: ignore[arg-type]


def same(model: nn.Module, net: nn.Module, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            expected, actual = model(x), net(x)
        assert (expected - actual).abs().max() <= 1e-12 * expected.abs().max()


BLOCKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "RepVGG": (lambda: repvgg(6), ["Conv2d", "ReLU"]),
    "RepVGG with a stride and groups": (lambda: repvgg(6, 2, 3), ["Conv2d", "ReLU"]),
    "MobileOne": (lambda: mobileone(6), ["Conv2d", "ReLU", "Conv2d", "ReLU"]),
    "ACNet": (lambda: acnet(6), ["Conv2d", "ReLU"]),
    "diverse branches": (lambda: dbb(6), ["Conv2d", "ReLU"]),
    "a norm before and after": (lambda: nn.Sequential(N(6), nn.Conv2d(6, 4, 3), N(4), nn.ReLU()), ["Conv2d", "ReLU"]),
    "a pool after": (
        lambda: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.AvgPool2d(2), nn.ReLU()),
        ["Conv2d", "ReLU"],
    ),
    "a concatenation": (lambda: nn.Sequential(Cat(conv(6, 3, 3, 1), conv(6, 5, 3, 1)), nn.SiLU()), ["Conv2d", "SiLU"]),
    "a thin pair": (lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1), nn.ReLU()), ["Conv2d", "ReLU"]),
    "a pad": (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(6, 4, 3), N(4)), ["Conv2d"]),
    "depthwise in a residual": (
        lambda: Sum(nn.Identity(), nn.Sequential(conv(6, 6, 3, 1, g=6), conv(6, 6, 1, g=6))),
        ["Conv2d", "ReLU"],
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_one_conv_and_the_same_function_at_every_size(name: str) -> None:
    make, words = BLOCKS[name]
    model, net = merged(make(), torch.randn(1, 6, 11, 13))
    assert ops_of(net) == words  # type: ignore[arg-type]
    same(model, net, (1, 6, 11, 13), (3, 6, 10, 7), (2, 6, 24, 17))


@pytest.mark.parametrize("name", BLOCKS)
def test_simplified_again_it_is_the_same_graph(name: str) -> None:
    x = torch.randn(1, 6, 11, 13)
    _, net = merged(BLOCKS[name][0](), x)
    again = lmfx.simplify(net, x.double())
    assert fingerprint(again) == fingerprint(net) and again.code == net.code  # type: ignore[arg-type]
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
    assert not lmfx.result_of(again).plan.candidates


@pytest.mark.parametrize("ndim", [1, 3])
def test_blocks_in_one_and_three_dimensions(ndim: int) -> None:
    make, norm = (nn.Conv1d, nn.BatchNorm1d) if ndim == 1 else (nn.Conv3d, nn.BatchNorm3d)
    block = Sum(
        nn.Sequential(make(4, 4, 3, padding=1), norm(4)), nn.Sequential(make(4, 4, 1, bias=False), norm(4)), norm(4)
    )
    model, net = merged(block, torch.randn(1, 4, *(7,) * ndim))
    assert ops_of(net) == [make.__name__, "ReLU"]  # type: ignore[arg-type]
    same(model, net, (2, 4, *(7,) * ndim), (1, 4, *(6,) * ndim))


def test_norms_around_a_linear_are_folded() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.BatchNorm1d(8), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip
    model, net = merged(model, torch.randn(2, 3, 8, 8))
    assert "BatchNorm1d" not in ops_of(net)  # type: ignore[arg-type]
    same(model, net, (2, 3, 8, 8), (1, 3, 9, 12))


# --- what is not merged -----------------------------------------------------------------------------------------------


def test_a_pad_of_a_shifted_value_is_never_merged_away() -> None:
    inner = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), N(6), nn.Conv2d(6, 6, 3, padding=1, bias=False), N(6))
    model, net = merged(Sum(nn.Identity(), inner), torch.randn(1, 6, 11, 13))
    assert ops_of(net) == ["Conv2d", "Conv2d", "add", "ReLU"]  # type: ignore[arg-type]
    same(model, net, (1, 6, 11, 13))
    assert "or a norm that shifts, before it" in str(lmfx.report(net))  # type: ignore[arg-type]


def test_two_padded_convs_are_never_merged() -> None:
    pair = nn.Sequential(nn.Conv2d(6, 2, 3, padding=1, bias=False), nn.Conv2d(2, 6, 3, padding=1, bias=False))
    model, net = merged(pair, torch.randn(1, 6, 11, 13), growth=math.inf)
    assert ops_of(net) == ["Conv2d", "Conv2d"]  # type: ignore[arg-type]
    assert "the ops before it look at several pixels" in str(lmfx.report(net))  # type: ignore[arg-type]
    same(model, net, (1, 6, 11, 13))


@pytest.mark.parametrize(("mode", "count"), [("zeros", 2), ("reflect", 1), ("replicate", 1), ("circular", 1)])
def test_a_biased_pixel_conv_passes_through_pads_that_copy_the_map(mode: str, count: int) -> None:
    pair = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode))
    model, net = merged(pair, torch.randn(1, 4, 9, 8), growth=math.inf)
    assert ops_of(net).count("Conv2d") == count  # type: ignore[arg-type]
    same(model, net, (1, 4, 9, 8), (2, 4, 12, 5))


def test_a_removed_activation_is_no_merge() -> None:
    inside = Sum(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Conv2d(4, 4, 1))
    model, net = merged(nn.Sequential(inside, nn.Conv2d(4, 4, 1)), torch.randn(1, 4, 8, 8))
    assert ops_of(net).count("Conv2d") == 3  # type: ignore[arg-type]
    same(model, net, (1, 4, 8, 8))


def test_a_bottleneck_that_would_grow_stays_unless_that_is_allowed() -> None:
    pair = nn.Sequential(nn.Conv2d(16, 2, 1), N(2), nn.Conv2d(2, 16, 1))
    _, net = merged(pair, torch.randn(1, 16, 9, 9))
    assert ops_of(net) == ["Conv2d", "Conv2d"]  # type: ignore[arg-type]
    assert "times its parts" in str(lmfx.report(net))  # type: ignore[arg-type]
    model, net = merged(pair, torch.randn(1, 16, 9, 9), growth=math.inf)
    assert ops_of(net) == ["Conv2d"]  # type: ignore[arg-type]
    same(model, net, (1, 16, 9, 9))


def test_a_norm_is_folded_where_the_pool_beside_it_stays() -> None:
    model, net = merged(nn.Sequential(nn.AvgPool2d(2), conv(6, 8, 3), nn.ReLU()), torch.randn(1, 6, 12, 12))
    assert ops_of(net) == ["AvgPool2d", "Conv2d", "ReLU"]  # type: ignore[arg-type]
    same(model, net, (1, 6, 12, 12), (1, 6, 15, 13))


def test_what_is_excluded_stays() -> None:
    model, net = merged(nn.Sequential(repvgg(4), repvgg(4)), torch.randn(1, 4, 8, 8), exclude=("0.*",))
    assert ops_of(net).count("Conv2d") == 3  # type: ignore[arg-type]
    same(model, net, (1, 4, 8, 8))


@pytest.mark.parametrize("growth", [0, -1.0, True, "2", math.nan])
def test_a_growth_that_is_no_number_above_zero_is_refused(growth: object) -> None:
    with pytest.raises(lmfx.OptionError, match="growth"):
        lmfx.simplify(repvgg(4).eval(), torch.randn(1, 4, 8, 8), growth=growth)  # type: ignore[arg-type]


def test_a_wrong_merge_is_an_error_and_not_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmfx.passes.spans.enumeration.inexact", lambda *_: None)
    pair = nn.Sequential(nn.Conv2d(6, 2, 3, padding=1), nn.Conv2d(2, 6, 3, padding=1))
    with pytest.raises(lmfx.VerifyError, match="merging changes the output"):
        merged(pair, torch.randn(1, 6, 11, 13), growth=math.inf)


# --- the result -------------------------------------------------------------------------------------------------------


def test_the_model_is_not_changed_and_the_result_is_saved_loaded_and_compressed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), *(repvgg(6) for _ in range(3)), nn.Conv2d(6, 3, 1)).eval()
    before, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(1, 3, 16, 16)
    net = lmfx.simplify(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not net.training
    assert "8 convolutions became 5" in str(lmfx.report(net)) and "none" in str(lmfx.report(net))
    loaded = lmfx.load(lmfx.save(net, tmp_path / "out"), model)
    assert torch.equal(loaded(x), net(x)) and lmfx.result_of(loaded) == lmfx.result_of(net)
    smaller = lmfx.compress(net, x, 0.9, latency="roofline", importance="magnitude", max_span_convs=2, progress=False)
    assert lmfx.result_of(smaller).ratio <= 0.9


def test_exact_candidates_are_the_same_function_and_others_are_not() -> None:
    """The mark of a candidate against its borders: applied alone, in float64, with norms that shift."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 1, bias=False),
        dbb(4),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.AvgPool2d(2),
    )
    model = double(nn.Sequential(*layers))
    x = torch.randn(2, 3, 15, 17, dtype=torch.float64)
    graph = lmfx.trace(model, x)
    for fine in (False, True):
        options = SpanOptions(realize=("compose",), max_kernel_size=5, max_span_convs=3)
        spans = enumerate_spans(Network(graph, fine=fine), options)
        marks = []
        for c in spans:
            if c.realization != "compose":
                continue
            plan = lmfx.MergePlan((c,), fine=fine)
            with torch.no_grad():
                error = float((merge(rewrite(graph, plan))(x) - model(x)).abs().max() / model(x).abs().max())
            assert (error < 1e-12) == c.exact, (c.key, error)
            marks.append(c.exact)
        assert True in marks and False in marks
