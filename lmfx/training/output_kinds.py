"""What each tensor of an output is, told from the original's values, and how far two outputs are apart.

    scores         one number a class, to be softened       KL(softmax(z / T), softmax(z' / T)) T^2
    probabilities  numbers that are not negative and sum to 1    KL(p, p'), softened as their logarithms are
    values         all else: boxes, maps, embeddings        |z' - z|^2 / |z - mean z|^2

Scores are scores if they choose: over the images the softmax tells much of what is shown. With p = softmax(z) along
one dimension and H the entropy, what a row of n scores tells is

    H(mean p) - mean H(p)    from 0 (the same for all images, or nearly even) to log n

and values that are no scores (offsets of boxes, pixels, noise) tell next to nothing that way. A threshold of a fifth of
log n tells them apart for rows, and of a half for maps and sequences, where the dimension of the classes is looked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from lmfx.passes.errors import InputError
from lmfx.passes.model.interface import plain_output

__all__ = ["Kind", "distances", "floating_leaves", "output_kinds"]

ROWS, MAPS = 0.2, 0.5  # the share of log n that scores tell at least
SMALLEST = 1e-12


@dataclass(frozen=True)
class Kind:
    """One floating tensor of an output; `dim` is the dimension of the classes where it has some."""

    name: Literal["scores", "probabilities", "values"]
    dim: int = 1


def floating_leaves(output: Any) -> list[Tensor]:
    """The floating tensors of an output that have any values, in order."""
    leaves = pytree.tree_leaves(plain_output(output))
    return [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]


def output_kinds(outputs: Sequence[Any]) -> list[Kind]:
    """What each floating tensor of the original's outputs is, told from some batches of them."""
    batches = [floating_leaves(output) for output in outputs]
    return [_kind([leaf.detach() for leaf in leaves]) for leaves in zip(*batches, strict=True)]


def _kind(parts: list[Tensor]) -> Kind:
    for dim in dict.fromkeys((1, parts[0].dim() - 1)) if parts[0].dim() > 1 else ():
        classes = parts[0].shape[dim]
        if classes < 2 or any(part.dim() != parts[0].dim() or part.shape[dim] != classes for part in parts):
            continue
        rows = torch.cat([part.movedim(dim, -1).reshape(-1, classes) for part in parts]).double()
        if bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all()):
            return Kind("probabilities", dim)
        if _told(rows.softmax(1)) > (ROWS if parts[0].dim() == 2 else MAPS) * math.log(classes):
            return Kind("scores", dim)
    return Kind("values")


def _told(rows: Tensor) -> float:
    def entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp_min(SMALLEST).log()).sum(-1)

    return float(entropy(rows.mean(0)) - entropy(rows).mean())


def distances(got: Any, wanted: Any, kinds: Sequence[Kind], temperature: float = 1.0) -> list[Tensor]:
    """How far each floating tensor of an output is from the original's, by its kind; means over the images.

    Raises `InputError` if the two outputs differ in their shapes.
    """
    ours, theirs = floating_leaves(got), floating_leaves(wanted)
    if [v.shape for v in ours] != [v.shape for v in theirs]:
        raise InputError(
            f"the student gives {_shapes(ours)} and the original {_shapes(theirs)}: pass the model that the student "
            "was made from"
        )
    return [_distance(a.float(), b.float(), k, temperature) for a, b, k in zip(ours, theirs, kinds, strict=True)]


def _shapes(leaves: list[Tensor]) -> str:
    return ", ".join(str(tuple(v.shape)) for v in leaves) or "no floating tensor"


def _distance(got: Tensor, wanted: Tensor, kind: Kind, temperature: float) -> Tensor:
    if kind.name == "values":
        unit = wanted.abs().amax().clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
        got, wanted = got / unit, wanted / unit
        centre = wanted.mean(0, keepdim=True) if len(wanted) > 1 else wanted.mean()
        return (got - wanted).square().mean() / (wanted - centre).square().mean().clamp_min(1e-8)
    if kind.name == "probabilities":
        got, wanted = (v.clamp_min(1e-7).log() for v in (got, wanted))
    a, b = (F.log_softmax(v / temperature, kind.dim) for v in (got, wanted))
    cells = a.numel() / a.shape[kind.dim]
    return F.kl_div(a, b, reduction="sum", log_target=True) * temperature**2 / cells
