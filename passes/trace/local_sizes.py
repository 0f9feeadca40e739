"""Lets each op read sizes off values near it.

    n = x.size(0)                                           y = view(x, x.size(0), 3, -1)
    y = view(x, n, 3, -1)                   ->              z = view(conv(y), conv(y).size(0), -1)
    z = view(conv(y), n, -1)                                cat(expand(token, z.size(0), -1, -1), z)
    cat(expand(token, n, -1, -1), z)

A forward often reads the batch where it enters, and torch.export always does. As edges of the graph such reads tie the
input to ops everywhere, so that no part between them is a block of its own. Which dimensions have the same size, or a
multiple of it, is seen where the graph runs on fake tensors with one dimension of its inputs larger at a time, by
amounts of different rests: what is equal each time is taken for equal. The graph is compared with the model after this,
at the example and at other sizes. Where the operands have no such size, the nearest value is read that they are
computed from. The symbolic shapes of a program say the same, and were tried: they found no more.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from ..graph.graph_edit import drop_dead
from ..graph.map_shapes import fake_sizes, is_tensor_spec, placeholder_values
from ..graph.node_facts import shape_of
from ..graph.raw_nodes import reads_sizes

__all__ = ["localize_sizes"]

_IMAGES, _PIXELS = (1, 4), (32, 37, 43)  # what the first dimension of all inputs grows by, or another: one run each

Run = dict[fx.Node, tuple[int, ...] | int]
"""The shapes of tensors and the whole numbers of a graph at one size of its inputs."""

Seen = tuple[int | None, ...]
"""A size in each run; None where it cannot be had."""


def localize_sizes(gm: fx.GraphModule) -> bool:
    """Change the sizes that ops of a canonical graph are given for those of values near them; False if none is."""
    far = _far(gm.graph)
    if far:
        localizer = _Localizer(gm)
        for node in far:
            localizer.visit(node)
        drop_dead(gm)
        gm.recompile()
    return bool(far)


def _far(graph: fx.Graph) -> list[fx.Node]:
    """The ops that are given sizes of values which they do not work with."""
    read: dict[fx.Node, set[fx.Node]] = {}  # sizes and what is computed from them alone -> the values they are of
    far: list[fx.Node] = []
    for node in graph.nodes:
        sources = set(node.all_input_nodes)
        if sources and shape_of(node) is None and (reads_sizes(node) or sources <= read.keys()):
            read[node] = set().union(*(read.get(s, {s}) for s in sources))
        elif shape_of(node) is not None and any(not read.get(s, sources) <= sources for s in sources):
            far.append(node)
    return far


class _Localizer:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph, self.runs = gm.graph, list(_runs(gm))
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}

    def visit(self, node: fx.Node) -> None:
        """Change the sizes that one node is given."""
        operands = [n for n in node.all_input_nodes if self.sizes(n)] or self.met(node)
        made: dict[fx.Node, fx.Node] = {}

        def local(number: fx.Node) -> fx.Node:
            if number not in made and _varies(self.number(number)):
                made[number] = self.near(number, operands, local)
            return made.get(number, number)

        with self.graph.inserting_before(node):
            node.args, node.kwargs = fx.map_arg(node.args, local), fx.map_arg(node.kwargs, local)

    def met(self, node: fx.Node) -> list[fx.Node]:
        """What a value meets that is made of constants and sizes; it is moved there, with the views of it between."""
        chain = [node]
        while users := [n for n in chain[-1].users if n in self.order]:
            first = min(users, key=self.order.__getitem__)
            readers = {n for link in chain for n in link.users} - set(chain)
            if first.op == "output" or any(self.order.get(n, -1) < self.order[first] for n in readers):
                return []  # what reads it earlier would come before it
            operands = [n for n in first.all_input_nodes if n not in chain and self.sizes(n)]
            if operands:
                for moved in chain:
                    first.prepend(moved)
                    self.order[moved] = self.order[first]
                return operands
            chain.append(first)
        return []

    def near(self, number: fx.Node, operands: list[fx.Node], local: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """A node that has the same number: read off an operand, or computed from what is; else the same of the last
        values that the operands depend on; the number itself where there is none."""
        if (place := self.place(number, operands)) is not None:
            return self.size(*place)
        if self.follows(number, lambda part: self.place(part, operands) is not None):
            return self.graph.node_copy(number, local)
        parts, read = self.all_parts(number), set[fx.Node]()
        for value in self.before(operands):
            for dim, seen in self.sizes(value):
                if _multiple(self.number(number), seen) == 1:
                    return self.size(value, dim)
                read |= {n for n in parts if _multiple(self.number(n), seen) == 1}
            if self.follows(number, read.__contains__):
                return self.graph.node_copy(number, local)
        return self.graph.node_copy(number, local) if self.parts(number) else number

    def place(self, number: fx.Node, values: list[fx.Node]) -> tuple[fx.Node, int, int] | None:
        """(value, dimension, how many times the number it is) of one of some values, if possible once the number."""
        found = [(v, d, t) for v in values for d, seen in self.sizes(v) if (t := _multiple(self.number(number), seen))]
        return min(found, key=lambda place: place[2] > 1, default=None)

    def size(self, value: fx.Node, dim: int, times: int = 1) -> fx.Node:
        size = self.graph.call_method("size", (value, dim))
        return size if times == 1 else self.graph.call_function(operator.floordiv, (size, times))

    def parts(self, number: fx.Node) -> list[fx.Node]:
        """The numbers that one is computed from; none if it is read off a value."""
        sources = number.all_input_nodes
        return sources if all(self.number(n)[0] is not None for n in sources) else []

    def all_parts(self, number: fx.Node) -> list[fx.Node]:
        """The numbers that vary and that one is computed from, and those that these are computed from, in the order of
        the graph."""
        found, queue = set[fx.Node](), [number]
        while queue:
            new = {n for n in self.parts(queue.pop()) if _varies(self.number(n))} - found
            found |= new
            queue += new
        return sorted(found, key=self.order.__getitem__)

    def follows(self, number: fx.Node, known: Callable[[fx.Node], bool]) -> bool:
        """Whether a number is computed from known ones."""
        found = set[fx.Node]()

        def computed(n: fx.Node) -> bool:
            parts = [part for part in self.parts(n) if _varies(self.number(part))]
            return bool(parts) and found.issuperset(parts)

        for part in self.all_parts(number):
            if known(part) or computed(part):
                found.add(part)
        return computed(number)

    def before(self, values: list[fx.Node]) -> Iterator[fx.Node]:
        """Some values and all that they are computed from, the last ones first."""
        known = set(values)
        queue = [(-self.order[n], n.name, n) for n in values]
        heapq.heapify(queue)
        while queue:
            *_, value = heapq.heappop(queue)
            yield value
            for source in value.all_input_nodes:
                if source not in known and source in self.order and self.number(source)[0] is None:
                    known.add(source)
                    heapq.heappush(queue, (-self.order[source], source.name, source))

    def number(self, node: fx.Node) -> Seen:
        """The whole number that a node is in each run."""
        return tuple(n if isinstance(n := run.get(node), int) else None for run in self.runs)

    def sizes(self, node: fx.Node) -> list[tuple[int, Seen]]:
        """(dimension, size in each run) of the sizes of a tensor that are not the same in all."""
        shapes = [s if isinstance(s := run.get(node), tuple) else None for run in self.runs]
        if shapes[0] is None:
            return []
        rank = len(shapes[0])
        seen = [tuple(s[d] if s is not None and len(s) == rank else None for s in shapes) for d in range(rank)]
        return [(d, sizes) for d, sizes in enumerate(seen) if _varies(sizes)]


def _runs(gm: fx.GraphModule) -> Iterator[Run]:
    """A graph at the example, and with one dimension of its inputs larger at a time."""
    given = list(placeholder_values(gm).values())
    yield fake_sizes(gm, given)
    for dim in range(max((len(v[0]) for v in given if is_tensor_spec(v)), default=0)):
        for more in _PIXELS if dim else _IMAGES:
            yield fake_sizes(gm, [_grown(v, dim, more) for v in given])


def _grown(value: Any, dim: int, more: int) -> Any:
    if not is_tensor_spec(value) or len(value[0]) <= dim:
        return value
    return tuple(n + more * (d == dim) for d, n in enumerate(value[0])), value[1]


def _varies(seen: Seen) -> bool:
    return any(n is not None and n != seen[0] for n in seen)


def _multiple(wanted: Seen, seen: Seen) -> int:
    """How many times a number a size is in every run that has the size; 0 if not a whole number of times in all."""
    times = seen[0] // wanted[0] if wanted[0] and seen[0] else 0
    equal = all(b is None or (a is not None and b == a * times) for a, b in zip(wanted, seen, strict=True))
    return times if equal else 0
