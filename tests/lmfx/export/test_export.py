"""The emitter and the ONNX export compute what torch computes, and say so when they cannot."""

from __future__ import annotations

import operator
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from lmfx.export import UnsupportedOp, emit, export_onnx, to_onnx_bytes
from lmfx.passes.errors import ExportError, InputError
from lmfx.passes.graph.modules import ChannelAffine, ChannelLayerNorm, ChannelSelect

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


def graph(*modules: nn.Module) -> fx.GraphModule:
    """A canonical chain of modules with random statistics, in eval mode."""
    torch.manual_seed(0)
    net = nn.Sequential(*modules)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    tracer = fx.Tracer()
    tracer.is_leaf_module = lambda m, name: not isinstance(m, nn.Sequential)  # type: ignore[method-assign]
    return fx.GraphModule(net.eval(), tracer.trace(net))


def joined(function: Any, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """function(x, y, *args), as one node."""
    g = fx.Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    operands = ([x, y],) if function in (torch.cat, torch.concat) else (x, y)
    g.output(g.call_function(function, (*operands, *args), kwargs))
    return fx.GraphModule(nn.Module(), g)


def run(model: bytes, *inputs: torch.Tensor) -> torch.Tensor:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    named = {f"input_{i}": t.numpy() for i, t in enumerate(inputs)}
    return torch.from_numpy(session.run(None, named)[0])


def check(gm: fx.GraphModule, *inputs: torch.Tensor) -> None:
    """The emitted model gives torch's output."""
    model = emit(gm, inputs)
    with torch.no_grad():
        expected = gm(*inputs)
    torch.testing.assert_close(run(model.SerializeToString(), *inputs), expected, rtol=1e-4, atol=1e-4)


IMAGE = (2, 6, 13, 11)
ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.Hardtanh(-0.3, 0.7),
    nn.SiLU(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.LeakyReLU(0.2),
    nn.ELU(0.7),
    nn.CELU(0.7),
    nn.SELU(),
    nn.Mish(),
    nn.Softsign(),
    nn.PReLU(),
    nn.PReLU(6),
    nn.Softmax(1),
    nn.LogSoftmax(-1),
    nn.Identity(),
    nn.Dropout(0.5),
]
OTHERS = [
    nn.Conv2d(6, 8, 3, padding=1),
    nn.Conv2d(6, 12, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1), groups=3, bias=False),
    pytest.param(
        nn.Conv2d(6, 8, (4, 3), padding="same"),
        marks=pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch says that it is slow
        id="same",
    ),
    nn.Conv2d(6, 8, 3, padding="valid"),
    nn.BatchNorm2d(6),
    nn.BatchNorm2d(6, affine=False, eps=1e-2),
    nn.GroupNorm(3, 6),
    nn.GroupNorm(2, 6, affine=False),
    nn.LayerNorm([11]),
    nn.LayerNorm([13, 11], elementwise_affine=False),
    nn.LayerNorm([6, 13, 11], bias=False),
    nn.Linear(11, 5),
    nn.Linear(11, 5, bias=False),
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d(2, 3, 1, ceil_mode=True),
    nn.MaxPool2d(2, dilation=2, stride=1),
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d(2, 2, 1, ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d(2, 3, 1, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, divisor_override=5),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((None, 1)),
    nn.AdaptiveMaxPool2d(1),
    nn.Flatten(),
    nn.Flatten(2),
    nn.Flatten(0, 1),
    nn.ConstantPad2d((1, 2, 0, 3), 1.5),
    nn.ConstantPad2d((-1, 2, 0, -3), 0.0),
    nn.ZeroPad2d(2),
    nn.ReflectionPad2d((1, 2, 0, 3)),
    nn.ReplicationPad2d((1, 2, 0, 3)),
    nn.CircularPad2d((1, 2, 0, 3)),
    nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(6, 8, (3, 5), padding=(0, 2), stride=2, padding_mode="replicate", bias=False),
    nn.Conv2d(6, 6, (4, 3), padding="same", padding_mode="circular", groups=3),
    nn.Conv2d(6, 8, 1, padding_mode="reflect"),
    ChannelSelect(range(1, 5)),
    ChannelSelect(range(1, 6, 2)),
    ChannelSelect([0, 2, 4, 1, 3, 5]),
    ChannelSelect([3, 3, 0]),
    ChannelLayerNorm(6, eps=1e-3),
    ChannelLayerNorm(6, elementwise_affine=False),
    ChannelAffine(torch.randn(6), torch.randn(6)),
    ChannelAffine(torch.randn(1), torch.randn(1)),
]


@pytest.mark.parametrize("module", [*ACTIVATIONS, *OTHERS], ids=str)
def test_an_op_is_emitted_as_torch_computes_it(module: nn.Module) -> None:
    check(graph(module), torch.randn(IMAGE))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
        (nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(4, 6, 3, dilation=2)), (2, 4, 9)),
        (nn.BatchNorm1d(4), (2, 4, 9)),
        (nn.BatchNorm1d(4), (2, 4)),
        (nn.AvgPool1d(3, 2, 1, ceil_mode=True), (2, 4, 9)),
        (nn.ReflectionPad1d((2, 1)), (2, 4, 9)),
        (nn.ReplicationPad3d((1, 0, 2, 1, 0, 1)), (1, 3, 4, 6, 5)),
        (nn.CircularPad3d(1), (1, 3, 4, 6, 5)),
        (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), (1, 3, 4, 6)),
        (nn.MaxPool1d(3, 2, 1, ceil_mode=True), (2, 4, 10)),
        (nn.AdaptiveAvgPool1d(3), (2, 4, 9)),
        (nn.Conv3d(3, 5, (1, 3, 2), padding=(0, 1, 1)), (1, 3, 4, 6, 5)),
        (nn.BatchNorm3d(3), (1, 3, 4, 6, 5)),
        (nn.AvgPool3d(2, ceil_mode=True), (1, 3, 4, 6, 5)),
        (nn.AdaptiveAvgPool3d(1), (1, 3, 4, 6, 5)),
        (nn.ConstantPad3d((1, 0, 2, 1, 0, 3), 0.5), (1, 3, 4, 6, 5)),
        (nn.Linear(7, 3), (4, 7)),
        (nn.PReLU(5), (4, 5)),
    ],
    ids=str,
)
def test_other_numbers_of_dimensions_are_emitted_too(module: nn.Module, shape: tuple[int, ...]) -> None:
    check(graph(module), torch.randn(shape))


@pytest.mark.parametrize(
    "gm",
    [
        joined(torch.add),
        joined(torch.add, alpha=0.5),
        joined(operator.add),
        joined(torch.sub),
        joined(operator.sub),
        joined(torch.mul),
        joined(operator.mul),
        joined(torch.cat, 1),
        joined(torch.cat, dim=-1),
    ],
    ids=lambda gm: gm.code.split("\n")[3].strip(),
)
def test_a_join_is_emitted(gm: fx.GraphModule) -> None:
    check(gm, torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))


def test_a_zero_pad_goes_into_the_conv_behind_it_with_its_sides_apart() -> None:
    gm = graph(nn.ZeroPad2d((0, 1, 2, 3)), nn.Conv2d(6, 4, 3, padding=1))
    model = emit(gm, [torch.randn(IMAGE)])
    assert [n.op_type for n in model.graph.node] == ["Conv", "Identity"]
    pads = next(a.ints for a in model.graph.node[0].attribute if a.name == "pads")
    assert list(pads) == [3, 1, 4, 2]
    check(gm, torch.randn(IMAGE))


def test_a_pad_that_another_op_reads_stays_a_pad() -> None:
    g = fx.Graph()
    root = nn.Module()
    root.pad, root.conv = nn.ZeroPad2d(1), nn.Conv2d(6, 6, 1)
    padded = g.call_module("pad", (g.placeholder("x"),))
    g.output(g.call_function(torch.add, (g.call_module("conv", (padded,)), padded)))
    gm = fx.GraphModule(root, g)
    assert "Pad" in [n.op_type for n in emit(gm, [torch.randn(IMAGE)]).graph.node]
    check(gm, torch.randn(IMAGE))


def test_dtypes_are_kept() -> None:
    gm = graph(nn.Conv2d(6, 4, 3), nn.ReLU()).double()
    assert emit(gm, [((1, 6, 9, 9), torch.float64)]).graph.output[0].type.tensor_type.elem_type == 11
    half = graph(nn.Conv2d(6, 4, 3), nn.ReLU6()).half()
    assert {t.data_type for t in emit(half, [((1, 6, 9, 9), torch.float16)]).graph.initializer} == {10}


def test_emission_leaves_the_module_and_its_modes_alone() -> None:
    gm = graph(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2, ceil_mode=True), nn.Linear(5, 2))
    gm.train()
    gm.get_submodule("1").eval()
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    emit(gm, [((1, 6, 13, 11), torch.float32)])
    assert gm.training and not gm.get_submodule("1").training
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())


def test_meta_parameters_need_a_fill() -> None:
    with torch.device("meta"):
        gm = graph(nn.Conv2d(6, 4, 3))
    with pytest.raises(UnsupportedOp, match="meta device"):
        emit(gm, [torch.randn(IMAGE)])
    out = run(emit(gm, [torch.randn(IMAGE)], fill=0.5).SerializeToString(), torch.ones(IMAGE))
    torch.testing.assert_close(out, torch.full((2, 4, 11, 9), 0.5 * 54 + 0.5))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.BatchNorm2d(6, track_running_stats=False), "no running statistics"),
        (nn.AdaptiveAvgPool2d(4), "unequal size"),
        (nn.AdaptiveMaxPool2d(1, return_indices=True), "indices|no rule"),
        (nn.ChannelShuffle(2), "no rule for ChannelShuffle"),
        (nn.Softmax(), "without a dim"),
    ],
    ids=str,
)
def test_an_op_without_a_rule_is_refused_by_name(module: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedOp, match=reason):
        emit(graph(module), [torch.randn(IMAGE)])


def test_functions_without_a_rule_and_integer_inputs_are_refused() -> None:
    with pytest.raises(UnsupportedOp, match="no rule"):
        emit(joined(torch.maximum), [torch.randn(2), torch.randn(2)])
    with pytest.raises(UnsupportedOp, match="floating point"):
        emit(joined(torch.add), [torch.zeros(2, dtype=torch.int64)] * 2)
    with pytest.raises(UnsupportedOp, match="takes 2 inputs, and 1"):
        emit(joined(torch.add), [torch.zeros(2)])


def test_what_the_emitter_refuses_is_exported_by_torch() -> None:
    pytest.importorskip("onnxscript")
    gm = graph(nn.ChannelShuffle(2), nn.Conv2d(8, 3, 1))
    x = torch.randn(1, 8, 4, 4)
    session = ort.InferenceSession(to_onnx_bytes(gm, [x]), providers=["CPUExecutionProvider"])
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), gm(x).detach(), rtol=1e-4, atol=1e-5)


# export_onnx


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.dropout(self.conv(x)) * scale
        return y, y.mean()


def test_an_export_is_one_file_with_the_networks_outputs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3)).train()
    net[1].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = export_onnx(net, torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"] and path == tmp_path / "net.onnx"
    assert net.training and not net[1].training
    x = torch.randn(1, 3, 8, 8)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), net.eval()(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["tuple", "dict"])
def test_examples_may_be_tuples_and_dicts(tmp_path: Path, style: str) -> None:
    pytest.importorskip("onnxscript")
    x, scale = torch.randn(2, 3, 8, 8), torch.randn(1)
    example: Any = (x, scale) if style == "tuple" else {"scale": scale, "x": x}
    net = TwoInputs()
    path = export_onnx(net, example, tmp_path / "net.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    other, factor = torch.randn(2, 3, 8, 8), torch.tensor([-2.5])
    with torch.no_grad():
        expected = net.eval()(other, factor)
    given = {i.name: (other if len(i.shape) == 4 else factor).numpy() for i in session.get_inputs()}
    for found, wanted in zip(session.run(None, given), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_dynamic_batch_computes_what_torch_does_at_another_batch(tmp_path: Path, batch: int) -> None:
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten())
    net[1].running_mean.uniform_(-0.5, 0.5)
    net[1].running_var.uniform_(0.5, 2)
    path = export_onnx(net, torch.randn(2, 3, 8, 9), tmp_path / "net.onnx", dynamic_batch=True)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(batch, 3, 8, 9)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net.eval()(x), rtol=1e-4, atol=1e-5)


class DependsOnTheExample(nn.Module):
    """Exports the branch that the example takes, so another input gives another result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


def test_a_wrong_export_leaves_no_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    target = tmp_path / "net.onnx"
    target.write_bytes(b"old")
    with pytest.raises(ExportError, match="differ by|could not export"):
        export_onnx(DependsOnTheExample(), torch.randn(2, 3), target)
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_network_that_can_not_be_exported_is_an_export_error(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")

    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="Branches"):
        export_onnx(Branches(), torch.randn(2, 3), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_bad_targets_and_examples_are_named(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ExportError, match="does not exist"):
        export_onnx(net, torch.randn(1, 2), tmp_path / "no" / "net.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        export_onnx(net, torch.randn(1, 2), tmp_path)
    with pytest.raises(InputError, match="file name .* given Tensor: look at the order"):
        export_onnx(nn.Conv2d(3, 4, 3), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not int"):
        export_onnx(net, 3, tmp_path / "net.onnx")  # type: ignore[arg-type]
