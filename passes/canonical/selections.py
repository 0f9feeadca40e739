"""Rewrites chunks, splits, slices, index lists and shuffles along the channels as `ChannelSelect` modules.

    %c = chunk(%x, 2, 1)                                  %a = call_module[select](%x)      ChannelSelect 0:3:1
    %a = getitem(%c, 0)                          ->       %b = call_module[select_1](%x)    ChannelSelect 3:6:1
    %b = getitem(%c, 1)

    %v = view(%x, n, 2, 3, h, w)
    %t = transpose(%v, 1, 2)                     ->       %s = call_module[select](%x)      ChannelSelect 6, groups=2
    %s = view(contiguous(%t), n, 6, h, w)

Views, permutes and slices only move numbers. So nothing has to be said about spellings: the ops between a map and a map
of the same batch and size are run once on the positions ``0, 1, 2, ...`` of the first one's numbers
(`moved_positions`). If all that the second one holds is whole channels of the first, unchanged, then it is that
selection, proved number by number.

The same positions show a reshape that makes channels of blocks of pixels (space-to-depth as einops writes it), or
pixels of channels: all numbers of the map are there, and channel `k` of the result holds pixel `(a, b)` of each block
of some channel. It becomes a `SpaceToDepth` or `nn.PixelShuffle`, beside a selection where the channels come in
another order.

    %v = reshape(%x, n, c, h / 2, 2, w / 2, 2)
    %p = permute(%v, 0, 3, 5, 1, 2, 4)                    %d = call_module[blocks](%x)     SpaceToDepth 2x2
    %s = reshape(%p, n, 4 c, h / 2, w / 2)        ->      %s = call_module[select](%d)     ChannelSelect

The proof is for the example's size. These rules make it one for all sizes: the map is known to be channels-first (the
number of tokens after a class token is another one at another size); a part is only taken along dimension 1, by
constants or by numbers of channels; the batch stays the first dimension; and a dimension of size 1 is neither moved nor
merged with others, because at that size too much looks alike.

**Parts of the batch** (of a Siamese network, or an average over flips) become slices. The number of parts of a chunk,
and of a split by a size that is a value, depends on the batch; so torch.export makes a number of the batch, and a file
for any batch could not be written. A slice has no such number:

    %p = chunk(%f, 2, 0)                                  %n = size(%f, 0);  %s = (%n + 1) // 2
    %a = getitem(%p, 0)                          ->       %a = getitem(%f, [: %s])
    %b = getitem(%p, 1)                                   %b = getitem(%f, [%s : 2 %s])
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from ..graph import ops
from ..graph.graph_edit import bypass, place
from ..graph.map_shapes import spatial_maps
from ..graph.node_facts import note_like, shape_of, tensor_shape
from ..graph.raw_nodes import argument, op_name
from .arithmetic import concatenation
from .moved_positions import Moved, moved_by

__all__ = ["select_channels", "slice_batches"]

_SIZES = {"chunk": "chunks", "split": "split_size_or_sections"}


def select_channels(gm: fx.GraphModule) -> int:
    """Rewrite in place of `gm` (the caller's own copy) with the shapes of its nodes; returns how many it made."""
    _unpack(gm)
    found = 0
    while made := _select(gm, set(spatial_maps(gm))):  # what reads a selection may be known as a map only now
        found += made
    return found


def _select(gm: fx.GraphModule, maps: set[str]) -> int:
    found = 0
    moved: dict[fx.Node, Moved] = {}
    last_reader = {operand: node for node in gm.graph.nodes for operand in node.all_input_nodes}
    for node in list(gm.graph.nodes):
        operands = node.all_input_nodes
        step = moved_by(gm, node, moved)
        index = None if step is None else step.channels(node)
        blocks = None if step is None or index is not None else step.blocks(node)
        if step is not None and index is not None and not {step.source.name, node.name}.isdisjoint(maps):
            if index != tuple(range(tensor_shape(step.source)[1])):
                maps.add(_place(gm, node, step.source, index))
                found += 1
            elif step.parts_only:  # all channels in their order, whatever the size
                node.args, node.kwargs = (step.source,), {}
                bypass(node)
            else:
                moved[node] = step
        elif step is not None and blocks is not None and not {step.source.name, node.name}.isdisjoint(maps):
            maps.add(_place_blocks(gm, node, step.source, *blocks))
            found += 1
        elif step is not None:
            moved[node] = step
        for operand in operands:
            if last_reader.get(operand) is node:
                moved.pop(operand, None)  # positions take as much memory as the maps
    return found


def _place_blocks(gm: fx.GraphModule, node: fx.Node, source: fx.Node, module: nn.Module, order: tuple[int, ...]) -> str:
    """The module of `Moved.blocks` in place of `node`, with a selection where the order is not torch's."""
    if order == tuple(range(len(order))):
        return place(gm, node, module, "blocks", source).name
    device = next((p.device for p in (*gm.parameters(), *gm.buffers())), None)
    select = ops.ChannelSelect(order, device)
    first, second = (select, module) if isinstance(module, nn.PixelShuffle) else (module, select)
    with gm.graph.inserting_before(node):
        between = gm.graph.call_function(torch.clone, (source,))
    note_like(between, node, shape=shape_of(source if first is select else node))
    between = place(gm, between, first, "select" if first is select else "blocks", source)
    return place(gm, node, second, "blocks" if first is select else "select", between).name


def _place(gm: fx.GraphModule, node: fx.Node, source: fx.Node, index: tuple[int, ...]) -> str:
    before = gm.get_submodule(str(source.target)) if source.op == "call_module" else None
    device = next((p.device for p in (*gm.parameters(), *gm.buffers())), None)
    module = ops.ChannelSelect(index, device)
    if isinstance(before, ops.ChannelSelect) and before.span and module.span:  # a part of a part
        first = source.args[0]
        assert isinstance(first, fx.Node)
        source, module = first, ops.ChannelSelect([before.index[i] for i in index])
    return place(gm, node, module, "select", source).name


def _unpack(gm: fx.GraphModule) -> None:
    """`cat(chunk(x), 1)` reads the parts one by one."""
    for node in list(gm.graph.nodes):
        whole = node.args[0] if node.args and op_name(node) in ("cat", "concat", "concatenate") else None
        if not isinstance(whole, fx.Node):
            continue
        step = moved_by(gm, whole, {})
        if step is None or not isinstance(step.value, (tuple, list)):
            continue
        parts = []
        with gm.graph.inserting_before(node):
            for i, positions in enumerate(step.value):
                part = gm.graph.call_function(operator.getitem, (whole, i))
                note_like(part, node, shape=tuple(positions.shape))
                parts.append(part)
        node.args = (parts, *node.args[1:])
        concatenation(node)


# --- parts of the batch -----------------------------------------------------------------------------------------------


def slice_batches(gm: fx.GraphModule) -> int:
    """Rewrite in place of `gm` (the caller's own copy) with the shapes of its nodes; returns how many it made."""
    found = 0
    for node in list(gm.graph.nodes):
        x = node.args[0] if node.args else None
        if op_name(node) not in ("chunk", "split") or not isinstance(x, fx.Node) or shape_of(x) is None:
            continue
        if argument(node, 2, "dim", 0) not in (0, -len(shape_of(x) or ())) or not all(map(_is_part, node.users)):
            continue
        with gm.graph.inserting_before(node):
            size = _size_of_parts(gm.graph, node, x)
        if size is None:
            continue
        for part in list(node.users):
            with gm.graph.inserting_before(part):
                i = int(part.args[1])
                begin, end = (_times(gm.graph, size, k) for k in (i, i + 1))
                new = gm.graph.call_function(operator.getitem, (x, slice(begin, end)))
            note_like(new, part)
            part.replace_all_uses_with(new)
            gm.graph.erase_node(part)
            found += 1
        gm.graph.erase_node(node)
    return found


def _is_part(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[1], int) and node.args[1] >= 0


def _size_of_parts(graph: fx.Graph, node: fx.Node, x: fx.Node) -> Any:
    """The node that says how many images a part has; None where that is written as a number, or another for each."""
    given = argument(node, 1, _SIZES[op_name(node)])
    if op_name(node) == "split":
        return given if isinstance(given, fx.Node) else None
    if not isinstance(given, int) or given < 1:
        return None
    images = graph.call_method("size", (x, 0))
    return graph.call_function(operator.floordiv, (graph.call_function(operator.add, (images, given - 1)), given))


def _times(graph: fx.Graph, size: fx.Node, count: int) -> fx.Node | None:
    return graph.call_function(operator.mul, (size, count)) if count > 1 else size if count else None
