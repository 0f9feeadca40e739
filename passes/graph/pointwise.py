"""`Pointwise`: a formula of one value as one activation, y = f(x) with the same f for every number of a channel.

    x * tanh(log(1 + exp(x)))        %1 = exp(%0); %2 = part(%1); %3 = log(%2); %4 = tanh(%3); %5 = mul(%0, %4)

`%0` is the input, `%k` the result of step k. A step is (name, arguments, keyword arguments): one of `FUNCTIONS` with
operands and plain constants, or `part i`, a module that works on each number alone (an activation, a `ChannelAffine`).
Such steps are data and no code: they can be compared, copied and written as text.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FUNCTIONS", "NONLINEAR", "PART", "TAKES_KEYWORDS", "Pointwise", "Step", "is_operand"]

Step = tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]]
PART = "part"

_BINARY = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "pow", "gt", "ge", "lt", "le", "eq", "ne")},
    **{"div": operator.truediv, "and_": operator.and_, "or_": operator.or_},
    **{name: getattr(torch, name) for name in ("maximum", "minimum", "where", "logical_and", "logical_or", "rsub")},
}
_UNARY = (
    *("abs", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "square", "reciprocal", "neg"),
    *("sin", "cos", "tan", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh", "erf", "erfc", "sigmoid"),
    *("tanh", "sign", "floor", "ceil", "round", "trunc", "logical_not", "zeros_like", "ones_like", "relu"),
    *("clamp", "clamp_min", "clamp_max", "clip"),
)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_BINARY,
    **{name: getattr(torch, name) for name in _UNARY},
    **{"softplus": nn.functional.softplus, "type_as": Tensor.type_as, "max": torch.maximum, "min": torch.minimum},
    **{"float": Tensor.float, "double": Tensor.double, "masked_fill": torch.masked_fill},
}
"""What may stand in a formula: of operands of one shape it gives that shape, number by number."""

TAKES_KEYWORDS = frozenset({"clamp", "clamp_min", "clamp_max", "clip", "round", "softplus"})
_STRAIGHT = frozenset({"add", "sub", "rsub", "neg", "zeros_like", "ones_like", "float", "double"})
NONLINEAR = frozenset(FUNCTIONS) - _STRAIGHT
"""What makes a formula of one value no affine op of it."""


class Pointwise(nn.Module):
    """y = f(x), number by number; a `ChannelAffine` or `nn.PReLU` in it may differ from channel to channel."""

    def __init__(self, steps: Sequence[Step], parts: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.steps = tuple(steps)
        for i, part in enumerate(parts):
            self.add_module(str(i), part)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]

        def value(argument: Any) -> Any:
            return values[int(argument[1:])] if is_operand(argument) else argument

        for name, args, kwargs in self.steps:
            if name == PART:
                values.append(getattr(self, str(args[0]))(value(args[1])))
            else:
                values.append(FUNCTIONS[name](*map(value, args), **dict(kwargs)))
        return values[-1]

    def extra_repr(self) -> str:
        return "; ".join(f"%{i} = {_text(step)}" for i, step in enumerate(self.steps, 1))


def is_operand(argument: Any) -> bool:
    """Whether an argument of a step is the input or the result of another step."""
    return isinstance(argument, str) and argument.startswith("%")


def _text(step: Step) -> str:
    name, args, kwargs = step
    if name == PART:
        return f"part{args[0]}({args[1]})"
    return f"{name}({', '.join([*map(str, args), *(f'{k}={v}' for k, v in kwargs)])})"
