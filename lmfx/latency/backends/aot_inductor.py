"""Measures with AOTInductor on a CPU: each workload is exported, compiled to a shared library, loaded and run.

    workload ── torch.export ── aoti_compile_and_package ── NAME.pt2 ── aoti_load_package ── timed as `torch` is

It is what a C++ process without Python runs. Compiling takes a C++ compiler and some 20 s of CPU time a workload, so a
package is kept until the process ends and found again by the workload's signature: the original network, which is
measured beside every plan, is compiled once. Rows are in the store, as those of all backends are. Tables of large
networks are better taken with fewer candidates (`max_kernel_size`, `max_span_convs`, `realize`).
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmfx.environment.caller_state import one_line
from lmfx.latency.backends.torch_backend import TorchBackend
from lmfx.latency.sampling import Sampling
from lmfx.latency.workload import Workload
from lmfx.passes.errors import MissingExtra, OptionError
from lmfx.passes.model.interface import plain_face
from lmfx.passes.model.quiet import quiet, tracing

__all__ = ["AotInductorBackend"]

COMPILERS = ("g++", "clang++", "c++")


class AotInductorBackend(TorchBackend):
    """Times workloads that AOTInductor compiled, with `threads` of a CPU, in `precision` ("fp32", "fp16", "bf16").

    `channels_last` is the memory format of 4-d inputs and weights. Raises `MissingExtra` without a C++ compiler.
    """

    name = "aotinductor"

    def __init__(
        self,
        threads: int = 1,
        precision: str = "fp32",
        channels_last: bool = False,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(threads, "cpu", precision, channels_last, sampling=sampling)
        self.compiler = _compiler()

    def identity(self) -> dict[str, Any]:
        """Those of the torch backend, and the compiler."""
        return super().identity() | {"compiler": _version(self.compiler)}

    def _callable(self, module: nn.Module, inputs: list[torch.Tensor], workload: Workload) -> Any:
        key = (workload.signature, self.precision, self.channels_last, self.threads)
        package = _PACKAGES.get(key) if workload.lasting else None
        try:
            if package is None:
                package = _compiled(module, tuple(inputs))
                if workload.lasting:
                    _PACKAGES[key] = package
            with quiet():
                return torch._inductor.aoti_load_package(str(package))
        except Exception as error:  # an op that it has no code for, or what the compiler says: many kinds
            raise OptionError(
                f"AOTInductor could not compile a part of the network ({type(error).__name__}: {one_line(error)}); use "
                "latency='torch' or 'onnxruntime'"
            ) from error


_PACKAGES: dict[Any, Path] = {}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where packages are until the process ends."""
    return tempfile.TemporaryDirectory(prefix="lmfx-aoti-")


def _compiled(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Path:
    path = Path(_folder().name) / f"{uuid.uuid4().hex}.pt2"
    with quiet(), tracing(), torch.no_grad():
        program = torch.export.export(plain_face(module), inputs, strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


def _compiler() -> str:
    """The C++ compiler that AOTInductor calls. Raises `MissingExtra`."""
    asked = os.environ.get("CXX")
    found = next((path for name in ((asked,) if asked else COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        seen = f"CXX={asked}, which is not there" if asked else f"none of {', '.join(COMPILERS)} is on the path"
        raise MissingExtra(
            f"the aotinductor backend needs a C++ compiler, and {seen}: install one (apt-get install g++), or set CXX "
            "to its path"
        )
    return found


@functools.cache
def _version(compiler: str) -> str:
    try:
        told = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except OSError:
        return compiler
    return next(iter(told.splitlines()), compiler)
