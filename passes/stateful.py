"""A network that changes while it is run: its outputs depend on what it has seen before, which no graph can say.

    observers and fake quantisation      write the range of what they see into buffers
    a norm that stays in training mode   moves its running statistics, even in eval

Such a network is refused by name. Buffers are compared around the run that tracing needs anyway; where one has changed
(a cache that is filled once does as well) the network runs once more on other values, and only what changes again is
state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import ModelError
from .interface import Example

__all__ = ["run_unchanged"]


def run_unchanged(model: nn.Module, example: Example) -> Any:
    """The output of `model`, a copy of the caller's, on the example. Raises `ModelError` if running changes buffers."""
    before = _buffers(model)
    output = _run(model, example)
    if not _changed(before, _buffers(model)):
        return output
    warm = _buffers(model)
    try:
        _run(model, pytree.tree_map(_other, example))
    except Exception:  # other values may be none that the model takes; its own run was fine
        return output
    changed = _changed(warm, _buffers(model))
    if changed:
        raise ModelError(_message(model, changed))
    return output


def _run(model: nn.Module, example: Example) -> Any:
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)
    with torch.no_grad():
        return model(*args, **kwargs)


def _other(value: Any) -> Any:
    """Other values of the same shape and type, whose range is another."""
    return 3.0 * value.flip(0) + 0.5 if isinstance(value, Tensor) and value.is_floating_point() else value


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [n for n, v in after.items() if n not in before or not _same(before[n], v)]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


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
