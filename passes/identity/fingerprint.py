"""Describes a traced graph as lines of text, and hashes them: the keys of plans, saved networks and stored rows.

    fingerprint   names, ops, constants, attributes,          of a plan or a saved folder: other weights may come
                  shapes of weights
    Identity      the same without names, with the code of    of a stored row: only the very same may come
                  foreign parts, shapes of inputs, dtypes
                  or values of weights

    h = pow(relu, 3)                        one line an op; operands by name, or by number where names do not matter
    b = b: Conv2d(in_channels=8, ...)(h)

Whatever may change a value is in the lines: constants of functions and methods, attributes, hooks and buffers of
modules, what the example gave besides tensors. Names of variables, modules against functions against methods, and
in-place against pure forms are gone in a canonical graph, so the same network in another spelling has one identity.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..graph.node_facts import dtype_of, known_value, shape_of
from ..graph.raw_nodes import op_name
from ..model.trace_facts import noted
from .code_text import library_name
from .content import Describer, Weights, digest_of, is_foreign, shortened

__all__ = [
    "Identity",
    "Origin",
    "changes_while_it_runs",
    "difference",
    "fingerprint",
    "graph_lines",
    "identify",
    "is_of",
    "node_text",
    "states_of",
]

PREFIX = "2-"  # of a fingerprint; those of older lmfx have none, and say nothing of constants


@dataclass(frozen=True)
class Identity:
    """A hash of all that a graph is, and what of it could not be told apart for sure: if there is any, nothing that was
    found or made for this graph may be served for another that only looks like it."""

    digest: str
    unsure: tuple[str, ...] = ()

    @property
    def certain(self) -> bool:
        return not self.unsure


def identify(gm: fx.GraphModule, weights: Weights = "types") -> Identity:
    """What a graph and its inputs' shapes are, whatever its parts are called; with "values" its weights, too."""
    describer = Describer(weights, code=True, volatile=_volatile(gm))
    lines = [*_inputs(gm, describer, True), *_lines(gm, describer, False)]
    return Identity(digest_of([f"{PREFIX}{weights}", *lines]), tuple(dict.fromkeys(describer.unsure)))


def fingerprint(gm: fx.GraphModule) -> str:
    """A short digest of the graph's structure, with names and constants, but without weights and inputs' sizes."""
    return PREFIX + digest_of(graph_lines(gm))


def graph_lines(gm: fx.GraphModule) -> list[str]:
    """The lines of which `fingerprint` is the digest, long ones shortened to a beginning and a hash."""
    describer = Describer("shapes", volatile=_volatile(gm))
    return [shortened(line) for line in (*_inputs(gm, describer, False), *_lines(gm, describer, True))]


@dataclass(frozen=True)
class Origin:
    """What a saved network was made of: the lines of its graph, and a digest of the code of foreign parts, which is
    comparable where the version of Python is equal."""

    lines: tuple[str, ...]
    python: str
    code: str

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Origin:
        """That of a traced graph."""
        describer = Describer("shapes", code=True, versions=False, volatile=_volatile(gm))
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return cls(tuple(graph_lines(gm)), python, digest_of(_lines(gm, describer, True)))

    def differs(self, gm: fx.GraphModule) -> str:
        """How a graph differs from it, for a person; empty if it does not."""
        here = Origin.of(gm)
        if here.lines != self.lines:
            return difference(self.lines, here.lines)
        if here.python == self.python and here.code != self.code:
            return "the code of its own modules or functions is another one"
        return ""


def is_of(wanted: str, gm: fx.GraphModule) -> bool:
    """Whether a fingerprint is that of this graph. Warns for one of an older lmfx, which does not see constants."""
    if wanted.startswith(PREFIX):
        return wanted == fingerprint(gm)
    if wanted != _old_fingerprint(gm):
        return False
    warnings.warn(
        "the plan was made by an older lmfx, which did not note constants: whether it is of just this model cannot be "
        "told, so check its outputs, and save it again",
        stacklevel=3,
    )
    return True


def difference(saved: Sequence[str], here: Sequence[str]) -> str:
    """The first line in which two graphs differ, for a person."""
    for one, two in zip(saved, here, strict=False):
        if one != two:
            return f"where the saved one has {_around(one, two)}, this one has {_around(two, one)}"
    if len(saved) != len(here):
        longer, which = (saved, "the saved one") if len(saved) > len(here) else (here, "this one")
        return f"only {which} has {shortened(longer[min(len(saved), len(here))], 100)!r}"
    return "no op differs"


def _around(text: str, other: str, length: int = 100) -> str:
    """The part of a text in which it differs from another."""
    first = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
    start = max(0, first - length // 2) if len(text) > length else 0
    return repr(f"{'...' if start else ''}{text[start : start + length]}{'...' if start + length < len(text) else ''}")


# --- lines ------------------------------------------------------------------------------------------------------------


def _volatile(gm: fx.GraphModule) -> tuple[str, ...]:
    return noted(gm).volatile


def _lines(gm: fx.GraphModule, describer: Describer, names: bool) -> list[str]:
    """One line a node. Without names operands are numbers, and only the order of the graph says what is what."""
    refs: dict[fx.Node, str] = {}
    lines = []
    for node in gm.graph.nodes:
        refs[node] = node.name if names else f"%{len(refs)}"
        text = node_text(gm, node, describer, refs.__getitem__, names)
        lines.append(f"{refs[node]} = {text}")
    return lines


def node_text(
    gm: fx.GraphModule,
    node: fx.Node,
    describer: Describer,
    ref: Callable[[fx.Node], str],
    names: bool = False,
    module: Callable[[str], str] | None = None,
) -> str:
    """What one node is. `ref` names its operands; `module` gives the text of a module by its target."""

    def argument(value: Any) -> str:
        if isinstance(value, fx.Node):
            return ref(value)
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return f"({', '.join(argument(v) for v in value)})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {argument(v)}" for k, v in sorted(value.items(), key=str)) + "}"
        if isinstance(value, slice):
            return f"slice({argument((value.start, value.stop, value.step))})"
        return describer.value(value, node.name)

    target, arguments = str(node.target), [argument(a) for a in node.args]
    arguments += [f"{k}={argument(v)}" for k, v in sorted(node.kwargs.items())]
    called = f"({', '.join(arguments)})"
    if node.op == "placeholder":
        return f"input{called}"
    if node.op == "output":
        return f"output{called}"
    label = f"{target}: " if names else ""
    if node.op == "call_module":
        text = describer.module(gm.get_submodule(target), target) if module is None else module(target)
        return f"{label}{text}{called}"
    if node.op == "get_attr":
        return label + _tensor(gm, target, describer)
    return f"{_function(node, describer)}{called}"


def _function(node: fx.Node, describer: Describer) -> str:
    """The plain name of an op of torch, whatever form calls it; what a function of others is."""
    if node.op == "call_method":
        return op_name(node)
    known = library_name(node.target)
    if known is None or not known.startswith("torch.") or "::" in known:
        return describer.value(node.target, node.name)
    last = known.rpartition(".")[2]
    plain = op_name(node)
    return last if plain == "fn" else plain


def _tensor(gm: fx.GraphModule, target: str, describer: Describer) -> str:
    """A tensor that the graph reads by its name: a weight, or one that no state dict has, and so part of the code."""
    path, _, name = target.rpartition(".")
    owner: Any = gm
    for part in path.split(".") if path else ():
        owner = getattr(owner, part)
    value = getattr(owner, name)
    if isinstance(value, Tensor) and isinstance(owner, nn.Module):
        held = name in owner._parameters or (name in owner._buffers and name not in owner._non_persistent_buffers_set)
        return (
            f"weight {describer.weight(value, target)}"
            if held
            else f"constant {describer.attribute(value, path, name)}"
        )
    return f"constant {describer.value(value, target)}"


def _inputs(gm: fx.GraphModule, describer: Describer, shapes: bool) -> list[str]:
    """What the example gave: constants, and of tensors their shape and dtype if `shapes`."""

    def text(spec: Any) -> str:
        if isinstance(spec, dict) and set(spec) == {"shape", "dtype"}:
            return f"{spec['dtype']}{spec['shape']}" if shapes else "tensor"
        if isinstance(spec, dict):
            return "{" + ", ".join(f"{k}: {text(v)}" for k, v in spec.items()) + "}"
        if isinstance(spec, (tuple, list)):
            return f"({', '.join(text(v) for v in spec)})"
        return describer.value(spec, "the example")

    inputs = noted(gm).inputs
    lines = [f"example {text(inputs[name])}" for name in ("positional", "keyword") if inputs[name]]
    if shapes:
        lines += [f"{shape_of(n)} {dtype_of(n)}" for n in gm.graph.nodes if n.op == "placeholder" and known_value(n)]
    return lines


# --- what changes while it runs ---------------------------------------------------------------------------------------


def states_of(gm: fx.GraphModule) -> dict[str, str]:
    """Path -> content of every attribute and unsaved buffer of foreign modules, which only running them may change."""
    found: dict[str, str] = {}
    for target in {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}:
        module = gm.get_submodule(target)
        if is_foreign(module):
            for path, inner in module.named_modules():
                where = ".".join(p for p in (target, path) if p)
                found.update(_state(inner, where))
    return found


def _state(module: nn.Module, path: str) -> dict[str, str]:
    machinery = vars(nn.Module()).keys()
    held: dict[str, Any] = {k: v for k, v in vars(module).items() if k not in machinery}
    held |= {k: v for k, v in module._buffers.items() if k in module._non_persistent_buffers_set}
    return {f"{path}.{k}": Describer("shapes").value(v, k) for k, v in held.items()}


def changes_while_it_runs(before: dict[str, str], gm: fx.GraphModule) -> tuple[str, ...]:
    """The paths whose content is another one than in `before`: counters, caches."""
    after = states_of(gm)
    return tuple(sorted(k for k in {*before, *after} if before.get(k) != after.get(k)))


def _old_fingerprint(gm: fx.GraphModule) -> str:
    """That of lmfx before constants were noted."""
    lines = []
    for node in gm.graph.nodes:
        what = str(node.target) if node.op != "call_function" else getattr(node.target, "__name__", "?")
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            what += f" {type(module).__name__}({module.extra_repr()})"
        lines.append(f"{node.op} {node.name} {what} {','.join(n.name for n in node.all_input_nodes)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
