"""Folds constants: what depends on parameters and buffers alone is computed once, and becomes one tensor.

    before                                                  after
    %w = get_attr[conv.weight]                              %c = get_attr[conv.weight]       the folded weight
    %m = mean(%w, (1, 2, 3), True)                          %y = conv2d(%x, %c)
    %c = sub(%w, %m)
    %y = conv2d(%x, %c)

A node is constant if its operands are, it draws no random numbers, writes into nothing and leaves no memory
uninitialised. Only the last constant nodes (those that a value meets) get a tensor. It is found under the path of the
module that computes it: as `weight` or `bias` of that module where it is one for a conv, a norm or a linear layer, so
that the op becomes a plain module there, else as a buffer of its own. Equal tensors under one path are one tensor: a
module that is called twice keeps its weight shared. Values are exactly those of the network, since the same ops run.
What is computed from something trainable is trainable, and what is computed from frozen parameters is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph import ops
from ..graph.graph_edit import drop_dead
from ..graph.node_facts import attribute_of, note_like, path_of
from ..graph.raw_nodes import op_name, tensor_of

__all__ = ["fold_constants"]

_MADE_BY_TRACERS = ("_tensor_constant", "lifted_tensor", "_lifted_tensor_constant")
_SLOTS = ("conv1d", "conv2d", "conv3d", "convolution", "linear", "batch_norm", "group_norm", "layer_norm")
_TEMPORARY = "_folded_"
_UNKNOWN = object()


def fold_constants(gm: fx.GraphModule) -> int:
    """Fold in the graph of `gm` (the caller's own copy); returns the number of tensors that were placed.

    Of every node its path must be noted (`node_facts`), and of tensors dtype and device.
    """
    values = _constants(gm)
    trainable = _trainable(values)
    fresh: list[tuple[fx.Node, Tensor]] = []
    for node, value in values.items():
        readers = [u for u in node.users if u not in values]
        if not readers:
            continue
        if isinstance(value, Tensor):
            if node.op != "get_attr" or str(node.target).rpartition(".")[2].startswith(_MADE_BY_TRACERS):
                fresh.append((node, value))
        elif node.op != "get_attr" and node.target is not getattr and _is_literal(value):
            for reader in readers:
                reader.args = _with_literal(reader.args, node, value)
                reader.kwargs = _with_literal(reader.kwargs, node, value)
    holes = [_hole(gm, node, value) for node, value in fresh]
    drop_dead(gm)
    known: dict[tuple[str, torch.Size, torch.dtype, str], list[tuple[Tensor, str]]] = {}
    for (node, value), hole in zip(fresh, holes, strict=True):
        path, slot = path_of(node), _slot(hole)
        equal = known.setdefault((path, value.shape, value.dtype, slot), [])
        name = next((n for t, n in equal if torch.equal(t, value)), None)
        if name is None:
            name = _register(gm, path, slot, value, node in trainable)
            equal.append((value, name))
        hole.target = name
    for name in [n for n in gm._buffers if n.startswith(_TEMPORARY)]:
        delattr(gm, name)
    gm.graph.lint()
    gm.recompile()
    return len({hole.target for hole in holes})


def _constants(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """The value of every node that depends on no input."""
    values: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            tensor = tensor_of(gm, node)
            if tensor is not None:
                values[node] = tensor
        elif node.target is getattr and node.args[1] in ("dtype", "device"):
            # Of a value, known from the example: a table is made in the network's own type, and moves with it.
            source: Any = node.args[0]
            if (known := attribute_of(source, str(node.args[1]))) is not None:
                values[node] = known
        elif node.op.startswith("call_") and all(n in values for n in node.all_input_nodes):
            value = _evaluate(gm, node, values)
            if value is not _UNKNOWN:
                values[node] = value
    return values


def _trainable(values: dict[fx.Node, Any]) -> set[fx.Node]:
    """The constants that are, or are computed from, tensors that want a gradient."""
    found: set[fx.Node] = set()
    for node, value in values.items():
        own = node.op == "get_attr" and isinstance(value, Tensor) and value.requires_grad
        if own or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _evaluate(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node whose operands are known, or `_UNKNOWN` if it is not the same each time."""
    name = op_name(node)
    if name.startswith(("empty", "new_empty")) or (name.endswith("_") and not name.endswith("__")):
        return _UNKNOWN
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    operands = [v for v in (values[n] for n in node.all_input_nodes) if isinstance(v, Tensor)]
    # A norm writes into its statistics without telling their version counters.
    kept = [(v, v.clone()) for v in operands] if name.endswith(("batch_norm", "instance_norm")) else []
    versions = [v._version for v in operands]
    cuda = {v.device for v in operands if v.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d for d in cuda if d.index is not None]), torch.no_grad():
        before = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in cuda)]
        try:
            if node.op == "call_module":
                module = gm.get_submodule(str(node.target))
                if not type(module).__module__.startswith("torch.nn.") or ops.has_hooks(module):
                    return _UNKNOWN
                value = module(*args, **kwargs)
            elif node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                function: Any = node.target
                value = function(*args, **kwargs)
        except Exception:  # an op that does not run on its own stays in the graph
            return _UNKNOWN
        after = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in cuda)]
    drew = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    changed = [(v, old) for v, old in kept if not torch.equal(v, old)]
    for v, old in changed:
        v.copy_(old)
    wrote = bool(changed) or any(v._version != version for v, version in zip(operands, versions, strict=True))
    return _UNKNOWN if drew or wrote or not _is_value(value) else value


def _is_value(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_value(v) for v in value)
    return isinstance(value, Tensor) or _is_literal(value)


def _is_literal(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_literal(v) for v in value)
    return isinstance(value, (int, float, bool, str, torch.dtype, torch.device, torch.memory_format))


def _with_literal(arguments: Any, node: fx.Node, value: Any) -> Any:
    return fx.map_arg(arguments, lambda n: value if n is node else n)


def _hole(gm: fx.GraphModule, node: fx.Node, value: Tensor) -> fx.Node:
    """A get_attr node in place of a constant one, with a name that is its own until dead nodes are gone."""
    name = f"{_TEMPORARY}{node.name}"
    gm.register_buffer(name, value)
    with gm.graph.inserting_before(node):
        hole = gm.graph.get_attr(name)
    note_like(hole, node)
    node.replace_all_uses_with(hole)
    return hole


def _slot(hole: fx.Node) -> str:
    """`weight` or `bias` if all that the constant does is to be one, else an empty string."""
    found = set()
    for user in hole.users:
        place = (
            list(user.args).index(hole)
            if hole in user.args
            else next((k for k, v in user.kwargs.items() if v is hole), "")
        )
        name = op_name(user)
        if not name.startswith(_SLOTS):
            return ""
        if name.startswith(("conv", "linear")):
            place = "weight" if place == 1 else "bias" if place == 2 else place
        found.add(place)
    only = found.pop() if len(found) == 1 else ""
    return only if only in ("weight", "bias") else ""


def _register(gm: fx.GraphModule, path: str, slot: str, value: Tensor, trainable: bool) -> str:
    """Put a tensor into the graph module, and return its name."""
    own = value.detach().clone(memory_format=torch.contiguous_format)
    trainable = trainable and own.is_floating_point()
    owner = _module_at(gm, path)
    called = any(n.op == "call_module" and n.target == path for n in gm.graph.nodes)
    if path and slot and not called and _is_free(gm, owner, path, slot):
        if hasattr(owner, slot):
            delattr(owner, slot)
        owner.register_parameter(slot, nn.Parameter(own, requires_grad=trainable))
        return f"{path}.{slot}"
    name, i = "constant", 0
    while hasattr(owner, name):
        i += 1
        name = f"constant_{i}"
    if trainable:
        owner.register_parameter(name, nn.Parameter(own))
    else:
        owner.register_buffer(name, own)
    return f"{path}.{name}" if path else name


def _is_free(gm: fx.GraphModule, owner: nn.Module, path: str, slot: str) -> bool:
    """Whether nothing reads `slot` of the module any more."""
    if not isinstance(getattr(owner, slot, None), (Tensor, type(None))):
        return False
    return all(n.op != "get_attr" or n.target not in (path, f"{path}.{slot}") for n in gm.graph.nodes)


def _module_at(gm: fx.GraphModule, path: str) -> nn.Module:
    """The module at a path, made of empty modules where there is none."""
    module: nn.Module = gm
    for atom in path.split(".") if path else ():
        child = module._modules.get(atom)
        if child is None:
            child = nn.Module()
            module.add_module(atom, child)
        module = child
    return module
