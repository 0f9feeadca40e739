"""Trains a student by steps of which each is known by its number: the images, how they are mixed, and the rate.

    step n:   batch n of the epoch's order  ->  moved and mixed  ->  the original says what is wanted
              objective -> backward -> step of `rate` times each weight's size

So the same number gives the same step again, in a short trial, and in a run that goes on after it was stopped. With
several processes each takes its own part of every batch.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import batches_for
from lmfx.calibration.shown_images import shown
from lmfx.passes.errors import InputError
from lmfx.training.norm_statistics import renew_statistics, running_norms, set_norms
from lmfx.training.recovery_objective import RecoveryObjective, arguments
from lmfx.training.relative_steps import Kind, RelativeSteps

__all__ = ["Trainer"]

RENEWED = 256  # images from which norms take new statistics


class Trainer:
    """Steps of a student towards the traced original on the images `fit`; `batch` is set before the first step."""

    def __init__(
        self,
        student: fx.GraphModule,
        original: fx.GraphModule,
        objective: RecoveryObjective,
        fit: Calibration,
        *,
        mix: bool,
        move: int,
        seed: int,
        runner: Any = None,
    ) -> None:
        self.student, self.original, self.objective, self.fit = student, original, objective, fit
        self.mix, self.move, self.seed, self.runner = mix, move, seed, runner
        self.module: nn.Module = objective if runner is None else runner.prepare(objective)
        self.trainable = [p for p in student.parameters() if p.is_floating_point() and p.requires_grad]
        if not self.trainable:
            raise InputError("no weight of the student requires a gradient: call student.requires_grad_(True)")
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))
        self.batch = self.possible(1)
        self.norms = running_norms(student.eval(), arguments(self.images(0), fit.names))
        self.trained = False  # whether norms use the statistics of batches
        self.kind: Kind = "orthogonal"

    def possible(self, size: int) -> int:
        """The images a batch has where `size` are wanted: some graphs run with one number of images only."""
        return len(next(batches_for(self.original, self.fit.whole_batches(size), size))[0])

    def images(self, step: int) -> tuple[Tensor, ...]:
        """The images of a step, as they are in the calibration data."""
        runner = self.runner
        rank, processes = (0, 1) if runner is None else (runner.process_index, runner.num_processes)
        total, count = len(self.fit), self.batch * processes
        places = torch.arange(step * count + rank * self.batch, step * count + (rank + 1) * self.batch)
        chosen = torch.stack([self._permutation(int(p) // total)[int(p) % total] for p in places])
        return tuple(t[chosen.to(t.device)] for t in self.fit.tensors)

    def _permutation(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.fit), generator=_generator(self.seed, epoch, 0)))
        return self._order[1]

    def optimizer(self, rate: float) -> Any:
        """A new optimizer of all weights, of the trainer's kind."""
        made = RelativeSteps(self.trainable, rate, kind=self.kind)
        return made if self.runner is None else self.runner.prepare(made)

    def step(self, number: int, optimizer: Any, rate: float) -> float:
        """One step; the loss before it, which may be no number: then nothing was changed."""
        runner, names = self.runner, self.fit.names
        random = _generator(self.seed, number, 1 if runner is None else 1 + runner.process_index)
        given = arguments(shown(self.images(number), random, move=self.move, mix=float(self.mix)), names)
        set_norms(self.student, self.norms, self.trained)
        autocast = contextlib.nullcontext() if runner is None else runner.autocast()
        wanted = self.objective.wanted(given, autocast)
        value = self.module(given, wanted)
        found = float(value.detach())
        if runner is not None and runner.num_processes > 1:
            found = float(runner.reduce(value.detach().clone(), "mean"))
        if not math.isfinite(found):
            return found
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        value.backward() if runner is None else runner.backward(value)
        optimizer.step()
        return found

    def settle(self, net: nn.Module) -> None:
        """Brings a network that was trained, or an average of such, into the state in which it is judged."""
        net.eval()
        if self.trained:
            batches = batches_for(self.original, self.fit, self.possible(max(self.batch, 32)), RENEWED)
            renew_statistics(net, self.norms, (arguments(b, self.fit.names) for b in batches))

    def weights(self) -> dict[str, Tensor]:
        """A copy of the student's state."""
        return {name: value.detach().clone() for name, value in self.student.state_dict().items()}


def _generator(seed: int, number: int, use: int) -> torch.Generator:
    """Random numbers for one step or epoch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) * 1_009 + use)
