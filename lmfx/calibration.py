"""Calibration images: from whatever the caller has to a list of batches, checked against the example."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmfx.passes.errors import InputError
from lmfx.passes.trace import example_arguments

__all__ = ["Calibration", "as_calibration"]

MAX_IMAGES = 512


@dataclass(frozen=True)
class Calibration:
    """Unlabelled inputs: one tensor a model input, all with the images along dimension 0."""

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...] = ()  # keyword names of the last tensors, if the model takes them by name

    def __len__(self) -> int:
        return len(self.tensors[0])

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        """The inputs in batches of at most `size` images, of at most `limit` images in all."""
        total = len(self) if limit is None else min(limit, len(self))
        for start in range(0, total, size):
            yield tuple(t[start : min(start + size, total)] for t in self.tensors)

    def whole_batches(self, size: int) -> Calibration:
        """As many images as make whole batches of `size`; fewer than one batch are repeated to make one."""
        count = max(len(self) // size, 1) * size
        take = torch.arange(count) % len(self)
        return self if count == len(self) else Calibration(tuple(t[take] for t in self.tensors), self.names)

    def split(self, held: int) -> tuple[Calibration, Calibration]:
        """(images to fit on, at most `held` others to judge on): each fourth; below four images both are all."""
        if len(self) < 4:
            return self, self
        apart = torch.arange(len(self)) % 4 == 3
        rest, judged = (tuple(t[mask] for t in self.tensors) for mask in (~apart, apart))
        return Calibration(rest, self.names), Calibration(tuple(t[:held] for t in judged), self.names)

    def digest(self) -> str:
        """A short digest of all values, which names stored importances."""
        state = hashlib.sha256()
        for tensor in self.tensors:
            state.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return state.hexdigest()[:16]


def as_calibration(calibration: Any, example_input: Any, limit: int = MAX_IMAGES) -> Calibration:
    """Calibration inputs from a tensor, a tuple or dict of tensors, or an iterable of batches (a DataLoader, say).

    Of a batch that is a tuple, the first entries are taken, as many as the model has inputs; labels are ignored. At
    most `limit` images are read. None stands for the example itself. Raises `InputError` for shapes that do not fit the
    example, NaN, or nothing at all.
    """
    if isinstance(calibration, Calibration):
        return calibration
    args, kwargs = example_arguments(example_input)
    example = [*args, *kwargs.values()]
    if not example or not all(isinstance(v, Tensor) for v in example):
        raise InputError(
            f"the example's inputs are {', '.join(type(v).__name__ for v in example) or 'nothing'}, and images must go "
            "through the model in batches: wrap it in a module that takes tensors only and fixes the rest"
        )
    source = example if calibration is None else calibration
    columns: list[list[Tensor]] = [[] for _ in example]
    count = 0
    for batch in _batches(source, len(example), tuple(kwargs)):
        _check(batch, example)
        for column, value in zip(columns, batch, strict=True):
            column.append(value[: limit - count].detach().to(example[0].device))
        count += len(batch[0])
        if count >= limit:
            break
    if not count:
        raise InputError("the calibration data is empty: pass a tensor of images or a loader that yields some")
    tensors = tuple(torch.cat(c) for c in columns)
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError("the calibration data has NaN or infinite values: clean it, or check the normalisation")
    return Calibration(tensors, tuple(kwargs))


def _batches(source: Any, inputs: int, names: tuple[str, ...]) -> Iterable[list[Tensor]]:
    if isinstance(source, Tensor):
        yield [source]
        return
    if isinstance(source, dict) and not names:
        raise InputError(
            "the calibration is a dict, and the example is not: pass a tensor, or a tuple of tensors in the order of "
            "the model's inputs"
        )
    if isinstance(source, dict):
        missing = [n for n in names if n not in source]
        if missing:
            raise InputError(f"the calibration dict has no {missing}; it has {sorted(source)}")
        yield [source[n] for n in names]
        return
    if isinstance(source, (list, tuple)) and source and all(isinstance(v, Tensor) for v in source) and inputs > 1:
        yield list(source[:inputs])
        return
    if not isinstance(source, Iterable):
        raise InputError(
            f"calibration={type(source).__name__}: pass a tensor, a tuple of tensors or a loader of batches"
        )
    for batch in source:
        if isinstance(batch, Tensor):
            yield [batch]
        elif isinstance(batch, dict) and names:
            yield from _batches(batch, inputs, names)
        elif isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Tensor):
            yield list(batch[:inputs])
        else:
            raise InputError(
                f"a calibration batch is a {type(batch).__name__}: expected a tensor or a tuple of tensors"
            )


def _check(batch: list[Tensor], example: list[Tensor]) -> None:
    if len(batch) != len(example):
        raise InputError(f"a calibration batch has {len(batch)} inputs, the example has {len(example)}")
    for value, like in zip(batch, example, strict=True):
        if not isinstance(value, Tensor):
            raise InputError(f"a calibration batch holds a {type(value).__name__}: expected a tensor for each input")
        if not like.dim():
            raise InputError(
                "an input of the example has the shape (), without a batch dimension: wrap the model in a module that "
                "fixes it"
            )
        if value.dim() != like.dim() or value.shape[1:] != like.shape[1:]:
            raise InputError(
                f"a calibration batch has shape {tuple(value.shape)}, the example {tuple(like.shape)}: "
                "all but the first dimension must agree"
            )
        if value.dtype != like.dtype:
            raise InputError(f"the calibration data is {value.dtype}, the example {like.dtype}: convert one of them")
    if len({len(value) for value in batch}) > 1:
        raise InputError(
            f"the inputs of a calibration batch have {[len(v) for v in batch]} images: pass as many for each input"
        )
