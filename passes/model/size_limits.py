"""Makes a graph that is right at some sizes only refuse inputs of other sizes.

    def forward(self, x):                                     # traced at a batch of 1, which a reshape has as a number
        _lmfx_sizes(('x', x, (1, 3, 14, 14), (0,), 'batch'))   # raises SizeError for x of shape (4, 3, 14, 14)
        ...

The check stands in the generated code, so that it goes wherever the graph goes: copies, rewritten and merged networks,
pickles (whose code torch.fx traces again: the new graph gets the check as well). Interpreters and exporters, which run
the example's shapes, do not meet it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import SizeError
from .trace_facts import SizeKind

__all__ = ["Limit", "LimitedCodeGen", "expect_sizes", "limits_of", "set_limits"]


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

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """The signature, and the check."""
        text = super().gen_fn_def(free_vars, maybe_return_annotation, **options)
        return text + self.limits_text()

    def limits_text(self) -> str:
        """The line that checks sizes, or nothing."""
        if not self.limits:
            return ""
        rows = ", ".join(f"({v.name!r}, {v.name}, {v.shape!r}, {v.dims!r}, {v.kind!r})" for v in self.limits)
        return f"\n    _lmfx_sizes({rows})"

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What the generated code calls."""
        return [*super().additional_globals(), *([("_lmfx_sizes", expect_sizes)] if self.limits else [])]


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


def _pass_on(proxy: fx.Proxy, limits: list[Limit]) -> None:
    """A graph that is being traced from this one's code has the same limits, if it has no face of its own (a pickle).

    `trace` finds them by itself: the model that it is given raises `SizeError` at other sizes.
    """
    graph = proxy.tracer.graph
    placeholders = {str(n.target).lstrip("*") for n in graph.nodes if n.op == "placeholder"}
    names = {re.split(r"\W", v.name)[0] for v in limits}
    if type(graph._codegen) is fx.graph.CodeGen and names <= placeholders:
        codegen = LimitedCodeGen()
        codegen.limits = tuple(limits)
        graph.set_codegen(codegen)
