"""Traces with torch.fx where shapes are numbers: every proxy carries the fake tensor that the op would give.

    n, c, h, w = x.shape                 four ints
    if x.size(1) == c: ...               decided
    table = torch.arange(h)              a constant tensor
    y = x * table                        %y = mul(%x, %table), fake (n, c, h, w)

The graph is specialised to the example's shape. Values are never known: a branch on data raises, as it must.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import _symbolic_trace

from ..model.autocast import no_autocast
from ..model.interface import Example
from .facts import unpatched
from .proxies import MutableProxy
from .tracers import SymbolicTracer, Traced, record, unpacked

__all__ = ["ShapeTracer", "trace_shapes"]


class _ShapeProxy(MutableProxy):
    """A proxy that knows the fake value that it stands for, and answers questions about it with constants."""

    fake: Any
    tracer: ShapeTracer
    __getitem__: Callable[[Any, Any], Any]  # fx adds it

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # `isinstance(x, torch.Tensor)` and `torch.is_tensor(x)` are asked by model code.
        return Tensor if isinstance(self.fake, Tensor) else _ShapeProxy

    def __getattr__(self, name: str) -> Any:
        if name == "fake" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        with self.tracer.mode, torch.no_grad():
            value = getattr(self.fake, name)
        if callable(value):
            return _Method(self, name)
        if _has_tensor(value):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return value  # shape, dtype, device, ndim, requires_grad, ...

    def __len__(self) -> int:
        return len(self.fake)

    def __bool__(self) -> bool:
        return bool(self.fake)

    def __int__(self) -> int:
        return int(self.fake)

    def __float__(self) -> float:
        return float(self.fake)

    def __index__(self) -> int:
        return operator.index(self.fake)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self.fake))])


class _Method:
    """A method of a proxy's value, recorded when it is called."""

    def __init__(self, owner: _ShapeProxy, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner.tracer.create_proxy("call_method", self.name, (self.owner, *args), kwargs)


class ShapeTracer(SymbolicTracer):
    """A tracer whose proxies carry fake tensors, computed op by op beside the graph."""

    follows_numbers = False

    def __init__(self, model: nn.Module, example: Example, leaves: frozenset[str] = frozenset()) -> None:
        super().__init__(model, example, leaves)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Trace, also into functions that `torch.fx.wrap` marks as one op: they need no mark here."""
        marked = dict(_symbolic_trace._wrapped_fns_to_patch)
        _symbolic_trace._wrapped_fns_to_patch.clear()
        try:
            return super().trace(root, concrete_args)
        finally:
            _symbolic_trace._wrapped_fns_to_patch.update(marked)

    def _fake(self, value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda v: self._fake_tensor(v) if isinstance(v, Tensor) else v)

    def _fake_tensor(self, value: Tensor) -> Tensor:
        fake = self.mode.from_tensor(value)
        if 0 not in value.stride():
            return fake
        with self.mode:  # an expanded one: memory of its own costs a fake tensor nothing
            return fake.contiguous()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxies that answer questions about shapes."""
        return _ShapeProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> Any:
        """Record an op, and compute it on fake tensors; a number, a shape or a flag is a constant of this trace."""
        a, k = fx.node.map_aggregate(args, _unwrap), fx.node.map_aggregate(kwargs, _unwrap)
        if kind == "call_method" and (made := _made(str(target), args, a, k)) is not None:
            return made
        with self.mode, torch.no_grad(), no_autocast():
            if kind == "call_function":
                fake = target(*a, **k)
            elif kind == "call_method":
                fake = getattr(a[0], target)(*a[1:], **k)
            elif kind == "call_module":
                fake = unpatched(lambda: self.root.get_submodule(target)(*a, **k))
            elif kind == "placeholder":
                fake = self._fake(self.binding.given[target])
            else:
                raise NotImplementedError(f"a {kind} of {target} in the middle of a trace")
        if kind in ("call_function", "call_method") and fake is not None and not _has_tensor(fake):
            return fake
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *more, **named)
        proxy.fake = fake
        # What chunk, split or unbind give is a tuple to the model, which may take its length, slice it, add to it.
        parts = isinstance(fake, tuple) or type(fake) in (list, dict)
        return unpacked(proxy, fake) if parts and kind != "placeholder" else proxy


def _made(method: str, args: Any, a: Any, k: Any) -> Tensor | None:
    """A constant that a value gives no more than its type and device: `x.new_zeros(3)`, `table.to(x)`."""
    if any(type(v) is _ShapeProxy for v in [*args[1:], *k.values()]):
        like = a[1] if method in ("to", "type_as") and len(a) == 2 and not k else None
        known = isinstance(like, Tensor) and not isinstance(a[0], FakeTensor)
        return a[0].to(like.device, like.dtype) if known and like is not None else None
    if method not in ("new_zeros", "new_ones", "new_full", "new_tensor") or not isinstance(a[0], FakeTensor):
        return None
    made: Tensor = getattr(torch.empty(0, dtype=a[0].dtype, device=a[0].device), method)(*a[1:], **k)
    return made


def _unwrap(value: Any) -> Any:
    return value.fake if type(value) is _ShapeProxy else value


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has_tensor(v) for v in value)
    if isinstance(value, dict):
        return any(_has_tensor(v) for v in value.values())
    return isinstance(value, Tensor) or not isinstance(value, _CONSTANTS)


_CONSTANTS = (int, float, bool, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


def trace_shapes(model: nn.Module, example: Example) -> Traced:
    """Trace with proxies that carry shapes; the graph is specialised to the example's. `model` is not changed."""
    return record(ShapeTracer, model, example)
