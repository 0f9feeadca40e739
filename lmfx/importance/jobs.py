"""Runs one importance job: a candidate's network is trained and evaluated by the user's functions, in any process.

    Job ── pickled by the executor ── run_job ── Outcome(key, performance, seconds)

A network travels as its structure (a GraphModule on the meta device) and its tensors, both as bytes, so nothing is
shared between processes, and a worker that dies takes nothing with it. The structure is made again only when its job
runs: torch.fx traces a graph that is unpickled, which takes over every module call of the process meanwhile, and Dask
unpickles what arrives beside the job that runs. The result does not depend on where or when a job runs:
torch, numpy and Python draw from the same seed in each, torch has the same number of threads, and the jobs of one
process run one at a time, because it has only one of each of these. All of them are put back afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from lmfx.environment.caller_state import check_threads
from lmfx.importance.memory import memory_kept
from lmfx.passes.errors import InputError

__all__ = ["Job", "Outcome", "PackedNetwork", "isolated", "run_job"]

Train = Callable[[nn.Module], Any]
Evaluate = Callable[[nn.Module], Any]

_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class PackedNetwork:
    """A module as its structure, whose tensors have no values, and the values as safetensors.

    In another process the structure is bytes.
    """

    structure: nn.Module | bytes
    values: bytes
    device: str

    @classmethod
    def of(cls, net: nn.Module) -> PackedNetwork:
        """Packs a copy; `net` is not changed."""
        tensors = _tensors(net)
        empty = {id(t): _like(t, t.detach().to("meta")) for t in tensors}
        structure = copy.deepcopy(net, empty)
        structure.meta = {}  # type: ignore[assignment]  # of a traced graph: the example and the plan
        values = {str(i): t.detach().cpu().clone().contiguous() for i, t in enumerate(tensors)}
        device = str(tensors[0].device) if tensors else "cpu"
        return cls(structure, safetensors.torch.save(values), device)

    def unpack(self) -> nn.Module:
        """The network, on its device; each call gives another copy. Nothing else may run modules meanwhile."""
        structure = self.structure
        if isinstance(structure, bytes):
            structure = ForkingPickler.loads(structure)
        values = safetensors.torch.load(self.values)
        filled = {id(t): _like(t, values[str(i)].to(self.device)) for i, t in enumerate(_tensors(structure))}
        return copy.deepcopy(structure, filled)

    def __reduce__(self) -> tuple[type[PackedNetwork], tuple[bytes, bytes, str]]:
        structure = self.structure if isinstance(self.structure, bytes) else _frozen(self.structure)
        return type(self), (structure, self.values, self.device)


def _frozen(structure: nn.Module) -> bytes:
    """A structure as multiprocessing sends it, or as Dask does: with classes by value that workers cannot import."""
    try:
        import cloudpickle
    except ImportError:
        return bytes(ForkingPickler.dumps(structure))
    return bytes(cloudpickle.dumps(structure))


def _tensors(net: nn.Module) -> list[Tensor]:
    """Every parameter and buffer once, in an order that copying and pickling keep."""
    return [*net.parameters(), *net.buffers()]


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


@dataclass(frozen=True)
class Job:
    """What one row of the table needs. Without `train` the network is evaluated as it is."""

    key: str
    network: PackedNetwork
    train: Train | None
    evaluate: Evaluate
    seed: int
    threads: int


@dataclass(frozen=True)
class Outcome:
    """The performance of one job's network, which may be NaN, and the seconds that it took."""

    key: str
    performance: float
    seconds: float


def run_job(job: Job) -> Outcome:
    """Train in train mode with gradients everywhere, evaluate in eval mode.

    Raises `InputError` with the job's key and the user's own error.
    """
    start = time.perf_counter()
    with isolated(job.seed, job.threads), memory_kept():
        net = job.network.unpack()
        if job.train is not None:
            for parameter in net.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            trained = _call("train", job.train, net.train(), job.key)
            net = trained if isinstance(trained, nn.Module) else net
        performance = _number(_call("evaluate", job.evaluate, net.eval(), job.key), job.key)
    return Outcome(job.key, performance, time.perf_counter() - start)


def _call(name: str, function: Callable[[nn.Module], Any], net: nn.Module, key: str) -> Any:
    try:
        return function(net)
    except Exception as error:  # any function may fail in any way
        raise InputError(
            f"{name}(model) failed on the network of {key}: {type(error).__name__}: {error}. Try it on "
            "lmfx.rewrite(graph, plan) first; rows that were finished are kept"
        ) from error


def _number(value: Any, key: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        return float(value)
    raise InputError(f"evaluate(model) gave a {type(value).__name__} for {key}: return one number")


@contextlib.contextmanager
def isolated(seed: int, threads: int) -> Iterator[None]:
    """Random numbers of torch, numpy and Python from `seed`, and so many threads of torch; as before afterwards.

    Whoever needs the same waits: there is one generator a process, and another thread would draw from it.
    """
    check_threads(threads, "this job")
    with _ONE_AT_A_TIME, torch.random.fork_rng():
        python, array, before = random.getstate(), np.random.get_state(), torch.get_num_threads()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
            torch.set_num_threads(before)
