"""TensorRT engines ahead of time, on a machine without a GPU; and every way in which an installation can be broken."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import lmfx
from lmfx.export import build_engine, to_onnx_bytes
from lmfx.export import tensorrt as engines
from lmfx.export.tensorrt import import_tensorrt, network_layers
from lmfx.passes.errors import ExportError, MissingExtra, OptionError
from tests.toys import compress, toy

pytest.importorskip("onnx")
IMAGE = ((1, 6, 12, 12), torch.float32)


def onnx_bytes(*modules: nn.Module, **options: Any) -> bytes:
    return to_onnx_bytes(fx.symbolic_trace(nn.Sequential(*modules).eval()), [IMAGE], **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(onnx_bytes(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    return path


# engines that are really built


@pytest.mark.parametrize("target", ["sm89", "sm120", ["sm86", "sm89", "sm120"], None], ids=str)
def test_an_engine_is_built_for_gpus_that_are_not_here(source: Path, target: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = build_engine(source, source.with_name("net.engine"), target=target, package="tensorrt_rtx")
    assert engine.read_bytes()[:4] == b"vtrt" and engine.stat().st_size > 1000


def test_engines_for_different_targets_differ(source: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    targets: list[Any] = ["sm89", "sm120", ["sm89", "sm120"]]
    files = [build_engine(source, source.with_name(f"{i}.engine"), t) for i, t in enumerate(targets)]
    assert len({file.read_bytes() for file in files}) == 3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_engine_in_half_precision_is_smaller(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "net.onnx").write_bytes(onnx_bytes(nn.Conv2d(6, 600, 9), nn.BatchNorm2d(600), nn.GroupNorm(2, 600)))
    full = build_engine(tmp_path / "net.onnx", tmp_path / "full.engine", "sm89")
    half = build_engine(tmp_path / "net.onnx", tmp_path / "half.engine", "sm89", precision=precision)
    weights = 600 * 6 * 81 * 4
    assert full.stat().st_size - half.stat().st_size > 0.4 * weights


def test_tensorrt_says_itself_why_it_can_not_build(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "net.onnx").write_bytes(onnx_bytes(nn.Conv2d(6, 8, 3), precision="bf16"))
    with pytest.raises(ExportError, match="could not build an engine: .*sm75"):
        build_engine(tmp_path / "net.onnx", tmp_path / "net.engine", "sm75")
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="cannot read the ONNX model"):
        build_engine(tmp_path / "bad.onnx", tmp_path / "bad.engine", "sm89")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.onnx", "net.onnx"]


def test_an_unknown_target_is_answered_with_the_known_ones(source: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(OptionError, match=r"'sm12'; it knows sm75, .*sm89, sm120"):
        build_engine(source, source.with_name("net.engine"), ["sm89", "sm12"])


def test_tensorrt_reads_fewer_layers_after_merging() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    x = torch.randn(1, 3, 12, 12)
    net = toy()
    merged = compress(net, x, 0.6, importance="magnitude")
    before, after = (network_layers(trt, to_onnx_bytes(g, [x])) for g in (lmfx.trace(net, x), merged))
    assert after["CONVOLUTION"] < before["CONVOLUTION"] == 6
    assert after.total() < before.total()


# what is refused before TensorRT is asked


def test_a_target_is_a_compute_capability(source: Path) -> None:
    for target in ("ada", "sm8", "SM 89", ["sm89", 89]):
        with pytest.raises(OptionError, match='like "sm89"'):
            build_engine(source, source.with_name("net.engine"), target=target)  # type: ignore[arg-type]


def test_files_packages_and_precisions_are_checked(source: Path) -> None:
    out = source.with_name("net.engine")
    with pytest.raises(ExportError, match=r"no ONNX file .*none\.onnx; write one with lmfx\.export_onnx"):
        build_engine(source.with_name("none.onnx"), out, target="sm89")
    with pytest.raises(ExportError, match="does not exist; make it first"):
        build_engine(source, source.parent / "no" / "net.engine", target="sm89")
    with pytest.raises(OptionError, match="tensorrt, tensorrt_rtx, not 'trt'"):
        build_engine(source, out, package="trt")
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(OptionError, match="fp32, fp16, bf16, not 'int8'"):
        build_engine(source, out, target="sm89", precision="int8")
    assert not out.exists()


# installations


def finds(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    """Imports of the two packages give a module, or raise."""

    def import_module(name: str) -> Any:
        value = found.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(value, BaseException):
            raise value
        return value

    monkeypatch.setattr(engines.importlib, "import_module", import_module)


def module(name: str, version: str = "99.0", **missing: Any) -> Any:
    fake = types.ModuleType(name)
    members = {"ILogger": object, "OnnxParser": object, "NetworkDefinitionCreationFlag": types.SimpleNamespace}
    fake.__dict__.update(members, __version__=version)
    fake.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)  # type: ignore[attr-defined]
    fake.__dict__.update(missing)
    return fake


def sentence(package: str | None = None, ahead_of_time: bool = False) -> str:
    with pytest.raises(MissingExtra) as caught:
        import_tensorrt(package, ahead_of_time)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_package_that_is_not_there_is_named_with_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    finds(monkeypatch)
    assert sentence("tensorrt_rtx") == (
        'TensorRT cannot be used: tensorrt_rtx is not installed; pip install "lmfx[trt-rtx]"'
    )
    text = sentence()
    assert "tensorrt is not installed and tensorrt_rtx is not installed" in text
    assert 'pip install "lmfx[trt]" or pip install "lmfx[trt-rtx]"' in text


@pytest.mark.parametrize(
    "error",
    [
        OSError("libtensorrt_rtx.so.1: cannot open shared object file:\n No such file or directory"),
        ImportError("libtensorrt_rtx.so.1: cannot open shared object file:\n No such file or directory"),
        ModuleNotFoundError("No module named 'tensorrt_rtx_libs'", name="tensorrt_rtx_libs"),
        RuntimeError("libtensorrt_rtx.so.1 has another version"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_package_that_can_not_be_loaded_is_not_called_missing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    finds(monkeypatch, tensorrt_rtx=error)
    text = sentence("tensorrt_rtx")
    assert f"tensorrt_rtx is installed and cannot be loaded ({type(error).__name__}: " in text
    assert "tensorrt_rtx" in str(error).replace("lib", "") and "not installed" not in text
    assert text.endswith('pip install --upgrade --force-reinstall "lmfx[trt-rtx]"')


def test_the_broken_one_is_told_of_and_not_the_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    finds(monkeypatch, tensorrt=OSError("libnvinfer.so.10: no such file"))
    text = sentence()
    assert "libnvinfer" in text and "tensorrt_rtx is not installed" not in text


@pytest.mark.parametrize(
    "old",
    [
        module("tensorrt", "8.6.1"),
        module("tensorrt", "10.9", NetworkDefinitionCreationFlag=types.SimpleNamespace(EXPLICIT_BATCH=0)),
    ],
    ids=["version", "feature"],
)
def test_a_version_that_is_too_old_is_named(old: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finds(monkeypatch, tensorrt=old)
    text = sentence("tensorrt")
    assert f"tensorrt {old.__version__} is too old, 10.0 is the oldest" in text and "--upgrade" in text


def test_which_package_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {name: module(name, "10.3.0.26") for name in engines.PACKAGES}
    finds(monkeypatch, **both)
    assert import_tensorrt() is both["tensorrt"] and import_tensorrt("tensorrt_rtx") is both["tensorrt_rtx"]
    assert import_tensorrt(ahead_of_time=True) is both["tensorrt_rtx"]
    finds(monkeypatch, tensorrt=OSError("broken"), tensorrt_rtx=both["tensorrt_rtx"])
    assert import_tensorrt() is both["tensorrt_rtx"]


def test_building_without_tensorrt_leaves_no_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in engines.PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match="pip install"):
        build_engine(source, source.with_name("net.engine"), target="sm89")
    assert not source.with_name("net.engine").exists()
