"""Lets a symbolic proxy record in-place ops as what they are, and be a number or have a length where one is known."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from .facts import UNKNOWN, Facts

__all__ = ["MutableProxy"]


class MutableProxy(fx.Proxy):
    """A proxy that records `x += y` as what it is, instead of as an out-of-place add."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)

    def __len__(self) -> int:
        return _length(self)

    def __index__(self) -> int:
        return _number(self)


class _Attribute(fx.proxy.Attribute):
    """An attribute of a proxy: a shape has a length."""

    def __len__(self) -> int:
        return _length(self)

    def __index__(self) -> int:
        return _number(self)


def _length(proxy: fx.Proxy) -> int:
    facts = getattr(proxy.tracer, "facts", None)
    length = facts.length(proxy.node) if isinstance(facts, Facts) else None
    return fx.Proxy.__len__(proxy) if length is None else length


def _number(proxy: fx.Proxy) -> int:
    facts = getattr(proxy.tracer, "facts", None)
    value = facts.value(proxy.node) if isinstance(facts, Facts) else UNKNOWN
    if value is UNKNOWN:
        raise TypeError(f"{proxy.node.name} is a value of the graph, not a number")
    return operator.index(value)  # type: ignore[arg-type]
