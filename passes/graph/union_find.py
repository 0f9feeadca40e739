"""Keeps things in disjoint classes that are united two at a time (union-find)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

__all__ = ["UnionFind"]

T = TypeVar("T", bound=Hashable)


class UnionFind(Generic[T]):
    """Classes of nodes, or of whatever can be a key. What was never added is a class of its own, and is not listed."""

    def __init__(self) -> None:
        self._above: dict[T, T] = {}

    def __contains__(self, node: object) -> bool:
        return node in self._above

    def __iter__(self) -> Iterator[T]:
        return iter(self._above)

    def add(self, node: T) -> None:
        """List the node, in a class of its own if it is new."""
        self._above.setdefault(node, node)

    def root(self, node: T) -> T:
        """The node that stands for the class of `node`."""
        above = self._above
        while (parent := above.get(node, node)) != node:
            above[node] = node = above[parent]  # halves the path, so that long chains stay fast
        return node

    def unite(self, first: T, second: T) -> None:
        """Make one class of the classes of both, with the root of the second's."""
        self.add(first)
        self.add(second)
        self._above[self.root(first)] = self.root(second)
