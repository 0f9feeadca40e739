"""The normalisation of an image in bytes, channels last or first: one shift, one scale; the conv takes what it can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.passes.graph.modules import ChannelAffine
from lmfx.passes.trace.tracing import trace
from tests.helpers import double, ops_of, run

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BYTES = torch.randint(0, 256, (2, 17, 13, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Camera(nn.Module):
    """Takes images in bytes with channels last, and normalises them before or after its permute."""

    def __init__(self, last: bool, padding: int, learned: bool = False) -> None:
        super().__init__()
        shape = (3,) if last else (1, 3, 1, 1)
        for name, value in (("mean", MEAN), ("std", STD)):
            tensor = torch.tensor(value).view(shape)
            self.register_parameter(name, nn.Parameter(tensor)) if learned else self.register_buffer(name, tensor)
        self.last, self.conv, self.norm = last, nn.Conv2d(3, 6, 3, 2, padding, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        if not self.last:
            x = x.permute(0, 3, 1, 2)
        x = (x.to(self.mean.dtype) / 255 - self.mean) / self.std
        if self.last:
            x = x.permute(0, 3, 1, 2)
        return torch.relu(self.norm(self.conv(x)))


def affine(gm: Any) -> list[ChannelAffine]:
    return [m for m in gm.modules() if isinstance(m, ChannelAffine)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding", [0, 1])
def test_the_conv_takes_the_normalisation_as_far_as_that_is_exact(last: bool, padding: int) -> None:
    model = double(Camera(last, padding))
    graph = trace(model, BYTES)
    assert ops_of(graph)[:4] == ["permute", "to", "ChannelAffine", "ChannelAffine"]
    torch.testing.assert_close(run(graph, BYTES), run(model, BYTES), rtol=1e-12, atol=1e-12)
    net = lmfx.simplify(model, BYTES)
    shift = ["ChannelAffine"] if padding else []
    assert ops_of(net) == ["permute", "to", *shift, "Conv2d", "ReLU"]
    torch.testing.assert_close(run(net, BYTES), run(model, BYTES), rtol=1e-12, atol=1e-12)
    if padding:
        assert bool((affine(net)[0].scale == 1).all())
        torch.testing.assert_close(affine(net)[0].bias.detach(), -255 * torch.tensor(MEAN).double())
        assert any("a norm that shifts" in str(r) for r in lmfx.result_of(net).refusals)


def test_borders_are_those_of_the_normalised_image() -> None:
    model = double(Camera(True, 1))
    flat = torch.zeros_like(BYTES)  # black: folding the shift as well would make the border another one than the rest
    net = lmfx.simplify(model, BYTES)
    torch.testing.assert_close(run(net, flat), run(model, flat), rtol=1e-12, atol=1e-12)


def test_floats_of_channels_first_are_scaled_once() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv((x / 127.5 - 1) * 2 + 0.5)

    model, x = double(Chain()), torch.randn(2, 3, 9, 7, dtype=torch.float64)
    graph = trace(model, x)
    assert ops_of(graph) == ["ChannelAffine", "ChannelAffine", "Conv2d"]
    assert ops_of(lmfx.simplify(model, x)) == ["ChannelAffine", "Conv2d"]
    torch.testing.assert_close(run(graph, x), run(model, x), rtol=1e-12, atol=1e-12)


# --- what is left as it is --------------------------------------------------------------------------------------------


def names(gm: Any) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]


def test_a_shift_and_a_scale_stay_what_they_are() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv((x - 0.5) / 0.25)

    assert names(trace(double(Plain()), torch.randn(1, 3, 8, 8, dtype=torch.float64))) == ["sub", "div", "conv"]


def test_a_learned_normalisation_is_not_touched() -> None:
    model = double(Camera(False, 1, learned=True))
    graph = trace(model, BYTES)
    assert sum(isinstance(m, ChannelAffine) for m in graph.modules()) == 3
    assert all(p.requires_grad for m in affine(graph)[1:] for p in m.parameters())


class Rows(nn.Module):
    """Numbers a row or a column, not a channel."""

    def __init__(self, shape: tuple[int, ...], first: bool) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 4, 3), first
        self.register_buffer("table", torch.rand(shape) + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.table.dtype) / 255
        x = (x * self.table if self.first else x).permute(0, 3, 1, 2)
        return self.conv(x if self.first else x * self.table)


@pytest.mark.parametrize(("shape", "first"), [((1, 17, 1, 1), True), ((13, 1), True), ((13,), False), ((17, 1), False)])
def test_a_number_a_row_is_no_number_a_channel(shape: tuple[int, ...], first: bool) -> None:
    model = double(Rows(shape, first))
    torch.testing.assert_close(run(trace(model, BYTES), BYTES), run(model, BYTES), rtol=1e-12, atol=1e-12)


def test_maps_of_as_many_rows_as_channels_are_not_mixed_up() -> None:
    square = BYTES[:, :3, :3].repeat(1, 1, 1, 1)
    for shape in ((3,), (3, 1), (1, 3, 1, 1)):
        model = double(nn.Sequential(Table(shape), nn.Conv2d(3, 2, 2)))
        torch.testing.assert_close(run(trace(model, square), square), run(model, square), rtol=1e-12, atol=1e-12)


class Table(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor([1.5, 2.5, 3.5]).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        x = (x.to(self.table.dtype) / 255 - self.table).permute(0, 3, 1, 2)
        return x / self.table


def test_an_image_that_somebody_else_reads_is_not_moved() -> None:
    class Twice(Camera):
        def forward(self, x: Tensor) -> Tensor:
            y = x.to(self.mean.dtype) / 255
            return super().forward(x).mean() + y.permute(0, 3, 1, 2)

    model = double(Twice(True, 0))
    torch.testing.assert_close(run(trace(model, BYTES), BYTES), run(model, BYTES), rtol=1e-12, atol=1e-12)


def test_a_scale_of_zero_is_not_divided_by() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("gain", torch.tensor([1.0, 0.0, 2.0]).view(1, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv((x / 2 - 1) * self.gain)

    model, x = double(Dead()), torch.randn(1, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(run(trace(model, x), x), run(model, x), rtol=1e-12, atol=1e-12)


# --- through the pipeline ---------------------------------------------------------------------------------------------


def test_images_in_bytes_are_compressed_and_exported_as_a_program() -> None:
    torch.manual_seed(0)
    tail = [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(Camera(True, 1), *tail).eval()
    images = torch.randint(0, 256, (24, 17, 13, 3), dtype=torch.uint8)
    net = lmfx.compress(model, BYTES, 0.8, calibration=images, latency="roofline", progress=False)
    assert net(BYTES).shape == model(BYTES).shape and lmfx.result_of(net).plan.candidates
    program = lmfx.export_program(net, BYTES, dynamic_batch=True)
    torch.testing.assert_close(run(program.module(), images), run(net, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_the_memory_format_of_a_model_is_kept(last: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
    ).eval()
    model = model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    x = torch.randn(1, 3, 12, 10)
    nets = [
        lmfx.simplify(model, x),
        lmfx.compress(model, x, 0.9, latency="roofline", importance="magnitude", progress=False),
    ]
    for net in nets:
        weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
        assert all(w.is_contiguous(memory_format=torch.channels_last) is last for w in weights)
        assert all(w.is_contiguous() is not last for w in weights)
