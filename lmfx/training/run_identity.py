"""Describes a training as plain JSON, so that a checkpoint is resumed by the very same training only.

    options            as they are
    teacher            a digest of its class, code, attributes and all of its values
    student            the fingerprint of its graph, and roughly how large each weight was at the start
    batches            a digest of all that a list holds; of a loader what it says of itself
    loss, optimizer    what the function is, and the optimizer's own settings

A student is made anew before a run goes on, and its fits may differ in their last digits then, so sizes of its weights
are compared, within `CLOSE`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from lmfx.passes.identity.content import Describer, digest_of
from lmfx.passes.identity.fingerprint import fingerprint

__all__ = ["described_run", "is_close", "sizes_at_start"]

CLOSE = 1e-2
_STARTS = "lmfx_starts"


def described_run(
    student: fx.GraphModule,
    teacher: nn.Module | None,
    data: Any,
    loss: Any,
    optimizer: torch.optim.Optimizer,
    lr: float,
) -> dict[str, str]:
    """What a training depends on besides its numbers."""
    # The rate that `distill` was given is an option of its own.
    known = {("lr", lr), ("initial_lr", lr)}
    settings = [
        {k: v for k, v in group.items() if k != "params" and not (k in ("lr", "initial_lr") and (k, v) in known)}
        for group in optimizer.param_groups
    ]
    counts = [len(group["params"]) for group in optimizer.param_groups]
    return {
        "teacher": "none" if teacher is None else _digest(teacher),
        "student": fingerprint(student),
        "data": _digest(data if isinstance(data, (list, tuple)) else _loader(data)),
        "loss": "none" if loss is None else _digest(loss),
        "settings": f"{type(optimizer).__qualname__} {_digest((settings, counts))}",
    }


def _digest(value: Any) -> str:
    """Of what can be told of a value: who names a checkpoint says himself that it is his."""
    return digest_of([Describer("values", code=True).value(value)])


def _loader(data: Any) -> tuple[Any, ...]:
    """What a loader says of itself without being gone through: reading it may cost as much as an epoch."""
    dataset = getattr(data, "dataset", None)
    told = [type(data).__qualname__, len(data), getattr(data, "batch_size", None), getattr(data, "drop_last", None)]
    told.append(type(getattr(data, "sampler", None)).__qualname__)
    return (*told, *_dataset(dataset))


def _dataset(dataset: Any) -> tuple[Any, ...]:
    told: tuple[Any, ...] = (type(dataset).__qualname__, len(dataset) if hasattr(dataset, "__len__") else None)
    if isinstance(dataset, torch.utils.data.TensorDataset):
        return (*told, dataset.tensors)
    if isinstance(dataset, torch.utils.data.Subset):
        return (*told, list(dataset.indices), _dataset(dataset.dataset))
    return (*told, dataset) if isinstance(dataset, (list, tuple)) else told


def sizes_at_start(student: fx.GraphModule, folder: Path) -> dict[str, float]:
    """The mean absolute value of each weight before its training into `folder` began, also where it was interrupted
    and this is the student that it left."""
    starts = student.meta.setdefault(_STARTS, {})
    if str(folder) not in starts:
        floating = {n: t for n, t in student.state_dict().items() if t.is_floating_point() and t.numel()}
        starts[str(folder)] = {n: float(t.detach().double().abs().mean()) for n, t in floating.items()}
    return dict(starts[str(folder)])


def is_close(one: Any, other: dict[str, float]) -> bool:
    """Whether two students began alike."""
    if not isinstance(one, dict) or one.keys() != other.keys():
        return False
    return all(isinstance(v, (int, float)) and abs(v - other[k]) <= CLOSE * (abs(v) + 1e-6) for k, v in one.items())
