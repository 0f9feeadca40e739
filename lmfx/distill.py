"""`distill`: fine-tuning of the trainable form against the original network, without labels.

    minimise   mean |z' - z|^2 / var(z)      z: the teacher's outputs, z': the student's, on the same images

Norms keep their running statistics (they are folded into the merged convs), so batches may be small.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.export.emit import eval_mode
from lmfx.passes.errors import InputError, OptionError
from lmfx.progress import progress as progress_bar
from lmfx.values import flat_output

__all__ = ["distill"]


def distill(
    student: fx.GraphModule,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int = 1,
    lr: float = 3e-4,
    progress: bool = True,
) -> fx.GraphModule:
    """Train `student` in place to give what `teacher` gives, and return it in eval mode. `teacher` is not changed.

    `batches` is gone through `epochs` times: tensors, tuples (the model's inputs first, labels are ignored) or dicts.
    Adam with a cosine schedule. Raises `InputError` if there is no batch, or the loss is not finite.
    """
    for role, net in (("student", student), ("teacher", teacher)):
        if not isinstance(net, nn.Module):
            raise InputError(
                f"the {role} is a {type(net).__name__}, not a module: pass what lmfx.compress(..., merge=False) gave, "
                "and the original model"
            )
    if not isinstance(epochs, int) or epochs < 1 or not isinstance(lr, (int, float)) or not 0 < lr < float("inf"):
        raise OptionError(f"epochs={epochs!r}, lr={lr!r}: use at least one epoch and a positive learning rate")
    data = batches if isinstance(batches, (list, tuple)) or hasattr(batches, "__len__") else list(batches)
    steps = epochs * len(data)  # type: ignore[arg-type]
    if not steps:
        raise InputError("there are no batches to distill on: pass a list of image tensors or a loader")
    trainable = [p for p in student.parameters() if p.is_floating_point() and p.requires_grad]
    if not trainable:
        raise InputError("no weight of the student requires a gradient: call student.requires_grad_(True)")
    optimizer = torch.optim.Adam(trainable, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    student.eval()
    # Each of the teacher's modules gets its own mode back: some may be frozen in a model that trains.
    with eval_mode(teacher), progress_bar(steps, "distilling", progress) as bar:
        for _ in range(epochs):
            for batch in data:
                loss = _loss(student, teacher, batch)
                if not bool(loss.isfinite()):
                    raise InputError(f"the distillation loss is {loss.item()}: lower lr={lr} or check the images")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(1)
    return student.eval()


def _loss(student: fx.GraphModule, teacher: nn.Module, batch: Any) -> Tensor:
    inputs = batch if isinstance(batch, (tuple, list, dict)) else (batch,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    args = () if kwargs else tuple(inputs)[: sum(n.op == "placeholder" for n in student.graph.nodes)]
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if not tensors or len(tensors) < len(args):
        raise InputError(f"a batch holds a {type((*args, None)[0]).__name__}: pass a list of image tensors or a loader")
    try:
        with torch.no_grad():
            wanted = flat_output(teacher(*args, **kwargs))
        got = flat_output(student(*args, **kwargs))
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"student and teacher do not run on a batch of shape {[tuple(v.shape) for v in tensors]} "
            f"({str(error).splitlines()[0]}): pass inputs as the model takes them"
        ) from error
    if got.shape != wanted.shape:
        raise InputError(
            f"the student gives {got.numel()} numbers and the teacher {wanted.numel()}: pass the model that the "
            "student was made from"
        )
    return (got - wanted).square().mean() / wanted.var().clamp_min(1e-12)
