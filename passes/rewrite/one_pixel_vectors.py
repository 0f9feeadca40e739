"""Limits a merged network to the example's size where a vector that it adds is a map at other sizes.

    def forward(self, x, y): return self.b(self.a(y) + x)      x and y of one pixel, a(y) of three by three

Here the example says that x adds one number a channel, and at other sizes it is a map like a(y). The algebra of a
vector (`side_vectors`) is not that of a map, so the inputs that such a vector grows with get a `Limit`: they are made
larger, one by one and then together, on fake tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from ..graph.map_shapes import fake_shapes, placeholder_values
from ..graph.node_facts import shape_of, tensor_shape
from ..model.size_limits import Limit

__all__ = ["vector_limits"]

GROWTH = (2, 37)


def vector_limits(gm: fx.GraphModule, vectors: Iterable[str]) -> list[Limit]:
    """The limits of inputs that some of the values named `vectors` have more than one pixel with."""
    names = set(vectors)
    if not names:
        return []
    given = placeholder_values(gm)
    maps = [n for n in gm.graph.nodes if n.op == "placeholder" and len(shape_of(n) or ()) > 2]
    found: dict[fx.Node, None] = {}
    for grown in [*([n] for n in maps), *([maps] if len(maps) > 1 else [])]:
        if len(grown) > 1 and found:
            break
        for growth in GROWTH:
            inputs = [
                ((*v[0][:2], *(s + growth for s in v[0][2:])), v[1]) if node in grown else v
                for node, v in given.items()
            ]
            seen = fake_shapes(gm, inputs, partial=True)
            if any(n.name in names and any(s != 1 for s in seen.get(n, ())[2:]) for n in seen):
                found |= dict.fromkeys(grown)
    limits = ((n, tensor_shape(n)) for n in found)
    return [Limit(str(n.target), shape, tuple(range(2, len(shape))), "size") for n, shape in limits]
