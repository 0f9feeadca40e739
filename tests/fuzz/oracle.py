"""A second way to compute a composed span: run the graph's own modules, each with its own padding, without activations.

Padding between layers is not padding before all of them, so the two agree where the merged window lies inside the
input; of an op that enlarges its map, where the window of the whole block of pixels does. The input is random and large
enough for such pixels, whatever the size of the network's maps.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.graph import ops
from lmfx.passes.ir import Candidate, Layer, MergePlan
from lmfx.passes.rewrite.narrowed import with_units
from lmfx.passes.rewrite.span_modules import build_span
from lmfx.passes.rewrite.trainable import rewrite
from lmfx.passes.spans.layers import Network
from lmfx.passes.spans.pruning import is_dropped
from tests.fuzz.compare import Wrong

__all__ = ["check_span", "factored_twice", "narrowed_twice"]

MOST_VALUES = 200_000


class _Unknown(Exception):
    """The span holds something that this oracle has no second way for."""


def check_span(network: Network, candidate: Candidate) -> bool:
    """Compare one composed candidate with the graph's own modules; False if the oracle cannot say."""
    conv = candidate.conv
    assert conv is not None
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    size = [
        2 * (abs(lo) + abs(hi)) + r + 4 * s + 3 for (lo, hi), r, s in zip(conv.padding, reach, conv.stride, strict=True)
    ]
    generator = torch.Generator().manual_seed(1)
    like = next(p for p in network.gm.parameters() if p.is_floating_point())
    x = torch.randn((1, conv.in_channels, *size), generator=generator, dtype=torch.float64).to(like.dtype)
    if x.numel() > MOST_VALUES:
        return False
    layers = network.series[candidate.span.series].layers[candidate.span.start : candidate.span.stop]
    wanted = set(candidate.kept)
    kept = frozenset(n for n in network.convs(layers)[1] if network.path(n) in wanted)
    module = build_span(network, candidate)
    assert isinstance(module, LinearSpan)
    with torch.no_grad():
        try:
            bare = candidate.post_norm is not None  # a norm after the conv: nothing stands for what goes
            expected = _run(network, layers, kept, x, candidate.span.activation, bare)
        except _Unknown:
            return False
        results = {"trainable": module.eval()(x), "merged": module.reparameterize().eval()(x)}
    inside = [slice(None), slice(None)]
    blocks = conv.upscale or (1,) * len(size)
    rows = zip(size, expected.shape[2:], conv.padding, reach, conv.stride, blocks, strict=True)
    for n, out, (lo, _), r, s, u in rows:
        # A transposed conv ends within its last block; what a pad adds there is zero in the graph, and a bias here.
        good = [o for o in range(out) if s * (o // u) - lo >= 0 and s * ((o + u - 1) // u) - lo + r <= n - 1]
        if not good:
            return False
        inside.append(slice(good[0], good[-1] + 1))
    for name, actual in results.items():
        if actual.shape != expected.shape:
            raise Wrong("oracle", f"{candidate.key} {name}: shape {tuple(expected.shape)} became {tuple(actual.shape)}")
        a, b = expected[tuple(inside)], actual[tuple(inside)]
        error = float((a - b).norm()) / max(float(a.norm()), 1e-6)
        if not error <= 1e-10:
            raise Wrong("oracle", f"{candidate.key} {name} differs from the linearized graph by {error:.1e}")
    return True


def _run(
    network: Network,
    layers: tuple[Layer, ...],
    kept: frozenset[str],
    x: Tensor,
    stays: str | None = None,
    bare: bool = False,
) -> Tensor:
    for layer in layers:
        if layer.opaque is not None:
            raise _Unknown
        if layer.conv is not None and layer.conv not in kept:
            continue
        if layer.parallel is not None:
            x = _join(network, layer, kept, x, bare)
        for name in network.affine_nodes(layer):
            node = network.nodes[name]
            if node.op != "call_module" or len(node.all_input_nodes) != 1:
                raise _Unknown
            x = network.module(name)(x)
        if layer.activation is not None and layer.activation != stays and not bare:
            x = _linearized(network.module(layer.activation), x)
    return x


def _linearized(module: Any, x: Tensor) -> Tensor:
    """An activation is the identity in a span, a norm of the map its own scale and bias."""
    if not isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
        return x
    tail = (-1, *(1,) * (x.dim() - 2))
    x = x if module.weight is None else x * module.weight.view(tail)
    return x if getattr(module, "bias", None) is None else x + module.bias.view(tail)


def _join(network: Network, layer: Layer, kept: frozenset[str], x: Tensor, bare: bool) -> Tensor:
    parallel: Any = layer.parallel
    values = [
        _run(network, branch.layers, kept, x, bare=bare)
        for i, branch in enumerate(parallel.branches)
        if not is_dropped(network, parallel, kept, i)
    ]
    if parallel.join == "cat":
        return torch.cat(values, 1)
    total = values[0]
    for value in values[1:]:
        total = total - value if parallel.join == "sub" else total + value
    return total


def narrowed_twice(network: Network, candidate: Candidate, rng: random.Random) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Two ways to take random channels away: the graph with nothing read of them, and the narrowed network of it."""
    cuts = []
    gm = copy.deepcopy(network.gm)
    for cut in candidate.cuts:
        private = network.narrowing.of(cut)
        assert private is not None
        space = private.space
        stay = space.indispensable([rng.random() for _ in range(space.units)])
        others = sorted(set(range(space.units)) - stay)
        units = stay | frozenset(rng.sample(others, cut.width // space.per_unit - len(stay)))
        cuts.append(with_units(private, cut, units))
        for name in (space.reader, *space.gates):
            source = network.nodes[name].all_input_nodes[0].name
            gone = [i for i, unit in enumerate(space.labels[source]) if unit not in units]
            layer: Any = gm.get_submodule(str(network.nodes[name].target))
            rows = (slice(None), gone) if not isinstance(layer, ops.TRANSPOSED) else (gone,)
            with torch.no_grad():
                layer.weight[rows] = 0
    return gm, rewrite(gm, MergePlan((replace(candidate, cuts=tuple(cuts)),)))


def factored_twice(network: Network, candidate: Candidate, rng: random.Random) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph with a conv that is the product of two, and the network with these two."""
    gm = copy.deepcopy(network.gm)
    conv: Any = gm.get_submodule(candidate.all_convs[0])
    assert candidate.conv is not None
    with torch.no_grad():
        weight, generator = conv.weight, torch.Generator().manual_seed(rng.randrange(10**9))
        out, channels, taps = len(weight), weight.shape[1], weight[0, 0].numel()
        filters, rank = candidate.conv.multiplier, candidate.conv.rank

        def drawn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        if rank:
            product = torch.einsum("or,rct->oct", drawn(out, rank), drawn(rank, channels, taps))
        else:
            product = torch.einsum("ocq,cqt->oct", drawn(out, channels, filters), drawn(channels, filters, taps))
        scale = weight.double().norm() / max(weight.numel(), 1) ** 0.5 / (rank or filters) ** 0.5
        weight.copy_((scale * product).view(weight.shape))
    return gm, rewrite(gm, MergePlan((candidate,)))
