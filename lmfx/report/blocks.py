"""What a drawing of a network consists of: its layers as blocks in rows, and the values between them as edges.

    Layer (conv, norm, activation)      one block                  the branches of a parallel layer: their own blocks,
    Parallel (join and what follows)    one block                  the longest branch first, and the join after them
    ops outside of all regions          one block a run            constants: none

Rows are in the order of the series, so whatever a span covers is a run of rows: a merged convolution can be drawn as
one tall box where its layers are. A row's edges only lead downwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from lmfx.passes.graph import ops
from lmfx.passes.graph.conv_configs import module_config
from lmfx.passes.graph.node_facts import shape_of
from lmfx.passes.graph.raw_nodes import op_name
from lmfx.passes.ir import Layer, Series
from lmfx.passes.spans.layers import Network

__all__ = ["Block", "Picture", "picture_of"]

SIGNS = {"add": "+", "sub": "−", "mul": "×", "cat": "cat", "mesh": "mesh"}


@dataclass(frozen=True)
class Block:
    """One row of a drawing. `channels` are what it gives; `kernel` is empty for all but convolutions."""

    row: int
    nodes: tuple[str, ...]
    kind: str  # conv, join, op, input or output
    name: str  # of the module, or of the op
    what: str  # in words, for who points at it
    channels: int = 0
    kernel: str = ""
    sign: str = ""  # of a join
    layer: tuple[str, int] | None = None  # series and index, of a layer


@dataclass(frozen=True)
class Picture:
    """The blocks of a network in rows, and its edges as pairs of rows."""

    blocks: tuple[Block, ...]
    edges: tuple[tuple[int, int], ...]
    row_of: dict[str, int]  # node -> row

    def rows(self, network: Network, series: str, start: int, stop: int) -> range:
        """The rows of `series.layers[start:stop]`, branches included."""
        layers = network.series[series].layers[start:stop]
        found = [self.row_of[n] for layer in layers for n in layer.all_nodes() if n in self.row_of]
        return range(min(found), max(found) + 1) if found else range(0)


def picture_of(network: Network) -> Picture:
    """The blocks and edges of a network."""
    parts = _in_order(network, [*_regions(network), *_others(network)])
    blocks = [replace(block, row=row) for row, block in enumerate(b for part in parts for b in part)]
    row_of = {node: block.row for block in blocks for node in block.nodes}
    return Picture(tuple(blocks), _edges(network, row_of), row_of)


# --- the layers of regions --------------------------------------------------------------------------------------------


def _regions(network: Network) -> Iterator[list[Block]]:
    for region in network.regions:
        yield list(_series(network, region.series))


def _series(network: Network, series: Series) -> Iterator[Block]:
    for index, layer in enumerate(series.layers):
        if layer.parallel is not None:
            branches = list(layer.parallel.branches)
            if layer.parallel.join != "mesh":  # whose branches may read each other
                branches.sort(key=lambda b: -sum(1 for lay in b.layers for _ in lay.all_nodes()))
            for branch in branches:
                yield from _series(network, branch)
        yield _layer(network, series.name, index, layer)


def _layer(network: Network, series: str, index: int, layer: Layer) -> Block:
    place = series, index
    shape = network.shape(layer.exit)
    words = [_word(network, n) for n in layer.nodes]
    channels = shape[1] if len(shape) > 1 else 0
    if layer.parallel is not None:
        join, nodes = layer.parallel.join, tuple(dict.fromkeys((*layer.parallel.inner, *layer.nodes)))
        name = network.path(layer.parallel.node)
        what = f"{', '.join(words)} of {len(layer.parallel.branches)} branches; gives {_size(shape)}"
        return Block(0, nodes, "join", name, what, channels, sign=SIGNS[join], layer=place)
    if layer.conv is None:
        name = network.path(layer.nodes[0])
        return Block(0, layer.nodes, "op", name, f"{', '.join(words)}; gives {_size(shape)}", channels, layer=place)
    module: Any = network.module(layer.conv)
    kernel, more = _conv(module)
    what = f"{', '.join(words)}{more}; {_size(network.shape(layer.entry))} to {_size(shape)}"
    return Block(0, layer.nodes, "conv", network.path(layer.conv), what, channels, kernel, layer=place)


def _conv(module: nn.Module) -> tuple[str, str]:
    """The kernel of a convolution, and what else there is to say of it."""
    if not isinstance(module, (*ops.CONVS, *ops.TRANSPOSED)):
        return "linear", ""
    config = module_config(module, 0, 0)
    more = [f"stride {'x'.join(map(str, config.stride))}"] if any(s != 1 for s in config.stride) else []
    more += [f"dilation {'x'.join(map(str, config.dilation))}"] if any(d != 1 for d in config.dilation) else []
    more += ["depthwise"] if config.depthwise else [f"{config.groups} groups"] if config.groups > 1 else []
    return "×".join(map(str, config.written)), "".join(f", {m}" for m in more)


def _word(network: Network, name: str) -> str:
    node = network.nodes[name]
    return type(network.module(name)).__name__ if node.op == "call_module" else op_name(node) or node.op


def _size(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape[1:])) or "one value"


# --- what is in no region ---------------------------------------------------------------------------------------------


def _others(network: Network) -> Iterator[list[Block]]:
    """Inputs, outputs, and runs of ops that read one another and nothing else."""
    layers = [layer for series in network.series.values() for layer in series.layers]
    inside = {n for layer in layers for n in (*layer.nodes, *(layer.parallel.inner if layer.parallel else ()))}
    run: list[fx.Node] = []
    for node in network.gm.graph.nodes:
        if node.name in inside or node.op == "get_attr" or _constant(node):
            continue
        if node.op in ("placeholder", "output"):
            kind = "input" if node.op == "placeholder" else "output"
            what = _size(shape) if (shape := _shape(network, node)) else "what the network returns"
            yield [Block(0, (node.name,), kind, node.name if kind == "input" else "output", what)]
            continue
        reads = [n for n in node.all_input_nodes if n.op != "get_attr" and not _constant(n)]
        if run and (reads != [run[-1]] or len(run[-1].users) != 1):
            yield [_run(network, run)]
            run = []
        run.append(node)
    if run:
        yield [_run(network, run)]


def _run(network: Network, nodes: list[fx.Node]) -> Block:
    words = [_word(network, n.name) for n in nodes]
    shape = _shape(network, nodes[-1])
    channels = shape[1] if shape and len(shape) > 1 else 0
    what = f"{', '.join(words)}{f'; gives {_size(shape)}' if shape else ''}"
    return Block(0, tuple(n.name for n in nodes), "op", network.path(nodes[0].name), what, channels)


def _shape(network: Network, node: fx.Node) -> tuple[int, ...]:
    return shape_of(node) or ()


def _constant(node: fx.Node) -> bool:
    """Whether a node reads nothing that depends on the input."""
    return node.op in ("call_function", "call_method") and not node.all_input_nodes


# --- their order, and what leads where --------------------------------------------------------------------------------


def _in_order(network: Network, parts: list[list[Block]]) -> list[list[Block]]:
    """Each part after those that it reads; where several could be next, the one that the graph has first."""
    place = {name: i for i, name in enumerate(network.nodes)}
    part_of = {n: i for i, part in enumerate(parts) for b in part for n in b.nodes}
    first = [min(place[n] for b in part for n in b.nodes) for part in parts]
    reads = [
        {part_of[m.name] for b in part for n in b.nodes for m in network.nodes[n].all_input_nodes if m.name in part_of}
        - {i}
        for i, part in enumerate(parts)
    ]
    left, done, found = set(range(len(parts))), set[int](), []
    while left:
        ready = [i for i in left if reads[i] <= done] or list(left)  # parts that read each other: as the graph has it
        best = min(ready, key=lambda i: first[i])
        left.remove(best)
        done.add(best)
        found.append(parts[best])
    return found


def _edges(network: Network, row_of: dict[str, int]) -> tuple[tuple[int, int], ...]:
    """Pairs of rows, each value's reader after it; what a mesh gives its own branches comes from before the mesh."""
    found: set[tuple[int, int]] = set()
    for node in network.gm.graph.nodes:
        if node.name not in row_of:
            continue
        for value in node.all_input_nodes:
            if value.name in row_of:
                found.add((row_of[value.name], row_of[node.name]))
    forward = {(a, b) for a, b in found if a < b}
    for a, b in sorted(found - forward):
        if a > b:
            above = [p for p, q in forward if q == a and p < b]
            if above:
                forward.add((min(above), b))
    return tuple(sorted(forward))
