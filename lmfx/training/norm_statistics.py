"""Says which batch norms of a network in training run with whose statistics, and computes new ones afterwards.

A norm in train mode has the statistics of the batch, and its stored ones follow what it was shown: mixed images, with
weights that changed under way. Before such a network is judged they are taken anew, as plain averages over batches of
calibration images. Norms that a network holds but does not run (of a span that computes as its merged op) stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmfx.training.recovery_objective import Arguments

__all__ = ["renew_statistics", "running_norms", "set_norms"]


@torch.no_grad()
def running_norms(net: nn.Module, given: Arguments) -> list[str]:
    """The names of the batch norms with stored statistics that `net` runs on a batch."""
    seen: dict[str, None] = {}
    handles = []
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:

            def note(*_: Any, name: str = name) -> None:
                seen[name] = None

            handles.append(module.register_forward_hook(note))
    try:
        net(*given[0], **given[1])
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)


def set_norms(net: nn.Module, names: Iterable[str], trained: bool) -> None:
    """All of `net` in eval mode, but for the norms `names` where they are trained."""
    net.eval()
    for name in names if trained else ():
        net.get_submodule(name).train()


@torch.no_grad()
def renew_statistics(net: nn.Module, names: Iterable[str], batches: Iterable[Arguments]) -> None:
    """Gives the norms `names` the average statistics of some batches; `net` is in eval mode afterwards."""
    norms = [m for m in map(net.get_submodule, names) if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    set_norms(net, names, True)
    try:
        for args, kwargs in batches:
            net(*args, **kwargs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        net.eval()
