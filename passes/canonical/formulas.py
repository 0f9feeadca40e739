"""Groups a formula of one value, written as several ops, to one activation.

    %s = call_module[sigmoid](%x)            %y = call_module[silu](%x)         nn.SiLU: it computes what that computes
    %y = mul(%x, %s)                  ->

    %e = exp(%x)                             %y = call_module[mul](%x)          Pointwise, a formula without a name
    %n = neg(%e)
    %g = exp(%n)
    %y = mul(%x, %g)

From an op on, its operands are taken in, the latest first, as long as they work number by number and nothing else reads
them, until one value is left: the one that the formula is of. An op of one value (a power, a root) is a formula by
itself, and takes in the activation before it, and numbers between them. Sums of a value with multiples of itself are
affine and no formula.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ..graph import ops
from ..graph.graph_edit import place
from ..graph.node_facts import is_floating, same_kind, shape_of
from ..graph.pointwise import FUNCTIONS, NONLINEAR, PART, TAKES_KEYWORDS, Pointwise, Step, is_operand
from ..graph.raw_nodes import op_name
from ..model.model_copy import shared_copy

__all__ = ["group_formulas"]

_NAMED: tuple[type[nn.Module], ...] = (
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.GELU, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softplus),
    *(nn.Softsign, nn.ELU, nn.Tanhshrink, nn.LogSigmoid),
)
_PLAIN = (int, float, bool, type(None))


def group_formulas(gm: fx.GraphModule) -> int:
    """Make each formula of one value in the graph of `gm` one module; returns how many there were."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    changed = 0
    for node in list(gm.graph.nodes):
        found = _formula(gm, node, order)
        if found is None:
            continue
        value, members = found
        whole = _module(gm, value, sorted(members, key=order.__getitem__))
        known = _known(whole)
        made = place(gm, node, known or whole, type(known).__name__.lower() if known else _name(gm, node), value)
        order[made] = order[node]
        for member in sorted(members - {node}, key=order.__getitem__, reverse=True):
            gm.graph.erase_node(member)
        changed += 1
    return changed


def _name(gm: fx.GraphModule, node: fx.Node) -> str:
    return op_name(node).strip("_") if node.op != "call_module" else type(gm.get_submodule(str(node.target))).__name__


def _formula(gm: fx.GraphModule, node: fx.Node, order: dict[fx.Node, int]) -> tuple[fx.Node, set[fx.Node]] | None:
    """The value that `node` is a formula of, and the nodes of the formula; None if it is none."""
    shape = shape_of(node)
    if shape is None or len(shape) < 2 or not is_floating(node) or not _is_number_by_number(gm, node, shape):
        return None
    if node.op == "call_module" and not _follows_formula(gm, node):
        return None
    members, open_ = {node}, set(node.all_input_nodes)
    while len(open_) > 1:
        latest = max(open_, key=order.__getitem__)
        if not members.issuperset(latest.users) or not _is_number_by_number(gm, latest, shape):
            return None
        open_ = (open_ - {latest}) | set(latest.all_input_nodes)
        members.add(latest)
    (value,) = open_
    if not same_kind(value, node):
        return None
    if not any(_bends(gm, member) for member in members):
        return None
    before = _before(gm, value, members)
    return (value, members) if before is None else (before.all_input_nodes[0], members | _between(before, value))


def _is_number_by_number(gm: fx.GraphModule, node: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether an op gives each number of its result from the numbers at the same place of values of this shape."""
    values = node.all_input_nodes
    if not values or any(shape_of(v) != shape for v in (node, *values)) or any(v.op == "get_attr" for v in values):
        return False
    if node.op == "call_module":
        return _is_activation(gm, node) or _is_affine(gm, node)
    name = op_name(node)
    if node.op not in ("call_function", "call_method") or name not in FUNCTIONS:
        return False
    constants = [a for a in node.args if not isinstance(a, fx.Node)]
    if name in ("max", "min") and (constants or len(node.args) != 2):
        return False  # the largest of all
    if node.kwargs and not (name in TAKES_KEYWORDS and all(type(v) in _PLAIN for v in node.kwargs.values())):
        return False  # alpha, a rounding mode, a dtype
    return all(type(v) in _PLAIN for v in constants)


def _is_activation(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = gm.get_submodule(str(node.target))
    return ops.plain_in(module, ops.ACTIVATIONS) and len(node.args) == 1 and not node.kwargs


def _is_affine(gm: fx.GraphModule, node: fx.Node) -> bool:
    return type(gm.get_submodule(str(node.target))) is ops.ChannelAffine


def _follows_formula(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an activation reads a formula, or a multiple of one, that nothing else reads."""
    if not _is_activation(gm, node):
        return False
    before = _before(gm, node.all_input_nodes[0], {node})
    return before is not None and isinstance(gm.get_submodule(str(before.target)), Pointwise)


def _before(gm: fx.GraphModule, value: fx.Node, members: set[fx.Node]) -> fx.Node | None:
    """The activation that a value is, or is a multiple of, if nothing but the formula reads it."""
    readers = members
    while value.op == "call_module" and readers.issuperset(value.users):
        if _is_activation(gm, value):
            return value
        if not _is_affine(gm, value):
            return None
        value, readers = value.all_input_nodes[0], {value}
    return None


def _between(first: fx.Node, last: fx.Node) -> set[fx.Node]:
    """The nodes of a chain from `first` to `last`."""
    found = {first}
    while last is not first:
        found.add(last)
        last = last.all_input_nodes[0]
    return found


def _bends(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _is_activation(gm, node)
    name, values = op_name(node), [isinstance(a, fx.Node) for a in node.args]
    return name in NONLINEAR and (name != "mul" or all(values)) and (name != "div" or values[-1])


def _module(gm: fx.GraphModule, value: fx.Node, members: list[fx.Node]) -> Pointwise:
    """The formula of the members, in order, as one module."""
    steps: list[Step] = []
    parts: list[nn.Module] = []
    names = {value: "%0"}
    for node in members:
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            source = names[node.all_input_nodes[0]]
            if isinstance(module, Pointwise):
                _inline(module, source, steps, parts)
            else:
                steps.append((PART, (len(parts), source), ()))
                parts.append(shared_copy(module))  # the formula may get its place inside the module
        else:
            args = tuple(names[a] if isinstance(a, fx.Node) else a for a in node.args)
            steps.append((op_name(node), args, tuple(sorted(node.kwargs.items()))))
        names[node] = f"%{len(steps)}"
    return Pointwise(steps, parts).train(False)


def _inline(formula: Pointwise, source: str, steps: list[Step], parts: list[nn.Module]) -> None:
    """Append the steps of a formula of `source`."""
    shift, held = len(steps), len(parts)

    def moved(argument: Any) -> Any:
        if not is_operand(argument):
            return argument
        return source if argument == "%0" else f"%{int(argument[1:]) + shift}"

    for name, args, kwargs in formula.steps:
        given = (args[0] + held, moved(args[1])) if name == PART else tuple(moved(a) for a in args)
        steps.append((name, given, kwargs))
    parts.extend(formula.children())


def _known(formula: Pointwise) -> nn.Module | None:
    """The activation of torch that computes the same, told by its values; None if there is none."""
    if any(p.requires_grad or p.numel() > 1 for p in formula.parameters()):
        return None
    eps = max([1e-14, *(torch.finfo(p.dtype).eps for p in formula.parameters())])
    x = torch.linspace(-24, 24, 961, dtype=torch.float64)[None, None]
    with torch.no_grad():
        y = copy.deepcopy(formula).to("cpu", torch.float64)(x)
        return next((m for m in _named() if torch.allclose(m(x), y, rtol=10 * eps, atol=10 * eps)), None)


def _named() -> Iterator[nn.Module]:
    yield from (kind() for kind in _NAMED)
    yield nn.GELU("tanh")
