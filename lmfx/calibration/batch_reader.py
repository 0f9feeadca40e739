"""Takes the caller's batches apart into the tensors that are batched in the example.

a tensor                     the images of a model with one input
a tuple, a list              the first entries are the inputs; or the whole example, constants included
a dict                       the inputs by their names; of a model that takes no names, the entry that fits
an iterable of these         a loader: one batch after the other
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lmfx.calibration.example_frame import BATCHED, Frame
from lmfx.passes.errors import InputError

__all__ = ["BatchReader", "check_batch", "fits"]


class BatchReader:
    """Takes batches apart into the tensors that are batched in the example."""

    def __init__(
        self, frame: Frame, example: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], framed: bool
    ) -> None:
        self.frame, self.inputs, self.args, self.kwargs = frame, len(example), args, kwargs
        self.names = tuple(kwargs)
        self.width = len(args)
        self.framed = framed

    def batches(self, source: Any) -> Iterable[list[Tensor]]:
        if isinstance(source, Tensor):
            yield [source]
            return
        if isinstance(source, Mapping):
            yield self.named(source)
            return
        if isinstance(source, (list, tuple)) and source and self.is_batch(source):
            yield self.row(source)
            return
        if not isinstance(source, Iterable):
            raise InputError(
                f"calibration={type(source).__name__}: pass a tensor, a tuple of tensors or a loader of batches"
            )
        for batch in source:
            if isinstance(batch, Tensor):
                yield [batch]
            elif isinstance(batch, Mapping):
                yield self.named(batch)
            elif isinstance(batch, (list, tuple)) and batch and (isinstance(batch[0], Tensor) or self.is_whole(batch)):
                yield self.row(batch)
            else:
                raise InputError(
                    f"a calibration batch is a {type(batch).__name__}: expected a tensor or a tuple of tensors"
                )

    def is_batch(self, source: Any) -> bool:
        """Whether a tuple is one batch, not a list of them."""
        tensors = all(isinstance(v, Tensor) for v in source) and self.inputs > 1
        return tensors or (self.framed and self.is_whole(source))

    def is_whole(self, batch: Any) -> bool:
        """Whether a tuple begins with all positional arguments of the example, constants included."""
        if self.names or len(batch) < self.width:
            return False
        return pytree.tree_structure((tuple(batch[: self.width]), {})) == self.frame.spec and all(
            isinstance(a, Tensor) == isinstance(b, Tensor)
            for a, b in zip(pytree.tree_leaves(tuple(batch[: self.width])), pytree.tree_leaves(self.args), strict=True)
        )

    def row(self, batch: Any) -> list[Tensor]:
        if self.framed and self.is_whole(batch):
            return self.picked(pytree.tree_leaves(tuple(batch[: self.width])))
        return list(batch[: self.inputs])

    def named(self, batch: Mapping[str, Any]) -> list[Tensor]:
        if not self.names:
            return self.keyed(batch)

        def needed(value: Any) -> bool:
            return any(v is BATCHED for v in pytree.tree_leaves(value))

        _, holes = pytree.tree_unflatten(list(self.frame.leaves), self.frame.spec)
        missing = [n for n in self.names if n not in batch and needed(holes[n])]
        if missing:
            raise InputError(
                f"the calibration dict has no {missing}; it has {sorted(batch)}: name its inputs as the example does"
            )
        whole = {n: batch.get(n, self.kwargs[n]) for n in self.names}
        if pytree.tree_structure(((), whole)) != self.frame.spec:
            raise InputError(
                f"the calibration dict is not built like the example: {pytree.tree_structure(whole)} for "
                f"{pytree.tree_structure(self.kwargs)}: nest its inputs as the example does"
            )
        return self.picked(pytree.tree_leaves(((), whole)))

    def keyed(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """A dict for a model that takes no names: the one dict that it takes, or the one entry that is its input."""
        held = self.args[0] if self.width == 1 else None
        if isinstance(held, Mapping):
            if missing := [k for k in held if k not in batch]:
                there = sorted(map(str, batch))
                raise InputError(
                    f"the calibration dict has no {missing}; it has {there}: name its inputs as the example does"
                )
            return self.row(({k: batch[k] for k in held},))
        like = held if isinstance(held, Tensor) else None
        found = [] if like is None else [k for k, v in batch.items() if fits(v, tuple(like.shape), like.dtype)]
        if len(found) == 1:
            return [batch[found[0]]]
        seen = ", ".join(f"{k!r} {_brief(v)}" for k, v in batch.items())
        what = f"a tensor like {_brief(like)}" if like is not None else f"{self.width} positional inputs"
        which = "none of them" if not found else f"more than one ({', '.join(map(repr, found))})"
        raise InputError(
            f"a calibration batch is a dict of {seen}, the model takes {what}, and {which} fits: pass the input alone, "
            f"like (batch[{(found or ['image'])[0]!r}] for batch in loader)"
        )

    def picked(self, leaves: list[Any]) -> list[Tensor]:
        """The batched ones of a whole batch's leaves; the others must be those of the example."""
        for value, held in zip(leaves, self.frame.leaves, strict=True):
            if held is not BATCHED and not _same(value, held):
                raise InputError(
                    f"the calibration has {_text(value)} where the example has {_text(held)}: constants are taken from "
                    "the example. Leave them out, or give the example a tensor with one entry an image"
                )
        return [v for v, held in zip(leaves, self.frame.leaves, strict=True) if held is BATCHED]


def fits(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a value is a batch of what has this shape, whatever the number of images, and this dtype."""
    return isinstance(value, Tensor) and value.dtype == dtype and value.dim() > 0 and value.shape[1:] == shape[1:]


def _brief(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"({type(value).__name__})"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a.cpu() == b.cpu()).all())
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return type(a) is type(b) and bool(a == b)


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.dim() else f"the tensor {value.item()}"
    return repr(value)


def check_batch(batch: list[Tensor], example: list[Tensor]) -> None:
    """Raises `InputError` if a batch is not like the example: its tensors in number, shape and dtype."""
    if len(batch) != len(example):
        raise InputError(f"a calibration batch has {len(batch)} inputs, the example has {len(example)}: pass as many")
    for value, like in zip(batch, example, strict=True):
        if not isinstance(value, Tensor):
            raise InputError(f"a calibration batch holds a {type(value).__name__}: expected a tensor for each input")
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
