"""Finds what is the same at several calls of one module, op by op, and where that begins and ends.

    a ─ conv ─ bn ─ relu                  a ─ | conv ─ bn ─ relu       a layer would begin with the pool, so that the
    b ─ pool ─ conv ─ bn ─ relu     ->    b ─ pool ─ | conv ─ bn ─ relu       calls of the conv had other layers

Layers are grouped greedily: a pool, a pad or a norm before a conv is a part of the conv's layer. Where the ops before
the calls of one conv differ, a layer must begin at the first that does not; where a pool, a pad or an activation comes
after some calls only, it must end before that. A norm or scale after a conv stays with it: every runtime folds it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..graph import ops

__all__ = ["Edges", "call_edges", "module_text", "shared_calls"]

MOST_CONTENTS = 1 << 16  # numbers of a buffer that are compared by value; larger ones are the same tensor or differ


@dataclass(frozen=True)
class Edges:
    """Nodes at which a layer must begin, and nodes at which one must end."""

    begin: frozenset[fx.Node] = frozenset()
    end: frozenset[fx.Node] = frozenset()


def shared_calls(gm: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """Nodes whose module has a parameter that another node uses, and all nodes that use it, in the graph's order."""
    users: dict[int, list[str]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            for parameter in gm.get_submodule(str(node.target)).parameters():
                users.setdefault(id(parameter), []).append(node.name)
    return {name: tuple(names) for names in users.values() if len(names) > 1 for name in names}


def call_edges(gm: fx.GraphModule, kind: Callable[[fx.Node], str]) -> Edges:
    """Where layers must begin and end, so that the calls of one conv can have the same layers. `kind` is that of an op
    of one map (`regions`)."""

    def is_affine(node: fx.Node) -> bool:
        return kind(node) == "affine"

    nodes = {n.name: n for n in gm.graph.nodes}
    begin: set[fx.Node] = set()
    end: set[fx.Node] = set()
    for names in dict.fromkeys(shared_calls(gm).values()):
        calls = [nodes[n] for n in names]
        convs = all(ops.plain_in(gm.get_submodule(str(n.target)), (*ops.CONVS, nn.Linear)) for n in calls)
        if not convs or not _same(gm, calls):
            continue
        begin.update(_first(gm, calls, is_affine))
        end.update(_last(gm, calls, kind))
    return Edges(frozenset(begin), frozenset(end))


def _first(gm: fx.GraphModule, calls: list[fx.Node], is_affine: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The first nodes before the calls that are the same, if a layer does not begin there by itself."""
    at = calls
    while True:
        before = [n.args[0] for n in at if n.args and isinstance(n.args[0], fx.Node)]
        steps = [n for n in before if n.op == "call_module" and len(n.users) == 1 and is_affine(n)]
        if len(steps) == len(before) == len(at) and _same(gm, steps):
            at = steps
            continue
        if at is calls:
            return at if steps else []
        cores = [
            n for n in before if n.op == "call_module" and ops.plain_in(gm.get_submodule(str(n.target)), ops.CONVS)
        ]
        return [] if len(cores) == len(at) else at


def _last(gm: fx.GraphModule, calls: list[fx.Node], kind: Callable[[fx.Node], str]) -> list[fx.Node]:
    """The last nodes after the calls that are the same, if what follows some of them is no norm, or if they have other
    activations: those stay at the end of a span anyway."""
    at = calls
    while True:
        after = [next(iter(n.users)) for n in at if len(n.users) == 1]
        steps = [n for n in after if n.op == "call_module" and kind(n) == "affine"]
        if len(steps) == len(at) and _same(gm, steps):
            at = steps
            continue
        bent = [n for n in after if n.op == "call_module" and kind(n) == "activation"]
        if bent and not steps and (len(bent) < len(at) or not _same(gm, bent)):
            return at
        windows = [n for n in steps if not ops.plain_in(gm.get_submodule(str(n.target)), _FOLDED)]
        return at if windows else []


_FOLDED = (*ops.BATCH_NORMS, ops.ChannelAffine)


def _same(gm: fx.GraphModule, nodes: list[fx.Node]) -> bool:
    return len({module_text(gm.get_submodule(str(n.target))) for n in nodes}) == 1


def module_text(module: nn.Module) -> Hashable:
    """What a module computes: a plain one its type, options and tensors, any other is only itself."""
    if not type(module).__module__.startswith(("torch.nn.", "lmfx.")) or module._forward_hooks:
        return id(module)
    options = tuple(sorted((k, repr(v)) for k, v in vars(module).items() if k[0] != "_" and k != "training"))
    weights = tuple((name, id(p)) for name, p in module.named_parameters(recurse=False))
    buffers = tuple((name, _content(b)) for name, b in module.named_buffers(recurse=False))
    inside = tuple((name, module_text(m)) for name, m in module.named_children())
    return type(module), options, weights, buffers, inside


def _content(tensor: Tensor) -> Hashable:
    if tensor.numel() > MOST_CONTENTS:
        return id(tensor)
    value = tensor.detach().to("cpu").contiguous()
    return str(value.dtype), tuple(value.shape), bytes(value.flatten().view(torch.uint8).numpy().tobytes())
