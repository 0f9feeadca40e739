"""Finds the layers that outputs come from: those whose values an output has, but for moves and a softmax."""

from __future__ import annotations

from torch import fx, nn
from torch.utils import _pytree as pytree

from lmfx.quality.outputs import LAYERS, MOVES, SOFTMAX, op_of

__all__ = ["last_layers"]


def last_layers(gm: fx.GraphModule) -> list[fx.Node | None]:
    """The last layer of each output; None where there is none that is called once and read by this output alone."""
    return [_layer(gm, node) for node in _leaves(gm)]


def _leaves(gm: fx.GraphModule) -> list[fx.Node]:
    output = next(n for n in gm.graph.nodes if n.op == "output")
    return [leaf for leaf in pytree.tree_leaves(output.args[0]) if isinstance(leaf, fx.Node)]


def _layer(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    while len(node.users) == 1:
        module, name = op_of(gm, node)
        if isinstance(module, LAYERS) and not isinstance(module, nn.LazyLinear):
            calls = [n for n in gm.graph.nodes if n.op == "call_module" and n.target == node.target]
            return node if len(calls) == 1 else None
        if name not in MOVES | SOFTMAX or name == "channelaffine" or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return None
