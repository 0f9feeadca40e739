"""Optimizes networks that are nearly right in short trainings: steps relative to each weight's own size.

    matrix G (out, in x taps)    M <- momentum of G,  step = lr |W| U V'     U S V' = M + momentum, all S become 1
    all else, or all             Adam's step, times the mean size of the weights of that tensor

|W| is the root mean square of the tensor as it came in, so one rate fits all layers, and a step of lr moves each tensor
by that share of itself: a trust region around what closed-form fits gave. Orthogonal steps for matrices are Muon's
(Jordan et al. 2024, quintic Newton-Schulz iteration): what few directions of large gradient would use up goes to all
directions, and so does what few images say by chance. On one small residual network 80 of them did better than 200
steps of AdamW; on a lean ImageNet classifier they did harm where Adam's helped (`docs/recovery.md`), so which of both
is taken is tried (`Kind`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Kind", "RelativeSteps", "orthogonal"]

Kind = Literal["orthogonal", "adam"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
LARGEST = 768  # the smaller side of a matrix whose iteration costs less than what it is worth
SMALLEST_MATRIX, SMALLEST_VECTOR = 1e-4, 1e-2  # sizes of tensors that are zero, or nearly
TINY = 1e-12


class RelativeSteps(torch.optim.Optimizer):
    """Moves each tensor by `lr` of its size a step; matrices along orthogonal directions where that is the kind."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        kind: Kind = "orthogonal",
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "betas": betas, "kind": kind})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradients that the parameters have."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, lr, momentum = self.state[p], group["lr"], group["momentum"]
        turned = group["kind"] == "orthogonal" and _is_matrix(p)
        if not state:
            state |= {"steps": 0, "size": _size(p), "mean": torch.zeros_like(p)}
            if not turned:
                state["square"] = torch.zeros_like(p)
        state["steps"] += 1
        if turned:
            state["mean"].lerp_(gradient, 1 - momentum)
            way = orthogonal(gradient.lerp(state["mean"], momentum).flatten(1))
            p.sub_((way * (lr * state["size"] / way.square().mean().sqrt().clamp_min(TINY))).view_as(p))
            return
        first, second = group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient.square(), 1 - second)
        way = state["mean"] / (1 - first ** state["steps"])
        way = way / ((state["square"] / (1 - second ** state["steps"])).sqrt() + TINY)
        p.sub_(way * (lr * state["size"]))


def _is_matrix(p: Tensor) -> bool:
    return p.dim() > 1 and p.shape[1] > 1 and 1 < min(len(p), p[0].numel()) <= LARGEST


def _size(p: Tensor) -> float:
    if p.dim() > 1:
        return max(float(p.square().mean().sqrt()), SMALLEST_MATRIX)
    return max(float(p.abs().mean()), SMALLEST_VECTOR)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values brought near 1 (0.7 to 1.2); zero stays zero."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + TINY)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
