"""Edits a graph: drops dead nodes, and calls a module where a node was, under the path that the node came from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from .node_facts import comes_from_leaf, note_like, path_of

__all__ = ["bypass", "drop_dead", "free_name", "is_attribute", "place", "set_submodule"]

_OWNED = (".weight", ".bias", ".running_mean", ".running_var")


def bypass(node: fx.Node) -> bool:
    """Remove `node`: its readers read its first operand instead."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)
    return True


def drop_dead(gm: fx.GraphModule) -> None:
    """Erase every node but inputs whose value nobody reads, also one that torch takes for impure (random, in place)."""
    gm.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def place(gm: fx.GraphModule, node: fx.Node, module: nn.Module, name: str, value: fx.Node | None = None) -> fx.Node:
    """Put a call of `module` where `node` was, under the path that the node came from, and return it.

    It reads `value`, or else the node's first operand.
    """
    value = value or next(a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node))
    target = _free_name(gm, node, module, name)
    set_submodule(gm, target, module.train(False))
    with gm.graph.inserting_before(node):
        new = gm.graph.create_node("call_module", target, (value,), {}, name=target.replace(".", "_"))
    note_like(new, node)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return new


def _free_name(gm: fx.GraphModule, node: fx.Node, module: nn.Module, name: str) -> str:
    """`layer1.conv` if the weight came from `layer1.conv.weight`, else the owner's path and the op's name."""
    for value in (*node.args[1:], *node.kwargs.values()):
        if isinstance(value, fx.Node) and value.op == "get_attr" and str(value.target).endswith(_OWNED):
            owner = str(value.target).rpartition(".")[0]
            if owner and not list(gm.get_submodule(owner).children()):
                uses = [n for n in gm.graph.nodes if n.op == "call_module" and n.target == owner]
                if uses and _same(gm.get_submodule(owner), module):
                    return owner  # the second call of one module
                if not uses and all(isinstance(getattr(module, a, None), Tensor) for a in _attributes_read(gm, owner)):
                    return owner
    path = path_of(node)
    if comes_from_leaf(node) and _may_stand_at(gm, path, module):
        return path  # what torch.export saw of a module without parameters
    # Beside a module that owns tensors, not inside: the op that they belong to takes its path.
    separator = "_" if _owns_tensors(gm, path) else "."
    base = f"{path}{separator}{name}" if path else name
    candidate, i = base, 0
    while is_attribute(gm, candidate):  # a module, a tensor, or a method of the graph module
        i += 1
        candidate = f"{base}_{i}"
    return candidate


def _same(old: nn.Module, new: nn.Module) -> bool:
    """Whether two modules are alike and share every parameter and buffer."""
    if type(old) is not type(new) or repr(old) != repr(new):
        return False
    tensors = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (old, new)]
    return tensors[0].keys() == tensors[1].keys() and all(tensors[0][k] is tensors[1][k] for k in tensors[0])


def _may_stand_at(gm: fx.GraphModule, path: str, module: nn.Module) -> bool:
    """Whether the path is free, or holds an equal module that another call put there."""
    held: Any = gm
    for atom in path.split("."):
        held = getattr(held, atom, None)
    return held is None or (isinstance(held, nn.Module) and _same(held, module))


def _owns_tensors(gm: fx.GraphModule, path: str) -> bool:
    module: Any = gm
    for atom in path.split("."):
        module = getattr(module, atom, None)
    if not isinstance(module, nn.Module) or list(module.children()):
        return False
    return any(f".{name}" in _OWNED for name in (*module._parameters, *module._buffers))


def _attributes_read(gm: fx.GraphModule, owner: str) -> set[str]:
    """The attributes of the module `owner` that the graph still reads."""
    targets = [str(n.target).rpartition(".") for n in gm.graph.nodes if n.op == "get_attr"]
    return {name for parent, _, name in targets if parent == owner}


def is_attribute(gm: nn.Module, path: str) -> bool:
    """Whether the dotted path below a module leads to anything: a module, a tensor, a method."""
    item: Any = gm
    for atom in path.split("."):
        if not hasattr(item, atom):
            return False
        item = getattr(item, atom)
    return True


def free_name(gm: nn.Module, name: str) -> str:
    """The name, or the next one (with `_` after it) that nothing below a module has."""
    while is_attribute(gm, name):
        name += "_"
    return name


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at the dotted path below `root`, making empty modules on the way."""
    *parents, last = path.split(".")
    for atom in parents:
        child = root._modules.get(atom)
        if child is None:
            child = nn.Module()
            root.add_module(atom, child)
        root = child
    root._modules[last] = module
