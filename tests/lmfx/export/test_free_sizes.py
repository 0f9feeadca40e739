"""Free sizes of exported files and programs: run at three sizes before anybody gets them, refused where they lie."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from lmfx.export.free_sizes import free_sizes
from lmfx.passes.errors import ExportError, OptionError
from tests.helpers import one_thread as one_thread
from tests.helpers import run
from tests.toys import Net

pytestmark = pytest.mark.usefixtures("one_thread")
ort = pytest.importorskip("onnxruntime")
X = torch.randn(1, 3, 16, 12)


def sized(file: Path) -> dict[str, list[Any]]:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return {v.name: v.shape for v in (*session.get_inputs(), *session.get_outputs())}


def through(file: Path, *inputs: Tensor) -> Tensor:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [v.name for v in session.get_inputs()]
    return torch.from_numpy(session.run(None, {n: v.numpy() for n, v in zip(names, inputs, strict=True)})[0])


class Padded(nn.Module):
    """Pads to a multiple of 8, and crops: sizes are values of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        return self.conv(F.pad(x, (0, -w % 8, 0, -h % 8)))[:, :, :h, :w]


class Stride(nn.Module):
    """Adds what it upsamples: takes multiples of 8 only."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 8, 8), nn.ConvTranspose2d(8, 3, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.relu(self.down(x)))


class Numbered(nn.Module):
    """A table of positions for one size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 4, 3, padding=1), nn.Parameter(torch.randn(1, 4, 16, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.table


@pytest.mark.parametrize("model", [Net, Padded, Stride])
def test_a_file_of_free_sizes_is_right_at_sizes_that_no_check_saw(model: Any, tmp_path: Path) -> None:
    net, x = model().eval(), X if model is not Stride else torch.randn(1, 3, 16, 24)
    file = lmfx.export_onnx(net, x, tmp_path / "net.onnx", dynamic_batch=True, dynamic_shapes=True)
    assert sized(file)["x"] == ["batch", 3, "height", "width"]
    for shape in ((1, 3, 8, 8), (4, 3, 40, 16), *(() if model is Stride else ((3, 3, 11, 21),))):
        other = torch.randn(shape)
        torch.testing.assert_close(through(file, other), run(net, other), rtol=1e-3, atol=1e-4)


def test_only_what_is_asked_for_is_free(tmp_path: Path) -> None:
    net = Net().eval()
    file = lmfx.export_onnx(net, X, tmp_path / "net.onnx", dynamic_shapes=("height",))
    assert sized(file)["x"] == [1, 3, "height", 12]
    file = lmfx.export_onnx(net, X, tmp_path / "net.onnx", dynamic_shapes={"x": {0: "images", 3: "columns"}})
    assert sized(file)["x"] == ["images", 3, 16, "columns"]
    assert sized(lmfx.export_onnx(net, X, tmp_path / "net.onnx"))["x"] == [1, 3, 16, 12]


@pytest.mark.parametrize("shapes", ["height", ("rows",), {"y": (2,)}, {"x": (4,)}, {"x": ("height",)}, ("depth",)])
def test_what_no_input_has_is_an_error_that_names_it(shapes: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="dynamic_shapes="):
        lmfx.export_onnx(Net().eval(), X, tmp_path / "net.onnx", dynamic_shapes=shapes)
    assert not list(tmp_path.iterdir())


def test_a_graph_of_one_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    program = torch.export.export(Net().eval(), (X,))
    net = lmfx.simplify(program, X)
    file = tmp_path / "net.onnx"
    for export in (partial(lmfx.export_onnx, net, X, file), partial(lmfx.export_program, net, X)):
        with pytest.raises(ExportError, match="16 x 12, and x has images of 11 x 9"):
            export(dynamic_shapes=True)
        with pytest.raises(ExportError, match="a batch of 1, and x has a batch of 2"):
            export(dynamic_batch=True)
    assert not list(tmp_path.iterdir())


def test_a_network_that_runs_at_no_other_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"runs at none of .*\(at x 1 x 3 x 11 x 9: RuntimeError: The size"):
        lmfx.export_onnx(Numbered().eval(), X, tmp_path / "net.onnx", dynamic_shapes=True)
    lmfx.export_onnx(Numbered().eval(), X, tmp_path / "net.onnx", dynamic_batch=True)


class Parts(nn.Module):
    """Several images of each input in one batch, taken apart again."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.way = nn.Conv2d(3, 4, 3), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "chunk":
            a, b, c = torch.chunk(self.conv(torch.cat([x, x.flip(-1), x.flip(-2)])), 3)
            return a + 2 * b - c
        a, b = self.conv(torch.cat([x, x.flip(-1)])).split(x.shape[0], dim=0)
        return a + 2 * b


@pytest.mark.parametrize("way", ["chunk", "split"])
def test_parts_of_the_batch_are_slices_in_a_file_of_any_batch(way: str, tmp_path: Path) -> None:
    model = Parts(way).eval()
    graph = lmfx.trace(model, X)
    file = lmfx.export_onnx(graph, X, tmp_path / "net.onnx", dynamic_batch=True)
    for images in (1, 2, 5):
        x = torch.randn(images, *X.shape[1:])
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
        torch.testing.assert_close(through(file, x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_batch_that_torch_takes_for_a_number_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="takes the batch of input x for the number"):
        lmfx.export_onnx(Parts("split").eval(), X, tmp_path / "net.onnx", dynamic_batch=True)
    assert not list(tmp_path.iterdir())


def test_a_fault_of_the_network_is_told_not_taken_for_a_size() -> None:
    class Faulty(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.no_such_method()

    with pytest.raises(ExportError, match="x 2 x 3 x 16 x 12: AttributeError.*no_such_method"):
        free_sizes(Faulty(), ((X,), {}), True, False)


def test_numbers_between_the_inputs_are_not_counted() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, scale: float, x: Tensor, others: Any) -> Tensor:
            return self.conv(x) * scale + self.conv(others[1]) * others[0]

    free = free_sizes(Several().eval(), ((2.0, X, (3, X.clone())), {}), True, False)
    assert free is not None and free.dims == {0: {0: "batch"}, 1: {0: "batch"}}
    assert free.specs(str.upper) == (None, {0: "BATCH"}, (None, {0: "BATCH"}))


def test_a_file_that_is_wrong_at_another_size_is_not_written(tmp_path: Path) -> None:
    class Baked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return y if torch.compiler.is_exporting() else y * max(1, x.shape[2] - 15)

    with pytest.raises(ExportError, match="input of another size"):
        lmfx.export_onnx(Baked().eval(), X, tmp_path / "net.onnx", dynamic_shapes=True)
    with pytest.raises(ExportError, match="differ on"):
        lmfx.export_program(Baked().eval(), X, dynamic_shapes=True)
    assert not list(tmp_path.iterdir())


def test_two_maps_of_which_one_is_half_as_large_stay_so(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(1, 4, 3, padding=1)

        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            return self.a(image) + self.b(mask)

    net, x = Two().eval(), (torch.randn(1, 3, 16, 12), torch.randn(1, 1, 8, 6))
    file = lmfx.export_onnx(net, x, tmp_path / "net.onnx", dynamic_batch=True, dynamic_shapes=True)
    other = torch.randn(3, 3, 20, 28), torch.randn(3, 1, 10, 14)
    torch.testing.assert_close(through(file, *other), run(net, other), rtol=1e-3, atol=1e-4)


def test_a_sequence_has_a_free_width() -> None:
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU()).eval()
    free = free_sizes(net, ((torch.randn(1, 2, 20),), {}), True, True)
    assert free is not None and free.dims == {0: {0: "batch", 2: "width"}}
    assert len({e[0][0].shape for _, e in free.trials}) == 3


def test_channels_last_images_are_freed_where_their_pixels_are() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.permute(0, 3, 1, 2))

    free = free_sizes(Last().eval(), ((torch.randn(1, 16, 12, 3),), {}), False, True)
    assert free is not None and free.dims == {0: {1: "height", 2: "width"}}


# --- programs ---------------------------------------------------------------------------------------------------------


def test_a_program_of_free_sizes_goes_round() -> None:
    net = Net().eval()
    program = lmfx.export_program(net, X, dynamic_batch=True, dynamic_shapes=True)
    again = lmfx.simplify(program, X)
    for shape in ((1, 3, 9, 9), (5, 3, 14, 33)):
        other = torch.randn(shape)
        torch.testing.assert_close(run(program.module(), other), run(net, other), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(again, other), run(net, other), rtol=1e-4, atol=1e-5)
    fixed = lmfx.export_program(net, X)
    with pytest.raises(AssertionError):
        fixed.module()(torch.randn(2, 3, 16, 12))


def test_a_program_that_takes_no_map_of_one_pixel_is_exported_for_larger_ones() -> None:
    class Pooled(nn.Module):
        """Its last map has one pixel at 16 x 12, where torch.export would write a number."""

        def __init__(self) -> None:
            super().__init__()
            self.down, self.last = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(self.down(x))
            return y.flatten(2).transpose(1, 2).softmax(1) + y.mean()

    net = Pooled().eval()
    program = lmfx.export_program(net, X, dynamic_batch=True, dynamic_shapes=True)
    other = torch.randn(3, 3, 40, 33)
    torch.testing.assert_close(run(program.module(), other), run(net, other), rtol=1e-4, atol=1e-5)


class Branch(nn.Module):
    """Does otherwise for many images, as upsampling in diffusers does."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.conv, self.most = nn.Conv2d(3, 4, 3), most

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + 1 if y.shape[0] >= self.most else y.relu()


def test_a_network_that_branches_on_the_number_of_images_has_a_program_for_the_few() -> None:
    net = Branch(64).eval()
    program = lmfx.export_program(net, X, dynamic_batch=True, dynamic_shapes=True).module()
    for shape in ((1, 3, 16, 12), (63, 3, 9, 20)):
        other = torch.randn(shape)
        torch.testing.assert_close(run(program, other), run(net, other), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="63"):
        program(torch.randn(64, 3, 9, 20))  # and is not wrong there
