"""Three ways from an nn.Module to a raw fx graph, in the order in which `trace` tries them.

    symbolic   torch.fx with structural leaves; its graphs run at other batches and sizes
    shapes     the same with proxies that carry a fake tensor, so that shapes, `len` and `if` resolve
    export     torch.export, functionalized: sees every alias, specialised to the example's shape

A submodule that torch.fx cannot trace becomes a leaf by itself, with the reason kept, and the trace goes on.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import ops
from .errors import TraceError

__all__ = ["TRACERS", "Example", "trace_export", "trace_shapes", "trace_symbolic"]

Example = tuple[tuple[Any, ...], dict[str, Any]]
_NORM_NAMES = ("norm", "frn", "evonorm")


class _MutableProxy(fx.Proxy):
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


class SymbolicTracer(fx.Tracer):
    """torch.fx with leaves chosen by what a module is, not by where its class was defined."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: dict[str, str] = {}

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if ops.has_hooks(module):
            return True
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        name = type(module).__name__.lower()
        if name in {n.lower() for n in ops.IDENTITY_NAMES}:
            return True
        if type(module).__module__.startswith("torch.nn."):
            return True
        understood = (*ops.CONVS, *ops.AFFINE, *ops.ACTIVATIONS, *ops.MAX_POOLS, *ops.IDENTITIES, nn.Linear)
        if any(ops.is_plain(module, kind) for kind in understood):
            return True
        norm_like = any(part in name for part in _NORM_NAMES) and not list(module.children())
        return norm_like and not any(isinstance(m, ops.CONVS) for m in module.modules())

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _MutableProxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        qualified = self.path_of_module(m)
        if self.is_leaf_module(m, qualified):
            return super().call_module(m, forward, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)))
        stack = copy.copy(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever the forward does with a proxy may raise anything
            while (node := next(iter(reversed(self.graph.nodes)))) is not last:
                self.graph.erase_node(node)
            self.module_stack = stack
            self.opaque[qualified] = f"torch.fx cannot trace {type(m).__name__}: {_first_line(error)}"
            return self.create_proxy("call_module", qualified, args, kwargs)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def trace_symbolic(model: nn.Module, example: Example) -> tuple[fx.GraphModule, dict[str, str]]:
    """Trace with torch.fx; parameters that the example does not give keep their defaults."""
    tracer = SymbolicTracer()
    graph = tracer.trace(model, concrete_args=_absent_arguments(model, example))
    return fx.GraphModule(model, graph, type(model).__name__), tracer.opaque


def _absent_arguments(model: nn.Module, example: Example) -> dict[str, Any] | None:
    """Default values of the forward's parameters that are not passed, so that they are constants in the graph."""
    parameters = inspect.signature(model.forward).parameters
    args, kwargs = example
    given = set(list(parameters)[: len(args)]) | set(kwargs)
    absent = {
        name: p.default
        for name, p in parameters.items()
        if name not in given and p.default is not inspect.Parameter.empty and p.kind is not p.VAR_KEYWORD
    }
    return absent or None


class _ShapeProxy(_MutableProxy):
    """A proxy that knows the fake value behind it, and answers questions about it with constants."""

    fake: Any

    def __len__(self) -> int:
        return len(self.fake)

    def __bool__(self) -> bool:
        return bool(self.fake)

    def __int__(self) -> int:
        return int(self.fake)

    def __index__(self) -> int:
        return operator.index(self.fake)

    @property
    def shape(self) -> Any:
        return self.fake.shape

    @property
    def ndim(self) -> int:
        return int(self.fake.ndim)

    @property
    def dtype(self) -> torch.dtype:
        return self.fake.dtype

    @property
    def device(self) -> torch.device:
        return self.fake.device

    def size(self, dim: int | None = None) -> Any:
        return self.fake.size() if dim is None else self.fake.size(dim)

    def dim(self) -> int:
        return int(self.fake.dim())

    def numel(self) -> int:
        return int(self.fake.numel())

    def is_floating_point(self) -> bool:
        return bool(self.fake.is_floating_point())


class ShapeTracer(SymbolicTracer):
    """A tracer whose proxies carry fake tensors, computed op by op beside the graph."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        args, kwargs = example
        names = list(inspect.signature(model.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self.inputs = {k: self._fake(v) for k, v in given.items()}

    def _fake(self, value: Any) -> Any:
        return self.mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ShapeProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **named)
        unwrap = lambda p: p.fake if isinstance(p, _ShapeProxy) else p  # noqa: E731
        a, k = fx.node.map_aggregate(args, unwrap), fx.node.map_aggregate(kwargs, unwrap)
        with self.mode, torch.no_grad():
            if kind == "call_function":
                fake = target(*a, **k)
            elif kind == "call_method":
                fake = getattr(a[0], target)(*a[1:], **k)
            elif kind == "call_module":
                fake = _unpatched(lambda: self.root.get_submodule(target)(*a, **k))
            elif kind == "get_attr":
                fake = self._fake(_unpatched(lambda: operator.attrgetter(target)(self.root)))
            elif kind == "placeholder":
                fake = self.inputs.get(target.lstrip("*"))
            else:
                fake = None
        constant = fake is not None and not isinstance(fake, (torch.Tensor, tuple, list, dict))
        if constant and kind in ("call_function", "call_method"):
            return fake  # a number, a shape, a flag: a constant of this trace
        assert isinstance(proxy, _ShapeProxy)
        proxy.fake = fake
        return proxy


_CALL, _GETATTR = nn.Module.__call__, nn.Module.__getattr__


def _unpatched(action: Callable[[], Any]) -> Any:
    """Do something with real modules while torch.fx has `__call__` and `__getattr__` of nn.Module patched."""
    patched = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__, nn.Module.__getattr__ = _CALL, _GETATTR  # type: ignore[method-assign]
    try:
        return action()
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = patched  # type: ignore[method-assign]


def trace_shapes(model: nn.Module, example: Example) -> tuple[fx.GraphModule, dict[str, str]]:
    """Trace with shape-carrying proxies; the graph is specialised to the example's shape."""
    tracer = ShapeTracer(model, example)
    graph = tracer.trace(model, concrete_args=_absent_arguments(model, example))
    return fx.GraphModule(model, graph, type(model).__name__), tracer.opaque


def trace_export(model: nn.Module, example: Example) -> tuple[fx.GraphModule, dict[str, str]]:
    """Trace with torch.export, functionalized but not decomposed."""
    args, kwargs = example
    with torch.no_grad():  # autograd forbids some in-place ops that inference allows
        program = torch.export.export(model, args, kwargs, strict=False).run_decompositions({})
    exported = program.module()
    if not isinstance(exported, fx.GraphModule):
        raise TraceError("torch.export gave no graph module")
    for node in list(exported.graph.nodes):
        if node.op == "call_module" and "guards" in str(node.target):
            exported.graph.erase_node(node)
    output = next(n for n in exported.graph.nodes if n.op == "output")
    plain_inputs = not kwargs and all(isinstance(a, torch.Tensor) for a in args)
    if plain_inputs and len(output.args[0]) == 1 and program.call_spec.out_spec.is_leaf():
        # One tensor out of plain tensors: no need of the exported program's flattening of inputs and outputs.
        output.args = (output.args[0][0],)
        exported.graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(exported, exported.graph, type(model).__name__), {}


TRACERS: dict[str, Callable[[nn.Module, Example], tuple[fx.GraphModule, dict[str, str]]]] = {
    "symbolic": trace_symbolic,
    "shapes": trace_shapes,
    "export": trace_export,
}
