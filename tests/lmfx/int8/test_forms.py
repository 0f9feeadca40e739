"""Which layers run in 8 bits: by measured times, and never a network that is slower than in float."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import lmfx
from lmfx.export import to_onnx_bytes
from lmfx.int8.forms import Forms, FormTimes, byte_ends_of
from lmfx.int8.graph_view import GraphView, view_of
from lmfx.int8.qdq import with_qdq
from lmfx.int8.units import SCHEMES
from lmfx.latency import LatencyTable, get_backend
from lmfx.latency.backends import int8_models
from lmfx.latency.workload import Workload
from lmfx.passes.errors import ExportError, OptionError
from tests.lmfx.int8.test_quantize import ops, pictures, small

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Chain(nn.Sequential):
    """Dense, depthwise, dense."""

    def __init__(self) -> None:
        convs = (nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 3))
        super().__init__(*(layer for conv in convs for layer in (conv, nn.ReLU())))


def view(net: nn.Module, *shapes: tuple[int, ...]) -> GraphView:
    return view_of(to_onnx_bytes(fx.symbolic_trace(net.eval()), [(s, torch.float32) for s in shapes]))


def forms_with(conversion: float) -> Forms:
    """Dense convs are three times as fast in 8 bits, depthwise ones half as fast."""

    def time(model: bytes, dense: float, depthwise: float) -> float:
        (node,) = [n for n in onnx.load_from_string(model).graph.node if n.op_type == "Conv"]
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        return dense if groups == 1 else depthwise

    times = FormTimes(lambda m: time(m, 3.0, 1.0), lambda m: time(m, 1.0, 2.0), lambda shape, to: conversion)
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
    dense = Workload.of(
        fx.symbolic_trace(nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU())), ((1, 64, 30, 30), torch.float32)
    )
    rows = {p: get_backend("onnxruntime", precision=p).measure([dense], rounds=3) for p in ("fp32", "int8")}
    assert rows["int8"][dense.signature].ms < rows["fp32"][dense.signature].ms
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


def test_ends_in_8_bits_take_and_give_bytes() -> None:
    both = view(nn.Conv2d(16, 8, 1), (1, 16, 5, 5))
    ends = [*both.inputs, *both.outputs]
    from lmfx.int8.units import find_units

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
    monkeypatch.setattr(int8_models.Int8Models, "_times", lambda self, models: [1.0] * len(models))
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
