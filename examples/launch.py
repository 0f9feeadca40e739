"""What the recipes share: processes that a launcher started, GPUs for importance jobs, a plan that all wait for.

    python recipe.py ...                            one process; importance jobs run on all GPUs (`--jobs`)
    torchrun --nproc_per_node 8 recipe.py ...       the first process makes the plan and runs the jobs on all GPUs, the
    accelerate launch recipe.py ...                 others wait for its file; then all train

Every process reads the plan from the same file, so all have the same one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

__all__ = ["Launch", "check_options", "job_pool", "take_gpu", "wait_for"]


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together, and its device."""

    rank: int
    processes: int
    device: str

    @classmethod
    def of(cls, device: str) -> Launch:
        """From the variables that torchrun and accelerate set; `cuda` becomes a GPU of this process alone."""
        rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if device == "cuda" and processes > 1:
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
        return cls(rank, processes, device)

    @property
    def first(self) -> bool:
        """Whether this is the process that makes the plan and writes what comes out."""
        return self.rank == 0

    def share(self, batch: int) -> int:
        """The images of each process, for `batch` in all."""
        if batch % self.processes:
            raise SystemExit(f"a batch of {batch} images cannot be shared by {self.processes} processes: use --batch")
        return batch // self.processes

    def total(self, *values: float) -> list[float]:
        """The sums of the numbers that all processes give."""
        if self.processes == 1:
            return list(values)
        # Counts beyond 2^24 are exact in float64 only.
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return [float(v) for v in sums]

    def leave(self) -> None:
        """At the end: what the training opened is closed."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def job_pool(jobs: int | None, device: str) -> Callable[[], ProcessPoolExecutor] | None:
    """A function that opens a pool of `jobs` processes (default: one a GPU), each of which sees one GPU; None for one.

    A pool that broke because a worker died is replaced by another one, so it must be made by a function.
    """
    gpus = _visible() if device.startswith("cuda") else []
    count = jobs if jobs is not None else max(len(gpus), 1)
    return None if count <= 1 else partial(_open, count, gpus)


def _open(count: int, gpus: list[str]) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # CUDA does not live on in a forked process
    names = context.SimpleQueue()
    for i in range(count):
        names.put(gpus[i % len(gpus)] if gpus else "")
    return ProcessPoolExecutor(count, context, initializer=take_gpu, initargs=(names,))


def take_gpu(names: Any) -> None:
    """In a worker, before anything has touched a GPU: it sees the next one of `names` alone, as `cuda:0`."""
    name = names.get()
    if name:
        os.environ["CUDA_VISIBLE_DEVICES"] = name


def _visible() -> list[str]:
    """The GPUs of this process by the names that CUDA_VISIBLE_DEVICES takes."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def check_options(file: Path, options: Mapping[str, Any]) -> None:
    """Notes in `file` what the plan beside it is made with; a later run with other options is refused."""
    told = {name: str(value) for name, value in options.items()}
    if not file.exists():
        partial_file = file.with_suffix(f".{os.getpid()}.partial")
        partial_file.write_text(json.dumps(told, indent=1))
        os.replace(partial_file, file)
        return
    before = json.loads(file.read_text())
    other = [f"--{k.replace('_', '-')} was {before.get(k)} and is {v}" for k, v in told.items() if before.get(k) != v]
    if other:
        raise SystemExit(f"{file.parent} holds a run with other options ({'; '.join(other)}): use another --out")


def wait_for(file: Path, seconds: float = 2.0) -> None:
    """Returns once `file` is there. The launcher ends who waits if the process that makes it fails."""
    while not file.exists():
        time.sleep(seconds)
