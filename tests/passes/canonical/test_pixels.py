"""Crops, strided slices and space-to-depth: linear ops that a merged conv takes in, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.passes.algebra import linear
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, check_trace, double, ops_of, pick, relative_error, run, spans_of

X = torch.randn(2, 4, 18, 12, dtype=torch.float64)


class Between(nn.Module):
    """A conv, `body` of its map, and another conv."""

    def __init__(self, body: Callable[[Tensor], Tensor], times: int = 1, kernel: int = 3, **options: Any) -> None:
        super().__init__()
        self.body = body
        self.a = nn.Conv2d(4, 6, kernel, **options)
        self.bn = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6 * times, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.body(self.bn(self.a(x))))


def blocks(h: int, w: int, order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Space-to-depth as einops writes it, with the channels in one of its orders."""

    def body(x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        split = x.reshape(n, c, height // h, h, width // w, w).permute(0, *order, 2, 4)
        return split.reshape(n, c * h * w, height // h, width // w)

    return body


def focus(x: Tensor) -> Tensor:
    """YOLOv5's first layer."""
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


EXACT: dict[str, tuple[Callable[[Tensor], Tensor], int, dict[str, Any]]] = {
    "slices": (lambda x: x[:, :, 1:-1, 2:], 1, {"padding": 1}),
    "slices after a stride": (lambda x: x[:, :, 1:, :-1], 1, {"stride": 2, "padding": 2, "dilation": 2}),
    "slices with a step": (lambda x: x[:, :, 1::2, :-1:3], 1, {"padding": 1, "groups": 2}),
    "an end counted from the size": (lambda x: x[:, :, : x.shape[2] - 2, 1 : x.size(3) - 1], 1, {"padding": 1}),
    "narrow": (lambda x: x.narrow(3, 1, x.shape[3] - 3), 1, {"padding": 1}),
    "a slice of channels too": (lambda x: torch.cat([x[:, :2, 1:-1], x[:, 2:, 1:-1]], 1), 1, {"padding": 1}),
    "a negative pad": (lambda x: F.pad(x, (-1, 0, -2, -1)), 1, {"padding": 1}),
    "a mirrored padding, then a crop": (lambda x: x[:, :, 1:-1, 1:-1], 1, {"padding": 1, "padding_mode": "reflect"}),
    "focus": (focus, 4, {"padding": 1}),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 4, {"padding": 1}),
    "einops, channels first": (blocks(2, 2, (1, 3, 5)), 4, {"padding": 1}),
    "einops, channels last": (blocks(2, 2, (3, 5, 1)), 4, {"padding": 1}),
    "einops, turned": (blocks(3, 2, (1, 5, 3)), 6, {"padding": 1}),
}


@pytest.mark.parametrize("case", EXACT)
def test_a_conv_takes_in_what_moves_pixels_exactly_at_every_size(case: str) -> None:
    body, times, options = EXACT[case]
    model = double(Between(body, times, **options))
    spans = spans_of(model, X, max_kernel_size=None)
    found = [c for c in spans if c.realization == "compose" and set(c.all_convs) == {"a", "b"} == set(c.kept)]
    assert len(found) == 1, [str(r) for r in spans.refusals]
    others = [torch.randn(1, 4, n, m, dtype=torch.float64) for n, m in ((12, 18), (24, 30))]
    if times == 1:
        others.append(torch.randn(1, 4, 17, 23, dtype=torch.float64))
    merged = check_rewrite(model, X, lambda _: found, spans=spans, others=others)
    assert set(ops_of(merged)) <= {"Conv2d", "ConstantPad2d", "ReflectionPad2d"}
    for x in (X, *others):  # the second conv does not pad, so nothing at all changes
        assert relative_error(run(model, x), run(merged, x)) < 1e-12


def test_focus_before_a_conv_is_one_conv_of_six_by_six() -> None:
    model = double(nn.Sequential(_Focus(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU()))
    merged = check_rewrite(
        model, X, pick(realization="compose", kernel=(6, 6), stride=(2, 2)), after=["Conv2d", "ReLU"]
    )
    assert relative_error(run(model, X), run(merged, X)) < 1e-12


class _Focus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return focus(x)


@pytest.mark.parametrize("dims", [1, 3])
def test_slices_are_exact_in_one_and_three_dimensions(dims: int) -> None:
    make: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = make(3, 4, 3, padding=1), make(4, 2, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)[:, :, 1:-2][..., 1::2])

    model = double(Net())
    x = torch.randn(1, 3, *(13, 11, 15)[:dims], dtype=torch.float64)
    spans = spans_of(model, x, max_kernel_size=None)
    larger = torch.randn(1, 3, *(16, 12, 19)[:dims], dtype=torch.float64)
    merged = check_rewrite(model, x, pick(realization="compose", convs=("a", "b")), spans=spans, others=[larger])
    assert relative_error(run(model, larger), run(merged, larger)) < 1e-12


def test_a_crop_inside_a_branch_lines_up_with_the_others() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + x[:, :, 1:-1, 1:-1])

    model = double(Net())
    others = [torch.randn(1, 4, 9, 21, dtype=torch.float64)]
    merged = check_rewrite(model, X, pick(realization="compose", kernel=(5, 5)), after=["Conv2d"], others=others)
    assert relative_error(run(model, others[0]), run(merged, others[0])) < 1e-12


STAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "as many pixels as the example has": lambda x: x[:, :, :14],
    "the last pixels": lambda x: x[:, :, -5:],
    "a size of another dimension": lambda x: x[:, :, : x.shape[3] - 2],
    "every other row from the end": lambda x: x[:, :, -9::2],
    "one row": lambda x: x[:, :, 3].unsqueeze(2).expand(-1, -1, 4, -1),
    "a part of the batch": lambda x: x[1:, :, 1:-1],
    "a partition into windows": lambda x: x.reshape(2, 6, 2, 8, 2, 5).permute(0, 1, 2, 4, 3, 5).reshape(2, 24, 8, 5),
    "a roll": lambda x: torch.roll(x, 1, 2),
    "a mirror": lambda x: x.flip(3),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_depends_on_the_size_is_not_taken_for_a_crop(case: str) -> None:
    model = double(Between(STAYS[case], 4 if "windows" in case else 1))
    gm = check_trace(model, X)
    assert not {"PixelSlice", "SpaceToDepth", "PixelUnshuffle"} & set(ops_of(gm))
    assert not [c for c in spans_of(model, X) if c.realization == "compose" and len(c.convs) == 2]


def test_a_crop_that_meets_a_filling_from_the_map_is_refused() -> None:
    model = double(Between(lambda x: F.pad(x, (-2, 0)), kernel=3, padding=1, padding_mode="circular"))
    spans = spans_of(model, X)
    assert any("fills the rest from the map itself (circular)" in r.reason for r in spans.refusals)
    assert not [c for c in spans if c.realization == "compose" and len(c.convs) == 2]
    mirror = double(Between(nn.ReflectionPad2d((-1, 1, 0, 0))))
    assert any("the pad crops, and fills from the map itself" in r.reason for r in spans_of(mirror, X).refusals)


def test_a_block_of_pixels_is_read_by_one_tap() -> None:
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    assert torch.equal(linear.from_space_to_depth((2, 2), 3)(x), F.pixel_unshuffle(x, 2))
    assert torch.equal(linear.from_slice(((1, 2), (0, 1)), (2, 1), 3)(x), x[:, :, 1:-2:2, :-1])
    assert torch.equal(linear.from_pad([(-1, 2), (0, -1)], 3)(x), F.pad(x, (0, -1, -1, 2)))


def test_traced_slices_compute_the_same_at_other_sizes() -> None:
    model = double(Between(blocks(2, 2, (3, 1, 5)), 4))
    gm = trace(model, X)
    assert "PixelUnshuffle" in ops_of(gm)
    for size in ((10, 16), (26, 14)):
        x = torch.randn(3, 4, *size, dtype=torch.float64)
        assert relative_error(run(model, x), run(gm, x)) < 1e-14


def test_plans_with_crops_are_saved_exported_and_timed(tmp_path: Any) -> None:
    import lmfx

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(4, 8, 1), nn.Conv2d(32, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.pixel_unshuffle(self.a(x)[:, :, 2:, 1:-1], 2)
            return self.c(torch.relu(self.b(y)))[:, :, 1:]

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 4, 20, 22)
    backend = lmfx.get_backend("roofline") if hasattr(lmfx, "get_backend") else "roofline"
    net = lmfx.compress(model, x, 0.9, latency=backend, importance="magnitude", realize=("compose",), progress=False)
    crops = [c.conv for c in lmfx.result_of(net).plan.candidates if c.conv is not None]
    assert any(p < 0 for conv in crops for pair in conv.padding for p in pair)
    lmfx.save(net, tmp_path / "net")
    again = lmfx.load(tmp_path / "net", model)
    assert torch.equal(run(net, x), run(again, x))
    pytest.importorskip("onnxruntime")
    lmfx.export_onnx(net, x, tmp_path / "net.onnx")
    lmfx.export_onnx(lmfx.trace(model, x), x, tmp_path / "original.onnx")
