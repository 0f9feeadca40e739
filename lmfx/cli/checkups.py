"""Tries what lmfx can use on this machine, one thing after the other: imports it, and has it work on a tiny network.

    python -m lmfx.cli.checkups NAME...     a JSON line before and after each; what is imported may end the process

`lmfx doctor` runs this in a process of its own and goes on after the one at which it ended (`lmfx.cli.doctor`).

    ok         it did its work
    missing    it is not installed; `fix` is the command that installs it
    absent     it works elsewhere: there is no such device or compiler here
    broken     it is installed, and does not work
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmfx.environment.bounded_reading import in_one_line
from lmfx.export import export_onnx
from lmfx.export.emit import to_onnx_bytes
from lmfx.export.tensorrt import import_tensorrt, serialize_engine
from lmfx.latency import BACKENDS, Store, get_backend
from lmfx.latency.workload import sentinel_workload
from lmfx.passes.errors import DeviceError, LmfxError, MissingExtra
from lmfx.stages import trace

__all__ = ["CHECKS", "Check", "main", "result", "row"]


@dataclass(frozen=True)
class Check:
    """One thing to try: its title and group, the packages it needs, the extra that has them, and the trial, which
    returns what it saw."""

    name: str
    group: str
    packages: tuple[str, ...]
    extra: str
    trial: Callable[[], str]
    needed: bool = False


class Absent(Exception):
    """What is to be tried is not on this machine; the text says what is missing."""


# --- what is tried ----------------------------------------------------------------------------------------------------


def _network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval(), torch.randn(1, 3, 16, 16)


def _core() -> str:
    model, x = _network()
    graph = trace(model, x)
    error = (graph(x) - model(x)).abs().max().item()
    if error > 1e-5:
        raise RuntimeError(f"a traced network is off by {error:g}")
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    return f"a network was traced; {build}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise Absent(f"{why}; latencies are measured on the CPU")
    conv = nn.Conv2d(3, 8, 3).cuda()
    conv(torch.randn(1, 3, 16, 16, device="cuda")).sum().item()
    shown = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        shown.append(
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm{properties.major}{properties.minor}"
        )
    return "; ".join(shown)


def _store() -> str:
    with Store.open() as store:
        folder = store.path.parent
    with tempfile.NamedTemporaryFile(dir=folder):
        pass
    return f"{folder}, {shutil.disk_usage(folder).free / 1e9:.0f} GB free"


def _backend(name: str) -> Callable[[], str]:
    def trial() -> str:
        backend = get_backend(name)
        workload = sentinel_workload()
        (ms,) = (m.ms for m in backend.measure([workload], rounds=1).values())
        device = in_one_line(str(backend.identity().get("device", "this machine")))
        return f"a 3x3 convolution of 64 channels took {ms:.3g} ms on {device}"

    return trial


def _compiler() -> str:
    """Compiling one convolution takes some 20 s, most of what the doctor took; so only the compiler is looked for."""
    try:
        backend = get_backend("aotinductor")
    except MissingExtra as error:
        raise Absent(str(error)) from error
    return f"{in_one_line(str(backend.identity()['compiler']))} is there; nothing was compiled, which takes some 20 s"


def _providers() -> str:
    import onnxruntime

    model, x = _network()
    data = to_onnx_bytes(model, [(tuple(x.shape), x.dtype)])
    found = []
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what a provider lacks is told below
    for provider in onnxruntime.get_available_providers():
        try:
            session = onnxruntime.InferenceSession(data, options, providers=[provider])
            used = session.get_providers()[0]
            session.run(None, {session.get_inputs()[0].name: x.numpy()})
        except Exception as error:  # providers raise errors of their own
            found.append(f"{provider} fails ({type(error).__name__})")
        else:
            found.append(provider if used == provider else f"{provider} falls back to {used}")
    return ", ".join(found)


def _tensorrt(package: str) -> Callable[[], str]:
    def trial() -> str:
        module = import_tensorrt(package)
        if not torch.cuda.is_available() and package == "tensorrt":
            raise Absent("builds engines for the GPU of this machine, and there is none")
        model, x = _network()
        targets = () if torch.cuda.is_available() else ("sm89",)
        engine = serialize_engine(module, to_onnx_bytes(model, [(tuple(x.shape), x.dtype)]), targets)
        where = f"for {targets[0]}, ahead of time: there is no GPU to run it" if targets else "for this GPU"
        return f"an engine of {len(engine) / 1e3:.0f} kB was built {where}"

    return trial


def _export() -> str:
    model, x = _network()
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, x, Path(folder) / "net.onnx")
        return f"a network was exported ({path.stat().st_size} bytes) and checked in ONNX Runtime"


def _torchvision() -> str:
    import torchvision

    values = torchvision.transforms.functional.center_crop(torch.zeros(3, 8, 8), [4, 4])
    return f"{len(torchvision.models.list_models())} models; a picture was cropped to {tuple(values.shape)}"


def _timm() -> str:
    import timm

    return f"{len(timm.list_models())} models"


def _pillow() -> str:
    from PIL import Image

    Image.init()
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(file, "JPEG")
    Image.open(file).load()
    return "JPEG was written and read"


def _jinja2() -> str:
    import jinja2

    text = jinja2.Environment(autoescape=True).from_string("<p>{{ name }}</p>").render(name="<page>")
    return f"a template was filled ({len(text)} bytes)"


def _matplotlib() -> str:
    import matplotlib.figure

    figure = matplotlib.figure.Figure((1, 1))
    figure.subplots().plot([0, 1])
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return f"a plot was drawn ({file.tell()} bytes)"


def _imports(*modules: str) -> Callable[[], str]:
    def trial() -> str:
        for name in modules:
            importlib.import_module(name)
        return "imported"

    return trial


RUNTIME = "runtimes to measure on"
EXTRA = "extras"
PACKAGES = {"onnxruntime": ("onnxruntime", "onnx"), "tensorrt": ("tensorrt",), "torch": ("torch",)}
EXTRAS = {"onnxruntime": "ort", "tensorrt": "trt"}
TRIALS = {"aotinductor": _compiler}  # of the backends that are not run

CHECKS = {
    check.name: check
    for check in (
        Check("core", "needed", ("torch", "numpy", "safetensors", "filelock", "tqdm"), "", _core, needed=True),
        Check("store", "needed", (), "", _store, needed=True),
        Check("gpu", "devices", (), "", _gpu),
        Check("onnxruntime providers", "devices", ("onnxruntime", "onnx"), "ort", _providers),
        Check("tensorrt_rtx engines", "devices", ("tensorrt_rtx", "onnx"), "trt-rtx", _tensorrt("tensorrt_rtx")),
        *(
            Check(name, RUNTIME, PACKAGES.get(name, ()), EXTRAS.get(name, ""), TRIALS.get(name, _backend(name)))
            for name in BACKENDS
        ),
        Check("onnx export", EXTRA, ("onnx", "onnxscript", "onnxruntime"), "onnx,ort", _export),
        Check("torchvision", EXTRA, ("torchvision",), "vision", _torchvision),
        Check("timm", EXTRA, ("timm",), "vision", _timm),
        Check("pictures", EXTRA, ("pillow",), "vision", _pillow),
        Check("plots", EXTRA, ("matplotlib",), "plot", _matplotlib),
        Check("pages", EXTRA, ("jinja2",), "html", _jinja2),
        Check("several GPUs", EXTRA, ("accelerate",), "train", _imports("accelerate")),
        Check("dask", EXTRA, ("distributed",), "dask", _imports("distributed")),
        Check("pruning", EXTRA, ("torch-pruning",), "pruning", _imports("torch_pruning")),
    )
}


# --- one of them ------------------------------------------------------------------------------------------------------


def result(check: Check) -> dict[str, Any]:
    """What became of a check, as plain values."""
    start = time.monotonic()
    versions = {name: _version(name) for name in check.packages}
    lacking = [name for name, version in versions.items() if version is None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is imported; the trial says whether it works
        try:
            state, detail = ("missing", f"not installed: {', '.join(lacking)}") if lacking else ("ok", check.trial())
        except (Absent, DeviceError) as error:
            state, detail = "absent", str(error)
        except LmfxError as error:  # also a package that is there, and cannot be imported or is too old
            state, detail = "broken", str(error)
        except (Exception, SystemExit) as error:  # of any package that is tried
            state, detail = "broken", f"{type(error).__name__}: {error}"
    seen = {name: version for name, version in versions.items() if version is not None}
    return row(check, state, detail, seen, round(time.monotonic() - start, 2))


def row(
    check: Check, state: str, detail: str, versions: dict[str, str] | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """A result as plain values, with the command that mends it where one does."""
    return {
        "name": check.name,
        "group": check.group,
        "state": state,
        "needed": check.needed,
        "versions": versions or {},
        "detail": in_one_line(detail),
        "fix": _fix(check, state),
        "seconds": seconds,
    }


def _fix(check: Check, state: str) -> str | None:
    """None where there is nothing to install: a folder, a device, a compiler."""
    if state not in ("missing", "broken") or not check.packages:
        return None
    again = "--upgrade --force-reinstall " if state == "broken" else ""
    return f"pip install {again}" + (f'"lmfx[{check.extra}]"' if check.extra else "lmfx")


def _version(package: str) -> str | None:
    """None where it is not installed. Nothing is imported, which may crash."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    module = package.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        return None
    for other in importlib.metadata.packages_distributions().get(module, ()):  # as onnxruntime-gpu is onnxruntime
        return importlib.metadata.version(other)
    return "unknown"  # from a folder on the path


def main(names: list[str]) -> None:
    """Run these checks; whatever they print goes to stderr, and stdout has a JSON line before and after each."""
    sys.stdout.flush()
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name in names:
        print(json.dumps({"begun": name}), file=lines, flush=True)
        print(json.dumps(result(CHECKS[name])), file=lines, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
