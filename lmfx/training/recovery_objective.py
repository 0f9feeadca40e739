"""Computes what `recover` minimises: the distance of outputs, by what they are, and of values that both graphs share.

    total = mean over outputs of distance + weight * mean over shared values of |f' - f|^2 / |f - mean f|^2

    scores    T^2 KL(softmax(z / T), softmax(z' / T))      steps of a sequence are rows like any other
    all else  |z' - z|^2 / |z - mean z|^2                  boxes, maps, embeddings

It is one module, so a training library wraps all of it. The original runs as its traced graph, without gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lmfx.calibration.images import Frame
from lmfx.calibration.recording import floating_outputs
from lmfx.passes.errors import InputError
from lmfx.quality.outputs import Output
from lmfx.training.losses import normalised_error
from lmfx.training.shared_values import Tapped, shared_values

__all__ = ["RecoveryObjective", "arguments", "distance"]

LEAST_PROBABILITY = 1e-7
Arguments = tuple[Sequence[Any], Mapping[str, Any]]


def arguments(tensors: tuple[Tensor, ...], names: tuple[str, ...] | Frame) -> Arguments:
    """The arguments of a graph for a batch of calibration tensors."""
    if isinstance(names, Frame):
        return names.arguments(tensors)
    positional = len(tensors) - len(names)
    return tensors[:positional], dict(zip(names, tensors[positional:], strict=True))


class RecoveryObjective(nn.Module):
    """The student and its distance to the original; `forward` takes what `wanted` gave for the same arguments."""

    def __init__(
        self,
        student: fx.GraphModule,
        original: fx.GraphModule,
        outputs: Sequence[Output],
        temperature: float,
        weight: float,
    ) -> None:
        super().__init__()
        pairs = shared_values(student, original) if weight else []
        self.outputs, self.temperature, self.weight = list(outputs), temperature, weight
        self.student = Tapped(student, [own for own, _ in pairs])
        self._original = [Tapped(original, [theirs for _, theirs in pairs])]  # in a list: it is no part of this module
        self.pairs = pairs

    @torch.no_grad()
    def wanted(self, given: Arguments, autocast: Any = None) -> tuple[list[Tensor], list[Tensor]]:
        """(outputs, shared values) of the original."""
        with autocast if autocast is not None else contextlib.nullcontext():
            output, values = self._original[0](*given)
        return floating_outputs(output), values

    def forward(self, given: Arguments, wanted: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        output, values = self.student(*given)
        apart = [
            distance(kind, got, theirs, self.temperature)
            for kind, got, theirs in zip(self.outputs, floating_outputs(output), wanted[0], strict=True)
            if kind.rows is not None
        ]
        total = torch.stack(apart).mean()
        # A graph that was pruned after it was traced has fewer channels than its nodes' noted shapes say.
        pairs = [(got, theirs) for got, theirs in zip(values, wanted[1], strict=True) if got.shape == theirs.shape]
        if pairs:
            errors = [normalised_error(got, theirs) for got, theirs in pairs]
            total = total + self.weight * torch.stack(errors).mean()
        return total


def distance(kind: Output, got: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """How far one output is from the original's, a mean over the images. Raises `InputError` for other shapes."""
    if got.shape != wanted.shape:
        raise InputError(
            f"output {kind.name} of the student has the shape {tuple(got.shape)} and the original's "
            f"{tuple(wanted.shape)}: pass the model that the student was made from"
        )
    got, wanted = got.float(), wanted.float()
    if kind.kind != "scores":
        return normalised_error(got, wanted)
    if kind.probabilities:
        got, wanted = (v.clamp_min(LEAST_PROBABILITY).log() for v in (got, wanted))
    rows = kind.rows if kind.rows is not None else 0
    a, b = (F.log_softmax(v.movedim(rows, 0) / temperature, -1) for v in (got, wanted))
    return F.kl_div(a, b, reduction="sum", log_target=True) * temperature**2 / (a.numel() / a.shape[-1])
