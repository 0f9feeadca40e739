"""Computes what fine-tuning minimises: a loss on labels, a distance to the teacher, or their sum.

    total = loss(output, labels) + weight * distance

    outputs     |z' - z|^2 / |z - mean z|^2                               z: the teacher's outputs, z': the student's
    logits      T^2 KL(softmax(z / T), softmax(z' / T))                   Hinton, Vinyals, Dean 2015
    features    mean over layers of |f' - f|^2 / |f - mean f|^2 + outputs  Romero et al. 2015, without a regressor

Features are the outputs of layers that student and teacher share: a layer that the plan left alone keeps its name and
its shape, and what it computed in the original is what it should compute after merged convolutions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lmfx.calibration.recording import flat_output
from lmfx.passes.errors import InputError

__all__ = ["Distance", "StudentLoss", "recorded", "shared_layers"]

Distance = Literal["outputs", "logits", "features"]


class StudentLoss(nn.Module):
    """The student and its loss as one module: `forward` gives the loss, so a training library wraps all of it.

    `layers` are the names of the layers whose outputs are compared for `distance="features"`.
    """

    def __init__(
        self,
        student: fx.GraphModule,
        loss: Callable[..., Tensor] | None,
        distance: Distance | None,
        weight: float = 1.0,
        temperature: float = 4.0,
        layers: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.distance = distance
        self.weight = weight
        self.temperature = temperature
        self.layers = tuple(layers)

    def forward(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        labels: Sequence[Any],
        wanted: Any,
        features: dict[str, Tensor],
    ) -> Tensor:
        with recorded(self.student, self.layers) as seen:
            output = self.student(*args, **kwargs)
        terms = []
        if self.loss is not None:
            terms.append(self.loss(output, *labels))
        if self.distance is not None:
            terms.append(self.weight * self.measure(output, wanted))
        if self.layers:
            apart = [normalised_error(seen[name], features[name]) for name in self.layers]
            terms.append(self.weight * torch.stack(apart).mean())
        return torch.stack([term.float() for term in terms]).sum()

    def measure(self, output: Any, wanted: Any) -> Tensor:
        """The distance of two outputs."""
        got, target = flat_output(output).float(), flat_output(wanted).float()
        if got.shape != target.shape:
            raise InputError(
                f"the student gives {got.numel()} numbers and the teacher {target.numel()}: pass the model that the "
                "student was made from"
            )
        if self.distance != "logits":
            return normalised_error(got, target)
        if not isinstance(output, Tensor) or not isinstance(wanted, Tensor) or output.dim() < 2:
            raise InputError(
                "distillation='logits' needs one tensor of logits (images, classes, ...), not a "
                f"{type(output).__name__}: use distillation='outputs'"
            )
        scale = self.temperature
        a, b = (F.log_softmax(z.float() / scale, 1) for z in (output, wanted))
        cells = a.numel() / a.shape[1]
        return F.kl_div(a, b, reduction="sum", log_target=True) * scale**2 / cells


def normalised_error(got: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared error over the variance of what is wanted, both in units of what is wanted: squares of large or
    small float32 numbers would overflow or vanish. Where it does not vary (to a millionth), over that of its size."""
    got, wanted = got.float(), wanted.float()
    unit = torch.maximum(wanted.detach().abs().amax(), 1e-6 * got.detach().abs().amax())
    unit = torch.where((unit > 0) & unit.isfinite(), unit, torch.ones_like(unit))
    got, wanted = got / unit, wanted / unit
    return (got - wanted).square().mean() / wanted.var().clamp_min(1e-12)


@contextlib.contextmanager
def recorded(net: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of `net`'s submodules `layers`, by name, of the calls within.

    Raises `InputError` for a name that `net` does not have.
    """
    seen: dict[str, Tensor] = {}
    handles = []
    for name in layers:
        try:
            module = net.get_submodule(name)
        except AttributeError as error:
            raise InputError(
                f"{type(net).__name__} has no layer {name!r}: use names that student and teacher share"
            ) from error

        def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            # A copy: an activation after it may write into the same memory.
            seen[name] = output.clone() if isinstance(output, Tensor) else output

        handles.append(module.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def shared_layers(
    student: fx.GraphModule, teacher: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> list[str]:
    """The layers that student and teacher have by the same name, call once each, and give maps of one shape.

    Raises `InputError` if there are none.
    """
    called = [str(n.target) for n in student.graph.nodes if n.op == "call_module"]
    theirs = dict(teacher.named_modules())
    names = [name for name in dict.fromkeys(called) if called.count(name) == 1 and name in theirs]
    calls: dict[str, int] = dict.fromkeys(names, 0)

    def counted(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[name] += 1

        return count

    handles = [theirs[name].register_forward_hook(counted(name)) for name in names]
    try:
        with recorded(teacher, names) as wanted:
            teacher(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    with recorded(student, names) as seen:
        student(*args, **kwargs)

    def alike(name: str) -> bool:
        a, b = seen.get(name), wanted.get(name)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or calls[name] != 1:
            return False
        return a.shape == b.shape and a.dim() > 2 and a.is_floating_point()

    found = [name for name in names if alike(name)]
    if not found:
        raise InputError(
            "student and teacher share no layer whose outputs could be compared: name some with features=, or use "
            "distillation='outputs'"
        )
    return found
