"""Keeps values by key up to a number of bytes in all; beyond it the least recently used are dropped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Bounded"]

V = TypeVar("V")


class Bounded(Generic[V]):
    """Values by key; `size` gives the bytes of one, `limit` is that of all."""

    def __init__(self, size: Callable[[V], int], limit: int) -> None:
        self.size, self.limit, self.held = size, limit, 0
        self.values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable) -> V | None:
        """The value, which is the most recently used from now on; None where there is none (any more)."""
        if key in self.values:
            self.values.move_to_end(key)
        return self.values.get(key)

    def put(self, key: Hashable, value: V) -> None:
        """Keeps a value, unless its key has one."""
        if key in self.values:
            return
        self.values[key] = value
        self.held += self.size(value)
        while self.held > self.limit:
            self.held -= self.size(self.values.popitem(last=False)[1])
