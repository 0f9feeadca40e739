"""Makes what a student is shown: calibration images, moved and mixed; the original says what each of them is.

    moved    by whole pixels, as far as an eighth of the size; what comes in at a border is the mirrored image
    mixed    a x + (1 - a) y        a even between 0 and 1                         mixup  (Zhang et al. 2018)
             x with a box of y      as large a share of the pixels                 CutMix (Yun et al. 2019)

Labels would have to be mixed as well. Nothing of the kind is needed here: the original is asked. A few hundred images
so become as many as there are steps, and mixing says more than moving, since it asks for what lies between the classes.

All inputs of an image are mixed alike, and with the same other image. Integers (time steps, tokens) cannot be mixed:
with such an input beside them images stay whole. Only maps are moved, and only those that are large.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["moved", "shown"]

SMALLEST_MOVED = 16  # pixels in each direction
SHARE_MOVED = 8  # by at most an eighth of the size


def shown(
    tensors: tuple[Tensor, ...], random: torch.Generator, *, move: int = 1, mix: float = 1.0
) -> tuple[Tensor, ...]:
    """A batch as it is shown: moved by multiples of `move` pixels (0: not at all), `mix` of the images mixed."""
    maps = [t for t in tensors if t.dim() > 2]
    if move and len(maps) == 1 and maps[0].is_floating_point() and min(maps[0].shape[2:]) >= SMALLEST_MOVED:
        tensors = tuple(moved(t, random, move) if t is maps[0] else t for t in tensors)
    if mix and len(tensors[0]) > 1 and all(t.is_floating_point() for t in tensors):
        tensors = _mixed(tensors, random, mix)
    return tensors


def moved(images: Tensor, random: torch.Generator, step: int = 1) -> Tensor:
    """Each image moved by its own multiples of `step` pixels along each spatial dimension."""
    most = [n // SHARE_MOVED // step for n in images.shape[2:]]
    flat = [m * step for m in reversed(most) for _ in range(2)]
    # Padding mirrors at most three dimensions at once.
    padded = F.pad(images, flat, mode="reflect")
    offsets = [torch.randint(2 * m + 1, (len(images),), generator=random) * step for m in most]
    rows = []
    for i in range(len(images)):
        row = padded[i]
        for dim, (offset, size) in enumerate(zip(offsets, images.shape[2:], strict=True)):
            row = row.narrow(dim + 1, int(offset[i]), size)
        rows.append(row)
    return torch.stack(rows)


def _mixed(tensors: tuple[Tensor, ...], random: torch.Generator, share: float) -> tuple[Tensor, ...]:
    count = len(tensors[0])
    other = torch.randperm(count, generator=random)
    ratio = torch.rand(count, generator=random)
    ratio = torch.where(torch.rand(count, generator=random) < share, ratio, torch.ones(count))
    boxed = len(tensors) == 1 and tensors[0].dim() > 2 and bool(torch.rand((), generator=random) < 0.5)
    if boxed:
        return (_boxed(tensors[0], tensors[0][other.to(tensors[0].device)], ratio, random),)

    def blend(t: Tensor) -> Tensor:
        a = ratio.to(t).view(-1, *[1] * (t.dim() - 1))
        return a * t + (1 - a) * t[other.to(t.device)]

    return tuple(blend(t) for t in tensors)


def _boxed(images: Tensor, others: Tensor, ratio: Tensor, random: torch.Generator) -> Tensor:
    """Images with a box of the others, which has about 1 - ratio of the pixels."""
    result = images.clone()
    sizes = images.shape[2:]
    for i in range(len(images)):
        side = float(1 - ratio[i]) ** (1 / len(sizes))
        box = []
        for n in sizes:
            long = round(side * n)
            start = int(torch.randint(n - long + 1, (), generator=random))
            box.append(slice(start, start + long))
        result[i][:, *box] = others[i][:, *box]
    return result
