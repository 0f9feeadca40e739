"""`entry`: runs a public function in a neutral state, gives the caller's state back, and raises errors of lmfx only.

Within a call it is as in a fresh process, and afterwards, also after an exception, as it was before:

    this thread      gradients on, inference mode off, autocast off, and no default device but that of the model
    the process      random numbers (torch on CPU and GPUs, numpy, Python), threads, cuDNN and determinism, precision of
                     matmul, warnings' filters

torch's own threads do not survive a fork: an op of several threads in a forked process waits for them for ever. There
all runs in one thread, and who asks for more is refused (`check_threads`).

The default dtype stays the caller's, because the caller's forward may ask for it. What belongs to the process is kept
when the first thread comes in and put back when the last one leaves; a thread that is alone puts back its own.

A `torch.export.ExportedProgram` among the arguments is a model: the function gets the module that it is.

An error of another library is raised again as an `LmfxError` that names the op at fault, with the cause chained. What
the caller's own code raises (a loader, `train`, `evaluate`, a loss) is passed on as it is: whatever lmfx called that is
no part of the network.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmfx.passes.errors import DeviceError, InputError, LmfxError, ModelError
from lmfx.passes.model.autocast import no_autocast
from lmfx.passes.trace.programs import as_module, is_program

__all__ = ["check_threads", "entry", "is_entry", "neutral", "one_line", "ordinary"]

P = ParamSpec("P")
R = TypeVar("R")


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a public function: neutral state within, the caller's afterwards, and only errors of lmfx."""

    @functools.wraps(function)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        with neutral((*args, *kwargs.values())), _own_errors(function.__name__):
            if any(map(is_program, (*args, *kwargs.values()))):
                return function(*map(_taken, args), **{k: _taken(v) for k, v in kwargs.items()})
            return function(*args, **kwargs)

    within.__lmfx_entry__ = True  # type: ignore[attr-defined]
    return within


def _taken(value: Any) -> Any:
    """The module of an exported program; anything else as it is."""
    return as_module(value) if is_program(value) else value


def is_entry(function: Any) -> bool:
    """Whether a function is decorated with `entry`."""
    return getattr(function, "__lmfx_entry__", False) is True


def ordinary(values: Any) -> Any:
    """The same with ordinary tensors in place of those made in inference mode, of which no gradient can be had."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) and v.is_inference() else v, values)


# --- the state --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def neutral(given: tuple[Any, ...] = ()) -> Iterator[None]:
    """A neutral state within. `given` are the call's arguments; the first module among them says the device."""
    before = _GUARD.enter()
    try:
        if _GUARD.forked and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
        with torch.inference_mode(False), torch.enable_grad(), no_autocast(), _default_device(given):
            yield
    finally:
        _GUARD.leave(before)


def check_threads(threads: int, what: str) -> None:
    """Raises `DeviceError` if `what` asks for several threads of torch in a forked process, where they are gone."""
    if _GUARD.forked and threads > 1:
        raise DeviceError(
            f"{what} asks for {threads} threads of torch in a forked process, where they would wait for ever; start "
            "processes with multiprocessing's 'spawn' or 'forkserver', or ask for one thread"
        )


@contextlib.contextmanager
def _default_device(given: tuple[Any, ...]) -> Iterator[None]:
    """New tensors lie on the CPU within, unless the default device is the model's own: its forward may count on it."""
    default = torch.get_default_device()
    first = next((p for m in given if isinstance(m, nn.Module) for p in m.parameters()), None)
    plain = default.type == "cpu" or (first is not None and default.type == first.device.type != "meta")
    with contextlib.nullcontext() if plain else torch.device("cpu"):
        yield


@dataclass(frozen=True)
class _Process:
    """What belongs to the process."""

    torch_state: Tensor
    gpu_states: list[Tensor] | None
    numpy_state: Any
    python_state: Any
    threads: int
    deterministic: tuple[bool, bool]
    matmul: str
    cudnn: tuple[Any, ...]
    filters: list[Any]

    @classmethod
    def now(cls) -> _Process:
        gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        return cls(
            torch.get_rng_state(),
            gpu,
            np.random.get_state(),
            random.getstate(),
            torch.get_num_threads(),
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
            torch.get_float32_matmul_precision(),
            _cudnn(),
            list(warnings.filters),
        )

    def put_back(self) -> None:
        torch.set_rng_state(self.torch_state)
        if self.gpu_states is not None:
            torch.cuda.set_rng_state_all(self.gpu_states)
        elif torch.cuda.is_available() and torch.cuda.is_initialized():  # by this call: as nobody had drawn
            for generator in torch.cuda.default_generators:
                generator.manual_seed(generator.initial_seed())
        np.random.set_state(self.numpy_state)
        random.setstate(self.python_state)
        now = _Process.now()
        if now.threads != self.threads:
            torch.set_num_threads(self.threads)
        if now.deterministic != self.deterministic:
            torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])
        if now.matmul != self.matmul:
            torch.set_float32_matmul_precision(self.matmul)
        if now.cudnn != self.cudnn:
            cudnn = torch.backends.cudnn
            cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cudnn.enabled = self.cudnn
        if warnings.filters != self.filters:
            warnings.filters[:] = self.filters  # type: ignore[index]
            warnings._filters_mutated()  # type: ignore[attr-defined]


def _cudnn() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cudnn.enabled


class _Guard:
    """Counts the threads that are inside a call, and keeps the process's state of before the first one."""

    forked = False

    def __init__(self) -> None:
        self.begin()

    def after_fork(self) -> None:
        """In a child: nobody is inside, and torch's threads are gone."""
        self.begin()
        self.forked = True

    def begin(self) -> None:
        self.lock = threading.Lock()
        self.inside: dict[int, int] = {}
        self.first: _Process | None = None

    def enter(self) -> _Process:
        me = threading.get_ident()
        with self.lock:
            now = _Process.now()
            if not self.inside:
                self.first = now
            self.inside[me] = self.inside.get(me, 0) + 1
            return now

    def leave(self, before: _Process) -> None:
        me = threading.get_ident()
        with self.lock:
            left = self.inside.get(me, 1) - 1
            self.inside[me] = left
            if not left:
                del self.inside[me]
            if not self.inside:
                (self.first or before).put_back()
                self.first = None
            elif set(self.inside) == {me}:
                before.put_back()


_GUARD = _Guard()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_GUARD.after_fork)


# --- errors -----------------------------------------------------------------------------------------------------------

_LIBRARIES = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")})
_PACKAGE = Path(__file__).resolve().parents[1]
_OWN = str(_PACKAGE) + os.sep
_PASSES = str((_PACKAGE / "passes").resolve()) + os.sep  # elsewhere in a checkout
_RUNS_NETWORKS = ("torch/fx/interpreter.py", "torch/fx/graph_module.py", "torch/nn/modules/module.py")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NO_PATH = re.compile(r"expected str, bytes or os\.PathLike object, not (\w+)")
_NODE = re.compile(r"While executing %(\w+) : .*?= (\w+)\[target=([^\]]+)\]")


@contextlib.contextmanager
def _own_errors(stage: str) -> Iterator[None]:
    try:
        yield
    except LmfxError:
        raise
    except Exception as error:  # any library may fail in any way; the cause is chained
        if _is_callers(error):
            raise
        raise _told(stage, error) from error


def _told(stage: str, error: Exception) -> LmfxError:
    """What another library's error is told as."""
    text = _ESCAPES.sub("", str(error))
    node = _NODE.search(text)
    kind = type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return LmfxError(f"{stage} ran out of memory ({one_line(error)}): use a smaller batch or fewer images")
    if node is not None:
        op = f"the module {node[3]}" if node[2] == "call_module" else node[3]
        return ModelError(
            f"{stage} could not run {op} ({node[1]} of the traced graph): {kind}: {one_line(error)}. Take it out of "
            "the model, or make a module of it that runs on any batch; lmfx.trace(model, x).print_readable() shows it"
        )
    if isinstance(error, TypeError) and (given := _NO_PATH.search(text)):
        return InputError(
            f"{stage} needs a file name or a pathlib.Path where it was given {given[1]}: look at the order of its "
            f"arguments, help(lmfx.{stage})"
        )
    return LmfxError(
        f"{stage} stopped with an error that lmfx does not know ({kind}: {one_line(error)}); if your model, data and "
        "options are as documented, please report it with the traceback above"
    )


def one_line(error: BaseException) -> str:
    """The first line of what an error says, without colours."""
    lines = [line for line in _ESCAPES.sub("", str(error)).strip().splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _is_callers(error: BaseException) -> bool:
    """Whether the caller's own code raised it: the first foreign code below lmfx, if that is no part of a network."""
    trace = error.__traceback__
    frames: list[FrameType] = []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    if len(frames) <= 2:  # the arguments did not fit the signature
        return True
    if error.__cause__ is not None and type(error.__cause__).__name__ == "_RemoteTraceback":
        return True  # of a process that ran the caller's function
    caller = ""
    for frame in frames[2:]:
        name = _file(frame)
        if not (name.startswith((*_LIBRARIES, _OWN, _PASSES, "<"))):
            return not caller.endswith(_RUNS_NETWORKS)
        caller = name
    return False


@functools.lru_cache(maxsize=4096)
def _resolved(name: str) -> str:
    return name if name.startswith("<") else str(Path(name).resolve())


def _file(frame: FrameType) -> str:
    return _resolved(frame.f_code.co_filename)
