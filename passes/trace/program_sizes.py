"""Reads off an exported program which sizes it takes: those that it has as numbers, and what it assumes of the others.

    x: f64[2, 3, s0, 16 * s1]                     x has a batch of 2 (`size_limits.Limit`)
    s0 from Dim(min=4, max=64)           ->       x.size()[2] >= 4, x.size()[2] <= 64
    16 * s1                              ->       x.size()[3] % 16 == 0
    L['x'].size()[2] % 8 == 0            ->       x.size()[2] % 8 == 0        a guard: text, from a file perhaps

Conditions become code of the module. So of a guard's text only arithmetic with sizes is taken; where there is more in
it, nobody knows what it excludes, and only the sizes of the example are known to be right.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..model.interface import Binding
from ..model.size_limits import Limit

__all__ = ["LEAST", "sizes_of_program"]

LEAST = 2  # torch.export takes sizes of 0 and 1 for numbers, and says that others start from here


def sizes_of_program(program: torch.export.ExportedProgram, binding: Binding) -> tuple[list[Limit], list[str]]:
    """The sizes that the program has as numbers, and what it assumes of the others, over the inputs by their names."""
    wanted = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in wanted]
    inputs = [(_expression(path), value) for path, value in pytree.tree_flatten_with_path(binding.given)[0]]
    limits: list[Limit] = []
    conditions: list[str] = []
    first: dict[Any, str] = {}
    for (name, _), value in zip(inputs, values, strict=True):
        if isinstance(value, Tensor):
            limits += _numbers(name, value)
            conditions += _assumed(name, value, program.range_constraints, first)
    names = [name for name, _ in inputs]
    for text in getattr(program, "_guards_code", ()) or ():
        said = _condition(str(text), names, set(binding.given))
        if said is None:
            return _of_example(inputs), list(dict.fromkeys(conditions))
        conditions.append(said)
    return limits, list(dict.fromkeys(conditions))


def _expression(path: Any) -> str:
    """An input, or an entry of one, in Python."""
    return f"{path[0].key}{pytree.keystr(path[1:])}"


def _numbers(name: str, value: Tensor) -> list[Limit]:
    """The dimensions of an input that are numbers."""
    known = [d for d, n in enumerate(value.shape) if isinstance(n, int)]
    shape = tuple(n if isinstance(n, int) else 0 for n in value.shape)
    found = [Limit(name, shape, (0,), "batch")] if 0 in known else []
    rest = tuple(d for d in known if d)
    if rest and (len(rest) > 1 or value.dim() < 3):  # one alone is the channels, which the first layer looks at
        found.append(Limit(name, shape, rest, "size"))
    return found


def _assumed(name: str, value: Tensor, ranges: Any, first: dict[Any, str]) -> list[str]:
    """Ranges, steps and equal sizes of the free dimensions of an input; `first` has those of the inputs before it."""
    found: list[str] = []
    for d, n in enumerate(value.shape):
        if isinstance(n, int):
            continue
        size, expression = f"{name}.size()[{d}]", n.node.expr
        if expression in first:
            found.append(f"{size} == {first[expression]}")
            continue
        first[expression] = size
        if (known := ranges.get(expression)) is not None:
            found += [f"{size} >= {known.lower}"] if known.lower > LEAST else []
            found += [f"{size} <= {known.upper}"] if known.upper.is_number and known.upper < 2**40 else []
        elif (step := _multiple(expression)) > 1:
            found.append(f"{size} % {step} == 0")
    return found


def _multiple(expression: Any) -> int:
    """The whole number that a size is a multiple of: 8 for `8 * s`."""
    factor, _ = expression.as_coeff_Mul()
    return int(factor) if factor.is_Integer else 1


def _of_example(inputs: list[tuple[str, Any]]) -> list[Limit]:
    """Every size of the example as a number."""
    sizes = [(name, tuple(v.shape)) for name, v in inputs if isinstance(v, Tensor) and v.dim()]
    found = [Limit(name, shape, (0,), "batch") for name, shape in sizes]
    return found + [Limit(name, shape, tuple(range(1, len(shape))), "size") for name, shape in sizes if shape[1:]]


# --- guards -----------------------------------------------------------------------------------------------------------

_PLAIN: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Load),
    *(ast.cmpop, ast.boolop, ast.unaryop, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Div, ast.Pow),
)
_POWER = 4  # more than any size is raised to; a power of powers from a file could be computed for ever


def _condition(text: str, flat: list[str], names: set[str]) -> str | None:
    """A guard as a condition over the inputs by their names; None for what is more than arithmetic with sizes.

    `(L['x'].size()[2] % 8) == 0` is `x.size()[2] % 8 == 0`; a strict export may call inputs `L['flat_args'][0]`.
    """
    try:
        tree = _Named(flat, names).visit(ast.parse(text, mode="eval"))
        return ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError, _NotPlain):  # all that the parser says of a text
        return None


class _NotPlain(Exception):
    """A guard that asks for something else than sizes."""


class _Named(ast.NodeTransformer):
    """`L['x']` becomes `x`; anything but `x.size()[2]`, numbers and arithmetic raises `_NotPlain`."""

    def __init__(self, flat: list[str], names: set[str]) -> None:
        self.flat, self.names = flat, names

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Subscript):
            return self._subscript(node)
        if isinstance(node, ast.Call):
            return self._larger(node)
        if not isinstance(node, _PLAIN):
            raise _NotPlain
        if isinstance(node, ast.Constant) and not isinstance(node.value, int):
            raise _NotPlain
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _small(node):
            raise _NotPlain
        return self.generic_visit(node)

    def _larger(self, node: ast.Call) -> ast.AST:
        """`torch.sym_max(a, b)` is `max(a, b)`, as torch writes it before 2.14, and `sym_min` is `min`."""
        name = {"torch.sym_max": "max", "torch.sym_min": "min"}.get(called := ast.unparse(node.func), called)
        if name not in ("max", "min") or name in self.names or len(node.args) != 2 or node.keywords:
            raise _NotPlain
        return ast.Call(ast.Name(name, ast.Load()), [self.visit(v) for v in node.args], [])

    def _subscript(self, node: ast.Subscript) -> ast.AST:
        call = node.value
        index = node.slice
        if not (isinstance(call, ast.Call) and not call.args and not call.keywords and isinstance(index, ast.Constant)):
            raise _NotPlain
        function = call.func
        if not (isinstance(function, ast.Attribute) and function.attr == "size" and type(index.value) is int):
            raise _NotPlain
        function.value = self._input(function.value)
        return node

    def _input(self, node: ast.AST) -> Any:
        """An input, or an entry of one."""
        if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Constant):
            raise _NotPlain
        if isinstance(node.value, ast.Name) and node.value.id == "L" and node.slice.value in self.names:
            return ast.Name(str(node.slice.value), ast.Load())
        if isinstance(node.value, ast.Subscript) and ast.unparse(node.value) == "L['flat_args']":
            place = node.slice.value
            if type(place) is not int or not 0 <= place < len(self.flat):
                raise _NotPlain
            return ast.parse(self.flat[place], mode="eval").body
        node.value = self._input(node.value)
        return node


def _small(node: ast.BinOp) -> bool:
    """Whether a power is a small one, of something without powers."""
    exponent = node.right.value if isinstance(node.right, ast.Constant) else None
    inside = any(isinstance(n, ast.Pow) for n in ast.walk(node.left))
    return type(exponent) is int and 0 <= exponent <= _POWER and not inside
