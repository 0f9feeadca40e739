"""Rewrites a concatenation that begins with all operands of an earlier one: it reads that one instead.

    %d1 = cat([%x, %y1], 1)                          %d1 = cat([%x, %y1], 1)
    %d2 = cat([%x, %y1, %y2], 1)             ->      %d2 = cat([%d1, %y2], 1)
    %d3 = cat([%x, %y1, %y2, %y3], 1)                %d3 = cat([%d2, %y3], 1)

In a block where each layer reads the concatenation of all outputs before it, every one of them is read by all later
concatenations, and nothing is series-parallel. Written this way each concatenation is read by its layer and by the next
concatenation alone: a chain of branches with a skip. The numbers are the same, and no more of them are copied.
"""

from __future__ import annotations

import torch
from torch import fx

from ..graph.node_facts import dtype_of, shape_of

__all__ = ["share_prefixes"]


def share_prefixes(gm: fx.GraphModule) -> int:
    """Rewrite in place of `gm`, whose joins are canonical and which has no dead code; returns how many it changed."""
    seen: dict[tuple[int, tuple[fx.Node, ...]], fx.Node] = {}
    changed = 0
    for node in list(gm.graph.nodes):
        operands = _operands(node)
        if operands is None:
            continue
        dim = node.args[1]
        for length in range(len(operands), 1, -1):
            earlier = seen.get((dim, operands[:length]))
            if earlier is None:
                continue
            changed += 1
            if length == len(operands):
                node.replace_all_uses_with(earlier)
                gm.graph.erase_node(node)
            else:
                node.args = ([earlier, *operands[length:]], dim)
            break
        # Later ones are compared as they were written.
        seen.setdefault((dim, operands), node)
    return changed


def _operands(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The operands of a concatenation of values that agree in rank and dtype; promoting them in steps could round."""
    if node.op != "call_function" or node.target is not torch.cat or node.kwargs or len(node.args) != 2:
        return None
    operands = node.args[0]
    if not isinstance(operands, (list, tuple)) or not all(isinstance(o, fx.Node) for o in operands):
        return None
    kinds = {(dtype_of(o), len(shape_of(o) or ())) for o in operands if isinstance(o, fx.Node)}
    return tuple(o for o in operands if isinstance(o, fx.Node)) if len(kinds) == 1 else None
