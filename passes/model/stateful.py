"""Refuses a network that changes while it is run: its outputs depend on earlier inputs, which no graph can say.

    observers and fake quantisation      write the range of what they see into buffers
    a norm that stays in training mode   moves its running statistics, even in eval
    a counter, a running mean, a memory  in a plain attribute, read by the next call

Such a network is refused by name. What it keeps is compared around the run that tracing needs anyway. Where buffers
have changed (a cache that is filled once does as well) it runs once more on other values, and only what changes again
is state. Plain attributes are often written and never read (the last attention, for who wants to see it), so there the
outputs decide: the network that has run, and a fresh copy, are given the same values. Where numbers go on changing it
runs some more times, and must give the same again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ModelError
from .attributes import changed_attributes, plain_attributes, same_value
from .differences import differs
from .interface import Example, plain_output
from .model_copy import eval_copy
from .randomness import kept_random_state

__all__ = ["run_unchanged"]

REPEATS = 10
TOLERANCE = 1e-5  # the same ops on the same values


def run_unchanged(model: nn.Module, example: Example) -> Any:
    """The output of a copy of `model` on the example. Raises `ModelError` if what it gives depends on earlier runs."""
    copied = eval_copy(model)
    buffers, attributes = _buffers(copied), plain_attributes(copied)
    output = _run(copied, example)
    if _changed(buffers, _buffers(copied)):
        _refuse_buffers(copied, example)
    written = changed_attributes(attributes, plain_attributes(copied))
    if written:
        with kept_random_state():
            _refuse_attributes(model, example, written)
    return output


def _refuse_buffers(model: nn.Module, example: Example) -> None:
    warm, other = _buffers(model), _other(example)
    try:
        _run(model, other)
    except Exception:  # the caller's forward alone: other values may be none that it takes, its own run was fine
        return
    changed = _changed(warm, _buffers(model))
    if changed:
        raise ModelError(_message(model, changed))


def _refuse_attributes(model: nn.Module, example: Example, written: list[str]) -> None:
    used, fresh = eval_copy(model), eval_copy(model)
    try:
        first = _run_seeded(used, example)
        warm = plain_attributes(used)
        outputs = _run_seeded(used, _other(example)), _run_seeded(fresh, _other(example))
    except Exception:  # other values may be none that the model takes
        used = eval_copy(model)
        first, warm = _run_seeded(used, example), plain_attributes(used)
        outputs = first, first
    again = changed_attributes(warm, plain_attributes(used))
    wrong = differs(outputs[1], outputs[0], TOLERANCE)
    # A tensor that is kept is either read by the next run or never; a number may matter later.
    kept = plain_attributes(used)
    counts = [name for name in again if not isinstance(kept[name], Tensor)]
    for _ in range(REPEATS if counts else 1):
        wrong = wrong or differs(first, _run_seeded(used, example), TOLERANCE)
    if wrong:
        shown = ", ".join((again or written)[:3])
        raise ModelError(
            f"{type(model).__name__} changes while it is run, in eval mode too: it writes into {shown}, and what it "
            "gives depends on that. A graph keeps no state: take it as an input and return it, write only where "
            "self.training is set, or pass the part of the network that keeps nothing"
        )


def _run_seeded(model: nn.Module, example: Example) -> Any:
    torch.manual_seed(0)
    return pytree.tree_map(_clone, plain_output(_run(model, example)))


def _run(model: nn.Module, example: Example) -> Any:
    args, kwargs = pytree.tree_map(_clone, example)
    with torch.no_grad():
        return model(*args, **kwargs)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _other(example: Example) -> Example:
    """Other values of the same shape and type, whose range is another."""
    other: Example = pytree.tree_map(_moved, example)
    return other


def _moved(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return 3.0 * (value.flip(0) if value.dim() else value) + 0.5


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [n for n, v in after.items() if n not in before or not same_value(before[n], v)]


def _message(model: nn.Module, changed: list[str]) -> str:
    owners = {name: name.rpartition(".")[0] for name in changed}
    kinds = {owner: type(model.get_submodule(owner)) for owner in owners.values()}
    first = changed[0]
    shown = ", ".join(f"{n} of {kinds[owners[n]].__name__}" for n in changed[:3])
    text = f"{type(model).__name__} changes while it is run, in eval mode too: it writes into {shown}"
    if any("quant" in kind.__module__ for kind in kinds.values()):
        return (
            f"{text}. These are observers of a network that was prepared for quantisation: compress the network before "
            "it is prepared, and prepare the result; or stop them with "
            "model.apply(torch.ao.quantization.disable_observer)"
        )
    if any(isinstance(model.get_submodule(o), nn.modules.batchnorm._NormBase) for o in owners.values()):
        norm = model.get_submodule(owners[first])
        why = "stays in training mode, so eval() does not reach it" if norm.training else "updates its statistics"
        return f"{text}. {owners[first] or 'the norm'} {why}: let eval() set training=False in it"
    return f"{text}. A graph keeps no state: write into buffers only where self.training is set"
