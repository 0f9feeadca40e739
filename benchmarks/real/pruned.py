"""Torch-Pruning at a latency: the least share of channels whose removal reaches it, by its best importance.

    share of channels removed, the same in every layer     found by measuring
    importance                                              magnitude, Taylor or Hessian: the least output error

Taylor and Hessian need a loss; there are no labels, so it is the outputs times random signs, whose squared gradients
are the Gauss-Newton matrix of the outputs' squared error. Which of the three is best is seen on calibration images.
A module, not a script.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lmfx
from benchmarks.real.exported import draft, forward, latencies
from benchmarks.real.subjects import Subject

__all__ = ["Missed", "best_pruned", "pruned"]

IMPORTANCES = ("magnitude", "taylor", "hessian")
MOST, STEPS, TRIED = (0.5, 0.65, 0.8), 5, 32


class Missed(Exception):
    """A baseline cannot reach the budget; `least` is the ratio that it reaches."""

    def __init__(self, least: float) -> None:
        super().__init__(f"the least ratio is {least:.3f}")
        self.least = least


def pruned(subject: Subject, model: nn.Module, share: float, importance: str, images: Tensor) -> nn.Module:
    """A copy of `model`, a traced one, without `share` of its channels."""
    tp = _torch_pruning()
    net = copy.deepcopy(model)
    kept = [m for n, m in net.named_modules() if n.rpartition(".")[2] in subject.pinned or n in subject.pinned]
    kept += [m for m in net.modules() if isinstance(m, nn.LSTM)]
    scorer: Any = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
    }[importance]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Torch-Pruning's, of tensors that it was not told of
        pruner = tp.pruner.MetaPruner(
            net,
            subject.example,
            importance=scorer,
            pruning_ratio=share,
            ignored_layers=kept,
            round_to=8 if _typical_width(net) >= 64 else 4,
        )
        if importance != "magnitude":
            _gradients(net, images, scorer if importance == "hessian" else None)
        pruner.step()
    net.zero_grad(set_to_none=True)
    return net.eval()


def best_pruned(
    subject: Subject, model: nn.Module, budget: float, known: dict[tuple[int, ...], float]
) -> tuple[nn.Module, dict[str, Any]]:
    """The pruned network at a latency and what was chosen. `known` keeps widths -> measured ratio from call to call.

    Raises `Missed` where nothing that may be pruned reaches it.
    """
    images = subject.images("cal", min(TRIED, subject.calibration), subject.size)
    whole = draft(model, subject.example)
    graph = lmfx.trace(model, subject.example)

    def ratio(share: float) -> float:
        made = pruned(subject, graph, share, "magnitude", images)
        if (widths := _widths(made)) not in known:
            known[widths] = latencies(whole, [draft(made, subject.example)], 7)[0].ratio
        return known[widths]

    share = least_share(ratio, budget)
    wanted = forward(model, images)
    made = {name: pruned(subject, graph, share, name, images) for name in IMPORTANCES}
    errors = {name: _error(forward(net, images), wanted) for name, net in made.items()}
    best = min(errors, key=lambda name: errors[name])
    return made[best], {"importance": best, "channels": 1 - share, "errors": errors}


def least_share(ratio: Callable[[float], float], budget: float) -> float:
    """The least share whose ratio is within the budget, by halving. Near 1 rounding leaves layers as they are."""
    high = next((share for share in MOST if ratio(share) <= budget), None)
    if high is None:
        raise Missed(min(ratio(share) for share in MOST))
    low = 0.0
    for _ in range(STEPS):
        middle = round((low + high) / 2, 4)
        low, high = (low, middle) if ratio(middle) <= budget else (middle, high)
    return high


def _torch_pruning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        import torch_pruning
    return torch_pruning


def _gradients(net: nn.Module, images: Tensor, scorer: Any) -> None:
    random = torch.Generator().manual_seed(0)
    net.zero_grad()
    for image in images.split(1 if scorer is not None else 8):
        given = net(image)
        rows = given if isinstance(given, (tuple, list)) else (given,)
        signs = [torch.randint(0, 2, g.shape, generator=random) * 2.0 - 1 for g in rows]
        if scorer is not None:
            net.zero_grad()
        torch.stack([(g * s).sum() for g, s in zip(rows, signs, strict=True)]).sum().backward()
        if scorer is not None:
            scorer.accumulate_grad(net)


def _error(given: list[Tensor], wanted: list[Tensor]) -> float:
    """The outputs' squared error over their squares."""
    return sum(float((a - b).square().sum() / b.square().sum()) for a, b in zip(given, wanted, strict=True))


def _typical_width(net: nn.Module) -> int:
    widths = sorted(_widths(net))
    return widths[len(widths) // 2]


def _widths(net: nn.Module) -> tuple[int, ...]:
    return tuple(m.out_channels for m in net.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
