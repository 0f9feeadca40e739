"""Q/DQ files from calibration images: what is in them, that runtimes read them, and what is said of bad ranges."""

from __future__ import annotations

import builtins
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import lmfx
from lmfx.calibration.images import as_calibration
from lmfx.cli.command_line import main
from lmfx.export.tensorrt import network_layers
from lmfx.int8.forms import made_up_int8
from lmfx.int8.graph_view import view_of
from lmfx.int8.qdq import grid_of
from lmfx.int8.quantize import file_example
from lmfx.int8.units import SCHEMES, find_units
from lmfx.passes.errors import ExportError, InputError, MissingExtra, OptionError
from tests.helpers import one_thread as one_thread


class Small(nn.Module):
    """A stem, a residual block with a grouped and a depthwise conv, a pool, a smooth activation and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.first = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.second = nn.Conv2d(16, 16, (3, 1), padding=(1, 0), groups=16)
        self.pool = nn.MaxPool2d(2)
        self.wide = nn.Conv2d(16, 20, 1)
        self.head = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.second(torch.relu(self.first(x))) + x)
        x = nn.functional.silu(self.wide(self.pool(x)))
        return self.head(x.mean((2, 3)))


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    net = Small()
    for values, low, high in ((net.norm.running_mean, -0.3, 0.3), (net.norm.running_var, 0.5, 2.0)):
        assert values is not None
        values.uniform_(low, high)
    return net.eval()


def pictures(count: int = 24, size: int = 21, seed: int = 0) -> torch.Tensor:
    """Smooth images, each of another brightness."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator) + torch.randn(count, 3, 1, 1, generator=generator)
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: x[i : i + 1].numpy()})[0]) for i in range(len(x))])


def ops(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_quantized_network_gives_nearly_what_it_gave(tmp_path: Path, runtime: str, per_channel: bool) -> None:
    net, images = small(), pictures()
    made = lmfx.quantize(net, images, tmp_path / "q.onnx", runtime=runtime, per_channel=per_channel, progress=False)
    with torch.no_grad():
        y = net(images)
    off = run(tmp_path / "q.onnx", images) - y
    assert float(off.square().mean() / y.var(0).mean()) < 0.02
    assert made.path == tmp_path / "q.onnx" and made.runtime == runtime
    assert {x.name for x in made.layers} == {"stem", "first", "second", "wide", "head"}
    assert made.divergence < 0.03 and made.images == 3
    assert "5 convolutions and Linears in 8 bits" in str(made)


def test_onnx_runtime_runs_all_but_the_ends_in_8_bits(tmp_path: Path) -> None:
    lmfx.quantize(small(), pictures(), tmp_path / "q.onnx", progress=False)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"])
    found = ops(tmp_path / "optimized.onnx")
    assert found["QLinearConv"] == 4 and found["QLinearAdd"] == 1 and found["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Add", "Relu", "Gemm"} & set(found)
    assert found["QuantizeLinear"] <= 2  # the mean is none that it has in 8 bits


def test_for_tensorrt_nothing_is_between_a_convolution_and_its_sum_and_the_skip_is_quantized(tmp_path: Path) -> None:
    lmfx.quantize(small(), pictures(), tmp_path / "q.onnx", runtime="tensorrt_rtx", progress=False)
    graph = onnx.load(tmp_path / "q.onnx").graph
    maker = {name: n for n in graph.node for name in n.output}
    (add,) = [n for n in graph.node if n.op_type == "Add"]
    assert sorted(maker[name].op_type for name in add.input) == ["Conv", "DequantizeLinear"]
    zeros = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith(".zero")}
    assert zeros and all(not z.any() and z.dtype == np.int8 for z in zeros.values())
    weights = [t for t in graph.initializer if t.name.endswith(".int8")]
    assert len(weights) == 5 and all(np.abs(onnx.numpy_helper.to_array(t)).max() <= 127 for t in weights)


def test_tensorrt_rtx_reads_the_file_and_builds_its_engine(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    lmfx.quantize(small(), pictures(), tmp_path / "q.onnx", runtime="tensorrt_rtx", progress=False)
    found = network_layers(trt, (tmp_path / "q.onnx").read_bytes())
    assert found["CONVOLUTION"] == 4 and found["QUANTIZE"] >= 5
    engine = lmfx.build_engine(tmp_path / "q.onnx", tmp_path / "q.engine", target="sm89", package="tensorrt_rtx")
    assert engine.stat().st_size > 0
    inside = made_up_int8(
        lmfx.export.to_onnx_bytes(lmfx.trace(small(), pictures(1)), (pictures(1),)), SCHEMES["tensorrt"], True
    )
    assert network_layers(trt, inside)["QUANTIZE"] >= 5


def test_weights_by_their_gram_are_no_further_off_than_by_the_nearest_step(tmp_path: Path) -> None:
    net = small()
    made = lmfx.quantize(net, pictures(), tmp_path / "q.onnx", progress=False)
    plain = lmfx.quantize(net, pictures(), tmp_path / "n.onnx", weights="nearest", progress=False)
    assert all(x.error <= x.nearest_error for x in made.layers)
    assert any(x.error < 0.8 * x.nearest_error for x in made.layers)
    assert all(np.isnan(x.error) for x in plain.layers)


def test_an_onnx_file_is_quantized_as_its_network_is(tmp_path: Path) -> None:
    net, images = small(), pictures()
    source = lmfx.export_onnx(net, images[:1], tmp_path / "net.onnx")
    assert tuple(file_example(source).shape) == (1, 3, 21, 21)
    made = lmfx.quantize(source, images, tmp_path / "q.onnx", ranges="percentile", progress=False)
    assert len(made.layers) == 5 and made.divergence < 0.03
    lmfx.quantize(
        lmfx.export_onnx(net, images[:1], source, dynamic_batch=True), images, tmp_path / "d.onnx", progress=False
    )
    session = ort.InferenceSession(str(tmp_path / "d.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {session.get_inputs()[0].name: images[:5].numpy()})[0].shape == (5, 5)


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "entropy"])
def test_every_method_of_ranges_gives_a_network_that_works(tmp_path: Path, ranges: Any) -> None:
    made = lmfx.quantize(small(), pictures(), tmp_path / "q.onnx", ranges=ranges, weights="nearest", progress=False)
    assert made.ranges == ranges and made.divergence < 0.2


def test_images_that_are_held_out_to_judge_on_are_in_no_range(tmp_path: Path) -> None:
    images = pictures()
    plain = lmfx.quantize(small(), images, tmp_path / "q.onnx", weights="nearest", progress=False)
    held = as_calibration(torch.arange(24.0)[:, None], torch.zeros(1, 1)).roles().judge.tensors[0].flatten().long()
    assert len(held) == plain.images
    images[held] *= 100
    made = lmfx.quantize(small(), images, tmp_path / "q.onnx", weights="nearest", progress=False)
    assert made.divergence > 10 * plain.divergence  # beyond what was calibrated


def test_a_layer_that_is_excluded_stays_float(tmp_path: Path) -> None:
    made = lmfx.quantize(small(), pictures(), tmp_path / "q.onnx", exclude=("wi*",), progress=False)
    assert made.float_layers == (("wide", "exclude="),)
    assert {x.name for x in made.layers} == {"stem", "first", "second", "head"}
    session = ort.SessionOptions()
    session.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(tmp_path / "q.onnx"), session, providers=["CPUExecutionProvider"])
    assert ops(tmp_path / "optimized.onnx")["Conv"] == 1  # ONNX Runtime would quantize it by itself
    weights = {t.name.split(".int8")[0] for t in onnx.load(tmp_path / "q.onnx").graph.initializer if ".int8" in t.name}
    assert len(weights) == 4


def test_the_name_of_a_container_excludes_what_is_in_it(tmp_path: Path) -> None:
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1))
    net = nn.Sequential(OrderedDict(body=body, head=nn.Conv2d(16, 16, 1))).eval()
    made = lmfx.quantize(net, pictures(), tmp_path / "q.onnx", exclude=("body",), weights="nearest", progress=False)
    assert [n for n, _ in made.float_layers] == ["body.0", "body.2"] and [x.name for x in made.layers] == ["head"]


def test_a_network_and_a_file_that_take_bytes_are_quantized_alike(tmp_path: Path) -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net((x.permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3)

    images = ((pictures().permute(0, 2, 3, 1) + 2) / 4 * 255).clamp(0, 255).to(torch.uint8)
    net = Normalising().eval()
    source = lmfx.export_onnx(net, images[:1], tmp_path / "net.onnx")
    assert file_example(source).dtype == torch.uint8
    for given in (net, source):
        made = lmfx.quantize(given, images, tmp_path / "q.onnx", weights="nearest", progress=False)
        assert len(made.layers) == 5 and made.divergence < 0.05
        with torch.no_grad():
            y = net(images)
        assert float((run(tmp_path / "q.onnx", images) - y).square().mean() / y.var(0).mean()) < 0.05


def test_dead_channels_dead_layers_and_outliers_are_named(tmp_path: Path) -> None:
    net = small()
    with torch.no_grad():
        net.stem.weight[2] = 0
        net.wide.weight[7] *= 500
        net.first.weight.zero_()
    made = lmfx.quantize(net, pictures(), tmp_path / "q.onnx", progress=False)
    text = "\n".join(made.warnings)
    assert "stem: 1 of 16 channels are dead (always the same value): 2" in text
    assert "first: dead, it always gives 0" in text
    assert "wide: channel 7 reaches" in text
    assert torch.isfinite(run(tmp_path / "q.onnx", pictures())).all()
    assert not any(
        "channel" in w for w in lmfx.quantize(small(), pictures(), tmp_path / "s.onnx", progress=False).warnings
    )


def test_a_bias_that_is_huge_beside_its_weights_survives(tmp_path: Path) -> None:
    net, images = small(), pictures()
    with torch.no_grad():
        net.wide.weight[3] *= 1e-9
        assert net.wide.bias is not None
        net.wide.bias[3] = 3.0
        y = net(images)
    lmfx.quantize(net, images, tmp_path / "q.onnx", progress=False)
    off = run(tmp_path / "q.onnx", images) - y
    assert float(off.square().mean() / y.var(0).mean()) < 0.02


def test_what_a_relu_gives_has_all_levels_above_zero() -> None:
    assert grid_of(0.0, 2.55, symmetric=False) == (pytest.approx(0.01), 0)
    assert grid_of(-1.0, 1.55, symmetric=False) == (pytest.approx(0.01), 100)
    assert grid_of(0.5, 1.27, symmetric=True) == (pytest.approx(0.01), 0)
    assert grid_of(0.0, 0.0, symmetric=False)[0] > 0


def test_an_activation_that_somebody_else_reads_before_it_is_not_fused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return torch.relu(y), y

    x = torch.randn(1, 3, 8, 8)
    view = view_of(lmfx.export.to_onnx_bytes(lmfx.trace(Two().eval(), x), (x,)))
    kinds = [(u.kind, u.low) for u in find_units(view, SCHEMES["onnxruntime"])]
    assert kinds == [("weighted", None), ("pointwise", 0.0)]


def test_inputs_by_name_and_one_number_an_image(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            y = torch.relu(self.conv(x)) * scale
            return {"map": y, "mean": y.mean((1, 2, 3))}

    data = [{"x": x[None], "scale": torch.full((1, 1, 1, 1), 1.0 + i % 3)} for i, x in enumerate(pictures(8))]
    made = lmfx.quantize(Scaled().eval(), data, tmp_path / "q.onnx", example_input=data[0], progress=False)
    assert np.isfinite(made.divergence) and len(made.layers) == 1
    session = ort.InferenceSession(str(tmp_path / "q.onnx"), providers=["CPUExecutionProvider"])
    feed = {n.name: v.numpy() for n, v in zip(session.get_inputs(), data[0].values(), strict=True)}
    assert [v.shape for v in session.run(None, feed)] == [(1, 16, 19, 19), (1,)]
    with pytest.raises(InputError, match="pass example_input="):
        lmfx.quantize(Scaled().eval(), data, tmp_path / "q.onnx", progress=False)


# what is refused


def test_without_images_it_is_said_what_they_are_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs calibration images"):
        lmfx.quantize(small(), None, tmp_path / "q.onnx")


def test_without_onnxruntime_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "onnxruntime":
            raise ImportError("not here")
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"lmfx\[ort\]"):
        lmfx.quantize(small(), pictures(), tmp_path / "q.onnx")


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"runtime": "openvino"}, OptionError, "onnxruntime"),
        ({"weights": "random"}, OptionError, "nearest"),
        ({"ranges": "widest"}, OptionError, "percentile"),
        ({"exclude": ("*",)}, ExportError, "nothing in this network"),
        ({"exclude": "head"}, OptionError, "tuple of globs"),
        ({"exclude": ("wide", "hea")}, OptionError, "'hea' covers nothing that runs in 8 bits; there is stem, first"),
    ],
)
def test_an_option_that_is_none_is_refused(tmp_path: Path, options: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        lmfx.quantize(small(), pictures(), tmp_path / "q.onnx", progress=False, **options)
    assert not (tmp_path / "q.onnx").exists()


def test_what_is_no_file_and_images_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the path of an ONNX file, not dict"):
        lmfx.quantize({}, pictures(), tmp_path / "q.onnx")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="there is no ONNX file"):
        lmfx.quantize(tmp_path / "absent.onnx", pictures(), tmp_path / "q.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot load"):
        lmfx.quantize(tmp_path / "bad.onnx", pictures(), tmp_path / "q.onnx")
    with pytest.raises(ExportError, match="does not exist"):
        lmfx.quantize(small(), pictures(), tmp_path / "no" / "q.onnx")
    with pytest.raises(InputError, match="NaN"):
        lmfx.quantize(small(), pictures() * float("nan"), tmp_path / "q.onnx")


# the command line


def test_the_command_line_quantizes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lmfx.export_onnx(small(), pictures(1), tmp_path / "net.onnx")
    np.save(tmp_path / "images.npy", pictures().numpy())
    words = ["quantize", str(source), "--calibration", str(tmp_path / "images.npy"), "-o", str(tmp_path / "q.onnx")]
    assert main([*words, "--runtime", "tensorrt", "--per-tensor", "--rounding", "nearest", "-q"]) == 0
    told = capsys.readouterr().out
    assert "5 convolutions and Linears in 8 bits for tensorrt (a scale a layer" in told
    assert "24 images of" in told and ops(tmp_path / "q.onnx")["QuantizeLinear"] >= 5
    assert main(["quantize", str(tmp_path / "absent.onnx"), *words[2:]]) == 2
    assert "there is no ONNX file" in capsys.readouterr().err
