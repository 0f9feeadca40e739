"""Counts the ops inside the parts that a tracer did not follow which lmfx would have understood.

    Gate(x): x * sigmoid(mean(x))         one opaque op that hides a mean, a sigmoid and a product
    NormAct(x): leaky_relu(batch_norm(x)) one that hides a norm and an activation

Of two graphs of one network the one that hides fewer of them says more. Convolutions come first, because nothing is
merged without them.
"""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from ..canonical.functional import FUNCTIONS
from ..graph import ops
from ..model.autocast import autocast_on

__all__ = ["HiddenOps"]

_CONVS = ("conv1d", "conv2d", "conv3d", "conv_transpose")
_KNOWN = frozenset(
    {*FUNCTIONS, *ops.JOINS, "subtract", "multiply", "div", "true_divide", "rsub", "linear", "prelu", "mean"}
    | {"batch_norm", "group_norm", "layer_norm", "instance_norm"}
)


class HiddenOps(TorchFunctionMode):
    """Counts the convolutions and the understood ops that run, by whatever call, and notes autocast regions."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = self.known = 0
        self.autocast = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(func, "__name__", "")).strip("_")  # relu_, __rsub__
        self.autocast |= bool(autocast_on())
        self.convs += name.startswith(_CONVS)
        self.known += name in _KNOWN
        return func(*args, **(kwargs or {}))
