"""Lets a symbolic trace follow TorchScript and autograd functions, so that they are not one opaque op each.

    @torch.jit.script                        graph(%x):
    def swish(x):                              %s = aten::sigmoid(%x)         ->      %s = sigmoid(%x)
        return x * x.sigmoid()                 %y = aten::mul(%x, %s)                 %y = mul(%x, %s)

A scripted function or module has its graph with everything inlined. It is run here op by op: on proxies an op is
recorded as the aten op that it is, on constants (flags, numbers, parameters) it is computed, so that a branch is
decided where its condition is known. An autograd function is what its `forward` computes: a trace is of inference.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

__all__ = ["following", "inline_module"]


@contextlib.contextmanager
def following(tracer: fx.Tracer) -> Iterator[None]:
    """Within it, scripted functions and autograd functions that are called with proxies of `tracer` are traced into."""
    script: Any = torch.jit.ScriptFunction
    function: Any = torch.autograd.Function
    call, apply = script.__call__, function.__dict__["apply"]

    def traced_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_proxy((args, kwargs)):
            return call(self, *args, **kwargs)
        return _Inliner(tracer).run(self.inlined_graph, _bound(self.schema, args, kwargs))

    def traced_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_proxy((args, kwargs)):
            return apply.__get__(None, cls)(*args, **kwargs)
        own = cls.setup_context is torch.autograd.Function.setup_context  # forward takes the context itself
        return cls.forward(_Context(), *args, **kwargs) if own else cls.forward(*args, **kwargs)

    script.__call__, function.apply = traced_call, classmethod(traced_apply)
    try:
        yield
    finally:
        script.__call__, function.apply = call, apply


def inline_module(tracer: fx.Tracer, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a scripted module's forward gives, recorded op by op."""
    schema = module.forward.schema
    return _Inliner(tracer).run(module.inlined_graph, _bound(schema, (module, *args), kwargs))


class _Context:
    """The context of an autograd function: it takes everything, and nobody ever reads it."""

    needs_input_grad = (False,) * 64

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_dirty(self, *tensors: Any) -> None:
        raise NotImplementedError("an autograd function that writes into its input")

    def mark_non_differentiable(self, *tensors: Any) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def _has_proxy(value: Any) -> bool:
    found: list[Any] = []
    fx.node.map_aggregate(value, lambda v: found.append(v) if issubclass(type(v), fx.Proxy) else None)
    return bool(found)


def _bound(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a scripted call in order, with defaults."""
    names = [a.name for a in schema.arguments]
    if len(args) > len(names) or not kwargs.keys() <= set(names[len(args) :]):
        raise TypeError(f"{schema.name} takes {names}")
    values = list(args)
    for argument in schema.arguments[len(args) :]:
        if argument.name not in kwargs and not argument.has_default_value():
            raise TypeError(f"{schema.name} misses {argument.name}")
        values.append(kwargs.get(argument.name, argument.default_value))
    return values


def _getitem(value: Any, index: Any) -> Any:
    return value[index]


# Ops of numbers, lists and strings, as Python has them.
_PYTHON: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "eq", "ne", "lt", "le", "gt", "ge")},
    **{"__not__": operator.not_, "__is__": operator.is_, "__isnot__": operator.is_not, "neg": operator.neg},
    **{"__and__": operator.and_, "__or__": operator.or_, "remainder": operator.mod, "div": operator.truediv},
    **{"__getitem__": _getitem, "len": len, "Int": lambda v: v, "Float": lambda v: v, "Bool": lambda v: v},
    **{"format": lambda text, *parts: text, "__contains__": lambda held, item: item in held},
}
# Questions about a tensor, whose answers are numbers.
_QUESTIONS: dict[str, Callable[..., Any]] = {
    "dim": lambda x: x.dim(),
    "size": lambda x, *dim: x.size(*dim),
    "len": lambda x: x.size(0),
    "is_floating_point": lambda x: x.is_floating_point(),
    "Int": lambda x: x,  # of what a size was made into
    "__is__": lambda a, b: a is b,
    "__isnot__": lambda a, b: a is not b,
}
_ATTRIBUTES = frozenset({"dtype", "device", "layout", "shape", "is_cuda", "requires_grad"})


class _Inliner:
    """Runs a TorchScript graph with proxies among its values."""

    def __init__(self, tracer: fx.Tracer) -> None:
        self.tracer = tracer
        self.values: dict[str, Any] = {}

    def run(self, graph: Any, arguments: list[Any]) -> Any:
        for name, value in zip(graph.inputs(), arguments, strict=True):
            self.values[name.debugName()] = value
        self._block(graph)
        outputs = [self.values[v.debugName()] for v in graph.outputs()]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _block(self, block: Any) -> list[Any]:
        for node in block.nodes():
            outputs = list(node.outputs())
            result = self._node(node)
            results = [result] if len(outputs) == 1 else list(result or ())
            for name, value in zip(outputs, results, strict=True):
                self.values[name.debugName()] = value
        return [self.values[v.debugName()] for v in block.outputs()]

    def _node(self, node: Any) -> Any:
        space, _, name = node.kind().partition("::")
        inputs = [] if name in ("If", "Loop") else [self.values[v.debugName()] for v in node.inputs()]
        if space == "prim":
            return self._prim(node, name, inputs)
        return self._op(node, space, name, inputs)

    def _prim(self, node: Any, name: str, inputs: list[Any]) -> Any:
        if name == "Constant":
            return node.output().toIValue()
        if name == "GetAttr":
            return getattr(inputs[0], node.s("name"))
        if name == "ListConstruct":
            return inputs
        if name == "TupleConstruct":
            return tuple(inputs)
        if name in ("TupleUnpack", "ListUnpack"):
            return [inputs[0][i] for i in range(len(list(node.outputs())))]
        if name == "TupleIndex":
            return inputs[0][inputs[1]]
        if name in ("unchecked_cast", "NumToTensor", "Uninitialized"):
            return inputs[0] if inputs else None
        if name in _ATTRIBUTES:
            return getattr(inputs[0], name)
        if name == "If":
            yes, no = node.blocks()
            (condition,) = node.inputs()
            return self._block(yes if bool(self.values[condition.debugName()]) else no)
        if name == "Loop":
            return self._loop(node)
        if name == "RaiseException":
            raise ValueError(f"the scripted code raises {inputs[0]}")
        raise NotImplementedError(f"TorchScript's prim::{name}")

    def _loop(self, node: Any) -> list[Any]:
        trips, go_on, *carried = [self.values[v.debugName()] for v in node.inputs()]
        (body,) = node.blocks()
        for i in range(operator.index(trips)):
            if not bool(go_on):
                break
            for name, value in zip(body.inputs(), [i, *carried], strict=True):
                self.values[name.debugName()] = value
            go_on, *carried = self._block(body)
        return list(carried)

    def _op(self, node: Any, space: str, name: str, inputs: list[Any]) -> Any:
        schema = str(node.schema())
        if "Tensor" not in schema and name in _PYTHON:
            return _PYTHON[name](*inputs)
        if name in _QUESTIONS:
            return _QUESTIONS[name](*inputs)
        if name == "_convolution":  # what torch.jit.trace calls every convolution
            return self._convolution(inputs)
        packet = getattr(getattr(torch.ops, space), name)
        qualified = schema.partition("(")[0].partition("::")[2]
        overload = getattr(packet, qualified.partition(".")[2] or "default")
        args, kwargs = _arguments(overload._schema, inputs)
        return self._call(overload, args, kwargs)

    def _call(self, overload: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if not _has_proxy((args, kwargs)):
            return overload(*args, **kwargs)
        return self.tracer.create_proxy("call_function", overload, tuple(args), kwargs)

    def _convolution(self, inputs: list[Any]) -> Any:
        value, weight, bias, stride, padding, dilation, transposed, _, groups, *_ = inputs
        if transposed:
            raise NotImplementedError("a transposed convolution of torch.jit.trace")
        overload = getattr(torch.ops.aten, f"conv{weight.dim() - 2}d").default
        return self._call(overload, [value, weight, bias, stride, padding, dilation, groups], {})


def _arguments(schema: Any, inputs: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments; those at the end that have their default are left out."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument, value in zip(schema.arguments, inputs, strict=True):
        default = argument.has_default_value() and type(value) is type(argument.default_value)
        if argument.kwarg_only:
            if not default or value != argument.default_value:
                kwargs[argument.name] = value
        else:
            args.append(value)
    while args and (last := schema.arguments[len(args) - 1]).has_default_value():
        if type(args[-1]) is not type(last.default_value) or args[-1] != last.default_value:
            break
        args.pop()
    return args, kwargs
