"""Makes calibration images of whatever the caller has: a list of batches, checked against the example.

What of an example comes from the calibration data is said by its frame (`example_frame`), what of a batch is an input
by the reader (`batch_reader`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmfx.calibration.batch_reader import BatchReader, check_batch
from lmfx.calibration.example_frame import BATCHED, Frame, frame_of
from lmfx.passes.errors import InputError
from lmfx.passes.identity.content import Describer, digest_of
from lmfx.passes.trace.tracing import example_arguments

__all__ = ["Calibration", "Frame", "Roles", "as_calibration"]

MAX_IMAGES = 512  # at least, where there are as many: of small images more are read, as MAX_VALUES allows
MOST_SMALL_IMAGES, MAX_VALUES = 2048, 3 << 24
COMPARED = 128  # images on which plans are compared, where there are as many
LEAST_HELD, LEAST_JUDGED = 4, 16  # images of which some are held out, of which some only judge


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

    def evenly(self, count: int) -> Calibration:
        """At most `count` of the images, taken at equal distances."""
        if count >= len(self):
            return self
        take = torch.arange(count) * len(self) // max(count, 1)
        return Calibration(tuple(t[take.to(t.device)] for t in self.tensors), self.names)

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

    def comparing(self, count: int = COMPARED) -> Calibration:
        """What plans are compared on: `count` of the images that choose; where they are fewer, some of the fit as well.

        What a fit flatters itself by is much the same for all plans; a few dozen images do not tell plans apart.
        """
        more = count - len(self.choose)
        if more < 0:
            return self.choose.evenly(count)
        return self.choose if self.seen or not more else Calibration.joined(self.choose, self.fit.evenly(more))


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
    frame, example = frame_of(args, kwargs)
    # Each argument is a tensor of images itself: one in a dict or a list is put together by the frame.
    plain = all(v is BATCHED for v in frame.leaves) and all(isinstance(v, Tensor) for v in (*args, *kwargs.values()))
    reader = BatchReader(frame, example, args, kwargs, framed=not plain)
    source = [tuple(example)] if calibration is None else calibration
    if limit is None:
        values = max(sum(t[0].numel() for t in example), 1)
        limit = max(MAX_IMAGES, min(MOST_SMALL_IMAGES, MAX_VALUES // values))
    columns: list[list[Tensor]] = [[] for _ in example]
    count = 0
    for batch in reader.batches(source):
        check_batch(batch, example)
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
