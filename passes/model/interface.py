"""Gives a graph the signature of its model, and its output the structure of the model's output.

    def forward(self, sample, t, context=None, return_dict=True):     # the model, traced with (sample, 10)
        ...
        return Output(sample=y)

    def forward(self, sample, t, context=None, return_dict=True):     # the graph
        _expect(t=t, context=context, return_dict=return_dict)        # constants of this trace
        ...
        return _restore({"sample": y})

Only tensors (and, where the tracer can follow them, numbers) are values of the graph. Everything else that the example
gave, and every default, is a constant of the trace: the graph takes it as the model does, and refuses another value
instead of computing with the old one. In the graph an output is plain: tuples, lists and dicts of nodes. What a caller
gets is restored to what the model gives: named tuples, dataclasses, subclasses of dict with attribute access, and
everything that `torch.utils._pytree` knows.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import InputError
from .size_limits import LimitedCodeGen

__all__ = [
    "Binding",
    "Example",
    "ModelCodeGen",
    "Structure",
    "bind",
    "plain_face",
    "plain_output",
    "strip",
    "value_output",
]

Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Binding:
    """An example by the names of the forward's parameters, and what the forward takes besides."""

    signature: inspect.Signature
    arguments: dict[str, Any]
    given: dict[str, Any]  # one entry a placeholder
    absent: dict[str, Any]  # parameters that keep their default

    def call(self, function: Callable[..., Any], values: dict[str, Any]) -> Any:
        """`function` with `values` in place of the example's, by the names of `given`."""
        arguments: dict[str, Any] = {}
        for name, value in self.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                arguments[name] = tuple(values[f"{name}_{i}"] for i in range(len(value)))
            elif kind is inspect.Parameter.VAR_KEYWORD:
                arguments[name] = {key: values[key] for key in value}
            else:
                arguments[name] = values[name]
        bound = inspect.BoundArguments(self.signature, arguments)
        return function(*bound.args, **bound.kwargs)


def bind(model: nn.Module, example: Example) -> Binding:
    """The example by parameter names. Raises `InputError` if the model's forward does not take it."""
    args, kwargs = example
    signature = inspect.signature(model.forward)
    try:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise InputError(f"{type(model).__name__}.forward does not take this example: {error}") from error
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            given.update({f"{name}_{i}": v for i, v in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        else:
            given[name] = value
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    absent = {
        name: p.default for name, p in signature.parameters.items() if name not in arguments and p.kind not in variable
    }
    return Binding(signature, arguments, given, absent)


@dataclass(frozen=True)
class Structure:
    """How one container of an output is made again from a plain tuple, list or dict of its parts."""

    make: Callable[[Any], Any] | None
    parts: Any  # a Structure or None for each part, in the plain container

    def restore(self, plain: Any) -> Any:
        """The container with `plain`'s leaves."""
        if isinstance(plain, dict):
            made: Any = {k: _restore(self.parts[k], v) for k, v in plain.items()}
        else:
            made = type(plain)(_restore(s, v) for s, v in zip(self.parts, plain, strict=True))
        return made if self.make is None else self.make(made)


def _restore(structure: Structure | None, plain: Any) -> Any:
    return plain if structure is None else structure.restore(plain)


@dataclass(frozen=True)
class _Make:
    """Makes a `kind` from the plain dict or tuple of its parts."""

    kind: Any
    how: str
    spec: Any = None

    def __call__(self, plain: Any) -> Any:
        if self.how == "fields":  # also of dataclasses whose __init__ asks for something else
            made: Any = self.kind.__new__(self.kind)
            for key, value in plain.items():
                object.__setattr__(made, key, value)
            return made
        if self.how == "keywords":
            return self.kind(**plain)
        if self.how == "mapping":
            made = self.kind()
            made.update(plain)
            return made
        if self.how == "tuple":
            return self.kind(*plain)
        return pytree.tree_unflatten(list(plain), self.spec)


def strip(value: Any) -> tuple[Any, Structure | None]:
    """(the output in plain tuples, lists and dicts, how to restore it; None if it is plain already)."""
    kind = type(value)
    if kind in (tuple, list):
        return _strip_parts(kind, list(value), None)
    if isinstance(value, dict):
        items = {k: strip(v) for k, v in value.items()}
        make = None
        if kind is not dict:
            how = "keywords" if dataclasses.is_dataclass(kind) else "mapping"
            make = _Make(kind, how)
        return _joined({k: p for k, (p, _) in items.items()}, {k: s for k, (_, s) in items.items()}, make)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _strip_parts(tuple, list(value), _Make(kind, "tuple"))
    if isinstance(value, (Tensor, fx.Proxy)) or value is None:
        return value, None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: strip(getattr(value, f.name)) for f in dataclasses.fields(value)}
        plain = {k: p for k, (p, _) in parts.items()}
        return _joined(plain, {k: s for k, (_, s) in parts.items()}, _Make(kind, "fields"))
    children, spec = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    if spec.is_leaf():
        return value, None
    return _strip_parts(list, children, _Make(kind, "pytree", spec))


def _strip_parts(kind: type, values: list[Any], make: _Make | None) -> tuple[Any, Structure | None]:
    parts = [strip(v) for v in values]
    return _joined(kind(p for p, _ in parts), [s for _, s in parts], make)


def _joined(plain: Any, parts: Any, make: _Make | None) -> tuple[Any, Structure | None]:
    below = parts.values() if isinstance(parts, dict) else parts
    if make is None and all(s is None for s in below):
        return plain, None
    return plain, Structure(make, parts)


def plain_output(value: Any) -> Any:
    """An output in plain tuples, lists and dicts, so that its tensors can be told without knowing its classes."""
    return strip(value)[0]


def plain_face(net: nn.Module) -> nn.Module:
    """`net`, or for a traced graph whose output is of a class that torch does not know, one that gives plain output.

    Exporters refuse a dataclass that nobody registered with `torch.utils._pytree`. Modules and tensors are shared.
    """
    codegen = net.graph._codegen if isinstance(net, fx.GraphModule) else None
    if not isinstance(codegen, ModelCodeGen) or not _has_fields(codegen.structure):
        return net
    graph: Any = copy.deepcopy(net.graph)
    graph._codegen.structure = None
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (value_output(output.args[0]),)
    return fx.GraphModule(net, graph, type(net).__name__).train(net.training)


def value_output(plain: Any) -> Any:
    """A plain output without strings and other things that are no values, which exporters do not take."""
    if isinstance(plain, dict):
        return {k: value_output(v) for k, v in plain.items() if isinstance(v, (fx.Node, dict, tuple, list))}
    if isinstance(plain, (tuple, list)):
        return type(plain)(value_output(v) for v in plain if isinstance(v, (fx.Node, dict, tuple, list)))
    return plain


def _has_fields(structure: Structure | None) -> bool:
    if structure is None:
        return False
    parts = structure.parts.values() if isinstance(structure.parts, dict) else structure.parts
    made = isinstance(structure.make, _Make) and structure.make.how == "fields"
    return made or any(_has_fields(part) for part in parts)


@dataclass(eq=False)
class _Expect:
    """Raises `InputError` if an argument is not what the graph was traced with."""

    constants: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **seen: Any) -> None:
        for name, value in seen.items():
            expected = self.constants[name]
            traced = isinstance(value, fx.Proxy)  # torch.fx traces the forward of a graph that was pickled
            if value is not expected and not traced and not _equal(value, expected):
                raise InputError(
                    f"the graph was traced with {name}={expected!r} and computes nothing else, not {name}={value!r}: "
                    "trace the model with this value"
                )

    def __getitem__(self, name: str) -> Any:
        return self.constants[name]


def expect_written(**pairs: tuple[Any, Any]) -> None:
    """The same for constants that stand in the generated code, by name: (the argument, what it must be)."""
    _Expect({n: expected for n, (_, expected) in pairs.items()})(**{n: seen for n, (seen, _) in pairs.items()})


def _is_written(value: Any) -> bool:
    """Whether a constant can stand in code as it prints itself."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or type(value) in (bool, int, str)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


class ModelCodeGen(LimitedCodeGen):
    """Generates a forward that takes what the model's takes and gives what it gives.

    `fixed` are given arguments that are constants of the trace, `absent` parameters that kept their default.
    """

    def __init__(self, binding: Binding, fixed: dict[str, Any], structure: Structure | None) -> None:
        super().__init__()
        self.expect = _Expect({**fixed, **binding.absent})
        self.structure = structure
        kinds = {n: p.kind for n, p in binding.signature.parameters.items()}
        names = list(kinds)
        ordered = [n for n in names if n in binding.given or n in binding.absent]
        # Parameters with a default can stand after the others by position; elsewhere they need their keyword.
        tail = ordered[max((ordered.index(n) + 1 for n in binding.given if n in ordered), default=0) :]
        by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
        variable = any(n not in kinds for n in binding.given)
        self.after = [] if variable else [n for n in tail if kinds[n] is by_position]
        self.keywords = [n for n in binding.absent if n not in self.after]
        self.checked = [*fixed, *binding.absent]
        self.written = all(_is_written(self.expect[n]) for n in self.checked)

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """The signature, and a check of all that is constant."""
        written = self.written
        default = lambda n: f"{n}={self.expect[n]!r}" if written else f"{n}=_lmfx_expect[{n!r}]"  # noqa: E731
        names = [*free_vars, *(default(n) for n in self.after)]
        if self.keywords:
            names += ["*", *(default(n) for n in self.keywords)]
        text = super().gen_fn_def(names, maybe_return_annotation, **options)
        if self.checked:
            pairs = [f"{n}=({n}, {self.expect[n]!r})" if written else f"{n}={n}" for n in self.checked]
            text += f"\n    _lmfx_expect({', '.join(pairs)})"
        return text

    def generate_output(self, output_args: Any, **options: Any) -> str:
        """`return _lmfx_restore(...)` around the plain output."""
        text = super().generate_output(output_args, **options)
        if self.structure is None:
            return text
        return f"return _lmfx_restore({text.removeprefix('return ')})"

    def process_outputs(self, outputs: Any) -> Any:
        """The plain output in the model's own structure."""
        return _restore(self.structure, outputs)

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What the generated code calls; what can be imported can be pickled with the graph."""
        expect: Any = expect_written if self.written else self.expect
        found = super().additional_globals() + ([("_lmfx_expect", expect)] if self.checked else [])
        return found if self.structure is None else [*found, ("_lmfx_restore", self.process_outputs)]
