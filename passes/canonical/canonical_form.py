"""Rewrites functions and methods as plain torch.nn modules, and removes what is the identity in eval mode.

    before                                                    after
    %w = get_attr[conv.weight]                                %c = call_module[conv](%x)       plain nn.Conv2d
    %c = conv2d(%x, %w, None, 1, 1)                           %r = call_module[relu](%c)       plain nn.ReLU
    %r = call_method[relu](%c)                                %s = call_module[mul](%r)        ChannelAffine
    %d = dropout(%r, 0.1, False)
    %s = mul(%d, 0.5)

A formula of one value (`x * sigmoid(x)`) is one activation (`formulas`).

Joins are normalised to torch.add, torch.sub, torch.mul and torch.cat over values; constants are folded into a
`ChannelAffine`. A node that fits no rule stays as it is (opaque for the later passes).
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ..graph import ops
from ..graph.graph_edit import bypass, drop_dead, place, set_submodule
from ..graph.node_facts import gives_its_operand, is_floating, note_like, same_kind, shape_of, tensor_shape
from ..graph.raw_nodes import op_name, tensor_of
from .arithmetic import SCALAR, arithmetic, concatenation
from .broadcasts import plain_broadcasts
from .cats import share_prefixes
from .formulas import group_formulas
from .functional import global_pool, module_of
from .image_inputs import normalised_inputs
from .layouts import channels_first
from .pixels import slice_pixels
from .selections import select_channels, slice_batches
from .transposed import as_conv
from .written_borders import pads_before

__all__ = ["canonicalize"]

_EXPORTED_NORM = "_native_batch_norm_legit_no_training"


def canonicalize(gm: fx.GraphModule) -> int:
    """Rewrite the graph of `gm` (the caller's own copy) in place; returns the number of nodes changed.

    Of every node it must be noted (`node_facts`) which shape its value has, if it is a tensor, and whether it is the
    first operand itself.
    """
    drop_dead(gm)
    changed = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            changed += _module(gm, node)
        elif node.op in ("call_function", "call_method"):
            changed += _function(gm, node)
    changed += plain_broadcasts(gm)
    drop_dead(gm)
    changed += group_formulas(gm)
    changed += pads_before(gm)
    changed += _written_copies(gm)
    changed += normalised_inputs(gm)
    changed += _maps(gm)
    drop_dead(gm)
    changed += share_prefixes(gm) + slice_batches(gm)
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return changed


def _maps(gm: fx.GraphModule) -> int:
    """Rewrites what is known by the values that are maps. A part of the channels is one once it is a selection, so what
    permutes it enters a channels-last part; and what leaves such a part is a map whose channels may be selected."""
    changed = channels_first(gm)
    while found := slice_pixels(gm) + select_channels(gm):
        islands = channels_first(gm)
        changed += found + islands
        if not islands:
            break
    return changed


def _module(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = gm.get_submodule(str(node.target))
    if ops.plain_in(module, ops.IDENTITIES) or type(module).__name__ in ops.IDENTITY_NAMES:
        if ops.has_hooks(module) or len(node.all_input_nodes) != 1:
            return False
        return bypass(node)
    plain = as_conv(module) or _local_norm(module, shape_of(node))
    calls = [n for n in gm.graph.nodes if n.op == "call_module" and n.target == node.target] if plain else []
    if plain is not None and all(len(n.args) == 1 and not n.kwargs and _rank(n) == _rank(node) for n in calls):
        set_submodule(gm, str(node.target), plain.train(False))
        return True
    if node.kwargs and not node.args and len(node.kwargs) == 1:  # self.conv(input=x)
        node.args, node.kwargs = tuple(node.kwargs.values()), {}
        return True
    return False


def _written_copies(gm: fx.GraphModule) -> int:
    """Make of torch.export's `copy(into, value)`, which has no derivative, the value in the other one's form."""
    found = 0
    for node in list(gm.graph.nodes):
        if node.target is not torch.ops.aten.copy.default or len(node.args) != 2 or node.kwargs:
            continue
        into, value = node.args
        if not isinstance(into, fx.Node) or not isinstance(value, fx.Node):
            continue
        if same_kind(value, node):
            node.replace_all_uses_with(value)
            gm.graph.erase_node(node)
        else:
            with gm.graph.inserting_before(node):
                cast = gm.graph.call_method("type_as", (value, into))
            note_like(cast, node, shape=shape_of(value))
            node.op, node.target, node.args = "call_method", "expand_as", (cast, into)
        found += 1
    return found


def _rank(node: fx.Node) -> int | None:
    shape = shape_of(node)
    return None if shape is None else len(shape)


def _local_norm(module: nn.Module, shape: tuple[int, ...] | None) -> nn.Module | None:
    """The BatchNorm that a SyncBatchNorm is when no statistics are collected, with the same tensors; else None."""
    if shape is None or not 2 <= len(shape) <= 5 or not isinstance(module, nn.SyncBatchNorm):
        return None
    if not ops.is_plain(module, nn.SyncBatchNorm) or module.running_mean is None:
        return None
    norm = ops.BATCH_NORMS[max(len(shape) - 3, 0)](0, eps=module.eps, momentum=module.momentum)
    norm.affine, norm.num_features = module.affine, module.num_features  # type: ignore[assignment]
    norm._parameters, norm._buffers = module._parameters, module._buffers
    return norm


def _function(gm: fx.GraphModule, node: fx.Node) -> bool:
    name = op_name(node)
    if name in ops.IDENTITY_FUNCTIONS:
        return _drop_identity(node)
    if name == _EXPORTED_NORM:
        return _exported_norm(gm, node)
    if _is_copy(gm, node, name):
        return bypass(node)
    if name in ops.CASTS and gives_its_operand(node):
        return bypass(node)
    if shape_of(node) is None:
        return False
    if name in ("view", "_unsafe_view"):
        return _reshape(node)
    if name in ("cat", "concat", "concatenate"):
        return concatenation(node)
    if name == "mul" and (value := _times_ones(gm, node)) is not None:
        node.replace_all_uses_with(value)
        node.graph.erase_node(node)
        return True
    if name == "neg" and is_floating(node) and len(node.args) == 1 and not node.kwargs:
        node.op, node.target, node.args, name = "call_function", torch.mul, (node.args[0], -1.0), "mul"
    if name in SCALAR:
        return arithmetic(gm, node, name)
    if name == "mean":
        return _mean(gm, node)
    module = module_of(gm, node, name)
    if module is None:
        return False
    if isinstance(module, (*ops.PADS, *ops.MIRRORS)) and not any(module.padding):  # type: ignore[arg-type]
        return bypass(node)
    place(gm, node, as_conv(module) or module, name)
    return True


def _times_ones(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The operand of a product with ones of its own shape, a constant that a tracer made for the example's batch."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for value, other in (node.args, node.args[::-1]):
        if not isinstance(value, fx.Node) or not isinstance(other, fx.Node) or other.op != "get_attr":
            continue
        if not same_kind(value, node):
            continue
        ones = tensor_of(gm, other)
        if ones is None or isinstance(ones, nn.Parameter) or ones.shape != shape_of(node):
            continue
        if bool((ones == 1).all()):
            return value
    return None


def _drop_identity(node: fx.Node) -> bool:
    training = node.kwargs.get("training")
    if training is None:
        flags = [a for a in node.args[1:] if isinstance(a, bool)]
        last = op_name(node).startswith("drop_block")  # (..., inplace, eps, training)
        training = flags[-1 if last else 0] if flags else op_name(node) != "drop_path"
    p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else None)
    if (training and p != 0) or not isinstance(node.args[0] if node.args else None, fx.Node):
        return False
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)
    return True


def _reshape(node: fx.Node) -> bool:
    """A view is a reshape in a graph where nothing is in place, and a reshape asks nothing of its operand's memory."""
    if node.kwargs or len(node.args) < 2 or any(isinstance(a, torch.dtype) for a in node.args):
        return False
    if node.op == "call_function" and len(node.args) != 2:
        return False
    node.target = "reshape" if node.op == "call_method" else torch.reshape
    return True


def _mean(gm: fx.GraphModule, node: fx.Node) -> bool:
    """x.mean((2, 3)) of a map is a pool to one pixel, flattened."""
    pool = global_pool(node)
    if pool is None:
        return False
    source, shape = node.all_input_nodes[0], tensor_shape(node)
    if len(shape) > 2:
        place(gm, node, pool, "mean")
        return True
    with gm.graph.inserting_before(node):
        pooled = gm.graph.call_function(torch.mean, (source,))
    note_like(pooled, node, shape=(*shape, *(1,) * (len(tensor_shape(source)) - 2)))
    node.args, node.kwargs = (pooled,), {}
    place(gm, pooled, pool, "mean")
    place(gm, node, nn.Flatten(), "flatten")
    return True


def _is_copy(gm: fx.GraphModule, node: fx.Node, name: str) -> bool:
    """Whether a node only gives its operand a memory of its own, which no reader needs."""
    if name == "clone":
        return len(node.args) == 1
    readers = (gm.get_submodule(str(n.target)) for n in node.users if n.op == "call_module")
    known = (type(m).__module__.startswith("torch.nn.") or isinstance(m, ops.AFFINE) for m in readers)
    return name == "contiguous" and all(known)  # a module that nobody knows may ask for contiguous memory


def _exported_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    """torch.export's eval-mode norm gives three values, of which a network reads the first."""
    if not all(op_name(user) == "getitem" and user.args[1] == 0 for user in node.users):
        return False
    first, *others = node.users
    weight, bias, mean, var, momentum, eps = node.args[1:]
    for user in (first, *others):
        user.target, user.args = torch.nn.functional.batch_norm, (node.args[0], mean, var, weight, bias, False)
        user.kwargs = {"momentum": momentum, "eps": eps}
        _function(gm, user)
    return True
