"""Describes one layer as an affine op: its configuration, how it may be pruned, and its geometry.

`Network` bundles a traced graph with its regions and answers these questions; enumeration and rewriting share it.

    config     the `ConvConfig` of the layer's affine ops composed, its activation linearized
    reducible  the layer's conv may be pruned: same channels in and out, stride 1, same size in and out
    geometry   stride, window and size rule, also of what is not affine (a max pool has a window like an average pool)
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from ..algebra import linear
from ..algebra.side_vectors import side_vector
from ..errors import OptionError
from ..graph import ops
from ..graph.conv_configs import follows_rule, identity_config, module_config, pool_config, same_size
from ..graph.map_shapes import GROWTH, follows, holds_tensors, observed_geometry, spatial_maps, values_at
from ..graph.node_facts import path_of, tensor_shape
from ..graph.raw_nodes import op_name
from ..graph.shapes import check_crops
from ..ir import ConvConfig, Layer, Parallel, Refusal, Region, Series
from .calls import Calls
from .narrowing import Narrowing
from .regions import find_regions
from .same_layers import shared_calls

__all__ = ["Network"]


def _factor(module: nn.Module) -> Tensor | None:
    """What a norm or scale multiplies each channel by, without its sign; None for any other module."""
    if ops.plain_in(module, ops.BATCH_NORMS) and getattr(module, "running_var", None) is not None:
        norm: Any = module
        factor: Tensor = (norm.running_var.detach() + norm.eps).rsqrt()
        return factor if norm.weight is None else factor * norm.weight.detach().abs()
    return module.scale.detach().abs() if isinstance(module, ops.ChannelAffine) else None


class Network:
    """A canonical graph, its regions, and constant-time access to nodes, modules, series and configurations."""

    def __init__(self, gm: fx.GraphModule, regions: tuple[Region, ...] | None = None, fine: bool = False) -> None:
        self.gm = gm
        self.fine = fine
        self.nodes: dict[str, fx.Node] = {n.name: n for n in gm.graph.nodes}
        self.regions = find_regions(gm, fine) if regions is None else regions
        self.series: dict[str, Series] = {s.name: s for r in self.regions for s in r.series.walk()}
        self._configs: dict[int, ConvConfig | Refusal] = {}
        self._geometries: dict[int, ConvConfig | None] = {}
        self._convs: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._modules: dict[str, nn.Module] = {}
        self._norms: dict[str, float] = {}
        self.held: dict[object, object] = {}  # what those who use it keep with it, each under a key of its own
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}  # what ops make of constant maps (`exact`)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a node's value, as the example gave it."""
        return tensor_shape(self.nodes[name])

    def module(self, name: str) -> nn.Module:
        """The module that a node calls."""
        if name not in self._modules:
            self._modules[name] = self.gm.get_submodule(str(self.nodes[name].target))
        return self._modules[name]

    def path(self, name: str) -> str:
        """The qualified name of the module that a node came from."""
        node = self.nodes[name]
        return str(node.target) if node.op == "call_module" else path_of(node) or node.name

    @cached_property
    def vectors(self) -> dict[str, str]:
        """Nodes that add a vector from the side to a map, and the nodes of these vectors."""
        found = {n.name: side_vector(n) for n in self.gm.graph.nodes}
        return {name: side[0].name for name, side in found.items() if side is not None}

    @cached_property
    def shared(self) -> dict[str, tuple[str, ...]]:
        """Nodes of convs whose module or weight is used by another call, and all nodes that use it."""
        return shared_calls(self.gm)

    @cached_property
    def calls(self) -> Calls:
        """The runs of layers that are called several times."""
        return Calls(self)

    @cached_property
    def narrowing(self) -> Narrowing:
        """The cuts at which spans can become narrower."""
        return Narrowing(self)

    @cached_property
    def maps(self) -> frozenset[str]:
        """Nodes whose values are channels-first maps; see `map_shapes`."""
        return spatial_maps(self.gm)

    def sized(self, name: str) -> bool:
        """Whether a value is a channels-first map, or a vector."""
        return name in self.maps or len(self.shape(name)) == 2

    @cached_property
    def elsewhere(self) -> list[dict[str, tuple[int, ...]]]:
        """The shapes of the values at larger inputs, as far as the graph runs there."""
        return [] if holds_tensors(self.gm) else [values_at(self.gm, growth) for growth in GROWTH]

    def observed(self, entry: str, exit: str) -> ConvConfig | None:
        """The size rule between two maps, whatever lies between them, seen at the example and at larger inputs."""
        if entry not in self.maps or exit not in self.maps or not self.elsewhere:
            return None
        pairs = self._seen(entry, exit)
        if len(pairs) == 1 and 1 in self.shape(exit)[2:]:
            return None  # any stride leaves one pixel of one
        return observed_geometry(pairs)

    def _seen(self, entry: str, exit: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The shapes of two values at the example, and at those larger inputs at which both can be had."""
        pairs = [(self.shape(entry), self.shape(exit))]
        return pairs + [(seen[entry], seen[exit]) for seen in self.elsewhere if entry in seen and exit in seen]

    @cached_property
    def _layer_of(self) -> dict[str, Layer]:
        return {lay.conv: lay for s in self.series.values() for lay in s.layers if lay.conv is not None}

    def l1(self, name: str) -> float:
        """The L1 norm of a conv node's weight, with the norms and scales of its layer folded into it.

        Batch statistics undo whatever scale a weight has, so the weight alone would say nothing.
        """
        if name not in self._norms:
            conv: Any = self.module(name)
            weight = conv.weight.detach().abs()
            layer = self._layer_of.get(name)
            at = layer.nodes.index(name) if layer is not None else 0
            for other in self.affine_nodes(layer) if layer is not None and ops.plain_in(conv, ops.CONVS) else ():
                factor = _factor(self.module(other)) if self.nodes[other].op == "call_module" else None
                if factor is None or factor.numel() not in (1, weight.shape[0], conv.groups * weight.shape[1]):
                    continue
                if layer is not None and layer.nodes.index(other) > at:
                    weight = weight * factor.view(-1, *(1,) * (weight.dim() - 1))
                elif factor.numel() == 1:
                    weight = weight * factor
                else:  # one row of input channels a group, the same for all outputs of the group
                    rows = factor.view(conv.groups, -1).repeat_interleave(weight.shape[0] // conv.groups, 0)
                    weight = weight * rows.view(*rows.shape, *(1,) * (weight.dim() - 2))
            self._norms[name] = float(weight.sum())
        return self._norms[name]

    def affine_nodes(self, layer: Layer) -> tuple[str, ...]:
        """The layer's own affine nodes in order: without its activation and, for a parallel layer, up to its join."""
        skip = {layer.activation, *((*layer.parallel.inner, layer.parallel.node) if layer.parallel else ())}
        return tuple(n for n in layer.nodes if n not in skip)

    def config(self, layer: Layer) -> ConvConfig | Refusal:
        """The layer's own affine ops as one configuration (for a parallel layer: what follows the join)."""
        if id(layer) not in self._configs:
            self._configs[id(layer)] = self._config(layer)
        return self._configs[id(layer)]

    def _config(self, layer: Layer) -> ConvConfig | Refusal:
        if layer.opaque is not None:
            return layer.opaque
        entry = layer.parallel.node if layer.parallel else layer.entry
        shape = self.shape(entry)
        config = identity_config(shape[1], len(shape) - 2)
        for name in self.affine_nodes(layer):
            if name == layer.conv and name in self.shared and name not in self.calls.convs:
                reason = "the conv is shared with another call that has other layers, and merging would untie them"
                return Refusal(reason, self.shared[name])
            step = self.step(name, config)
            try:
                check_crops(config, step)
                config = linear.compose_config(config, step)
            except OptionError as error:
                return Refusal(str(error), (name,))
        return config

    def step(self, name: str, before: ConvConfig) -> ConvConfig:
        """The configuration of one affine node after ops of configuration `before`."""
        channels, ndim = before.out_channels, len(before.kernel_size)
        if self.nodes[name].op != "call_module":
            return identity_config(channels, ndim)  # a vector that is added from the side
        return module_config(self.module(name), channels, ndim)

    def enlarging(self, layers: tuple[Layer, ...]) -> str | None:
        """The first node of these layers, branches included, of `enlarging`: a transposed conv, a shuffle."""
        for name in (n for layer in layers for n in layer.all_nodes() if layer.opaque is None):
            if self.nodes[name].op == "call_module" and ops.enlarges(self.module(name)):
                return name
        return None

    def reducible(self, layer: Layer) -> bool:
        """Whether the layer's conv may be pruned, with all the layer's affine ops: the layer becomes the identity."""
        config = self.config(layer)
        if layer.conv is None or isinstance(config, Refusal) or self.shape(layer.entry) != self.shape(layer.exit):
            return False
        if config.upscale:
            return False
        return all(s == 1 for s in config.stride) and config.in_channels == config.out_channels and same_size(config)

    def convs(self, layers: tuple[Layer, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(node names of the convs on the main path, of all convs), both in the order of the graph.

        The main path of a sum is the branch with the most convs; a concatenation's and a product's is all branches.
        """
        found = [self._layer_convs(layer) for layer in layers]
        return tuple(c for main, _ in found for c in main), tuple(c for _, every in found for c in every)

    def _layer_convs(self, layer: Layer) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if id(layer) not in self._convs:
            self._convs[id(layer)] = self._find_convs(layer)
        return self._convs[id(layer)]

    def _find_convs(self, layer: Layer) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if layer.parallel is not None:
            found = [self.convs(b.layers) for b in layer.parallel.branches]
            every = tuple(c for _, all_convs in found for c in all_convs)
            if layer.parallel.join in ("add", "sub"):
                return max((main for main, _ in found), key=len), every
            return tuple(c for main, _ in found for c in main), every
        if layer.conv is not None:
            return (layer.conv,), (layer.conv,)
        called = [n for n in layer.nodes if layer.opaque is not None and self.nodes[n].op == "call_module"]
        inside = tuple(n for n in called if ops.plain_in(self.module(n), (*ops.CONVS, *ops.TRANSPOSED)))
        return inside, inside

    def meeting(self, value: fx.Node, reader: fx.Node) -> Refusal | None:
        """Why the region that gives `value` ends at `reader`, if that is an op of several values."""
        operands = [n for n in reader.all_input_nodes if n.op != "get_attr"]
        if reader.op == "output" or len(operands) < 2:
            return None
        name = op_name(reader)
        nodes = (reader.name, *(n.name for n in operands))
        if name in ops.JOINS and not reader.kwargs:
            return Refusal(f"the operands of {name} leave different values, so it closes no block", nodes)
        return Refusal(f"{name or reader.name} takes several values and is no sum, concatenation or product", nodes)

    def geometry(self, layer: Layer) -> ConvConfig | None:
        """Stride, window and size rule of a layer, affine or not; None if its output size follows no such rule."""
        if id(layer) not in self._geometries:
            self._geometries[id(layer)] = self._geometry(layer)
        return self._geometries[id(layer)]

    def _geometry(self, layer: Layer) -> ConvConfig | None:
        before, after = self.shape(layer.entry), self.shape(layer.exit)
        if not self.sized(layer.entry) or not self.sized(layer.exit) or len(before) != len(after):
            return None
        found = self._structural_geometry(layer, before, after)
        # The larger inputs tell apart what a map of one pixel does not.
        if found is not None and all(follows(found, a, b) for a, b in self._seen(layer.entry, layer.exit)):
            return found
        return self.observed(layer.entry, layer.exit)

    def _structural_geometry(self, layer: Layer, before: tuple[int, ...], after: tuple[int, ...]) -> ConvConfig | None:
        if layer.opaque is not None:
            return self._opaque_geometry(layer, before, after)
        own = self.config(layer)
        if isinstance(own, Refusal):
            step = module_config(self.module(layer.conv), before[1], len(before) - 2) if layer.conv else None
            own = step if step is not None else identity_config(before[1], len(before) - 2)
        if own.upscale:
            return None  # no convolution's rule
        if layer.parallel is None:
            return own
        joined = self._joined_geometry(layer.parallel)
        try:
            return None if joined is None else linear.compose_config(joined, own)
        except OptionError:
            return None

    def _joined_geometry(self, parallel: Parallel) -> ConvConfig | None:
        shape = self.shape(parallel.node)
        if parallel.join == "mesh":
            return None
        found: list[ConvConfig] = []
        for branch in parallel.branches:
            if self.shape(branch.exit)[2:] != shape[2:]:
                continue  # a gate of one value a channel, say: the map's geometry is that of the other branch
            whole = self.series_geometry(branch, branch.layers)
            if whole is not None:  # else its size is that of the others, wherever the network runs at all
                found.append(whole)
        if not found:
            return None
        try:
            whole = linear.cat_configs(found) if parallel.join == "cat" else linear.add_configs(found)
        except OptionError:
            return None
        return whole if whole.out_channels == shape[1] else replace(whole, out_channels=shape[1], groups=1)

    def series_geometry(self, series: Series, layers: tuple[Layer, ...]) -> ConvConfig | None:
        """The geometry of consecutive layers of a series."""
        entry, exit = (layers[0].entry, layers[-1].exit) if layers else (series.entry, series.exit)
        shape = self.shape(entry)
        if not self.sized(entry) or not self.sized(exit) or len(shape) != len(self.shape(exit)):
            return None
        whole = identity_config(shape[1], len(shape) - 2)
        for layer in layers:
            step = self.geometry(layer)
            if step is None:  # a cut in it is no map, as in a channels-last part: look at the ends only
                return self.observed(entry, exit)
            try:
                whole = linear.compose_config(whole, step)
            except OptionError:
                return self.observed(entry, exit)
        return whole

    def _opaque_geometry(self, layer: Layer, before: tuple[int, ...], after: tuple[int, ...]) -> ConvConfig | None:
        if len(layer.nodes) > 1:
            return None
        (name,) = layer.nodes
        node, ndim = self.nodes[name], len(before) - 2
        if ops.resizes(node, self.gm):
            return None  # its output has the size of its input only for the example
        module = self.module(name) if node.op == "call_module" else None
        if module is not None and ops.plain_in(module, (*ops.MAX_POOLS, *ops.AVG_POOLS)):
            return pool_config(module, before[1], ndim) if follows_rule(module, ndim) else None
        if module is not None and isinstance(module, ops.CONVS) and ops.plain_in(module, ops.CONVS):
            return module_config(module, before[1], ndim)
        # Equal sizes at the example (a strided op on one pixel) are no rule: only an op that is known to keep them is.
        keeps = module is not None and ops.keeps_shape(module)
        return identity_config(before[1], ndim) if keeps and before == after else None
