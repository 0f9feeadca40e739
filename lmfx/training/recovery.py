"""`recover`: minutes of training without labels, after which a student is never worse than it came in.

    student = lmfx.compress(model, x, 0.5, calibration=images, merge=False)
    net = lmfx.merge(lmfx.recover(student, model, images, minutes=3))

    images     3/4 to train on, 1/8 to choose by, 1/8 that nothing sees       (`Calibration.roles`)
    start      what the student is worth
    trials     short trainings from the same start: the rate, the kind of step, whose statistics   1/4 of the time
               norms use
    training   goes on from the best of them; judged at each eighth: the average of its steps, the student
    result     the best of start, students and averages

What is minimised is in `recovery_objective`, what is shown in `shown_images`, a step in `recovery_trainer`; what was
tried and what it gave is in docs/recovery.md.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.images import Calibration, Frame, as_calibration
from lmfx.environment.caller_state import entry
from lmfx.environment.progress import progress as progress_bar
from lmfx.made_of import made_of, set_made_of
from lmfx.passes.errors import InputError
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.trace.programs import Model, as_module
from lmfx.planning.saved_files import example_of
from lmfx.quality import Judge
from lmfx.stages import trace
from lmfx.training.option_checks import Norms, Precision, check_networks, check_recovery
from lmfx.training.processes import own_random_numbers, runner_for
from lmfx.training.recovery_clock import Clock, seconds_of
from lmfx.training.recovery_objective import RecoveryObjective, arguments
from lmfx.training.recovery_run import Choices, RecoveryRun
from lmfx.training.recovery_trainer import Trainer
from lmfx.training.relative_steps import Kind
from lmfx.training.run_identity import described_run, sizes_at_start

__all__ = ["recover"]

MOST_IMAGES = 4096
MOVE_OF_MAPS = 8  # pixels: where the output is a map, phases of mosaics and strides stay what they are


@entry
def recover(
    student: fx.GraphModule,
    model: Model,
    images: Any,
    *,
    minutes: float | str = 3.0,
    steps: int | None = None,
    lr: float | None = None,
    optimizer: Kind | None = None,
    norms: Norms | None = None,
    batch: int | None = None,
    temperature: float = 2.0,
    features: float = 0.3,
    mix: bool = True,
    precision: Precision = "fp32",
    accelerator: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> fx.GraphModule:
    """Train `student` in place, without labels, to give what `model` gives; return it in eval mode, never worse.

    Args:
        student: from `lmfx.compress`, `lmfx.rewrite` or `lmfx.load`; the trainable form (`merge=False`) learns better
            than the merged one.
        model: the original, or its graph from `lmfx.trace`. It is not changed.
        images: unlabelled inputs, a tensor or a loader, as for `calibration=`; hundreds do, at most 4,096 are read.
            A quarter is held out and decides what is returned.
        minutes: wall clock for all of it, or a text like "90s"; the schedule follows it.
        steps: how many steps to train, whatever they take, in place of a time: the same call gives the same weights.
        lr: share of its own size by which each weight moves in a step, at most; None finds it in short trials.
        optimizer: "orthogonal" moves matrices along all directions alike (Muon), "adam" each weight by itself; None
            tries the second at the rate that suits the first, which is taken where `lr` is given.
        norms: "train" uses and updates batch statistics, "frozen" keeps them; None tries both.
        batch: images a step; None takes as many as leave time for some hundred steps, 64 at most.
        temperature: by which scores are softened.
        features: weight of the relative error of what both graphs compute at the same places, beside the outputs; 0
            compares outputs only.
        mix: show images that are moved and mixed; the original says what they are.
        precision: "fp32", or mixed "fp16" or "bf16"; needs the extra `train`, as several processes do.
        accelerator: an `accelerate.Accelerator` of your own, in place of `precision`.
        checkpoint: a folder for the state after each eighth; a run that was stopped goes on there.
        seed: of the images' order and how they are mixed.
        progress: show a bar with the loss and the time that is left.

    `student.meta["lmfx_recovery"]` says what was done. Ctrl-C ends the training: the best so far is returned, with a
    warning; where there is a checkpoint or there are several processes, it is raised as usual.

    Raises `InputError` for images or networks that do not fit each other, `OptionError` for options, `MissingExtra`
    without Accelerate where it is needed, `StoreError` for a checkpoint of another training.
    """
    model = as_module(model)
    check_networks(student, model, "recovery")
    check_recovery(steps, lr, optimizer, norms, batch, temperature, features)
    clock = Clock(seconds_of(minutes), steps)
    if not isinstance(student, fx.GraphModule):
        raise InputError(f"the student is a {type(student).__name__}: trace it first, lmfx.trace(student, example)")
    runner = runner_for(precision, accelerator)
    first = next(student.parameters(), None)
    device = runner.device if runner is not None else first.device if first is not None else torch.device("cpu")
    student.to(device).eval()
    data, original = _original(student, model, images, device)
    roles = data.roles()
    with own_random_numbers():
        judge = Judge(original, roles.choose, held_out=not roles.seen)
        maps = any(kind.kind == "map" for kind in judge.kinds)
        objective = RecoveryObjective(student, original, judge.kinds, temperature, features)
        moved = MOVE_OF_MAPS if maps else 1
        trainer = Trainer(student, original, objective, roles.fit, mix=mix, move=moved, seed=seed, runner=runner)
        run = RecoveryRun(trainer, judge, clock, Choices(lr, norms, batch, optimizer))
        if checkpoint is not None:
            options = {"minutes": str(minutes), "steps": steps, "lr": lr, "optimizer": optimizer, "norms": norms}
            options |= {"batch": batch, "mix": mix, "temperature": temperature, "features": features}
            options |= {"seed": seed, "precision": precision}
            options |= described_run(student, original, list(data.tensors), None, trainer.optimizer(1.0), 1.0)
            run.keep_in(Path(checkpoint), options, sizes_at_start(student, Path(checkpoint)))
        shown = progress and (runner is None or runner.is_local_main_process)
        try:
            with progress_bar(steps if steps is not None else math.ceil(clock.seconds), "recovering", shown) as bar:
                run.train(bar)
        except KeyboardInterrupt:
            if checkpoint is not None or (runner is not None and runner.num_processes > 1):
                raise
            run.stop()
            stopped = f"recover was stopped after {run.done} steps, and returns the best network so far"
            warnings.warn(stopped, stacklevel=3)
        finally:
            run.finish()
    student.meta["lmfx_recovery"] = run.told()
    _note_quality(student, original, data)
    return student


def _note_quality(student: fx.GraphModule, original: fx.GraphModule, data: Calibration) -> None:
    """The result that travels with a student says what it is worth now, on images that nothing saw."""
    made = made_of(student)
    if made is not None and made.result is not None:
        roles = data.roles()
        quality = Judge(original, roles.judge, held_out=not roles.seen)(student)
        set_made_of(student, replace(made, result=replace(made.result, quality=quality)))


def _original(
    student: fx.GraphModule, model: nn.Module, images: Any, device: torch.device
) -> tuple[Calibration, fx.GraphModule]:
    """(the images on `device`, the model as its traced graph there)."""
    example = noted(model).example if isinstance(model, fx.GraphModule) else None
    made = made_of(student)
    inputs = noted(student).inputs if made is None or made.result is None else made.result.inputs
    data: Calibration | None = images if isinstance(images, Calibration) else None
    if data is None:
        given = example
        if given is None and (inputs["positional"] or inputs["keyword"]):
            positional, keyword = example_of(inputs)
            given = keyword or (tuple(positional) if len(positional) != 1 else positional[0])
        elif given is None and isinstance(images, Tensor):
            given = images[:1]
        if given is None:
            raise InputError(
                "the student does not say what its inputs are: pass images as one tensor, or the model as its graph, "
                "lmfx.trace(model, example_input)"
            )
        data = as_calibration(images, given, MOST_IMAGES)
    names = data.names
    if isinstance(names, Frame):
        held = tuple(v.to(device) if isinstance(v, Tensor) else v for v in names.leaves)
        names = Frame(held, names.spec, names.batch)
    data = Calibration(tuple(t.to(device) for t in data.tensors), names)
    first = next(model.parameters(), None)
    if first is not None and first.device != device:
        model = copy.deepcopy(model).to(device)
    if isinstance(model, fx.GraphModule) and example is not None:
        return data, model
    args, kwargs = arguments(tuple(t[: _rows(inputs)] for t in data.tensors), names)
    return data, trace(model, kwargs or (tuple(args) if len(args) != 1 else args[0]))


def _rows(inputs: dict[str, Any]) -> int:
    """The batch size of the example that a student was made with, at least 1."""
    specs = [*inputs["positional"], *inputs["keyword"].values()]
    specs = [s for s in specs if isinstance(s, dict) and s.get("shape")]
    return int(specs[0]["shape"][0]) if specs else 1
