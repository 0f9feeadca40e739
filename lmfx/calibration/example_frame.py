"""Says which of an example's tensors come from the calibration data; the rest of it are constants.

An example may hold more than batches of tensors: numbers and flags, tensors without a batch dimension, containers. What
has as many rows as the images is *batched* and comes from the calibration data; all else is a constant of the example.

    example      (sample (2, 3, 32, 32), 10, {"text": (2, 768), "scale": ()})
    batched       sample                      text                                 -> `Calibration.tensors`
    constants                            10                 scale                  -> `Frame.leaves`
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lmfx.passes.errors import InputError

__all__ = ["BATCHED", "Frame", "frame_of"]


class _Batched:
    """Stands in a frame for what comes from the calibration data."""


BATCHED = _Batched()


@dataclass(frozen=True)
class Frame:
    """An example with holes for its batched tensors: `leaves` in the order of `spec`, the tree of (args, kwargs)."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    batch: int  # rows of the example's batched tensors

    def arguments(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments with `tensors` in the holes, in order."""
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(given) if v is BATCHED else v for v in self.leaves], self.spec)
        return tuple(args), kwargs


def frame_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Frame, list[Tensor]]:
    """The frame of an example, and its batched tensors. The images are the first map, else the first tensor."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [v for v in leaves if isinstance(v, Tensor) and v.dim()]
    if not tensors:
        raise InputError(
            f"the example's inputs are {', '.join(_kind(v) for v in leaves) or 'nothing'}: at least one must be a "
            "tensor of images, with the images along its first dimension"
        )
    images = next((v for v in tensors if v.dim() > 2), tensors[0])
    batched = [isinstance(v, Tensor) and v.dim() > 0 and len(v) == len(images) for v in leaves]
    # A constant is kept as a copy: what the caller does with the example later changes nothing.
    own = [v.detach().clone() if isinstance(v, Tensor) else v for v in leaves]
    held = [BATCHED if b else v for v, b in zip(own, batched, strict=True)]
    return Frame(tuple(held), spec, len(images)), [v for v, b in zip(leaves, batched, strict=True) if b]


def _kind(value: Any) -> str:
    return "a tensor without dimensions" if isinstance(value, Tensor) else type(value).__name__
