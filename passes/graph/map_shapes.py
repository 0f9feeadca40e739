"""Finds which values are channels-first maps, and what sizes values have at other inputs than the example.

**Maps.** A 4-d value is a map (batch, channels, size...) if an op that only makes sense on maps writes or reads it: a
convolution, its norm, a pool. Ops that keep the shape of their operand (activations, norms, sums) pass this on in both
directions; ops that move dimensions (permute, reshape) do not. So the channels-last part of a network is known as none.

**Other sizes.** The graph is run on fake tensors with the example's maps enlarged. A part whose output size is that of
a convolution at the example and at the other sizes may be replaced by one. Where the graph only runs at the example's
size (a reshape with constant sizes), that size is all there is, and one pixel tells no rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..ir import ConvConfig
from ..model.quiet import quiet
from ..model.trace_facts import noted
from . import ops
from .conv_configs import module_config
from .node_facts import dtype_of, shape_of, tensor_shape
from .reduction import is_map, join_of, operands_of
from .union_find import UnionFind

__all__ = [
    "GROWTH",
    "fake_shapes",
    "fake_sizes",
    "follows",
    "holds_tensors",
    "is_tensor_spec",
    "observed_geometry",
    "placeholder_values",
    "spatial_maps",
    "values_at",
]

GROWTH = (32, 37, 43)  # pixels that each spatial dimension of the inputs grows by, one run each
Shapes = dict[str, tuple[int, ...]]


def spatial_maps(gm: fx.GraphModule) -> frozenset[str]:
    """The names of the values that are channels-first maps with at least one spatial dimension."""
    alike = UnionFind[fx.Node]()  # values of one layout
    seeds: list[fx.Node] = []
    for node in gm.graph.nodes:
        if not is_map(node) or len(tensor_shape(node)) < 3:
            continue
        if _only_on_maps(gm, node):
            seeds += [node, *(v for v in operands_of(node) if is_map(v))]
        elif _keeps_layout(gm, node):
            for value in operands_of(node):
                if shape_of(value) == shape_of(node) or join_of(node) == "cat" or _is_selection(gm, node):
                    alike.unite(value, node)
    classes = {alike.root(node) for node in seeds}
    return frozenset(
        n.name
        for n in gm.graph.nodes
        if n.op != "output" and is_map(n) and len(tensor_shape(n)) > 2 and alike.root(n) in classes
    )


_ON_MAPS = (
    *(*ops.CONVS, *ops.BATCH_NORMS, *ops.AVG_POOLS, *ops.MAX_POOLS, *ops.PADS, nn.GroupNorm, nn.Upsample),
    *(ops.PixelSlice, ops.SpaceToDepth, nn.PixelUnshuffle, nn.PixelShuffle, ops.DepthToSpace, *ops.TRANSPOSED),
)


def _only_on_maps(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = gm.get_submodule(str(node.target))
    return isinstance(module, _ON_MAPS) or (
        not type(module).__module__.startswith("torch.nn") and any(isinstance(m, ops.CONVS) for m in module.modules())
    )


def _keeps_layout(gm: fx.GraphModule, node: fx.Node) -> bool:
    if ops.resizes(node, gm):
        return False
    same = any(shape_of(v) == shape_of(node) for v in operands_of(node))
    return same or join_of(node) == "cat" or _is_selection(gm, node)


def _is_selection(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), ops.ChannelSelect)


def holds_tensors(gm: fx.GraphModule) -> bool:
    """Whether an input is a list or dict of tensors: which of them are maps that could be larger is unknown."""
    return any(_names_tensor(v) for spec in noted(gm).specs if (v := _parts(spec)) is not None)


def _parts(spec: Any) -> Any:
    """What a container's spec holds (see `tracing`), None for a tensor or a constant."""
    return next(iter(spec.values())) if isinstance(spec, dict) and len(spec) == 1 else None


def _names_tensor(parts: Any) -> bool:
    below = parts.values() if isinstance(parts, dict) else parts
    return any(isinstance(v, dict) and (set(v) == {"shape", "dtype"} or _names_tensor(_parts(v) or ())) for v in below)


def values_at(gm: fx.GraphModule, growth: int) -> Shapes:
    """The shape of each value when the inputs' maps are `growth` pixels larger, of those that can be had.

    Nothing is computed: the graph runs on fake tensors. Where no input is known as a map (a reshape or a permute is
    read before any conv), all of them grow in their pixels, as channels-first or channels-last maps or as sequences:
    in what makes a map of the graph larger. A graph that runs at one size only for all of these shows none elsewhere.
    """
    maps, given = spatial_maps(gm), placeholder_values(gm)
    if any(node.name in maps for node in given):
        return _grown(gm, [given[n] if n.name not in maps else _larger(given[n], 2, None, growth) for n in given])
    found: list[Shapes] = []
    for first, last in ((2, None), (1, -1), (1, None)):
        inputs = [_larger(v, first, last, growth) for v in given.values()]
        if inputs == list(given.values()):
            continue
        found.append(_grown(gm, inputs))
        if any(found[-1].get(n.name, shape_of(n)) != shape_of(n) for n in gm.graph.nodes if n.name in maps):
            return found[-1]
    return found[0] if found else _grown(gm, list(given.values()))


def _larger(value: Any, first: int, last: int | None, growth: int) -> Any:
    """(shape, dtype) of an input with more pixels in these dimensions: of a map, or of a sequence of whole numbers."""
    if not is_tensor_spec(value):
        return value
    shape, dtype = value
    if len(shape) < (3 if dtype.is_floating_point else 2) or (dtype.is_floating_point and (first, last) == (1, None)):
        return value
    grows = range(len(shape))[first:last]
    return tuple(n + growth if d in grows else n for d, n in enumerate(shape)), dtype


def _grown(gm: fx.GraphModule, inputs: Sequence[Any]) -> Shapes:
    return {node.name: shape for node, shape in fake_shapes(gm, inputs, partial=True).items()}


def placeholder_values(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """What the example gives for each input: (shape, dtype) of a tensor, or a value that is none."""
    known, positional = noted(gm).keyword, iter(noted(gm).positional)
    given: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        spec = known.get(str(node.target), next(positional, None))
        shape = shape_of(node)
        if shape is None:
            given[node] = spec if not isinstance(spec, dict) else node.args[0] if node.args else None
        else:
            given[node] = shape, dtype_of(node)
    return given


def fake_shapes(gm: fx.GraphModule, inputs: Sequence[Any], partial: bool = False) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every tensor in a graph (in eval mode), without computing anything.

    `inputs` are `(shape, dtype)` pairs, or values that are no tensors. With `partial` values that cannot be had for
    these inputs are left out, with all that is computed from them; else what an op raises is raised.
    """
    return _run(gm, inputs, partial).shapes


def fake_sizes(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, tuple[int, ...] | int]:
    """The same, and the whole numbers that the graph computes with, of those values that can be had."""
    runner = _run(gm, inputs, partial=True)
    return {**runner.shapes, **runner.numbers}


def _run(gm: fx.GraphModule, inputs: Sequence[Any], partial: bool) -> _ShapeRunner:
    runner = _ShapeRunner(gm, partial)
    device = next((t.device for t in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), quiet():
        runner.run(*(_fake(value, device) for value in inputs), enable_io_processing=False)
    return runner


def _fake(value: Any, device: torch.device) -> Any:
    return torch.empty(value[0], dtype=value[1], device=device) if is_tensor_spec(value) else value


def is_tensor_spec(value: Any) -> bool:
    """Whether a value is (shape, dtype), which stands for a tensor."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype)


class _Unknown:
    """Stands for a value that could not be computed."""


class _ShapeRunner(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, partial: bool) -> None:
        super().__init__(gm)
        self.partial = partial
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.numbers: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return None
        if any(isinstance(self.env.get(v), _Unknown) for v in n.all_input_nodes):
            return _Unknown()
        try:
            value = self.value(n)
        except Exception:  # a constant size somewhere: this value is only there at the example's size
            if not self.partial:
                raise
            return _Unknown()
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        elif type(value) is int:
            self.numbers[n] = value
        return value

    def value(self, n: fx.Node) -> Any:
        source = n.args[0] if n.op == "call_module" and len(n.args) == 1 else None
        if not isinstance(source, fx.Node) or not isinstance(self.env[source], Tensor):
            return super().run_node(n)
        module, x = self.fetch_attr(str(n.target)), self.env[source]
        if ops.keeps_shape(module):
            return x
        if ops.is_plain(module, nn.Linear) and x.shape[-1] == module.in_features:
            return x.new_empty((*x.shape[:-1], module.out_features))
        if ops.plain_in(module, ops.CONVS) and x.dim() == ops.rank(module) and x.shape[1] == module.in_channels:
            config = module_config(module, module.in_channels, x.dim() - 2)
            return x.new_empty((x.shape[0], config.out_channels, *config.output_size(tuple(x.shape[2:]))))
        return super().run_node(n)


def follows(config: ConvConfig, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a map of shape `before` becomes one of the size of `after` under a convolution of this configuration."""
    sizes = before[2:]
    reach = zip(sizes, config.padding, config.dilation, config.kernel_size, strict=True)
    if any(n + lo + hi < d * (k - 1) + 1 for n, (lo, hi), d, k in reach):
        return False
    return before[0] == after[0] and config.output_size(sizes) == after[2:]


def observed_geometry(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> ConvConfig | None:
    """The stride and size rule that all (shape before, shape after) pairs of a part follow, as a conv of one tap or,
    where the size is rounded down, of `stride` taps; None if there is none. The first pair is the example's."""
    (first, last), *_ = pairs
    if len(first) != len(last) or len(first) < 3:
        return None
    stride = tuple(max(1, round(n / m)) for n, m in zip(first[2:], last[2:], strict=True))
    ndim = len(stride)
    for kernel in ((1,) * ndim, stride):  # ceil(n / s), floor(n / s)
        config = ConvConfig(first[1], last[1], kernel, stride, ((0, 0),) * ndim, (1,) * ndim)
        if all(follows(config, before, after) for before, after in pairs):
            return config
    return None
