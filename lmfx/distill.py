"""`distill`: fine-tuning of the trainable form against the original network, without labels.

    minimise   mean |z' - z|^2 / var(z)      z: the teacher's outputs, z': the student's, on the same images

Norms keep their running statistics (they are folded into the merged convs), so batches may be small.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

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
    lr: float = 1e-3,
    progress: bool = True,
) -> fx.GraphModule:
    """Train `student` in place to give what `teacher` gives, and return it in eval mode. `teacher` is not changed.

    `batches` is gone through `epochs` times: tensors, or tuples whose first entry is the images. Adam with a cosine
    schedule. Raises `InputError` if there is no batch, or the loss is not finite.
    """
    if epochs < 1 or not lr > 0:
        raise OptionError(f"epochs={epochs!r}, lr={lr!r}: use at least one epoch and a positive learning rate")
    data = batches if isinstance(batches, (list, tuple)) or hasattr(batches, "__len__") else list(batches)
    steps = epochs * len(data)  # type: ignore[arg-type]
    if not steps:
        raise InputError("there are no batches to distill on: pass a list of image tensors or a loader")
    trainable = [p for p in student.parameters() if p.is_floating_point() and p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    was_training = teacher.training
    teacher.eval()
    student.eval()
    try:
        with progress_bar(steps, "distilling", progress) as bar:
            for _ in range(epochs):
                for batch in data:
                    x = batch if isinstance(batch, Tensor) else batch[0]
                    with torch.no_grad():
                        wanted = flat_output(teacher(x))
                    loss = (flat_output(student(x)) - wanted).square().mean() / wanted.var().clamp_min(1e-12)
                    if not bool(loss.isfinite()):
                        raise InputError(f"the distillation loss is {float(loss)}: lower lr={lr} or check the images")
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update(1)
    finally:
        teacher.train(was_training)
    return student.eval()
