"""Runs a training in one process with nothing but torch, or in several or in mixed precision, through Accelerate."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lmfx.export.specs import eval_mode
from lmfx.passes.errors import MissingExtra
from lmfx.training.option_checks import Precision

__all__ = ["agreed", "elsewhere", "own_random_numbers", "runner_for", "teaching"]


def runner_for(precision: Precision, accelerator: Any) -> Any:
    """An Accelerator where one is asked for or needed, else None."""
    if accelerator is not None:
        return accelerator
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if precision == "fp32" and processes == 1:
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        what = f"precision={precision!r}" if precision != "fp32" else f"training in {processes} processes"
        raise MissingExtra(f'{what} needs Accelerate ({error}): pip install "lmfx[train]"') from error
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision)


@contextlib.contextmanager
def teaching(teacher: nn.Module | None, runner: Any) -> Iterator[nn.Module | None]:
    """The teacher in eval mode, each of its modules in its own mode again at the end; a copy if it must move."""
    if teacher is None:
        yield None
        return
    first = next(teacher.parameters(), None)
    if runner is not None and first is not None and elsewhere(first.device, runner.device):
        teacher = copy.deepcopy(teacher).to(runner.device)
    with eval_mode(teacher):
        yield teacher


def elsewhere(device: torch.device, wanted: torch.device) -> bool:
    """Whether two devices differ; one without an index is the current one of its type, so no index is no difference."""
    return device.type != wanted.type or (None not in (device.index, wanted.index) and device.index != wanted.index)


@contextlib.contextmanager
def own_random_numbers() -> Iterator[None]:
    """The caller's random numbers go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def agreed(value: float, runner: Any) -> float:
    """A number as the first process has it, so that all of them decide alike."""
    if runner is None or runner.num_processes == 1:
        return value
    from accelerate.utils import broadcast

    return float(broadcast(torch.tensor([value], dtype=torch.float64, device=runner.device)))
