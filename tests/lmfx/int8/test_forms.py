"""Which layers run in 8 bits: by measured times, and never a network that is slower than in float."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import fx, nn

import lmfx
from lmfx.export import to_onnx_bytes
from lmfx.int8.forms import Forms, FormTimes, byte_ends_of
from lmfx.int8.graph_view import GraphView, view_of
from lmfx.int8.in_network import conversion_model, has_blocked_layout
from lmfx.int8.qdq import with_qdq
from lmfx.int8.units import SCHEMES, find_units
from lmfx.latency import LatencyTable, get_backend
from lmfx.latency.backends import int8_models
from lmfx.latency.workload import Workload
from lmfx.passes.errors import ExportError, OptionError
from tests.helpers import one_thread as one_thread
from tests.lmfx.int8.test_quantize import ops, pictures, small

pytestmark = pytest.mark.usefixtures("one_thread")


class Chain(nn.Sequential):
    """Dense, depthwise, dense."""

    def __init__(self) -> None:
        convs = (nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 3))
        super().__init__(*(layer for conv in convs for layer in (conv, nn.ReLU())))


def view(net: nn.Module, *shapes: tuple[int, ...]) -> GraphView:
    return view_of(to_onnx_bytes(fx.symbolic_trace(net.eval()), [(s, torch.float32) for s in shapes]))


def forms_with(conversion: float, dense: float = 3.0) -> Forms:
    """Dense convs are three times as fast in 8 bits, depthwise ones half as fast."""

    def time(model: bytes, dense: float, depthwise: float) -> float:
        attributes = [a for n in onnx.load_from_string(model).graph.node for a in n.attribute]
        return dense if next((a.i for a in attributes if a.name == "group"), 1) == 1 else depthwise

    times = FormTimes(lambda m: time(m, dense, 1.0), lambda m: time(m, 1.0, 2.0), lambda shape, to: conversion)
    return Forms(SCHEMES["onnxruntime"], times)


def test_a_layer_that_is_slower_stays_float_where_the_conversions_cost_less_than_it_saves() -> None:
    chain = view(Chain(), (1, 16, 20, 20))
    for conversion, expected in ((0.4, [True, False, True]), (0.6, [True, True, True]), (9.0, [True, True, True])):
        forms = forms_with(conversion).choose(chain, byte_ends_of(chain))
        assert [f.quantized for f in forms] == expected, conversion
    assert [f.quantized for f in forms_with(9.0).choose(chain)] == [False] * 3  # float ends: two conversions of 9 ms
    assert "Conv, int8 2.0000 ms, float 1.0000 ms: float" in str(forms_with(0.4).choose(chain, byte_ends_of(chain))[1])


def test_a_time_is_measured_once_for_each_configuration() -> None:
    forms = forms_with(0.1)
    calls = []
    inner = forms.times.int8
    forms.times.int8 = lambda model: calls.append(1) or inner(model)  # type: ignore[func-returns-value]
    forms.choose(view(nn.Sequential(*(nn.Conv2d(16, 16, 1) for _ in range(4))), (1, 16, 9, 9)))
    assert len(calls) == 1


def test_rows_are_those_of_the_faster_form_and_images_come_in_float() -> None:
    backend = get_backend("onnxruntime", precision="int8")
    models = backend.int8  # type: ignore[attr-defined]
    dense = Workload.of(
        fx.symbolic_trace(nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU())), ((1, 64, 30, 30), torch.float32)
    )
    for float_ms, stays in ((3.0, {}), (0.5, {"stays float": ["Conv"]})):
        models.forms = forms_with(0.1, float_ms)
        row = backend.measure([dense], rounds=3)[dense.signature]
        assert row.ms > 0 and row.conditions == stays
    assert backend.identity()["precision"] == "int8" and "precision" not in get_backend("onnxruntime").identity()
    image = view(nn.Conv2d(3, 16, 3), (1, 3, 20, 20))
    assert len(byte_ends_of(image)) == 1 and byte_ends_of(image)[0] in image.outputs


def test_a_row_has_neither_conversions_nor_transposes_at_its_ends() -> None:
    models = get_backend("onnxruntime", precision="int8").int8  # type: ignore[attr-defined]
    models.forms = forms_with(0.6)
    model, left = models.row(to_onnx_bytes(fx.symbolic_trace(Chain()), [((1, 16, 20, 20), torch.float32)]))
    assert [n.op_type for n in model.graph.node] == ["QLinearConv"] * 3 and left == []
    models.forms = forms_with(0.4)
    model, left = models.row(to_onnx_bytes(fx.symbolic_trace(Chain()), [((1, 16, 20, 20), torch.float32)]))
    found = [n.op_type for n in model.graph.node]
    assert (
        found[0] == found[-1] == "QLinearConv"
        and found.count("DequantizeLinear") == 1
        and "Conv" in found
        and left == ["Conv"]
    )


@pytest.mark.parametrize("shape", [(1, 32, 5, 3), (1, 24, 5, 3), (2, 3, 5, 3), (2, 20)])
@pytest.mark.parametrize("to_int8", [True, False])
def test_a_conversion_is_that_of_the_layout_that_float_convolutions_have_here(
    shape: tuple[int, ...], to_int8: bool
) -> None:
    backend = get_backend("onnxruntime")
    here = has_blocked_layout(onnx, backend._optimize)  # type: ignore[attr-defined]
    for blocked in {False, here}:
        model = conversion_model(onnx, shape, to_int8, blocked)
        image = len(shape) == 4 and shape[1] >= 16
        found = [n.op_type for n in model.graph.node]
        assert found.count("Transpose") == image
        assert any("Reorder" in op for op in found) == (blocked and image and shape[1] % 16 == 0)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        assert given.type == ("tensor(float)" if to_int8 else "tensor(uint8)")
        y = session.run(None, {given.name: np.zeros(given.shape, np.float32 if to_int8 else np.uint8)})[0]
        assert y.size == math.prod(shape) and y.dtype == (np.uint8 if to_int8 else np.float32)


def test_a_processor_without_the_blocked_layout_gets_none() -> None:
    assert not has_blocked_layout(onnx, onnx.load_from_string)

    def blocking(data: bytes) -> Any:
        model = onnx.load_from_string(data)
        model.graph.node[0].domain = "com.microsoft.nchwc"
        return model

    assert has_blocked_layout(onnx, blocking)


def whole_with(
    monkeypatch: pytest.MonkeyPatch, forms: Forms, ms: dict[str, float], net: nn.Module | None = None
) -> tuple[int, int8_models.ChosenForms]:
    """(layers in 8 bits in the model of a whole network that is taken, what was found) with these times: "float",
    "mixed" (some in 8 bits) and "int8" (all)."""

    def times(self: Any, models: list[bytes], *longer: int) -> list[float]:
        kinds = []
        for data in models:
            count = layers_in_8_bits(data)
            kinds.append("float" if not count else "int8" if count == 3 else "mixed")
        return [ms[k] for k in kinds]

    monkeypatch.setattr(int8_models.Int8Models, "_times", times)
    models = get_backend("onnxruntime", precision="int8").int8  # type: ignore[attr-defined]
    models.forms = forms
    data = to_onnx_bytes(fx.symbolic_trace((net or Chain()).eval()), [((1, 16, 20, 20), torch.float32)])
    model, found = models.whole(data)
    again = models.whole(data)
    assert again[0] == model and again[1] is found  # measured once
    return layers_in_8_bits(model), found


def layers_in_8_bits(model: bytes) -> int:
    return sum(
        t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
        for t in onnx.load_from_string(model).graph.initializer
    )


@pytest.mark.parametrize(
    ("conversion", "ms", "layers", "pays"),
    [
        (0.4, {"float": 7.0, "mixed": 3.0, "int8": 4.0}, 2, True),
        (0.4, {"float": 7.0, "mixed": 4.0, "int8": 3.0}, 3, True),  # what is measured decides, not the sum
        (0.4, {"float": 3.01, "mixed": 3.0, "int8": 4.0}, 0, False),  # too little to lose anything for
        (0.4, {"float": 2.0, "mixed": 3.0, "int8": 4.0}, 0, False),
        (9.0, {"float": 7.0, "int8": 3.0}, 3, True),  # no layer was chosen
        (9.0, {"float": 3.0, "int8": 7.0}, 0, False),
    ],
)
def test_a_whole_network_is_the_one_that_is_measured_to_be_fastest(
    monkeypatch: pytest.MonkeyPatch, conversion: float, ms: dict[str, float], layers: int, pays: bool
) -> None:
    count, found = whole_with(monkeypatch, forms_with(conversion), ms)
    assert (count, found.pays) == (layers, pays)
    assert found.ms["float32"] == ms["float"] and found.ms["int8"] == min(ms.get("mixed", 99.0), ms["int8"])
    if pays:
        assert sum(f.quantized for f in found.forms) == layers


def test_a_network_without_a_layer_that_runs_in_8_bits_is_none_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    count, found = whole_with(monkeypatch, forms_with(0.1), {"float": 1.0}, nn.Sequential(nn.Softmax(1)))
    assert count == 0 and not found.pays and found.forms == ()


def test_ends_in_8_bits_take_and_give_bytes() -> None:
    both = view(nn.Conv2d(16, 8, 1), (1, 16, 5, 5))
    ends = [*both.inputs, *both.outputs]
    for scheme, kind in ((SCHEMES["onnxruntime"], "tensor(uint8)"), (SCHEMES["tensorrt"], "tensor(int8)")):
        model = with_qdq(both, find_units(both, scheme), scheme, byte_ends=ends)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        assert [v.type for v in (*session.get_inputs(), *session.get_outputs())] == [kind] * 2


# compress


def compressed(**options: Any) -> fx.GraphModule:
    images = pictures(24, 33)
    common: dict[str, Any] = {"calibration": images, "progress": False, "realize": ("fit",), "refit": False}
    return lmfx.compress(small(), images[:1], 0.97, **{**common, "precision": "int8", **options})


@pytest.mark.filterwarnings("ignore::lmfx.QualityWarning")
def test_compress_in_8_bits_measures_judges_and_exports_one_file(tmp_path: Path) -> None:
    net = compressed(cache_dir=tmp_path)
    result = lmfx.result_of(net)
    assert result.backend["precision"] == "int8" and result.ratio is not None and result.ratio <= 0.97
    assert result.int8 is not None
    text = lmfx.report(net)
    if not result.int8.pays:  # a small network on a machine without fast 8-bit products
        assert "does not pay" in text
        return
    assert "in 8 bits" in text and result.int8.quantized is not None
    file = lmfx.export_onnx(net, pictures(1, 33), tmp_path / "net.onnx")
    assert ops(file)["QuantizeLinear"] > 3
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    images = pictures(24, 33)
    name = session.get_inputs()[0].name
    y = torch.cat([torch.from_numpy(session.run(None, {name: x[None].numpy()})[0]) for x in images])
    with torch.no_grad():
        assert float((y - net(images)).square().mean() / y.var(0).mean()) < 0.1
    reference = lmfx.compare(net, lmfx.trace(small(), images[:1]), images[7::8])
    assert result.quality is not None and result.quality.divergence != reference.divergence  # of the file, not of net
    again = lmfx.load(lmfx.save(net, tmp_path / "saved"), small())
    lmfx.export_onnx(again, images[:1], tmp_path / "again.onnx")
    session = ort.InferenceSession(str(tmp_path / "again.onnx"), providers=["CPUExecutionProvider"])
    assert torch.equal(y[:1], torch.from_numpy(session.run(None, {name: images[:1].numpy()})[0]))
    with pytest.raises(ExportError, match="shapes"):
        lmfx.export_onnx(net, pictures(2, 33), tmp_path / "other.onnx")
    with torch.no_grad():
        next(net.parameters()).add_(1.0)
    with pytest.raises(ExportError, match="weights of this network changed"):
        lmfx.export_onnx(net, pictures(1, 33), tmp_path / "other.onnx")
    other = lmfx.load(lmfx.save(net, tmp_path / "saved"), small())  # the file of other weights is not taken
    assert "QuantizeLinear" not in ops(lmfx.export_onnx(other, images[:1], tmp_path / "float.onnx"))


@pytest.mark.filterwarnings("ignore::lmfx.QualityWarning")
def test_where_8_bits_do_not_pay_the_network_stays_float_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_models.Int8Models, "_times", lambda self, models, *longer: [1.0] * len(models))
    net = compressed(cache_dir=tmp_path)
    facts = lmfx.result_of(net).int8
    assert facts is not None and not facts.pays and facts.quantized is None and facts.rows
    assert "does not pay, so the network stays float: 1 ms in 8 bits, 1 ms in float" in lmfx.report(net)
    file = lmfx.export_onnx(net, pictures(1, 33), tmp_path / "net.onnx")
    assert "QuantizeLinear" not in ops(file)


def test_precisions_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(OptionError, match="use one of 'fp32'"):
        compressed(precision="int4")
    with pytest.raises(OptionError, match="the form to deploy"):
        compressed(merge=False)
    with pytest.raises(OptionError, match="measures in fp32"):
        compressed(latency=get_backend("onnxruntime"))
    with pytest.raises(OptionError, match="measures in fp32"):
        compressed(latency=LatencyTable({}, {"backend": "onnxruntime"}))
    with pytest.raises(OptionError, match="no option precision"):
        compressed(latency="roofline")
    with pytest.raises(OptionError, match='"int8" on the provider cpu'):
        get_backend("onnxruntime", precision="fp16")
