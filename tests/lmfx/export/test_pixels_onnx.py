"""The emitter's rules for ops that move pixels and transposed convs, against ONNX Runtime; spellings of a shuffle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.export import UnsupportedOp, emit
from lmfx.passes.graph.modules import DepthToSpace, PixelSlice, SpaceToDepth
from tests.helpers import check_trace, ops_of
from tests.lmfx.export.test_export import check, graph

MOVES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "crop": (PixelSlice([(1, 2), (0, 3)], (1, 1)), (2, 3, 7, 9)),
    "strided slice": (PixelSlice([(1, 0), (0, 1)], (2, 3)), (2, 3, 7, 9)),
    "slice in one dimension": (PixelSlice([(2, 1)], (2,)), (2, 3, 9)),
    "blocks": (SpaceToDepth((2, 2)), (2, 3, 6, 8)),
    "blocks with a rest": (SpaceToDepth((2, 3)), (2, 3, 7, 11)),
    "blocks in three dimensions": (SpaceToDepth((1, 2, 3)), (1, 2, 3, 4, 6)),
    "torch's blocks": (nn.PixelUnshuffle(2), (2, 3, 6, 8)),
    "pixels": (DepthToSpace((2, 2)), (2, 12, 3, 5)),
    "pixels of two factors": (DepthToSpace((2, 3)), (2, 12, 3, 5)),
    "pixels in one dimension": (DepthToSpace((4,)), (2, 12, 5)),
    "pixels in three dimensions": (DepthToSpace((1, 2, 3)), (1, 12, 3, 2, 4)),
    "torch's pixels": (nn.PixelShuffle(2), (2, 12, 3, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (2, 4, 5, 3)),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, (2, 5), (2, 3), (0, 2), groups=2, bias=False), (2, 4, 5, 3)),
    "transposed and dilated": (nn.ConvTranspose2d(4, 6, 3, 2, 2, 1, dilation=2), (2, 4, 5, 3)),
    "transposed in one dimension": (nn.ConvTranspose1d(4, 6, 8, 4, 2), (2, 4, 5)),
    "transposed in three dimensions": (nn.ConvTranspose3d(4, 6, 2, 2), (1, 4, 3, 2, 4)),
}


@pytest.mark.parametrize("name", MOVES)
def test_the_emitter_says_what_torch_computes(name: str) -> None:
    module, shape = MOVES[name]
    check(graph(module), torch.randn(shape))


def test_a_transposed_conv_that_is_asked_for_a_size_is_left_to_torch() -> None:
    gm = graph(nn.ConvTranspose2d(4, 6, 3, 2, 1))
    (call,) = [n for n in gm.graph.nodes if n.op == "call_module"]
    call.args = (*call.args, [10, 6])
    gm.recompile()
    with pytest.raises(UnsupportedOp, match="no rule for ConvTranspose2d"):
        emit(gm, [torch.randn(2, 4, 5, 3)])


def test_a_shuffle_of_any_rank_is_torchs_where_torch_has_one_and_undoes_the_blocks() -> None:
    x = torch.randn(2, 12, 3, 5)
    assert torch.equal(DepthToSpace((2, 2))(x), nn.PixelShuffle(2)(x))
    for factors, shape in (((2, 3), (2, 12, 3, 5)), ((4,), (2, 12, 5)), ((1, 2, 3), (1, 12, 3, 2, 4))):
        value = torch.randn(shape)
        assert torch.equal(SpaceToDepth(factors)(DepthToSpace(factors)(value)), value)


def reshaped(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


def blocks_outermost(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)


SHUFFLES: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "function": (lambda x: F.pixel_shuffle(x, 2), ["PixelShuffle"]),
    "torch": (lambda x: torch.pixel_shuffle(x, 2), ["PixelShuffle"]),
    "reshape": (reshaped, ["PixelShuffle"]),
    "blocks outermost, as ONNX's DCR": (blocks_outermost, ["ChannelSelect", "PixelShuffle"]),
}


class Spelled(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 8, 3, padding=1), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.conv(x))


@pytest.mark.parametrize("name", SHUFFLES)
def test_a_pixel_shuffle_is_seen_however_it_is_written(name: str) -> None:
    torch.manual_seed(0)
    body, words = SHUFFLES[name]
    gm = check_trace(Spelled(body).double().eval(), torch.randn(2, 3, 4, 6, dtype=torch.float64))
    assert ops_of(gm)[0] == "Conv2d" and ops_of(gm)[-len(words) :] == words


def test_a_reshape_that_moves_pixels_in_another_way_is_no_shuffle() -> None:
    def mixed(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c // 4, 2 * h, 2 * w)

    gm = check_trace(Spelled(mixed).double().eval(), torch.randn(2, 3, 4, 6, dtype=torch.float64))
    assert "PixelShuffle" not in ops_of(gm)
