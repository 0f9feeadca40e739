"""`distill`: fine-tuning of the trainable form, on labels, against the original network, or both.

    student = lmfx.compress(model, x, 0.5, calibration=images, merge=False)
    net = lmfx.merge(lmfx.distill(student, model, loader, epochs=10, loss=F.cross_entropy, distillation="logits"))

One process in float32 needs nothing but torch. Mixed precision and several processes (`accelerate launch`, `torchrun`)
go through Hugging Face Accelerate (`pip install "lmfx[train]"`), which wraps student, optimizer and loader.

    epoch e:   seed <- (seed, e)
               each batch:  rate <- schedule(step);  objective -> backward -> clip -> step -> average
               checkpoint (student, optimizer, average, e + 1)
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lmfx.calibration.batch_reader import fits
from lmfx.environment.caller_state import entry
from lmfx.environment.progress import progress as progress_bar
from lmfx.made_of import made_of
from lmfx.passes.errors import InputError
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.trace.programs import Model, as_module
from lmfx.training.checkpoints import load_training, make_folder, save_training
from lmfx.training.losses import Distance, StudentLoss, recorded, shared_layers
from lmfx.training.moving_average import moving_average
from lmfx.training.option_checks import (
    Norms,
    Precision,
    Schedule,
    check_networks,
    check_objective,
    check_run,
    check_steps,
)
from lmfx.training.processes import own_random_numbers, runner_for, teaching
from lmfx.training.run_identity import described_run, sizes_at_start

__all__ = ["distill"]


@entry
def distill(
    student: fx.GraphModule,
    teacher: Model | None,
    batches: Iterable[Any],
    *,
    epochs: int = 1,
    lr: float = 3e-4,
    loss: Callable[..., Tensor] | None = None,
    distillation: Distance | None = "outputs",
    weight: float = 1.0,
    temperature: float = 4.0,
    features: Sequence[str] | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    schedule: Schedule = "cosine",
    warmup: float = 0.0,
    clip: float | None = None,
    norms: Norms | None = None,
    ema: float | None = None,
    precision: Precision = "fp32",
    accelerator: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    after_epoch: Callable[[int, fx.GraphModule], None] | None = None,
    progress: bool = True,
) -> fx.GraphModule:
    """Train `student` in place, on labels or to give what `teacher` gives, and return it in eval mode.

    `teacher` is not changed, and may be None for plain fine-tuning.

    Args:
        student: the trainable form, from `lmfx.compress(..., merge=False)` or `lmfx.rewrite`.
        teacher: the original model.
        batches: gone through once an epoch: tensors, tuples (the model's inputs, then labels) or dicts of inputs (other
            keys are labels). A DataLoader, a list, or an iterator, which is read into memory.
        epochs, lr: of Adam, unless `optimizer` says otherwise.
        loss: of the student's output and a batch's labels, like `F.cross_entropy`; None ignores labels.
        distillation: distance to the teacher: "outputs" (squared error), "logits" (softened classes), "features" (of
            layers that both have, and outputs), or None for none.
        weight: of the distance beside `loss`; temperature: of "logits".
        features: names of the layers for "features"; all that both have if None.
        optimizer: makes an optimizer of a list of parameters, with its own learning rates.
        schedule: "cosine" falls to 0 over all steps, "constant" stays.
        warmup: epochs in which the rate rises from 0 to its first value, linearly.
        clip: the largest norm of all gradients together.
        norms: "train" uses and updates batch statistics, "frozen" keeps them, so batches may be small; None trains them
            where there is a `loss`.
        ema: decay of a moving average of weights and norms' statistics over the steps, like 0.9999, which is what is
            returned then and what `after_epoch` gets; it rises to that from 0.1, see `lmfx/training/moving_average.py`.
        precision: "fp32", or mixed "fp16" or "bf16"; needs the extra `train`.
        accelerator: an `accelerate.Accelerator` of your own, in place of `precision`.
        checkpoint: a folder for the state after each epoch; a run that was stopped goes on there.
        seed: of each epoch, together with its number: of the loader's order and augmentation, too.
        after_epoch: called with the number of finished epochs and the student in eval mode.
        progress: show a bar with the loss and the time that is left.

    Raises `InputError` for batches that cannot be used or a loss that is not finite, `OptionError` for options,
    `MissingExtra` without Accelerate where it is needed, `StoreError` for a checkpoint of another training.
    """
    teacher = None if teacher is None else as_module(teacher)
    check_networks(student, teacher, distillation)
    check_steps(epochs, lr, schedule, warmup)
    check_objective(loss, distillation, weight, temperature, features)
    check_run(clip, norms, ema, precision)
    runner = runner_for(precision, accelerator)
    data = batches if hasattr(batches, "__len__") else list(batches)
    trainable = [p for p in student.parameters() if p.is_floating_point() and p.requires_grad]
    if not trainable:
        raise InputError("no weight of the student requires a gradient: call student.requires_grad_(True)")
    if not len(data):  # type: ignore[arg-type]
        raise InputError("there are no batches to distill on: pass a list of image tensors or a loader")
    if runner is not None:
        student.to(runner.device)
    made = optimizer(trainable) if optimizer is not None else torch.optim.Adam(trainable, lr=lr)
    trained = (norms or ("train" if loss is not None else "frozen")) == "train"
    run: dict[str, Any] = {"epochs": epochs, "lr": lr, "distillation": distillation, "weight": weight}
    run |= {
        "temperature": temperature,
        "schedule": schedule,
        "norms": trained,
        "seed": seed,
        "clip": clip,
        "warmup": warmup,
    }
    run |= {"labels": loss is not None, "optimizer": type(made).__name__, "precision": precision}
    run |= {"batches": len(data)}  # type: ignore[arg-type]
    run |= {} if ema is None else {"ema": ema}
    run |= {"features": None if features is None else list(features)}
    start: dict[str, float] = {}
    if checkpoint is not None:
        run |= described_run(student, teacher if distillation else None, data, loss, made, lr)
        run |= {"processes": 1 if runner is None else runner.num_processes}
        make_folder(Path(checkpoint))
        start = sizes_at_start(student, Path(checkpoint))

    with teaching(teacher if distillation else None, runner) as original, own_random_numbers():
        layers: Sequence[str] = ()
        if distillation == "features":
            assert original is not None
            layers = features or _find_layers(student.eval(), original, data, runner)
        objective = StudentLoss(student, loss, distillation, weight, temperature, layers)
        folder = None if checkpoint is None else Path(checkpoint)
        average = None if ema is None else moving_average(student, ema)
        done, extra = (0, None)
        if folder:
            done, extra = load_training(folder, student, made, run=run, start=start, average=average)
        rates = [group.get("initial_lr", group["lr"]) for group in made.param_groups]
        for group, rate in zip(made.param_groups, rates, strict=True):
            group["initial_lr"] = rate  # travels in the checkpoint, where "lr" is that of the last step
        module, stepper, loader = _prepared(runner, objective, made, data, extra)
        count = len(loader)
        shown = progress and (runner is None or runner.is_local_main_process)
        with progress_bar(epochs * count, "distilling", shown) as bar:
            bar.update(min(done, epochs) * count)
            for epoch in range(done, epochs):
                _seed(loader, seed, epoch)
                student.train(trained)
                for index, batch in enumerate(_turn(loader, runner)):
                    step = epoch * count + index
                    factor = _factor(schedule, step, epochs * count, round(warmup * count))
                    for group, rate in zip(made.param_groups, rates, strict=True):
                        group["lr"] = rate * factor
                    value = _step(module, stepper, original, batch, runner, clip, trainable, student, layers, lr)
                    if average is not None:
                        average.update_parameters(student)
                    bar.set_postfix(loss=f"{value:.4g}", refresh=False)
                    bar.update(1)
                if folder and (runner is None or runner.is_main_process):
                    scaler = getattr(runner, "scaler", None)
                    state = scaler.state_dict() if scaler is not None else None
                    told: dict[str, Any] = {"run": run, "start": start, "extra": state}
                    save_training(folder, student, made, epoch=epoch + 1, average=average, **told)
                if runner is not None:
                    runner.wait_for_everyone()
                if after_epoch is not None:
                    current: Any = student if average is None else average.module
                    after_epoch(epoch + 1, current.eval())
        if average is not None:
            student.load_state_dict(average.module.state_dict())
    return student.eval()


def _seed(loader: Any, seed: int, epoch: int) -> None:
    own = seed * 1_000_003 + epoch
    torch.manual_seed(own)
    for holder in (loader, getattr(loader, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
    for holder in (loader, getattr(loader, "sampler", None)):
        set_epoch = getattr(holder, "set_epoch", None)  # a DistributedSampler's own way
        if callable(set_epoch):
            set_epoch(epoch)


def _factor(schedule: Schedule, step: int, steps: int, warmup: int) -> float:
    """The learning rate of a step, over the first one."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) if schedule == "cosine" else 1.0


def _prepared(runner: Any, objective: StudentLoss, optimizer: Any, data: Any, extra: Any) -> tuple[Any, Any, Any]:
    if runner is None:
        return objective, optimizer, data
    if isinstance(data, torch.utils.data.DataLoader):
        module, stepper, loader = runner.prepare(objective, optimizer, data)
    else:  # each process takes every n-th batch, as many as all have
        module, stepper = runner.prepare(objective, optimizer)
        whole = len(data) // runner.num_processes * runner.num_processes
        if not whole:
            raise InputError(f"{len(data)} batches are too few for {runner.num_processes} processes: make smaller ones")
        loader = _Share(data, runner.process_index, whole, runner.num_processes)
    if extra is not None and runner.scaler is not None:
        runner.scaler.load_state_dict(extra)
    return module, stepper, loader


class _Share:
    """Every `step`-th batch from `start` to `stop`, anew in each turn."""

    def __init__(self, data: Any, start: int, stop: int, step: int) -> None:
        self.data, self.bounds = data, (start, stop, step)

    def __len__(self) -> int:
        return len(range(*self.bounds))

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.data), *self.bounds)


def _turn(loader: Any, runner: Any) -> Iterator[Any]:
    for batch in loader:
        if runner is not None:
            batch = pytree.tree_map(lambda v: v.to(runner.device) if isinstance(v, Tensor) else v, batch)
        yield batch


def _split(student: fx.GraphModule, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
    """(positional inputs, inputs by name, labels) of a batch."""
    names = [str(n.target).lstrip("*") for n in student.graph.nodes if n.op == "placeholder"]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(batch, Mapping):
        known = {k: v for k, v in batch.items() if k in names}
        args, kwargs, used = _keyed(student, batch) if not known else ((), known, set(known))
        labels = tuple(v for k, v in batch.items() if k not in used)
    else:
        whole = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        args, kwargs, labels = whole[: len(names)], {}, whole[len(names) :]
    leaves = pytree.tree_leaves((args, kwargs))
    strange = [v for v in leaves if not isinstance(v, (Tensor, int, float))]
    if strange or not any(isinstance(v, Tensor) for v in leaves):
        raise InputError(
            f"a batch holds a {type((*strange, None)[0]).__name__}: pass a list of image tensors or a loader"
        )
    return args, kwargs, labels


def _keyed(student: fx.GraphModule, batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], set[str]]:
    """A dict whose keys are no names of inputs: the one dict that the student takes, or the entry that is its input."""
    made = made_of(student)
    inputs = noted(student).inputs if made is None or made.result is None else made.result.inputs
    specs = inputs["positional"]
    spec = specs[0] if len(specs) == 1 and isinstance(specs[0], dict) else {}
    if set(spec) == {"dict"} and all(k in batch for k in spec["dict"]):
        return ({k: batch[k] for k in spec["dict"]},), {}, set(spec["dict"])
    if set(spec) == {"shape", "dtype"}:
        found = [k for k, v in batch.items() if fits(v, tuple(spec["shape"]), getattr(torch, spec["dtype"]))]
        if len(found) == 1:
            return (batch[found[0]],), {}, set(found)
        raise InputError(
            f"a batch is a dict of {', '.join(map(repr, batch))}, and {len(found)} of them fit the student's input of "
            f"shape {tuple(spec['shape'])}: pass tuples of the input and labels, like (batch['image'], batch['label'])"
        )
    return (), dict(batch), set(batch)


def _find_layers(student: fx.GraphModule, teacher: nn.Module, data: Any, runner: Any) -> list[str]:
    args, kwargs, _ = _split(student, next(_turn(data, runner)))
    return shared_layers(student, teacher, args, kwargs)


def _step(
    module: nn.Module,
    optimizer: Any,
    teacher: nn.Module | None,
    batch: Any,
    runner: Any,
    clip: float | None,
    trainable: list[nn.Parameter],
    student: fx.GraphModule,
    layers: Sequence[str],
    lr: float,
) -> float:
    """One step of the optimizer; the loss before it."""
    args, kwargs, labels = _split(student, batch)
    wanted, theirs = None, {}
    try:
        if teacher is not None:
            autocast = contextlib.nullcontext() if runner is None else runner.autocast()
            with torch.no_grad(), autocast, recorded(teacher, layers) as theirs:
                wanted = teacher(*args, **kwargs)
        value = module(args, kwargs, labels, wanted, dict(theirs))
    except (RuntimeError, TypeError, KeyError) as error:
        shapes = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        raise InputError(
            f"student, teacher and loss do not run on a batch of shape {shapes} with {len(labels)} labels "
            f"({(str(error).splitlines() or ['?'])[0]}): pass inputs as the model takes them"
        ) from error
    shown = float(value.detach())
    if not math.isfinite(shown):
        raise InputError(f"the distillation loss is {shown}: lower lr={lr} or check the images")
    optimizer.zero_grad()
    value.backward() if runner is None else runner.backward(value)
    if clip is not None and runner is None:
        torch.nn.utils.clip_grad_norm_(trainable, clip)
    elif clip is not None:
        runner.clip_grad_norm_(trainable, clip)
    optimizer.step()
    return shown
