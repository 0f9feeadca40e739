"""Says which tensors of an example may have other sizes, which sizes to try, and draws values of that size.

    batch, one     all images, or a single one            the first dimension of what has as many rows as the images
    size, more     other image sizes, and far other ones  the spatial dimensions of the maps
    both           another batch and another size
    same           the example's own sizes                other values only

Along each axis the smallest map changes, and maps that are a multiple of it (an image and its mask at half the size)
stay that multiple. Others change by as many pixels; or, where no model takes that, by as many times more as they are
larger (`strided`: an image of 5 pixels and its map of 2, rounded down at a stride).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .trace_facts import SizeKind

__all__ = ["KINDS", "Leaf", "SizeChange", "Trial", "changes_alone", "drawn", "layouts", "resized"]

KINDS: tuple[SizeKind, ...] = ("batch", "size")
SizeChange = Callable[[int, int], int | None]  # (pixels, axis) -> other pixels, None where there are none of the kind


class Trial(Enum):
    """What is other in the inputs that are tried."""

    BATCH = "batch"
    SIZE = "size"
    BOTH = "both"
    ONE = "one"
    MORE = "more"
    SAME = "same"

    @property
    def batched(self) -> bool:
        """Whether the number of images is another."""
        return self in (Trial.BATCH, Trial.BOTH, Trial.ONE)

    @property
    def sized(self) -> bool:
        """Whether images have another size."""
        return self in (Trial.SIZE, Trial.BOTH, Trial.MORE)

    @property
    def changes(self) -> tuple[SizeChange, ...]:
        """The sizes that are tried, one after the other."""
        return _MORE if self is Trial.MORE else _ONE if self.sized else (_kept,)


@dataclass(frozen=True)
class Leaf:
    """One tensor of the example that may have other sizes."""

    name: str  # as the graph's code reads it
    place: int  # among the flat values
    shape: tuple[int, ...]
    dims: tuple[int, ...]  # its spatial dimensions
    batched: bool


def layouts(values: Sequence[Any], names: Sequence[str], batch: int, trial: Trial) -> list[tuple[Leaf, ...]]:
    """Which tensors may vary, and in which dimensions: maps with channels first, then with channels last, then
    sequences; tensors with as many rows as the images, all or only those of two dimensions and more.

    `values` are the example's flat values with their `names`, `batch` how many images it has.
    """
    tensors = [(i, v) for i, v in enumerate(values) if isinstance(v, Tensor) and v.dim()]
    found: list[tuple[Leaf, ...]] = []
    rank = max((v.dim() for _, v in tensors if _is_map(v)), default=0)
    spatial: list[Callable[[Tensor], tuple[int, ...]]] = [lambda v: ()]
    if trial is Trial.SAME:
        spatial = [lambda v: tuple(range(1, v.dim()))]
    elif trial.sized:
        spatial = [lambda v: tuple(range(2, v.dim())), lambda v: tuple(range(1, v.dim() - 1))] if rank > 2 else []
    rows = [1, 2] if trial.batched else [1]
    for dims in spatial:
        for least in rows:
            leaves = tuple(
                Leaf(
                    names[i],
                    i,
                    tuple(v.shape),
                    dims(v) if trial is Trial.SAME or (v.dim() == rank and _is_map(v)) else (),
                    trial.batched and v.dim() >= least and len(v) == batch,
                )
                for i, v in tensors
            )
            leaves = tuple(v for v in leaves if v.dims or v.batched)
            if leaves and leaves not in found:
                found.append(leaves)
    return found


def _is_map(value: Tensor) -> bool:
    return value.dim() > (2 if value.is_floating_point() else 3)


def _smaller(n: int, axis: int) -> int | None:
    if n < 8:
        return n + 3 + axis  # kernels may be larger than a map that is smaller still
    return max(4, n * (5 + axis) // 8) | 1


def _of_32(n: int, axis: int) -> int | None:
    """Networks of stride 32 that add what they have at other strides."""
    if n % 32:
        return None
    return max(32, (n * (5 + axis) // 8) // 32 * 32) if n > 64 else n + 32 * (1 + axis)


def _half(n: int, axis: int) -> int | None:
    return None if n % 2 or n < 8 else n // 2


def _square(n: int, axis: int) -> int | None:
    return None if n % 32 or n <= 64 else n - 32


def _twice(n: int, axis: int) -> int | None:
    return 2 * n


def _larger(n: int, axis: int) -> int | None:
    if n < 8:
        return n + 4 + axis  # `_smaller` has the size before it
    return n + 32 * (1 + axis) if n % 32 == 0 else n + n // 4 + 2 + axis


def _next(n: int, axis: int) -> int | None:
    """What is rounded up to a multiple of a stride: of small maps all other sizes may leave the example's rest."""
    return n + 2 + axis if n < 16 else None


def _quarter(n: int, axis: int) -> int | None:
    return None if n < 16 else n // 4 + axis


def _few(n: int, axis: int) -> int | None:
    return n // 2 + axis if 3 <= n < 16 else None


def _tiny(n: int, axis: int) -> int | None:
    return 2 + axis if n >= 8 else None


def _single(n: int, axis: int) -> int | None:
    return 1


def _kept(n: int, axis: int) -> int | None:
    return n


_ONE: tuple[SizeChange, ...] = (_smaller, _of_32, _half, _square, _twice)
_MORE: tuple[SizeChange, ...] = (_larger, _quarter, _few, _tiny, _next)


def changes_alone(leaf: Leaf, kind: SizeKind, batch: int) -> list[list[tuple[int, ...] | None]]:
    """The shapes to try where one input alone changes; of each list the first that the model takes."""
    if kind == "batch":
        return [[resized(leaf, _kept, rows, (leaf,))] for rows in (1, 3 if batch == 2 else 2)]
    return [[resized(leaf, _single, 0, (leaf,))], [resized(leaf, change, 0, (leaf,)) for change in _ONE]]


def resized(
    leaf: Leaf, change: SizeChange, batch: int, leaves: tuple[Leaf, ...], strided: bool = False
) -> tuple[int, ...] | None:
    """The new shape: along each axis the smallest map changes, and others as the module docstring says."""
    shape = list(leaf.shape)
    for axis, d in enumerate(leaf.dims):
        least = min(v.shape[v.dims[axis]] for v in leaves if len(v.dims) == len(leaf.dims))
        new = change(least, axis)
        if new is None:
            return None
        times = shape[d] // least if shape[d] % least == 0 else round(shape[d] / least) if strided else 1
        shape[d] += times * (new - least)
    if leaf.batched:
        shape[0] = batch
    return tuple(shape)


def drawn(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of another shape with values like those of `value`; images differ, and none is constant."""
    for d, n in enumerate(shape):
        at = torch.arange(n, device=value.device)
        value = value.index_select(d, at % value.shape[d]) if n != value.shape[d] else value
    if not value.is_floating_point() or value.dim() < 2:
        return value.clone()
    dtype, value = value.dtype, value.double()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(value.device)
    spread = float(value.std()) if value.numel() > 1 else 0.0
    mixed = value + 0.5 * (spread if math.isfinite(spread) and spread > 0 else 1.0) * noise
    if spread > 0:  # within what the example has: images of [0, 1] stay images
        mixed = mixed.clamp(float(value.min()), float(value.max()))
    return mixed.to(dtype)
