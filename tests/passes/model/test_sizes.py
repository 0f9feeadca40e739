"""A graph that is right at the example's batch or image size only says so, wherever it goes."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from lmfx.passes.errors import ExportError, SizeError
from lmfx.passes.model.size_limits import limits_of
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.trace.tracing import trace
from tests.helpers import double
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Two convs, and a tail that does something with sizes."""

    def __init__(self, tail: Callable[[Any, Tensor], Any], inside: bool = True) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.table = nn.Parameter(torch.randn(1, 6, 5, 7))
        self.fc = nn.Linear(6, 4)
        self.tail = tail

    def forward(self, x: Tensor) -> Any:
        return self.tail(self, self.b(F.relu(self.norm(self.a(x)))))


class Caching(Net):
    """As anchor heads do: something is kept for the last size."""

    size: Any = None

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        b, c, h, w = y.shape
        if self.size != (h, w):
            self.size = (h, w)
        return y.view(b, c, -1)


def filled(net: Any, y: Tensor) -> Tensor:
    z = y.new_zeros(y.shape[0], 8, y.shape[2], y.shape[3])
    z[:, 1:7] = y
    return z


def padded(net: Any, y: Tensor) -> Tensor:
    h, w = y.shape[2:]
    return F.pad(y, (0, -w % 8, 0, -h % 8)) if h % 8 or w % 8 else y


def tiles(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    if h % 4 or w % 4:
        raise ValueError("the size is no multiple of 4")
    return y.view(b, c, h // 4, 4, w // 4, 4).amax((3, 5))


TAILS: dict[str, Callable[[Any, Tensor], Any]] = {
    "nothing": lambda net, y: y,
    "rows": lambda net, y: y.view(y.shape[0], -1),
    "length": lambda net, y: y.view(len(y), 6, -1),
    "zeros": lambda net, y: torch.cat([y, torch.zeros(y.shape[0], 1, *y.shape[2:], dtype=y.dtype)], 1),
    "filled": filled,
    "loop": lambda net, y: torch.stack([net.fc(y[i].mean((1, 2))) for i in range(y.shape[0])]),
    "branch": lambda net, y: y * 2 if y.shape[2] > 20 else y,
    "pool": lambda net, y: F.avg_pool2d(y, y.shape[2]),
    "pool by number": lambda net, y: F.avg_pool2d(y, (int(y.shape[2]), int(y.shape[3]))),
    "positions": lambda net, y: y + F.interpolate(net.table, size=y.shape[2:], mode="bilinear"),
    "mean by number": lambda net, y: y.sum((2, 3)) / (int(y.shape[2]) * int(y.shape[3])),
    "crop": lambda net, y: y[:, :, : y.shape[2] // 2 * 2, : int(y.shape[3] / 2) * 2],
    "padded": padded,
    "tiles": tiles,
    "grid": lambda net, y: y[:, :2] + torch.stack(torch.meshgrid(*map(torch.arange, y.shape[2:]), indexing="ij")),
    "number": lambda net, y: {"y": y, "count": len(y)},
    "whole batch": lambda net, y: y - y.mean(0, keepdim=True),
}
SHAPES = ((1, 3, 32, 32), (4, 3, 32, 32), (1, 3, 16, 16), (2, 3, 24, 40), (1, 3, 64, 64), (1, 3, 21, 22))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return bool(a["count"] == b["count"]) and equal(a["y"], b["y"])
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def right_or_says(model: nn.Module, graph: nn.Module, shape: tuple[int, ...], traced: tuple[int, ...]) -> str:
    """ "own" where the model refuses the shape, "right", or "says" where the graph names both sizes."""
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        try:
            expected = copy.deepcopy(model)(x)
        except (RuntimeError, ValueError):
            return "own"
        try:
            actual = graph(x)
        except SizeError as error:
            assert str(shape) in str(error) and str(traced) in str(error)
            return "says"
    assert equal(expected, actual)
    return "right"


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_graph_is_right_at_other_sizes_or_says_that_it_is_not(name: str, batch: int) -> None:
    model = double(Net(TAILS[name]))
    traced = (batch, 3, 32, 32)
    graph = trace(model, torch.randn(traced, dtype=torch.float64))
    assert right_or_says(model, graph, traced, traced) == "right"
    found = [right_or_says(model, graph, shape, traced) for shape in SHAPES]
    if name in ("nothing", "rows", "pool", "whole batch"):
        assert "says" not in found
        assert noted(graph).sizes == {"batch": "any", "size": "any"}


def test_what_a_run_before_left_in_the_model_is_no_part_of_the_graph_in_silence() -> None:
    for before in (False, True):
        model = double(Caching(TAILS["nothing"]))
        x = torch.randn(1, 3, 14, 14, dtype=torch.float64)
        if before:
            model(x)
        graph = trace(model, x)
        for shape in ((4, 3, 14, 14), (1, 3, 20, 9)):
            right_or_says(model, graph, shape, tuple(x.shape))


def fixed_batch() -> tuple[nn.Module, Tensor, Any]:
    model = double(Net(TAILS["loop"]))
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    return model, x, trace(model, x)


def again(graph: Any) -> Any:
    pickle = importlib.import_module("pickle")
    return pickle.loads(pickle.dumps(graph))


@pytest.mark.parametrize("way", [copy.deepcopy, again, lambda graph: trace(graph, torch.zeros(2, 3, 12, 12).double())])
def test_a_copy_a_pickle_and_a_trace_of_the_graph_say_so_too(way: Callable[[Any], Any]) -> None:
    _, x, graph = fixed_batch()
    other = way(graph)
    assert torch.equal(other(x), graph(x))
    with pytest.raises(SizeError, match=r"batch of 2, and x has a batch of 5 .*\(5, 3, 12, 12\)"):
        other(torch.zeros(5, 3, 12, 12, dtype=torch.float64))


def test_a_graph_inside_another_model_still_says_so() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.last = inner, nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.inner(x * 2))

    _, x, graph = fixed_batch()
    outer = trace(Outer(graph).eval(), x)
    assert noted(outer).sizes["batch"] == "fixed"
    with pytest.raises(SizeError, match="batch of 3"):
        outer(x[[0, 1, 0]])


@pytest.fixture(params=[True, False], ids=["merged", "trainable"])
def compressed(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Any]:
    model = Net(TAILS["loop"]).eval()
    x = torch.randn(2, 3, 12, 12)
    options: dict[str, Any] = {"latency": "roofline", "progress": False, "merge": request.param}
    return model, x, lmfx.compress(model, x, 0.9, calibration=torch.randn(9, 3, 12, 12), **options)


def test_a_compressed_network_says_so_in_the_report_and_when_it_is_loaded(
    compressed: tuple[nn.Module, Tensor, Any], tmp_path: Path
) -> None:
    model, x, net = compressed
    loaded = lmfx.load(lmfx.save(net, tmp_path / "saved"), model)
    assert torch.equal(net(x), loaded(x))
    for one in (net, loaded, lmfx.merge(net)):
        assert "right only at a batch of 2" in lmfx.report(one)
        assert "agrees with the model at other image sizes" in lmfx.report(one)
        with pytest.raises(SizeError, match="batch of 2, and x has a batch of 3"):
            one(torch.zeros(3, 3, 12, 12))
        one(torch.zeros(2, 3, 10, 14))
    with pytest.raises(SizeError):
        lmfx.compress(net, x, 1.0, latency="roofline", progress=False, importance="magnitude")(
            torch.zeros(1, 3, 12, 12)
        )


def test_onnx_with_a_free_batch_is_refused_where_the_batch_is_fixed(
    compressed: tuple[nn.Module, Tensor, Any], tmp_path: Path
) -> None:
    _, x, net = compressed
    with pytest.raises(ExportError, match="right only for a batch of 2"):
        lmfx.export_onnx(net, x, tmp_path / "net.onnx", dynamic_batch=True, check=False)
    assert not list(tmp_path.iterdir())
    assert lmfx.export_onnx(net, x, tmp_path / "net.onnx").exists()


def test_an_onnx_file_with_a_free_batch_is_run_at_another_one(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    net = trace(Net(TAILS["rows"]).eval(), torch.randn(1, 3, 8, 8))
    file = lmfx.export_onnx(net, torch.randn(1, 3, 8, 8), tmp_path / "net.onnx", dynamic_batch=True)
    session = onnxruntime.InferenceSession(str(file))
    four = torch.randn(4, 3, 8, 8)
    (got,) = session.run(None, {session.get_inputs()[0].name: four.numpy()})
    assert torch.allclose(torch.from_numpy(got), net(four), atol=1e-5)


def test_a_file_that_is_wrong_at_another_batch_is_not_written(tmp_path: Path) -> None:
    class Baked(nn.Module):  # right for one image, whatever the exporter makes of the rest
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return y if torch.compiler.is_exporting() else y * len(y)

    with pytest.raises(ExportError, match="another batch"):
        lmfx.export_onnx(Baked().eval(), torch.randn(1, 3, 8, 8), tmp_path / "net.onnx", dynamic_batch=True)
    assert not list(tmp_path.iterdir())


def test_a_model_of_one_batch_is_calibrated_in_its_batches() -> None:
    model = Net(lambda net, y: net.fc(y.mean((2, 3)).reshape(2, -1)[:, :6])).eval()

    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.fc = nn.Linear(6 * 64, 4)

        def forward(self, x: Tensor) -> Any:
            return self.fc(self.inner.b(F.relu(self.inner.a(x))).reshape(2, -1))

    strict = Strict().eval()
    x = torch.randn(2, 3, 8, 8)
    net = lmfx.compress(strict, x, 0.9, calibration=torch.randn(9, 3, 8, 8), latency="roofline", progress=False)
    assert net(x).shape == (2, 4)
    assert noted(net).sizes["batch"] == "refused"
    assert not limits_of(net)  # the model says it itself


def test_several_inputs_vary_together_and_the_error_names_the_one_that_differs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 4)

        def forward(self, given: Any, t: Tensor) -> Any:
            y = self.conv(given["x"]) + self.fc(t)[:, :, None, None]
            return y + sum(given["y"][0][i].mean() for i in range(len(y)))

    model = Two().double().eval()
    example = (
        {"x": torch.randn(2, 3, 8, 8).double(), "y": [torch.randn(2, 3, 4, 4).double()]},
        torch.randn(2, 5).double(),
    )
    graph = trace(model, example)
    assert torch.allclose(graph(*example), model(*example))
    assert noted(graph).sizes == {"batch": "fixed", "size": "any"}
    assert {v.name for v in limits_of(graph)} == {"given['x']", "given['y'][0]", "t"}
    given = {"x": torch.zeros(3, 3, 8, 8).double(), "y": [torch.zeros(3, 3, 4, 4).double()]}
    with pytest.raises(SizeError, match=r"given\['x'\] has a batch of 3"):
        again(graph)(given, torch.zeros(3, 5).double())


class Strided(nn.Module):
    """What a conv of stride 2 makes of an image beside another input, and a constant of that size. Found by the fuzzer:
    other sizes of both by as many pixels are none that the model takes."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.conv, self.inside = nn.Conv2d(3, 2, 3, stride=2, padding=1), inside

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.conv(x)
        sized = z.new_full((len(z), 1, *z.shape[2:]), 0.3) if self.inside else 0.3
        return torch.cat((z + sized, y), 1)


@pytest.mark.parametrize("inside", [True, False])
def test_inputs_that_belong_to_each_other_by_a_stride_vary_as_it_does(inside: bool) -> None:
    model = double(Strided(inside))
    example = torch.randn(1, 3, 9, 5).double(), torch.randn(1, 2, 5, 3).double()
    graph = trace(model, example)
    more = torch.randn(2, 3, 13, 11).double(), torch.randn(2, 2, 7, 6).double()
    if noted(graph).sizes["size"] == "any":
        torch.testing.assert_close(graph(*more), model(*more))
    else:
        assert inside and noted(graph).sizes["size"] == "fixed"
        with pytest.raises(SizeError, match="9 x 5"):
            graph(*more)


def test_the_callers_random_numbers_and_model_stay() -> None:
    model = double(Caching(TAILS["nothing"]))
    state = torch.get_rng_state()
    trace(model, torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0)).double())
    assert torch.equal(state, torch.get_rng_state())
    assert model.size is None
