"""float32 ONNX models in half precision: the same values to half's rounding, and float32 where half loses too much."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from lmfx.export import emit, to_onnx_bytes
from lmfx.export.precision import convert, convert_bytes
from lmfx.passes.errors import ExportError, OptionError
from tests.toys import toy

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
IMAGE = ((2, 6, 13, 11), torch.float32)


def graph(*modules: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(*modules).eval())


def norm(channels: int) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels)
    module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    module.weight.data.uniform_(0.5, 1.5)
    module.bias.data.uniform_(-1, 1)
    return module


def run(model: Any, *inputs: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return np.asarray(session.run(None, dict(zip(names, inputs, strict=True)))[0])


def words(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def check(gm: fx.GraphModule, shape: tuple[int, ...], tolerance: float = 5e-3) -> Any:
    x = torch.randn(shape)
    model = emit(gm, [x], precision="fp16")
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)} == {FLOAT16}
    got = run(model, x.half().numpy())
    assert got.dtype == np.float16
    expected = gm(x).detach().numpy()
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
    return model


@pytest.mark.parametrize(
    "modules",
    [
        (nn.Conv2d(6, 8, 3), nn.ReLU()),
        (nn.Conv2d(6, 8, 3, bias=False), norm(8), nn.Hardswish()),
        (norm(6), nn.ReLU6()),
        (nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 4, 1)),
        (nn.LayerNorm([11]), nn.GELU()),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2)),
        (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), nn.Softmax(1)),
        (nn.ConstantPad2d(1, 0.5), nn.LeakyReLU(0.1), nn.ReflectionPad2d(1)),
        (nn.Identity(),),
    ],
    ids=str,
)
def test_a_half_precision_graph_computes_the_same_to_halfs_rounding(modules: tuple[nn.Module, ...]) -> None:
    check(graph(*modules), IMAGE[0])


def test_a_norm_behind_a_conv_is_folded_before_rounding() -> None:
    bn = norm(8)
    bn.running_var.fill_(1e6)  # type: ignore[union-attr]
    bn.weight.data.fill_(1000.0)
    model = check(graph(nn.Conv2d(6, 8, 3), bn), IMAGE[0])
    assert words(model) == ["Conv", "Identity"] and len(model.graph.initializer) == 2


def test_a_conv_that_is_read_twice_keeps_its_weights() -> None:
    root, g = nn.Module(), fx.Graph()
    root.conv, root.norm = nn.Conv2d(6, 6, 1), norm(6)
    y = g.call_module("conv", (g.placeholder("x"),))
    g.output(g.call_function(torch.add, (g.call_module("norm", (y,)), y)))
    model = check(fx.GraphModule(root.eval(), g), IMAGE[0])
    assert words(model) == ["Conv", "Mul", "Add", "Add", "Identity"]


def test_two_norms_behind_convs_that_share_weights_are_folded_apart() -> None:
    root, g = nn.Module(), fx.Graph()
    root.conv, root.a, root.b = nn.Conv2d(6, 6, 1), norm(6), norm(6)
    x = g.placeholder("x")
    first = g.call_module("a", (g.call_module("conv", (x,)),))
    g.output(g.call_module("b", (g.call_module("conv", (first,)),)))
    assert words(check(fx.GraphModule(root.eval(), g), IMAGE[0])) == ["Conv", "Conv", "Identity"]


def test_norms_are_computed_in_float32_and_their_readers_see_half() -> None:
    model = check(graph(nn.GroupNorm(2, 6), nn.ReLU()), IMAGE[0])
    order = words(model)
    at = order.index("InstanceNormalization")
    assert order[at - 1] == order[at + 1] == "Cast" and order.count("Cast") == 2
    x = torch.randn(IMAGE[0]) * 1e3  # a sum of squares that half cannot hold
    gm = graph(nn.GroupNorm(2, 6))
    got = run(emit(gm, [x], precision="fp16"), x.half().numpy())
    assert np.abs(got - gm(x).detach().numpy()).max() < 0.01


def test_a_chain_of_float_ops_is_cast_once_on_each_side() -> None:
    helper = onnx.helper
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["apart"]),
        helper.make_node("Pow", ["apart", "two"], ["square"]),
        helper.make_node("Sqrt", ["square"], ["root"]),
        helper.make_node("MatMul", ["root", "w"], ["y"]),
    ]
    w = np.random.default_rng(0).random((4, 3), dtype=np.float32)
    constants = [onnx.numpy_helper.from_array(w, "w"), onnx.numpy_helper.from_array(np.float32(2), "two")]
    model = made(nodes, constants, (2, 4), (2, 3))
    x = np.random.default_rng(1).random((2, 4), dtype=np.float32)
    expected = run(model, x)
    got = run(convert(model, "fp16"), x.astype(np.float16))
    np.testing.assert_allclose(got, expected, atol=5e-3)
    assert words(model) == ["Cast", "ReduceMean", "Sub", "Pow", "Sqrt", "Cast", "MatMul"]
    assert {t.name: t.data_type for t in model.graph.initializer} == {"two": FLOAT, "w.half": FLOAT16}


def made(
    nodes: list[Any], constants: list[Any], shape: tuple[int, ...], out: tuple[int, ...], kind: int = FLOAT
) -> Any:
    info = onnx.helper.make_tensor_value_info
    g = onnx.helper.make_graph(nodes, "g", [info("x", kind, shape)], [info("y", FLOAT, out)], constants)
    return onnx.helper.make_model(
        g, opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in (("", 20), ("nobody", 1))], ir_version=10
    )


def test_the_angles_of_an_embedding_stay_in_float32() -> None:
    helper = onnx.helper
    nodes = [
        helper.make_node("Cast", ["x"], ["t"], to=FLOAT),
        helper.make_node("Constant", [], ["f"], value_float=0.999),
        helper.make_node("Mul", ["t", "f"], ["angle"]),
        helper.make_node("Sin", ["angle"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["y"]),
    ]
    model = made(nodes, [onnx.numpy_helper.from_array(np.ones((1, 1), np.float32), "w")], (5, 1), (5, 1), kind=7)
    t = np.array([[0], [1], [997], [1001], [4001]])
    got = run(convert(model, "fp16"), t)
    np.testing.assert_allclose(got, np.sin(t * np.float32(0.999)), atol=2e-3)
    assert words(model).count("Cast") == 2  # of the integers, and before the product


def test_inputs_and_outputs_stay_in_float32_if_asked_for() -> None:
    gm = graph(nn.Conv2d(6, 8, 3), nn.ReLU())
    x = torch.randn(IMAGE[0])
    model = onnx.load_model_from_string(convert_bytes(to_onnx_bytes(gm, [x]), "fp16", keep_io=True))
    assert {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)} == {FLOAT}
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["input_0", "output_0"]
    np.testing.assert_allclose(run(model, x.numpy()), gm(x).detach().numpy(), atol=5e-3)
    assert {t.data_type for t in model.graph.initializer} == {FLOAT16}


def test_a_constant_that_half_can_not_hold_becomes_the_largest_one() -> None:
    nodes = [onnx.helper.make_node("Add", ["x", "mask"], ["y"])]
    model = made(nodes, [onnx.numpy_helper.from_array(np.array([-1e38, 0], np.float32), "mask")], (1, 2), (1, 2))
    got = run(convert(model, "fp16"), np.array([[0, 1]], np.float16))
    assert np.isfinite(got).all() and got[0, 0] < -6e4 and got[0, 1] == 1


def test_scales_of_a_resize_stay_in_float32() -> None:
    nodes = [onnx.helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest")]
    scales = onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    model = convert(made(nodes, [scales], (1, 1, 2, 2), (1, 1, 4, 4)), "fp16")
    x = np.arange(4, dtype=np.float16).reshape(1, 1, 2, 2)
    np.testing.assert_array_equal(run(model, x)[0, 0, ::2, ::2], x[0, 0])


def test_a_whole_network_agrees_in_half_precision() -> None:
    from lmfx.passes.trace.tracing import trace

    x = torch.randn(1, 3, 12, 12)
    check(trace(toy(), x), (1, 3, 12, 12), tolerance=1e-2)


def test_a_network_that_only_torch_can_export_is_converted_too() -> None:
    pytest.importorskip("onnxscript")
    gm = graph(nn.PixelShuffle(2), nn.Conv2d(2, 3, 1), norm(3))
    x = torch.randn(1, 8, 4, 4)
    model = onnx.load_model_from_string(to_onnx_bytes(gm, [x], precision="fp16"))
    np.testing.assert_allclose(run(model, x.half().numpy()), gm(x).detach().numpy(), atol=2e-2)


def test_bfloat16_models_are_valid_and_of_an_opset_that_knows_it() -> None:
    gm = graph(nn.Conv2d(6, 8, 3), norm(8), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 8))
    model = emit(gm, [IMAGE], fill=0.5, precision="bf16")
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert {t.data_type for t in model.graph.initializer} >= {BFLOAT16}
    assert model.graph.input[0].type.tensor_type.elem_type == BFLOAT16


def test_float32_changes_nothing_and_meta_weights_are_filled() -> None:
    gm = graph(nn.Conv2d(6, 8, 3))
    data = to_onnx_bytes(gm, [IMAGE])
    assert convert_bytes(data, "fp32") is data and to_onnx_bytes(gm, [IMAGE], precision="fp32") == data
    meta = graph(nn.Conv2d(6, 8, 3, device="meta"), nn.BatchNorm2d(8, device="meta"))
    assert words(emit(meta, [IMAGE], fill=0.1, precision="fp16")) == ["Conv", "Identity"]


def test_what_can_not_be_converted_says_why() -> None:
    with pytest.raises(OptionError, match="fp32, fp16, bf16, not 'int8'"):
        convert_bytes(b"", "int8")
    with pytest.raises(ExportError, match="cannot read the ONNX model"):
        convert_bytes(b"nonsense", "fp16")
    body = onnx.helper.make_graph([], "b", [], [])
    nodes = [onnx.helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)]
    with pytest.raises(ExportError, match=r"control flow \(If\)"):
        convert(made(nodes, [], (1,), (1,)), "fp16")
    odd = [onnx.helper.make_node("Odd", ["x"], ["o"], domain="nobody"), onnx.helper.make_node("Relu", ["o"], ["y"])]
    with pytest.raises(ExportError, match="type of 'o'"):
        convert(made(odd, [], (1,), (1,)), "bf16")


def test_half_precision_costs_no_more_than_torchs_own(capsys: Any) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("onnxscript")
    from benchmarks.runtimes import half

    assert half.main(["--models", "timm/test_resnet"]) == 0
    name, ours, theirs, casts = capsys.readouterr().out.splitlines()[1].split()
    assert name == "timm/test_resnet" and 0 < float(ours) < 2 * float(theirs) < 0.01 and int(casts) >= 2
    assert half.main(["--models", "timm/test_resnet", "--tolerance", "0"]) == 1
