"""Makes a graph that is right at some sizes only refuse inputs of other sizes.

    def forward(self, x):                                     # traced at a batch of 1, which a reshape has as a number
        _lmfx_sizes(('x', x, (1, 3, 14, 14), (0,), 'batch'))   # raises SizeError for x of shape (4, 3, 14, 14)
        ...

What an exported program assumes of sizes are conditions (`x.size()[2] % 8 == 0`), which stand there as they are, too.

The check stands in the generated code, so that it goes wherever the graph goes: copies, rewritten and merged networks,
pickles (whose code torch.fx traces again: the new graph gets the check as well). Interpreters and exporters, which run
the example's shapes, do not meet it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import SizeError
from .trace_facts import SizeKind

__all__ = [
    "ConditionError",
    "Limit",
    "LimitedCodeGen",
    "conditions_of",
    "expect_conditions",
    "expect_sizes",
    "hand_on",
    "limits_of",
    "set_conditions",
    "set_limits",
]


class ConditionError(SizeError):
    """Inputs of a size that the exported program excludes; others of the kind are taken."""


@dataclass(frozen=True)
class Limit:
    """The dimensions `dims` of the input `name` (an expression such as `given[0]`) must be those of `shape`."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    kind: SizeKind


class LimitedCodeGen(fx.graph.CodeGen):
    """Generates a forward that raises `SizeError` for inputs at which the graph is not known to be right."""

    limits: tuple[Limit, ...] = ()
    conditions: tuple[str, ...] = ()  # over the inputs, in Python

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """The signature, and the check."""
        text = super().gen_fn_def(free_vars, maybe_return_annotation, **options)
        return text + self.limits_text()

    def limits_text(self) -> str:
        """The lines that check sizes, or nothing."""
        text = ""
        if self.limits:
            rows = ", ".join(f"({v.name!r}, {v.name}, {v.shape!r}, {v.dims!r}, {v.kind!r})" for v in self.limits)
            text += f"\n    _lmfx_sizes({rows})"
        if self.conditions:
            names = dict.fromkeys(n for v in self.conditions for n in _inputs(v))
            rows = ", ".join(f"({v!r}, lambda: {v})" for v in self.conditions)
            text += f"\n    _lmfx_conditions(({''.join(f'{n}, ' for n in names)}), {rows})"
        return text

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What the generated code calls."""
        found: list[tuple[str, Any]] = super().additional_globals()
        found += [("_lmfx_sizes", expect_sizes)] if self.limits else []
        return found + ([("_lmfx_conditions", expect_conditions)] if self.conditions else [])


def limits_of(gm: Any) -> tuple[Limit, ...]:
    """The limits of a graph; none for any other module."""
    codegen = gm.graph._codegen if isinstance(gm, fx.GraphModule) else None
    return codegen.limits if isinstance(codegen, LimitedCodeGen) else ()


def set_limits(gm: fx.GraphModule, limits: Iterable[Limit]) -> None:
    """Give a graph these limits in place of those it has."""
    codegen = gm.graph._codegen
    if not isinstance(codegen, LimitedCodeGen):
        if type(codegen) is not fx.graph.CodeGen:
            return
        codegen = LimitedCodeGen()
        gm.graph.set_codegen(codegen)
    codegen.limits = tuple(limits)
    gm.recompile()


def conditions_of(gm: Any) -> tuple[str, ...]:
    """The conditions of a graph; none for any other module."""
    codegen = gm.graph._codegen if isinstance(gm, fx.GraphModule) else None
    return codegen.conditions if isinstance(codegen, LimitedCodeGen) else ()


def set_conditions(gm: fx.GraphModule, conditions: Iterable[str]) -> None:
    """Give a graph that can have limits these conditions in place of those it has."""
    codegen = gm.graph._codegen
    if isinstance(codegen, LimitedCodeGen) and tuple(conditions) != codegen.conditions:
        codegen.conditions = tuple(conditions)
        gm.recompile()


def hand_on(model: Any, gm: fx.GraphModule) -> None:
    """Give a graph that was traced from `model` the model's own conditions, which are over the same inputs."""
    if conditions := conditions_of(model):
        set_conditions(gm, conditions)


def expect_conditions(inputs: Sequence[Any], *rows: tuple[str, Callable[[], Any]]) -> None:
    """Raises `ConditionError` if a condition does not hold: (its text, what computes it), over `inputs`.

    A condition that has an `and` or a `max` in it can be computed of numbers only, so not of what stands for a tensor.
    """
    if torch.jit.is_tracing():
        return
    proxies = [v for v in inputs if isinstance(v, fx.Proxy)]
    if proxies:
        _pass_on(proxies[0], (), [text for text, _ in rows])
        return
    for text, holds in rows:
        if not holds():
            raise ConditionError(
                f"the program that this graph comes from was exported for inputs with {text}: give such ones, or "
                "export the model for the sizes that you need (dynamic_shapes=)"
            )


def expect_sizes(*rows: tuple[str, Any, tuple[int, ...], tuple[int, ...], SizeKind]) -> None:
    """Raises `SizeError` if a tensor differs from the shape in the dimensions: (name, value, shape, dims, kind)."""
    if torch.jit.is_tracing():  # sizes are no numbers there
        return
    proxies = [value for _, value, *_ in rows if type(value) is not Tensor and isinstance(value, fx.Proxy)]
    if proxies:
        _pass_on(proxies[0], [Limit(name, shape, dims, kind) for name, _, shape, dims, kind in rows])
        return
    for name, value, shape, dims, kind in rows:
        known = isinstance(value, Tensor) and len(value.shape) == len(shape)
        if known and any(value.shape[d] != shape[d] for d in dims):
            raise SizeError(_message(name, tuple(value.shape), shape, dims, kind))


def _message(name: str, seen: Sequence[int], shape: Sequence[int], dims: Sequence[int], kind: SizeKind) -> str:
    if kind == "batch":
        what = f"a batch of {shape[0]}, and {name} has a batch of {seen[0]}"
    else:
        sizes = [" x ".join(str(v[d]) for d in dims) for v in (shape, seen)]
        what = f"images of {sizes[0]}, and {name} has images of {sizes[1]}"
    return (
        f"this graph is right only for {what} (shape {tuple(seen)}, traced with {tuple(shape)}): the trace has that "
        "size as a number. Trace or compress the model with an example of the size that you need"
    )


def _inputs(condition: str) -> list[str]:
    """The inputs that a condition is over."""
    found = ast.walk(ast.parse(condition, mode="eval"))
    return [n.id for n in found if isinstance(n, ast.Name) and n.id not in ("max", "min")]


def _pass_on(proxy: fx.Proxy, limits: Sequence[Limit], conditions: Sequence[str] = ()) -> None:
    """A graph that is being traced from this one's code has the same limits, if it has no face of its own (a pickle).

    `trace` finds them by itself: the model that it is given raises `SizeError` at other sizes.
    """
    graph = proxy.tracer.graph
    placeholders = {str(n.target).lstrip("*") for n in graph.nodes if n.op == "placeholder"}
    names = {re.split(r"\W", v.name)[0] for v in limits} | {n for text in conditions for n in _inputs(text)}
    if type(graph._codegen) in (fx.graph.CodeGen, LimitedCodeGen) and names <= placeholders:
        codegen = LimitedCodeGen()
        codegen.limits = (*getattr(graph._codegen, "limits", ()), *limits)
        codegen.conditions = (*getattr(graph._codegen, "conditions", ()), *conditions)
        graph.set_codegen(codegen)
