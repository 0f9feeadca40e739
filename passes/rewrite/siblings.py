"""Merges convolutions that read one value into one convolution, exactly, and splits its output.

    x ─┬─ conv a ─ bn a ─ relu ─ ...               x ─ conv ab ─ relu ─┬─ select a ─ ...
       └─ conv b ─ bn b ─ relu ─ ...        ->                         └─ select b ─ ...

Their kernels, strides, pads and dilations must be equal; norms after them are folded, and an activation that all of
them have is moved to before the split. Whether one large convolution is faster than several small ones depends on the
runtime (TensorRT merges such convolutions by itself), so this is a choice of its own: measure before and after.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from ..algebra import linear
from ..graph import ops
from ..graph.graph_edit import drop_dead, set_submodule
from ..graph.modules import ChannelSelect
from ..graph.node_facts import note_like
from ..graph.verify import check_graph, drop_unread

__all__ = ["merge_siblings"]


def merge_siblings(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a canonical graph in which convolutions that read one value are one; the same function as before."""
    gm = copy.deepcopy(gm)
    calls: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for node in list(gm.graph.nodes):
        groups: dict[tuple[Any, ...], list[fx.Node]] = {}
        for user in node.users:
            module = gm.get_submodule(str(user.target)) if user.op == "call_module" else None
            if module is None or calls[str(user.target)] > 1 or not ops.plain_in(module, ops.CONVS):
                continue
            conv: Any = module
            if conv.groups == 1:
                key = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode, conv.weight.dtype
                groups.setdefault(key, []).append(user)
        for convs in groups.values():
            if len(convs) > 1:
                _merge(gm, node, convs, calls)
    drop_dead(gm)
    drop_unread(gm)
    gm.graph.lint()
    gm.recompile()
    check_graph(gm)
    return gm


def _merge(gm: fx.GraphModule, source: fx.Node, convs: list[fx.Node], calls: dict[str, int]) -> None:
    """Put one conv, and a selection for each of `convs`, where these and the norms after them were."""
    ends = [_norm_after(gm, conv, calls) or conv for conv in convs]
    folded = [_folded(gm, conv, end) for conv, end in zip(convs, ends, strict=True)]
    like: Any = gm.get_submodule(str(convs[0].target))
    width = sum(len(op.weight) for op in folded)
    whole = nn.utils.skip_init(
        type(like),
        like.in_channels,
        width,
        like.kernel_size,
        stride=like.stride,
        padding=like.padding,
        dilation=like.dilation,
        padding_mode=like.padding_mode,
        dtype=like.weight.dtype,
        device=like.weight.device,
    )
    with torch.no_grad():
        whole.weight.copy_(torch.cat([op.weight for op in folded]))
        whole.bias.copy_(torch.cat([op.bias for op in folded]))
    name = _free(gm, f"{convs[0].target}_siblings")
    last = _call(gm, source, name, whole.train(gm.training), (source,), convs[0])
    acts = [_activation_after(gm, end) for end in ends]
    texts = {f"{type(m).__name__}({m.extra_repr()})" for a in acts if a and (m := gm.get_submodule(str(a.target)))}
    if all(acts) and len(texts) == 1:
        first = acts[0]
        assert first is not None
        last = _call(gm, last, f"{name}_act", copy.deepcopy(gm.get_submodule(str(first.target))), (last,), first)
        ends = [a for a in acts if a is not None]
    at = 0
    for i, (end, op) in enumerate(zip(ends, folded, strict=True)):
        part = ChannelSelect(range(at, at + len(op.weight)))
        end.replace_all_uses_with(_call(gm, last, f"{name}_part{i}", part, (last,), end))
        at += len(op.weight)


def _folded(gm: fx.GraphModule, conv: fx.Node, end: fx.Node) -> linear.LinearOp:
    """A conv without its padding, and the norm after it, as one op in float64."""
    module: Any = gm.get_submodule(str(conv.target))
    ndim = len(module.kernel_size)
    weight = module.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double()
    op = linear.LinearOp(weight, bias, (1,) * ndim, ((0, 0),) * ndim, (1,) * ndim)
    if end is conv:
        return op
    with torch.no_grad():
        return linear.compose(op, linear.from_batch_norm(gm.get_submodule(str(end.target)), ndim))


def _only_reader(node: fx.Node) -> fx.Node | None:
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return reader if reader is not None and reader.op == "call_module" and reader.args == (node,) else None


def _norm_after(gm: fx.GraphModule, conv: fx.Node, calls: dict[str, int]) -> fx.Node | None:
    reader = _only_reader(conv)
    if reader is None or calls[str(reader.target)] > 1:
        return None
    module = gm.get_submodule(str(reader.target))
    affine = ops.plain_in(module, ops.BATCH_NORMS) and ops.affine_refusal(module) is None
    return reader if affine else None


def _activation_after(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The activation that alone reads a value, if it has no parameters (one number a channel would not be shared)."""
    reader = _only_reader(node)
    if reader is None:
        return None
    module = gm.get_submodule(str(reader.target))
    return reader if ops.plain_in(module, ops.ACTIVATIONS) and not list(module.parameters()) else None


def _call(
    gm: fx.GraphModule, after: fx.Node, name: str, module: nn.Module, args: tuple[fx.Node, ...], like: fx.Node
) -> fx.Node:
    set_submodule(gm, name, module)
    with gm.graph.inserting_after(after):
        node = gm.graph.create_node("call_module", name, args, {}, name=name.replace(".", "_"))
    note_like(node, like, path=name)
    return node


def _free(gm: fx.GraphModule, name: str) -> str:
    taken = {n for n, _ in gm.named_modules(remove_duplicate=False)}
    found, i = name, 0
    while found in taken:
        i += 1
        found = f"{name}_{i}"
    return found
