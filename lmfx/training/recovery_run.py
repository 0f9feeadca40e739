"""Runs one recovery from its start to its end: what is tried, when it is judged, and the best that was seen.

    begin    the start is judged; a first step says what a step takes, and how many images it may have
    search   trials from the start, each a short training with a whole cosine; the smallest held-out loss decides:
             the rate, then the kind of step, then whose statistics norms use
    train    from the best trial on, in eight parts; after each the average of its last steps is judged, and the student
             where that is not the best so far, or at the end
    setback  where both are worse than the start, or the loss runs away: back to the best, at a third of the rate

The best state is kept from the start on, so whatever happens there is one to return.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from lmfx.calibration.images import Calibration
from lmfx.passes.errors import InputError
from lmfx.quality import Judge
from lmfx.training.checkpoints import load_training, save_training
from lmfx.training.moving_average import moving_average
from lmfx.training.option_checks import Norms
from lmfx.training.processes import agreed
from lmfx.training.rate_search import FACTOR, Watch, find_rate
from lmfx.training.recovery_clock import Clock, cosine
from lmfx.training.recovery_trainer import Trainer
from lmfx.training.relative_steps import Kind

__all__ = ["Choices", "Recovery", "RecoveryRun"]

BATCHES = (64, 32, 16, 8)
FEWEST_STEPS = 200  # of a training for which a batch is chosen
FIRST_RATE = 0.02 / FACTOR
LOWEST_RATE = 1e-7  # by which a training is given up
SEARCH, TRIALS = 0.25, 6  # share of the time, and trials that it is divided among
SHORTEST_TRIAL, LONGEST_TRIAL = 12, 60  # steps: a few steps find every rate too large
JUDGED, LEAST_JUDGED = 0.015, 16  # share of the time that judging once may take, and images it has at least
PARTS = 8
DECAY = 0.98  # of the average over the steps
NOTHING_LOST = 1e-7  # a loss that is no more than rounding


@dataclass(frozen=True)
class Choices:
    """What the caller chose; None is found out."""

    rate: float | None = None
    norms: Norms | None = None
    batch: int | None = None
    kind: Kind | None = None


@dataclass(frozen=True)
class Recovery:
    """What a recovery did. Losses are those by which plans are chosen (`Quality.loss`), on images that no step saw."""

    before: float
    after: float
    steps: int
    seconds: float
    rate: float | None  # None: nothing was trained
    batch: int
    norms: Norms
    optimizer: Kind = "orthogonal"

    def __str__(self) -> str:
        chosen = "" if self.rate is None else f", {self.optimizer} steps, rate {self.rate:.2g}, norms {self.norms}"
        trained = f"{self.steps} steps of {self.batch} images in {self.seconds:.0f} s{chosen}"
        return f"held-out loss {self.before:.3g} -> {self.after:.3g} ({trained})"


class RecoveryRun:
    """Trains the trainer's student until the clock has run out, and keeps the best state by the judge."""

    def __init__(self, trainer: Trainer, judge: Judge, clock: Clock, choices: Choices) -> None:
        self.trainer, self.judge, self.clock, self.choices = trainer, judge, clock, choices
        self.runner, self.student = trainer.runner, trainer.student
        self.done = 0
        self.rate: float | None = None
        self.folder: Path | None = None
        self.run: dict[str, Any] = {}
        self.sizes: dict[str, float] = {}
        begun = clock.elapsed()
        self.start = self.value(self.student)
        self.judging = agreed(clock.elapsed() - begun, self.runner)
        if clock.steps is None and self.judging > JUDGED * clock.seconds:
            share = JUDGED * clock.seconds / self.judging
            count = max(int(len(judge.images) * share), LEAST_JUDGED)
            self.judge = Judge(
                judge.gm, Calibration(tuple(t[:count] for t in judge.images.tensors), judge.images.names)
            )
            self.start = self.value(self.student)
            self.judging *= share
        self.first = trainer.weights()
        self.best, self.best_net = self.start, copy.deepcopy(self.student)

    def keep_in(self, folder: Path, run: dict[str, Any], sizes: dict[str, float]) -> None:
        """Checkpoints go to `folder` and are of this run only; `sizes` are those of the weights that it begins with."""
        self.folder, self.run, self.sizes = folder, run, sizes

    def value(self, net: fx.GraphModule) -> float:
        """The held-out loss of a network in eval mode, the same in all processes."""
        found = self.judge(net).loss()
        return agreed(found if math.isfinite(found) else math.inf, self.runner)

    def told(self) -> Recovery:
        """What was done, so far."""
        norms: Norms = "train" if self.trainer.trained else "frozen"
        seconds = self.clock.elapsed()
        return Recovery(
            self.start, self.best, self.done, seconds, self.rate, self.trainer.batch, norms, self.trainer.kind
        )

    def finish(self) -> None:
        """Leaves the student in its best state."""
        self.student.load_state_dict(self.best_net.state_dict())
        self.student.eval()

    # --- the time -----------------------------------------------------------------------------------------------------

    def train(self, bar: Any) -> None:
        """All of it; `bar` counts steps, or seconds where the time is what is given."""
        if self.start <= NOTHING_LOST:
            return
        part = self._found_again()
        if self.rate is None:
            self._begin()
            self._search()
            part = int(self._fraction() * PARTS)
        assert self.rate is not None
        watch, since, numbers = Watch(), self.done, False
        while (fraction := self._fraction()) < 1 and self.rate > LOWEST_RATE:
            if fraction >= (part + 1) / PARTS:
                part = int(fraction * PARTS)
                if not self._judged() and self.done - since >= SHORTEST_TRIAL:
                    self._set_back()
                    watch, since = Watch(), self.done
                self._save(part)
            loss = self.trainer.step(self.done, self.optimizer, self.rate * cosine(fraction))
            self.done += 1
            numbers |= math.isfinite(loss)
            if watch.astray(loss):
                self._set_back()
                watch, since = Watch(), self.done
            self.average.update_parameters(self.student)
            bar.set_postfix(loss=f"{loss:.3g}", held_out=f"{self.best:.3g}", refresh=False)
            bar.update(1 if self.clock.steps is not None else max(round(self.clock.elapsed()) - bar.n, 0))
        if self.done and not numbers and self.rate <= LOWEST_RATE:
            raise InputError("the loss is no number at any rate: check the weights of the student, and the images")
        self._judged(both=True)

    def stop(self) -> None:
        """Ends the training early: what was reached since the last judging counts."""
        if self.done:
            self._judged(both=True)

    def _fraction(self) -> float:
        return agreed(self.clock.fraction(self.done), self.runner)

    def _begin(self) -> None:
        """Chooses how many images a step has, by what a step takes, unless the caller did."""
        trainer, clock = self.trainer, self.clock
        if self.choices.batch is not None:
            trainer.batch = trainer.possible(self.choices.batch)
        elif clock.steps is not None:
            trainer.batch = trainer.possible(min(BATCHES[0], len(trainer.fit)))
        else:
            trainer.batch = trainer.possible(BATCHES[-1])
            each = self._step_seconds() / trainer.batch
            left = clock.seconds - clock.elapsed()
            fitting = [b for b in BATCHES if FEWEST_STEPS * b * each <= left and b <= len(trainer.fit)]
            trainer.batch = trainer.possible(fitting[0] if fitting else BATCHES[-1])

    def _step_seconds(self) -> float:
        """What a step takes, from the second of two that change nothing."""
        optimizer = self.trainer.optimizer(0.0)
        took = 0.0
        for _ in range(2):
            begun = self.clock.elapsed()
            self.trainer.step(0, optimizer, 0.0)
            took = self.clock.elapsed() - begun
        return agreed(took, self.runner)

    # --- the search ---------------------------------------------------------------------------------------------------

    def _search(self) -> None:
        trainer = self.trainer
        steps, most = self._trials()

        def trial(rate: float) -> float:
            self.student.load_state_dict(self.first)
            optimizer, watch = trainer.optimizer(rate), Watch()
            for step in range(steps):
                if watch.astray(trainer.step(step, optimizer, rate * cosine(step / steps))):
                    return math.inf
            trainer.settle(self.student)
            return self._offered(self.student)

        trainer.trained = self.choices.norms == "train"
        trainer.kind = self.choices.kind or "orthogonal"
        self.rate, reached = self.choices.rate, math.inf
        if self.rate is None and most < 2:
            self.rate = FIRST_RATE
        elif self.rate is None:
            # With few trials the first one is of a rate that does little harm to any network.
            first = FIRST_RATE if most == TRIALS else FIRST_RATE / FACTOR
            self.rate, reached = find_rate(trial, first, self.start, max(most - 1, 2))
            if self.choices.kind is None and most > 2:
                trainer.kind = "adam"
                other = trial(self.rate)
                helps = other < min(reached, self.start)
                trainer.kind, reached = ("adam", other) if helps else ("orthogonal", reached)
        room = most == TRIALS and trainer.batch >= BATCHES[-1]
        if self.choices.norms is None and trainer.norms and room and math.isfinite(reached):
            trainer.trained = True
            trainer.trained = trial(self.rate) < reached
        # Where a trial helped it is the beginning of the training, so most of the search's time is not lost.
        self.student.load_state_dict(self.best_net.state_dict())
        self._anew(self.rate)

    def _trials(self) -> tuple[int, int]:
        """(steps of a trial, trials that there is time for)."""
        if self.clock.steps is not None:
            return min(max(self.clock.steps // 20, SHORTEST_TRIAL), LONGEST_TRIAL), TRIALS
        time, each = SEARCH * self.clock.seconds, max(self._step_seconds(), 1e-6)
        steps = min(max(int((time / TRIALS - self.judging) / each), SHORTEST_TRIAL), LONGEST_TRIAL)
        return steps, min(int(time / (steps * each + self.judging)), TRIALS)

    def _anew(self, rate: float) -> None:
        """An optimizer and an average that begin with the student as it is."""
        self.optimizer: Any = self.trainer.optimizer(rate)
        self.average: Any = moving_average(self.student, DECAY)

    # --- judging ------------------------------------------------------------------------------------------------------

    def _offered(self, net: fx.GraphModule) -> float:
        """The held-out loss of a settled network, which is kept if it is the best so far."""
        found = self.value(net)
        if found < self.best:
            self.best = found
            self.best_net.load_state_dict(net.state_dict())
        return found

    def _judged(self, both: bool = False) -> bool:
        """Whether the average or the student is better than the start; both stay as they are. The student is not judged
        on the way where the average is the best so far: judging is dear."""
        now, best = self.trainer.weights(), self.best
        found = math.inf
        for state in (self.average.module.state_dict(), now):
            self.student.load_state_dict(state)
            self.trainer.settle(self.student)
            found = min(found, self._offered(self.student))
            if found < best and not both:
                break
        self.student.load_state_dict(now)
        return found <= self.start

    def _set_back(self) -> None:
        """Back to the best state, at a lower rate."""
        assert self.rate is not None
        self.rate /= FACTOR
        self.student.load_state_dict(self.best_net.state_dict())
        self._anew(self.rate)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, part: int) -> None:
        runner = self.runner
        if self.folder is not None and (runner is None or runner.is_main_process):
            scaler = getattr(runner, "scaler", None)
            extra: dict[str, Any] = {
                "done": self.done,
                "spent": self.clock.elapsed(),
                "rate": self.rate,
                "batch": self.trainer.batch,
            }
            extra |= {
                "trained": self.trainer.trained,
                "kind": self.trainer.kind,
                "best": self.best,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            told: dict[str, Any] = {"run": self.run, "start": self.sizes, "extra": extra}
            told |= {"average": self.average, "best": self.best_net}
            save_training(self.folder, self.student, self.optimizer, epoch=part, **told)
        if runner is not None:
            runner.wait_for_everyone()

    def _found_again(self) -> int:
        """The part that a checkpoint was left after, with the state of then; 0 without one."""
        self._anew(FIRST_RATE)
        if self.folder is None:
            return 0
        told: dict[str, Any] = {"run": self.run, "start": self.sizes, "average": self.average, "best": self.best_net}
        part, extra = load_training(self.folder, self.student, self.optimizer, **told)
        if extra is not None:
            self.done, self.rate, self.trainer.batch = extra["done"], extra["rate"], extra["batch"]
            self.trainer.trained, self.trainer.kind, self.best = extra["trained"], extra["kind"], extra["best"]
            self.clock.spent += extra["spent"]
            if extra["scaler"] is not None and getattr(self.runner, "scaler", None) is not None:
                self.runner.scaler.load_state_dict(extra["scaler"])
        return part
