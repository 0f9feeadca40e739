"""A random network as a program: classes with one statement a line, so that it can be printed, cut down and replayed.

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.m1 = nn.Conv2d(3, 4, 3)        made by the step that uses it
    def forward(self, x):
        v1 = self.m1(x)                     one step
        return v1
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Body", "Program", "Step", "laid_out", "randomise"]

HEADER = "from tests.fuzz.prelude import *\n"


@dataclass(frozen=True)
class Step:
    """One line of a forward, and the lines of `__init__` that it needs."""

    line: str
    makes: tuple[str, ...] = ()

    @property
    def out(self) -> str | None:
        """The variable that the line assigns."""
        name, equals, _ = self.line.partition(" = ")
        return name if equals and name.isidentifier() else None


@dataclass(frozen=True)
class Body:
    """One class: its parameters, its steps and what it returns."""

    name: str
    args: tuple[str, ...]
    steps: tuple[Step, ...]
    result: str

    def source(self) -> str:
        text = "\n".join([*(s.line for s in self.steps), self.result])
        made = dict.fromkeys(m for s in self.steps for m in s.makes if used(m, text))
        lines = [f"class {self.name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {m}" for m in made]
        lines += [f"    def forward(self, {', '.join(self.args)}):"]
        lines += [f"        {s.line}" for s in self.steps]
        return "\n".join([*lines, f"        return {self.result}", ""])


def used(make: str, text: str) -> bool:
    """Whether the attribute that a line of `__init__` sets is read."""
    name = make.split(" = ")[0] if " = " in make else make
    name = name.split("(")[1].split(",")[0].strip("'\"") if "register_buffer" in make else name.removeprefix("self.")
    name = name.split(".")[0]
    at = text.find(f"self.{name}")
    while at >= 0:
        after = text[at + len(name) + 5 : at + len(name) + 6]
        if not (after.isalnum() or after == "_"):
            return True
        at = text.find(f"self.{name}", at + 1)
    return False


@dataclass(frozen=True)
class Program:
    """A network and its inputs: `inputs` are shapes by the name of the argument, `other` a second set of sizes."""

    bodies: tuple[Body, ...]
    inputs: dict[str, tuple[int, ...]]
    other: dict[str, tuple[int, ...]]
    seed: int = 0
    keywords: bool = False  # the example is a dict
    constants: dict[str, Any] = field(default_factory=dict)  # what the example gives besides tensors
    form: str = "plain"  # of the example: "plain", "channels last", or "list" or "dict" in one argument
    text: str = field(default="", compare=False)  # of a record, where the bodies are not known

    @property
    def source(self) -> str:
        return self.text or "\n\n".join(b.source() for b in self.bodies)

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A new model in eval mode with norms that are not the identity; equal for equal programs."""
        names: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(HEADER + self.source, names)
            torch.manual_seed(self.seed)
            model: nn.Module = names["Net"]()
        return randomise(model).to(dtype).eval()

    def example(self, dtype: torch.dtype = torch.float64, other: bool = False) -> Any:
        """The example input: a tensor, a tuple or a dict."""
        generator = torch.Generator().manual_seed(self.seed + 1 + other)
        shapes = self.other if other else self.inputs
        values = {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in shapes.items()}
        if self.form == "channels last":
            values = {k: laid_out(v) for k, v in values.items()}
        if self.form == "list":
            return (list(values.values()),)
        if self.form == "dict":
            return (values,)
        given = {**values, **self.constants}
        if self.keywords:
            return given
        return tuple(given.values()) if len(given) > 1 else next(iter(given.values()))

    def dumps(self, **more: Any) -> str:
        """One line of JSON that `loads` reads."""
        return json.dumps(
            {
                **more,
                "inputs": self.inputs,
                "other": self.other,
                "seed": self.seed,
                "keywords": self.keywords,
                "constants": self.constants,
                "form": self.form,
                "source": self.source,
            }
        )

    @staticmethod
    def loads(text: str) -> Program:
        """The program of a record."""
        found = json.loads(text)
        inputs, other = ({k: tuple(v) for k, v in found[name].items()} for name in ("inputs", "other"))
        more = {name: found[name] for name in ("seed", "keywords", "constants", "form")}
        return Program((), inputs, other, **more, text=found["source"])


def laid_out(value: Tensor) -> Tensor:
    """The same values with the channels last in memory, where there is such a layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return value.to(memory_format=formats[value.dim()]) if value.dim() in formats else value


def randomise(model: nn.Module) -> nn.Module:
    """Norms with statistics and weights of a trained network's size, in place."""
    for module in model.modules():
        for name, low, high in (
            ("running_mean", -0.5, 0.5),
            ("running_var", 0.5, 2.0),
            ("weight", 0.5, 1.5),
            ("bias", -0.5, 0.5),
        ):
            tensor = getattr(module, name, None) if "Norm" in type(module).__name__ else None
            if isinstance(tensor, Tensor):
                tensor.data.uniform_(low, high)
    return model
