"""Goes through a graph with many images at once, a place at a time, holding little.

All images cannot have all their values in memory: 256 photographs in a first expansion to 96
channels take 1.2 GB.
So they go through in chunks, and between two places a `Lockstep` holds, for each chunk, only what later nodes read
(*live* values), at a node where that is small. What a place itself needs is computed from there, a chunk at a time, and
forgotten:

    node      0 ........ held ......... place .............. next
    chunk 1   [ live values ] ─ computed again ─ used, dropped
    chunk 2   [ live values ] ─ computed again ─ used, dropped
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import arguments_of, batches_for, images_at_once

__all__ = ["Lockstep"]

CHUNK = 16  # images
HELD_BYTES = 256 << 20  # of live values that are held without a look for a narrower place


class Lockstep:
    """One graph on the images of a calibration, in chunks. `at` is the index of the first node that is not held."""

    def __init__(self, gm: fx.GraphModule, calibration: Calibration, size: int | None = None) -> None:
        """`size` images are a chunk (default: `images_at_once`, which needs the shapes of a traced graph)."""
        size = images_at_once(gm, CHUNK) if size is None else size
        self.nodes = list(gm.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.last = {n: max((self.index[u] for u in n.users), default=-1) for n in self.nodes}
        self._run = fx.Interpreter(gm, garbage_collect_values=False)
        self.at = 0
        self.held: list[dict[fx.Node, Any]] = []
        self.images: list[int] = []
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        for batch in batches_for(gm, calibration, size):
            values = arguments_of(gm, batch, calibration.names)
            self.held.append(dict(zip(inputs, values, strict=True)))
            self.images.append(len(batch[0]))

    def __len__(self) -> int:
        return len(self.held)

    def values(self, chunk: int, wanted: Collection[fx.Node]) -> dict[fx.Node, Any]:
        """The values of some nodes for one chunk, with their derivatives where gradients are on."""
        known = self.held[chunk]
        needed, queue = set[fx.Node](), [n for n in wanted if n not in known]
        while queue:
            node = queue.pop()
            if node not in needed:
                needed.add(node)
                queue += [n for n in node.all_input_nodes if n not in known]
        order = sorted(needed, key=self.index.__getitem__)
        left = {n: sum(u in needed for u in n.users) for n in needed}
        env, kept = dict(known), set(wanted)
        for node in order:
            self._step(env, node)
            for source in node.all_input_nodes:
                if source in left:
                    left[source] -= 1
                    if not left[source] and source not in kept:
                        del env[source]
        return {n: env[n] for n in wanted}

    @torch.no_grad()
    def outputs(self) -> list[Any]:
        """What the graph gives for each chunk."""
        return [self.values(i, [self.nodes[-1]])[self.nodes[-1]] for i in range(len(self))]

    @torch.no_grad()
    def hold(self, stop: int) -> None:
        """Hold what is live before node `stop`, or before one that comes earlier, if less is live there."""
        if stop <= self.at or not self.held:
            return
        place: int | None = None
        for chunk, known in enumerate(self.held):
            env, best, kept = dict(known), None, dict(known)
            for i in range(self.at, stop if place is None else place):
                self._step(env, self.nodes[i])
                for source in self.nodes[i].all_input_nodes:
                    if self.last[source] <= i and source.op != "placeholder":
                        env.pop(source, None)
                if place is None:
                    size = _bytes(v for n, v in env.items() if self.last[n] > i and n.op != "get_attr") * len(self)
                    if best is None or size <= max(best[0], HELD_BYTES):
                        best, kept = (min(size, best[0]) if best else size, i + 1), dict(env)
            if place is None:
                assert best is not None
                place, env = best[1], kept
            self.held[chunk] = env
        assert place is not None
        self.at = place

    def _step(self, env: dict[fx.Node, Any], node: fx.Node) -> None:
        if node.op != "placeholder":
            self._run.env = env
            env[node] = self._run.run_node(node)


def _bytes(values: Iterable[Any]) -> int:
    return sum(v.numel() * v.element_size() for v in pytree.tree_leaves(list(values)) if isinstance(v, Tensor))
