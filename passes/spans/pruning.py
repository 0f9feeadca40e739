"""Finds what a run of layers can be as one convolution, for each way to prune it: its states.

A `State` is a configuration and the convs that are kept for it. A conv layer offers itself or, if its conv is
reducible, the identity; a parallel element offers the joins of its branches' states; states are carried from cut to
cut. Of the states that share a configuration the one with the largest sum of L1 norms (weights with their norms folded
in) survives, so one pass over a series gives, for each merged kernel size and group structure, the best kept set that
holds every irreducible conv.

A branch of a sum whose convs are all pruned is the identity; where another branch is the identity already (a skip) it
is dropped, so that a residual block becomes its skip and not `2x`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import prod

from ..algebra import linear
from ..errors import OptionError
from ..graph.conv_configs import identity_config, is_identity_config
from ..graph.shapes import check_crops
from ..ir import ConvConfig, Layer, Parallel, Refusal, Series
from .layers import Network

__all__ = ["State", "States", "is_dropped", "side_inputs"]

MOST_COMBINATIONS = 20_000  # of the branches' states at one join


@dataclass(frozen=True)
class State:
    """One configuration that a run of layers can have, the kept conv nodes, and the sum of their L1 norms."""

    config: ConvConfig
    score: float
    kept: tuple[str, ...]
    pruned: bool  # nothing but the identity is left, where there were convs


class States:
    """The states of layers and of runs of layers in one network, none with a kernel over `max_kernel_size`.

    Without `prune` every conv is kept.
    """

    def __init__(self, network: Network, max_kernel_size: int | None, prune: bool = True) -> None:
        self.network = network
        self.limit = max_kernel_size
        self.prune = prune
        self._known: dict[int, list[State] | Refusal] = {}

    def extend(self, states: list[State] | Refusal | None, layer: Layer) -> list[State] | Refusal:
        """The states of a span with one more layer."""
        if isinstance(states, Refusal):
            return states
        more = self.layer_states(layer)
        if isinstance(more, Refusal) or states is None:
            return more
        return self.composed(states, more, layer)

    def composed(self, first: list[State], second: list[State], layer: Layer) -> list[State] | Refusal:
        """Each of the first states with each of the second ones after it."""
        found: list[State] = []
        refused: OptionError | None = None
        for a, b in product(first, second):
            try:
                check_crops(a.config, b.config)
                config = linear.compose_config(a.config, b.config)
            except OptionError as error:  # a crop beside a pad, see `shapes`
                refused = error
                continue
            found.append(State(config, a.score + b.score, a.kept + b.kept, a.pruned and b.pruned))
        if not found:
            return Refusal(str(refused), layer.nodes)
        return self.bounded(found, layer.nodes)

    def bounded(self, states: list[State], nodes: tuple[str, ...]) -> list[State] | Refusal:
        best: dict[tuple[ConvConfig, bool], State] = {}
        for state in states:
            if self.limit is not None and max(state.config.kernel_size, default=1) > self.limit:
                continue
            key = (state.config, state.pruned)
            if key not in best or state.score > best[key].score:
                best[key] = state
        if not best:
            smallest = min(max(s.config.kernel_size, default=1) for s in states)
            return Refusal(f"the merged kernel would be {smallest} or more, over max_kernel_size={self.limit}", nodes)
        return list(best.values())

    def layer_states(self, layer: Layer) -> list[State] | Refusal:
        """The states of one layer, or why it has none."""
        if id(layer) not in self._known:
            found = self._states_of(layer)
            if layer.activation is not None and not isinstance(found, Refusal):  # what stands for it may add constants
                found = [replace(s, config=replace(s.config, biased=True)) for s in found]
            self._known[id(layer)] = found
        return self._known[id(layer)]

    def _states_of(self, layer: Layer) -> list[State] | Refusal:
        config = self.network.config(layer)
        if isinstance(config, Refusal):
            return config
        if config.upscale and side_inputs(self.network, (layer,), frozenset(self.network.convs((layer,))[1])):
            return Refusal("a vector from the side is added beside an op that enlarges the map", layer.nodes)
        if layer.parallel is not None:
            joined = self.joined(layer.parallel)
            if isinstance(joined, Refusal):
                return joined
            after = [State(config, 0.0, (), not self.network.affine_nodes(layer))]
            return self.composed(joined, after, layer)
        if layer.conv is None:
            return [State(config, 0.0, (), not self.network.affine_nodes(layer))]
        states = [State(config, self.network.l1(layer.conv), (layer.conv,), False)]
        if self.prune and self.network.reducible(layer):
            states.append(State(identity_config(config.in_channels, len(config.kernel_size)), 0.0, (), True))
        return self.bounded(states, layer.nodes)

    def joined(self, parallel: Parallel) -> list[State] | Refusal:
        """The states of a parallel element: one for each combination of its branches' states."""
        if parallel.refusal is not None:
            return parallel.refusal
        if parallel.join == "mul":
            return Refusal("the product of two maps is not affine; only a fit can replace it", (parallel.node,))
        if parallel.join == "cat" and self.network.nodes[parallel.node].args[1] != 1:
            return Refusal("the concatenation is not along the channels", (parallel.node,))
        shape = self.network.shape(parallel.node)
        branches: list[list[State]] = []
        for branch in parallel.branches:
            own = self.network.shape(branch.exit)
            if own[2:] != shape[2:] or len(own) != len(shape):
                return Refusal("an operand of the join broadcasts over the map", (parallel.node,))
            states = self.branch_states(branch)
            if isinstance(states, Refusal):
                return states
            branches.append(states)
        if prod(map(len, branches)) > MOST_COMBINATIONS:  # many wide branches: all of a branch, or as little as may be
            branches = [[max(s, key=_score), min(s, key=_score)] if len(s) > 1 else s for s in branches]
        if prod(map(len, branches)) > MOST_COMBINATIONS:
            branches = [[max(s, key=_score)] for s in branches]
        found = []
        try:
            for combination in product(*branches):
                found.append(self.join_states(parallel, combination))
        except OptionError as error:
            return Refusal(str(error), (parallel.node,))
        return self.bounded(found, (parallel.node,))

    def branch_states(self, branch: Series) -> list[State] | Refusal:
        """The states of a whole branch; a plain skip is the identity."""
        if not branch.layers:
            shape = self.network.shape(branch.entry)
            return [State(identity_config(shape[1], len(shape) - 2), 0.0, (), False)]
        enlarging = self.network.enlarging(branch.layers)
        if enlarging is not None:
            return Refusal("a branch enlarges the map", (enlarging,))
        states: list[State] | Refusal | None = None
        for layer in branch.layers:
            states = self.extend(states, layer)
        assert states is not None
        return states

    def join_states(self, parallel: Parallel, combination: tuple[State, ...]) -> State:
        """The state of the join of one state a branch."""
        score = sum(s.score for s in combination)
        kept = tuple(c for s in combination for c in s.kept)
        if parallel.join == "add":
            left = [s for i, s in enumerate(combination) if not is_dropped(self.network, parallel, frozenset(kept), i)]
            config = linear.add_configs([s.config for s in left])
            convs = any(b.layers for b in parallel.branches)
            return State(config, score, kept, convs and len(left) == 1 and not kept and is_identity_config(config))
        join = linear.cat_configs if parallel.join == "cat" else linear.add_configs
        return State(join([s.config for s in combination]), score, kept, False)


def _score(state: State) -> float:
    return state.score


def is_dropped(network: Network, parallel: Parallel, kept: frozenset[str], index: int) -> bool:
    """Whether branch `index` vanishes when only the `kept` conv nodes stay: all pruned, beside another identity."""
    if parallel.join != "add":
        return False
    pruned = [_is_pruned(network, b, kept) for b in parallel.branches]
    empty = [not b.layers for b in parallel.branches]
    if not pruned[index]:
        return False
    return any(empty) or any(pruned[:index])


def _is_pruned(network: Network, branch: Series, kept: frozenset[str]) -> bool:
    _, convs = network.convs(branch.layers)
    return bool(convs) and not kept.intersection(convs) and all(_vanishes(network, lay, kept) for lay in branch.layers)


def _vanishes(network: Network, layer: Layer, kept: frozenset[str]) -> bool:
    """Whether a layer none of whose convs is kept is the identity (a pool or a norm without a conv stays)."""
    if layer.parallel is None:
        return layer.conv is not None or not network.affine_nodes(layer)
    if network.affine_nodes(layer):
        return False
    left = [i for i in range(len(layer.parallel.branches)) if not is_dropped(network, layer.parallel, kept, i)]
    branches = [layer.parallel.branches[i] for i in left]
    return len(branches) == 1 and all(_vanishes(network, lay, kept) for lay in branches[0].layers)


def side_inputs(network: Network, layers: tuple[Layer, ...], kept: frozenset[str]) -> tuple[str, ...]:
    """The nodes whose vectors enter from the side where only the `kept` conv nodes stay, in the order of the graph."""
    found: list[str] = []
    for layer in layers if network.vectors else ():
        if layer.conv is not None and layer.conv not in kept:
            continue
        if layer.parallel is not None:
            for i, branch in enumerate(layer.parallel.branches):
                if not is_dropped(network, layer.parallel, kept, i):
                    found += side_inputs(network, branch.layers, kept)
        found += [network.vectors[name] for name in network.affine_nodes(layer) if name in network.vectors]
    return tuple(dict.fromkeys(found))
