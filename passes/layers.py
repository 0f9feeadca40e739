"""What one layer is as an affine op: its configuration, how it may be pruned, and its geometry.

`Network` bundles a traced graph with its regions and answers these questions; enumeration and rewriting share it.

    config     the `ConvConfig` of the layer's affine ops composed, its activation linearized
    reducible  the layer's conv may be pruned: same channels in and out, stride 1, same size in and out
    geometry   stride, window and size rule, also of what is not affine (a max pool has a window like an average pool)
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import fx, nn

from . import linear, ops
from .canonical import op_name
from .errors import OptionError
from .ir import ConvConfig, Layer, PaddingMode, Parallel, Refusal, Region, Series
from .observed import GROWTH, follows, observed_geometry, spatial_maps, values_at
from .regions import find_regions
from .sides import side_vector

__all__ = ["Network", "identity_config", "is_identity_config", "module_config"]


class Network:
    """A canonical graph, its regions, and constant-time access to nodes, modules, series and configurations."""

    def __init__(self, gm: fx.GraphModule, regions: tuple[Region, ...] | None = None) -> None:
        self.gm = gm
        self.nodes: dict[str, fx.Node] = {n.name: n for n in gm.graph.nodes}
        self.regions = find_regions(gm) if regions is None else regions
        self.series: dict[str, Series] = {s.name: s for r in self.regions for s in r.series.walk()}
        self._configs: dict[int, ConvConfig | Refusal] = {}
        self._geometries: dict[int, ConvConfig | None] = {}
        self._norms: dict[str, float] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a node's value, as the example gave it."""
        shape: tuple[int, ...] = self.nodes[name].meta["shape"]
        return shape

    def module(self, name: str) -> nn.Module:
        """The module that a node calls."""
        return self.gm.get_submodule(str(self.nodes[name].target))

    def path(self, name: str) -> str:
        """The qualified module name behind a node."""
        node = self.nodes[name]
        return str(node.target) if node.op == "call_module" else str(node.meta.get("path", "")) or node.name

    @cached_property
    def vectors(self) -> dict[str, str]:
        """Nodes that add a vector from the side to a map, and the nodes of these vectors."""
        found = {n.name: side_vector(n) for n in self.gm.graph.nodes}
        return {name: side[0].name for name, side in found.items() if side is not None}

    @cached_property
    def shared(self) -> frozenset[str]:
        """Nodes of convs whose module or weight is used by another call."""
        users: dict[int, list[str]] = {}
        for node in self.gm.graph.nodes:
            if node.op == "call_module":
                for parameter in self.gm.get_submodule(str(node.target)).parameters():
                    users.setdefault(id(parameter), []).append(node.name)
        return frozenset(name for names in users.values() if len(names) > 1 for name in names)

    @cached_property
    def maps(self) -> frozenset[str]:
        """Nodes whose values are channels-first maps; see `observed`."""
        return spatial_maps(self.gm)

    @cached_property
    def elsewhere(self) -> list[dict[str, tuple[int, ...]]]:
        """The shapes of the values at larger inputs, as far as the graph runs there."""
        return [values_at(self.gm, growth) for growth in GROWTH]

    def observed(self, entry: str, exit: str) -> ConvConfig | None:
        """The size rule between two maps, whatever lies between them, seen at the example and at larger inputs."""
        if entry not in self.maps or exit not in self.maps:
            return None
        pairs = [(self.shape(entry), self.shape(exit))]
        pairs += [(seen[entry], seen[exit]) for seen in self.elsewhere if entry in seen and exit in seen]
        return observed_geometry(pairs)

    def l1(self, name: str) -> float:
        """The L1 norm of a conv node's weight."""
        if name not in self._norms:
            weight: Any = self.module(name).weight
            self._norms[name] = float(weight.detach().abs().sum())
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
            if name == layer.conv and name in self.shared:
                return Refusal("the conv is shared with another call, and merging would untie them", (name,))
            step = self.step(name, config)
            try:
                config = linear.compose_config(config, step)
            except OptionError as error:
                return Refusal(str(error), (name,))
        return config

    def step(self, name: str, before: ConvConfig) -> ConvConfig:
        """The configuration of one affine node behind ops of configuration `before`."""
        channels, ndim = before.out_channels, len(before.kernel_size)
        if self.nodes[name].op != "call_module":
            return identity_config(channels, ndim)  # a vector that is added from the side
        return module_config(self.module(name), channels, ndim)

    def reducible(self, layer: Layer) -> bool:
        """Whether the layer's conv may be pruned, with all the layer's affine ops: the layer becomes the identity."""
        config = self.config(layer)
        if layer.conv is None or isinstance(config, Refusal) or self.shape(layer.entry) != self.shape(layer.exit):
            return False
        return set(config.stride) == {1} and config.in_channels == config.out_channels and _same_size(config)

    def convs(self, layers: tuple[Layer, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(node names of the convs on the main path, of all convs), both in the order of the graph.

        The main path of a sum is the branch with the most convs; a concatenation's and a product's is all branches.
        """
        main: list[str] = []
        every: list[str] = []
        for layer in layers:
            if layer.parallel is not None:
                found = [self.convs(b.layers) for b in layer.parallel.branches]
                every += [c for _, all_convs in found for c in all_convs]
                if layer.parallel.join in ("add", "sub"):
                    longest = max(range(len(found)), key=lambda i: len(found[i][0]))
                    main += found[longest][0]
                else:
                    main += [c for m, _ in found for c in m]
            elif layer.conv is not None:
                main.append(layer.conv)
                every.append(layer.conv)
            elif layer.opaque is not None:
                for name in layer.nodes:
                    if self.nodes[name].op == "call_module" and ops.plain_in(self.module(name), ops.CONVS):
                        main.append(name)
                        every.append(name)
        return tuple(main), tuple(every)

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
        if layer.entry not in self.maps or layer.exit not in self.maps:
            return None
        before, after = self.shape(layer.entry), self.shape(layer.exit)
        found = self._structural_geometry(layer, before, after)
        if found is not None and follows(found, before, after):
            return found
        return self.observed(layer.entry, layer.exit)

    def _structural_geometry(self, layer: Layer, before: tuple[int, ...], after: tuple[int, ...]) -> ConvConfig | None:
        if layer.opaque is not None:
            return self._opaque_geometry(layer, before, after)
        own = self.config(layer)
        if isinstance(own, Refusal):
            step = module_config(self.module(layer.conv), before[1], len(before) - 2) if layer.conv else None
            own = step if step is not None else identity_config(before[1], len(before) - 2)
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
            if whole is None:
                return None
            found.append(whole)
        try:
            return linear.cat_configs(found) if parallel.join == "cat" else linear.add_configs(found)
        except OptionError:
            return None

    def series_geometry(self, series: Series, layers: tuple[Layer, ...]) -> ConvConfig | None:
        """The geometry of consecutive layers of a series."""
        entry, exit = (layers[0].entry, layers[-1].exit) if layers else (series.entry, series.exit)
        if entry not in self.maps or exit not in self.maps:
            return None
        shape = self.shape(entry)
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
            return _pool_config(module, before[1], ndim) if _follows_rule(module, ndim) else None
        if module is not None and isinstance(module, ops.CONVS) and ops.plain_in(module, ops.CONVS):
            return module_config(module, before[1], ndim)
        return identity_config(before[1], ndim) if before == after else None


def identity_config(channels: int, ndim: int) -> ConvConfig:
    """1 x 1, stride 1, no padding, one group a channel."""
    ones = (1,) * ndim
    return ConvConfig(channels, channels, ones, ones, ((0, 0),) * ndim, ones, channels)


def is_identity_config(config: ConvConfig) -> bool:
    """Whether nothing but a diagonal is left: 1 x 1, stride 1, no padding, one group a channel."""
    return config == identity_config(config.in_channels, len(config.kernel_size))


def _same_size(config: ConvConfig) -> bool:
    """Whether output size equals input size for every input."""
    return all(
        lo + hi == d * (k - 1)
        for (lo, hi), d, k in zip(config.padding, config.dilation, config.kernel_size, strict=True)
    )


def _tuple(value: Any, ndim: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (int(value),) * ndim


def _pool_config(pool: Any, channels: int, ndim: int) -> ConvConfig:
    kernel, stride = _tuple(pool.kernel_size, ndim), _tuple(pool.stride or pool.kernel_size, ndim)
    before = _tuple(pool.padding, ndim)
    # ceil_mode rounds the output size up, which is s - 1 more pixels to read behind.
    extra = [s - 1 if pool.ceil_mode else 0 for s in stride]
    pads = tuple((p, p + e) for p, e in zip(before, extra, strict=True))
    dilation = _tuple(getattr(pool, "dilation", 1), ndim)
    return ConvConfig(channels, channels, kernel, stride, pads, dilation, channels)


def _follows_rule(pool: Any, ndim: int) -> bool:
    """Whether the output size is a conv's for every input size.

    torch leaves out a last window that a ceil_mode pool would begin behind its input, which can only happen where a
    stride reaches past the rest of the window.
    """
    config = _pool_config(pool, 1, ndim)
    reach = zip(config.stride, config.padding, config.dilation, config.kernel_size, strict=True)
    return not pool.ceil_mode or all(s + before <= d * (k - 1) + 1 for s, (before, _), d, k in reach)


def module_config(module: nn.Module, channels: int, ndim: int) -> ConvConfig:
    """The configuration of one affine module on a map of `channels` channels in `ndim` spatial dimensions."""
    any_module: Any = module
    if isinstance(module, ops.CONVS):
        return _conv_config(any_module)
    if ops.plain_in(module, ops.AVG_POOLS):
        return _pool_config(module, channels, ndim)
    if ops.plain_in(module, (*ops.PADS, *ops.MIRRORS)):
        flat = any_module.padding  # last dimension first, before and after
        pads = tuple((flat[2 * i], flat[2 * i + 1]) for i in reversed(range(ndim)))
        fill = _fill(pads, ops.mirror_mode(module), float(getattr(module, "value", 0.0)))
        return ConvConfig(channels, channels, (1,) * ndim, (1,) * ndim, pads, (1,) * ndim, channels, *fill)
    config = identity_config(channels, ndim)
    if isinstance(module, ops.ChannelSelect) and module.index != tuple(range(channels)):
        return replace(config, out_channels=len(module.index), groups=1)
    return config


def _conv_config(conv: Any) -> ConvConfig:
    kernel, dilation = tuple(conv.kernel_size), tuple(conv.dilation)
    if conv.padding == "same":
        extents = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = tuple((e // 2, e - e // 2) for e in extents)
    elif conv.padding == "valid":
        pads = ((0, 0),) * len(kernel)
    else:
        pads = tuple((int(p), int(p)) for p in conv.padding)
    fill = _fill(pads, conv.padding_mode)
    inner, outer = conv.in_channels, conv.out_channels
    return ConvConfig(inner, outer, kernel, tuple(conv.stride), pads, dilation, conv.groups, *fill)


def _fill(pads: tuple[tuple[int, int], ...], mode: PaddingMode, value: float = 0.0) -> tuple[PaddingMode, float]:
    """How a config says what its padding is filled with; one that does not pad says nothing."""
    return (mode, value) if any(map(any, pads)) else ("zeros", 0.0)
