"""Scales images, and says at which sizes: those of calibration and examples, for networks of smaller inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lmfx.calibration.images import Calibration
from lmfx.passes.errors import InputError
from lmfx.passes.graph.node_facts import shape_of

__all__ = ["Scaling", "Size", "resized", "scaled", "scaled_example", "size_of", "usual_sizes"]

Size = tuple[int, int]  # height, width


class Scaling(nn.Module):
    """A network for smaller images that takes them at the original's own size; `example` is of that size."""

    def __init__(self, net: fx.GraphModule, example: tuple[Any, ...], own: Size, size: Size) -> None:
        super().__init__()
        self.net, self.size = net, size
        self.images = tuple(_is_image(x) and tuple(x.shape[2:]) == own for x in example)

    def forward(self, *inputs: Any) -> Any:
        pairs = zip(inputs, self.images, strict=True)
        return self.net(*(_interpolated(x, self.size) if image else x for x, image in pairs))


def usual_sizes(graph: fx.GraphModule, own: Size) -> list[Size]:
    """Smaller sizes that suit a network, down to half of each side; none where its maps are as large as its images.

    They are whole numbers of what a pixel of its smallest map stands for: padding falls there as at its own size.
    """
    maps = [shape for n in graph.graph.nodes if len(shape := shape_of(n) or ()) == 4 and min(shape[2:]) > 1]
    whole = [own[0] // h for _, _, h, w in maps if own[0] % h == own[1] % w == 0 and own[0] // h == own[1] // w]
    step = max(whole, default=1)
    count = own[0] // step
    if step < 2 or count < 2:
        return []
    return [(step * k, step * max(round(own[1] / step * k / count), 1)) for k in range(count - 1, (count - 1) // 2, -1)]


def size_of(images: Calibration) -> Size:
    """Height and width of the first images. Raises `InputError` where there are none."""
    for tensor in images.tensors:
        if _is_image(tensor):
            return int(tensor.shape[2]), int(tensor.shape[3])
    raise InputError("input_sizes= is for networks that take images (batch, channels, height, width)")


def scaled(images: Calibration, size: Size) -> Calibration:
    """The same images at another size; what are no images, or of another size than the first, as it is."""
    own = size_of(images)
    return Calibration(tuple(resized(t, own, size) for t in images.tensors), images.names)


def scaled_example(example: Any, own: Size, size: Size) -> Any:
    """An example input whose images are of another size."""
    return pytree.tree_map(lambda v: resized(v, own, size), example)


def resized(value: Any, own: Size, size: Size) -> Any:
    """An image of the size `own` at another one; anything else as it is."""
    if not _is_image(value) or tuple(value.shape[2:]) != own:
        return value
    return torch.cat([_interpolated(v, size) for v in value.split(64)]).to(value.dtype)


def _interpolated(value: Tensor, size: Size) -> Tensor:
    return F.interpolate(value, size=size, mode="bilinear", antialias=True)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
