"""Keeps nodes in disjoint classes that are united two at a time (union-find)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

__all__ = ["UnionFind"]


class UnionFind:
    """Classes of nodes. A node that was never added is a class of its own, and is not listed."""

    def __init__(self) -> None:
        self._above: dict[fx.Node, fx.Node] = {}

    def __contains__(self, node: object) -> bool:
        return node in self._above

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self._above)

    def add(self, node: fx.Node) -> None:
        """List the node, in a class of its own if it is new."""
        self._above.setdefault(node, node)

    def root(self, node: fx.Node) -> fx.Node:
        """The node that stands for the class of `node`."""
        above = self._above
        while (parent := above.get(node, node)) is not node:
            above[node] = node = above[parent]  # halves the path, so that long chains stay fast
        return node

    def unite(self, first: fx.Node, second: fx.Node) -> None:
        """Make one class of the classes of both, with the root of the second's."""
        self.add(first)
        self.add(second)
        self._above[self.root(first)] = self.root(second)
