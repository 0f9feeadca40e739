"""`Draw` makes decisions, `Scope` writes a program line by line and runs each line at once, so that shapes are known.

A line that does not run (a kernel larger than its input, channels that do not fit) is taken back and the network goes
on without it, so nearly every example is a network that runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tests.fuzz.program import HEADER, Body, Step

__all__ = ["Draw", "Scope"]

T = TypeVar("T")
# Names that models do use and that a compiler might use, too.
TAKEN = tuple(
    [
        "merged",
        "add",
        "relu",
        "conv",
        "pad",
        "mul",
        "cat",
        "graph",
        "code",
        "v1",
        "output",
        "select",
        "merged_pad",
        "getitem",
        "input",
        "weight",
        "block",
        "conv_1",
        "gather",
        "features",
        "bias",
        "add_1",
        "meta",
        "x_1",
    ]
)
MOST_VALUES = 30_000  # of one tensor
MOST_CHANNELS = 24


class Draw:
    """Decisions: the first option is the simplest one, for shrinking."""

    def __init__(self, below: Callable[[int], int]) -> None:
        self.below = below  # uniform in [0, n)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def chance(self, n: int) -> bool:
        """True once in n."""
        return self.below(n) == n - 1

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)


class Names:
    """Numbers of variables, attributes and classes, unique in a program."""

    def __init__(self) -> None:
        self.count = 0
        self.bodies: list[Body] = []
        self.namespace: dict[str, Any] = {}
        exec(HEADER, self.namespace)

    def new(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"


class Scope:
    """One class that is being written."""

    def __init__(self, draw: Draw, names: Names, name: str, values: dict[str, Any]) -> None:
        self.draw, self.names, self.name = draw, names, name
        self.args = tuple(values)
        self.steps: list[Step] = []
        self.live = nn.Module()
        self.live.eval()
        self.env: dict[str, Any] = {**values, "self": self.live}
        self.maps: list[str] = list(values)  # values that are maps, in order, for skips
        self.reusable: list[tuple[str, int, int]] = []  # (attribute, channels, ndim) that may be called again

    def shape(self, value: str) -> tuple[int, ...]:
        return tuple(self.env[value].shape)

    def run(self, line: str, makes: Sequence[str] = ()) -> bool:
        """Append the line if it runs."""
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for make in makes:
                    exec(make, self.names.namespace, self.env)
                self.live.eval()
                exec(line, self.names.namespace, self.env)
        except Exception:  # whatever torch says to a random line
            return False
        self.steps.append(Step(line, tuple(makes)))
        return True

    def let(self, expression: str, *makes: str) -> str | None:
        """Append `v = expression` and return the new variable, or None if it does not run or gets too large."""
        name = self.names.new("v")
        if not self.run(f"{name} = {expression}", makes):
            return None
        if not self.fits(self.env[name]):
            self.steps.pop()
            return None
        return name

    def fits(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return True
        if value.numel() == 0 or value.numel() > MOST_VALUES or not bool(value.isfinite().all()):
            return False
        return value.dim() < 3 or value.shape[1] <= MOST_CHANNELS

    def attribute(self, prefix: str = "m") -> str:
        if self.draw.chance(14):
            name = self.draw.pick(TAKEN)
            if not hasattr(self.live, name) and f"self.{name} " not in " ".join(m for s in self.steps for m in s.makes):
                return "self." + name
        return "self." + self.names.new(prefix)

    def child(self, prefix: str, values: dict[str, Any]) -> Scope:
        return Scope(self.draw, self.names, self.names.new(prefix), values)

    def close(self, result: str) -> Body:
        """The finished class; it becomes a name that later lines can use."""
        body = Body(self.name, self.args, tuple(self.steps), result)
        self.names.bodies.append(body)
        exec(body.source(), self.names.namespace)
        return body
