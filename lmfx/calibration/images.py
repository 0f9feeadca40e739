"""Makes calibration images of whatever the caller has: a list of batches, checked against the example.

An example may hold more than batches of tensors: numbers and flags, tensors without a batch dimension, containers. What
has as many rows as the images is *batched* and comes from the calibration data; all else is a constant of the example.

    example      (sample (2, 3, 32, 32), 10, {"text": (2, 768), "scale": ()})
    batched       sample                      text                                 -> `Calibration.tensors`
    constants                            10                 scale                  -> `Frame.leaves`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lmfx.passes.errors import InputError
from lmfx.passes.identity.content import Describer, digest_of
from lmfx.passes.trace.tracing import example_arguments

__all__ = ["Calibration", "Frame", "Roles", "as_calibration", "fits"]

MAX_IMAGES = 512  # at least, where there are as many: of small images more are read, as MAX_VALUES allows
MOST_SMALL_IMAGES, MAX_VALUES = 2048, 3 << 24
LEAST_HELD, LEAST_JUDGED = 4, 16  # images of which some are held out, of which some only judge


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


@dataclass(frozen=True)
class Calibration:
    """Unlabelled inputs: one tensor a batched model input, all with the images along dimension 0."""

    tensors: tuple[Tensor, ...]
    # Keyword names of the last tensors, if the model takes them by name; a frame where there are constants as well.
    names: tuple[str, ...] | Frame = ()

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
        """(images to fit on, at most `held` others to choose by); see `roles`."""
        roles = self.roles()
        if roles.seen:
            return self, self
        return roles.fit, Calibration(tuple(t[:held] for t in roles.choose.tensors), self.names)

    def roles(self) -> Roles:
        """Who may see which image. From 16 images on each fourth is held out, and one half of these judges the result;
        from 4 on the held-out ones choose and judge; below that all images do everything."""
        count = len(self)
        if count < LEAST_HELD:
            return Roles(self, self, self, seen=True)
        apart = torch.arange(count) % 4 == 3
        if count < LEAST_JUDGED:
            return Roles(self._of(~apart), self._of(apart), self._of(apart), seen=False)
        judging = torch.arange(count) % 8 == 7
        return Roles(self._of(~apart), self._of(apart & ~judging), self._of(judging), seen=False)

    @classmethod
    def joined(cls, first: Calibration, second: Calibration) -> Calibration:
        """The images of both."""
        pairs = zip(first.tensors, second.tensors, strict=True)
        return cls(tuple(torch.cat(pair) for pair in pairs), first.names)

    def _of(self, mask: Tensor) -> Calibration:
        return Calibration(tuple(t[mask.to(t.device)] for t in self.tensors), self.names)

    def digest(self) -> str:
        """A short digest of all values, and of the constants beside them, which names stored importances."""
        return digest_of(self._described()[0])

    def certain(self) -> bool:
        """Whether the digest tells these inputs from all others: a constant of the example may be any object."""
        return not self._described()[1]

    def _described(self) -> tuple[list[str], list[str]]:
        describer = Describer("values", code=True)
        held = [v for v in self.names.leaves if v is not BATCHED] if isinstance(self.names, Frame) else list(self.names)
        form = str(self.names.spec) if isinstance(self.names, Frame) else ""
        lines = [describer.array(t) for t in self.tensors] + [form] + [describer.value(v, "the example") for v in held]
        return lines, describer.unsure


@dataclass(frozen=True)
class Roles:
    """The parts of some calibration images: what fits are made from, what plans and fits are chosen by, and what judges
    the result. `seen` if fits saw the images that judge."""

    fit: Calibration
    choose: Calibration
    judge: Calibration
    seen: bool


def as_calibration(calibration: Any, example_input: Any, limit: int | None = None) -> Calibration:
    """Calibration inputs from a tensor, a tuple or dict like the example, or an iterable of batches (a DataLoader).

    Of a batch that is a tuple, the first entries are taken, as many as the model has inputs; labels are ignored. A
    batch may leave out what is no tensor in the example; where it has it, it must be equal, since constants are taken
    from the example. At most `limit` images are read (512, of small ones up to 2,048). None stands for the example
    itself. Raises `InputError` for shapes that do not fit the example, NaN, or nothing at all.
    """
    if isinstance(calibration, Calibration):
        return calibration
    args, kwargs = example_arguments(example_input)
    frame, example = _frame(args, kwargs)
    # Each argument is a tensor of images itself: one in a dict or a list is put together by the frame.
    plain = all(v is BATCHED for v in frame.leaves) and all(isinstance(v, Tensor) for v in (*args, *kwargs.values()))
    reader = _Reader(frame, example, args, kwargs, framed=not plain)
    source = [tuple(example)] if calibration is None else calibration
    if limit is None:
        values = max(sum(t[0].numel() for t in example), 1)
        limit = max(MAX_IMAGES, min(MOST_SMALL_IMAGES, MAX_VALUES // values))
    columns: list[list[Tensor]] = [[] for _ in example]
    count = 0
    for batch in reader.batches(source):
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
    return Calibration(tensors, tuple(kwargs) if plain else frame)


def _frame(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Frame, list[Tensor]]:
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


class _Reader:
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


def _check(batch: list[Tensor], example: list[Tensor]) -> None:
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
