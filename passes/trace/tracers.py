"""Records a module's forward as a raw fx graph, in three ways that `trace` tries in order.

    symbolic   torch.fx with structural leaves; its graphs run at other batches and sizes
    shapes     the same with proxies that carry a fake tensor, so that shapes, `len` and `if` resolve
    export     torch.export, functionalized: sees every alias, specialised to the example's shape

A submodule that torch.fx cannot trace becomes a leaf by itself, with the reason kept, and the trace goes on: the model
is traced again, from a fresh copy, with that submodule as a leaf from the start. A model may keep what it computes
(a mask, a table of positions) in an attribute, and what an interrupted forward leaves there is a proxy.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..errors import TraceError
from ..graph import ops
from ..model.interface import Example, ModelCodeGen, Structure, bind, strip
from ..model.model_copy import eval_copy
from .facts import UNKNOWN, Facts
from .proxies import MutableProxy
from .scripted import following, inline_module

__all__ = ["SymbolicTracer", "Traced", "first_line", "record", "trace_symbolic", "unpacked"]

_NORM_NAMES = ("norm", "frn", "evonorm")
_LAYOUT = frozenset({"permute", "transpose", "movedim", "swapaxes"})


@dataclass(frozen=True)
class Traced:
    """A raw graph, and the reason of each submodule that was not traced; norms are opaque in another way."""

    gm: fx.GraphModule
    opaque: dict[str, str]
    norms: frozenset[str] = frozenset()  # that could not be traced, and may be known as what they are


class SymbolicTracer(fx.Tracer):
    """torch.fx with leaves chosen by what a module is, not by where its class was defined."""

    follows_numbers = True  # a number that the example gives is a value of the graph, not a constant

    def __init__(self, model: nn.Module, example: Example, leaves: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.binding = bind(model, example)
        self.leaves = leaves
        self.thread = threading.get_ident()
        self.failed: dict[str, str] = {}
        self.norms: frozenset[str] = frozenset()
        self.fixed: dict[str, Any] = {}
        self.structure: Structure | None = None
        named = [*model.named_parameters(), *model.named_buffers()]
        self.names = {id(tensor): (name, tensor) for name, tensor in named}
        self.paths: dict[int, str] = {}
        self.facts = Facts(model, self.binding.given)
        self.sources = Sources()

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Trace, also into scripted functions and autograd functions."""
        with following(self), self.sources:
            return super().trace(root, concrete_args)

    # --- what is known for every size ---------------------------------------------------------------------------------

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The answer to a question about dimensions, types or devices; any other raises."""
        value = self.facts.value(obj.node)
        return super().to_bool(obj) if value is UNKNOWN else bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The entries of a shape; any other value raises."""
        length = self.facts.length(obj.node)
        item: Any = obj
        return super().iter(obj) if length is None else iter([item[i] for i in range(length)])

    # --- inputs and outputs -------------------------------------------------------------------------------------------

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """One placeholder for each argument of the example, and the output in plain containers."""

        def forward(root: Any) -> Any:
            values = {name: self.placeholder(name, value) for name, value in self.binding.given.items()}
            plain, self.structure = strip(self.binding.call(root.forward, values))
            return plain

        forward.__annotations__.clear()  # torch.fx would write them into the generated code
        return forward, [self.root]

    def placeholder(self, name: str, value: Any) -> Any:
        """What the model gets for an argument: a proxy, a container of proxies, or the constant itself."""
        proxy = self.create_proxy("placeholder", name, (), {})
        if isinstance(value, Tensor):
            return proxy
        if isinstance(value, (tuple, list, dict)) and _holds_tensor(value):
            return unpacked(proxy, value)
        if self.follows_numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
            return proxy
        self.fixed[name] = value
        return value

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> Any:
        """Record an op. `TraceError` where a proxy was taken for a number: torch.is_tensor says no of a proxy."""
        if self.follows_numbers and kind == "call_function" and target in (torch.tensor, torch.as_tensor):
            seen: list[fx.Proxy] = []
            fx.node.map_aggregate(args, lambda v: seen.append(v) if isinstance(v, fx.Proxy) else None)
            for proxy in seen:
                given = self.binding.given.get(str(proxy.node.target)) if proxy.node.op == "placeholder" else None
                if isinstance(given, Tensor):
                    raise TraceError(f"{proxy.node.target} is a tensor, and torch.is_tensor says no of its proxy")
        return super().create_proxy(kind, target, args, kwargs, *more, **named)

    def create_arg(self, a: Any) -> Any:
        """Parameters and buffers by their names, found in constant time."""
        if isinstance(a, fx.Proxy):
            return a.node
        known = self.names.get(id(a))
        if known is not None and known[1] is a:
            return self.create_node("get_attr", known[0], (), {})
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters as they are: what a forward computes from them alone is a constant, and their shapes are known."""
        return attr_val

    def path_of_module(self, mod: nn.Module) -> str:
        """The qualified name, found in constant time; `NameError` if the module is none of the model's."""
        if not self.paths:
            self.paths = {id(m): name for name, m in self.root.named_modules()}
        name = self.paths.get(id(mod))
        return super().path_of_module(mod) if name is None else name

    # --- leaves -------------------------------------------------------------------------------------------------------

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a module is one op: a plain torch.nn one, one with hooks, one that is the identity."""
        if ops.has_hooks(module) or qualified_name in self.leaves:
            return True
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        if type(module).__name__ in ops.IDENTITY_NAMES:
            return True
        if type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module):
            return True
        return ops.plain_in(module, _UNDERSTOOD)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxies that record in-place operators."""
        return MutableProxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into a module, or record a call of it if that cannot be done."""
        if threading.get_ident() != self.thread:  # torch.fx patches nn.Module for all threads: another one runs its own
            return forward(*args, **kwargs)
        try:
            qualified = self.path_of_module(m)
        except NameError:  # made by the forward, as a slice of an nn.Sequential is: what it calls has a name
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, qualified):
            return super().call_module(m, forward, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)))
        stack = list(self.module_stack.items())
        if isinstance(m, torch.jit.ScriptModule):
            forward = functools.partial(_forward_of_script, self, m)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever the forward does with a proxy may raise anything
            if _is_norm(m):
                self.norms |= {qualified}
            else:
                self.failed[qualified] = f"torch.fx cannot trace {type(m).__name__}: {first_line(error)}"
        else:
            if not _is_norm(m) or _is_chain(self.graph, last):
                return result
        while (node := next(iter(reversed(self.graph.nodes)))) is not last:
            self.graph.erase_node(node)
        self.module_stack.clear()
        self.module_stack.update(stack)
        self.leaves |= {qualified}
        return super().call_module(m, forward, args, kwargs)


def _forward_of_script(tracer: fx.Tracer, module: Any, *args: Any, **kwargs: Any) -> Any:
    return inline_module(tracer, module, args, kwargs)


class Sources(TorchFunctionMode):
    """Remembers which constants a forward computes from trainable parameters, though no gradient is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if type(result) is Tensor and result.is_floating_point():
            found: list[Tensor] = []
            fx.node.map_aggregate((args, kwargs or {}), lambda v: found.append(v) if isinstance(v, Tensor) else None)
            if any(self.trainable(v) for v in found):
                self.computed[id(result)] = result
        return result

    def trainable(self, tensor: Tensor) -> bool:
        """Whether a tensor wants a gradient, or is computed from one that does."""
        return tensor.requires_grad or id(tensor) in self.computed


_UNDERSTOOD = (
    *ops.CONVS,
    *ops.TRANSPOSED,
    *ops.AFFINE,
    *ops.ACTIVATIONS,
    *ops.MAX_POOLS,
    *ops.IDENTITIES,
    nn.Linear,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.SyncBatchNorm,
)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm without parts of its own, by its class's name or base."""
    name = type(module).__name__.lower()
    return not list(module.children()) and any(part in name for part in _NORM_NAMES)


def _is_chain(graph: fx.Graph, last: fx.Node) -> bool:
    """Whether what was recorded after `last` reads one value each and keeps the layout.

    Such a norm is worth more as its ops (a norm with constant statistics is a scale and a bias, `F.group_norm` is a
    module); a norm that computes its statistics by hand, or permutes, says more as one op.
    """
    for node in reversed(graph.nodes):
        if node is last:
            return True
        if str(node.target if node.op == "call_method" else getattr(node.target, "__name__", "")) in _LAYOUT:
            return False
        if len([n for n in node.all_input_nodes if n.op != "get_attr"]) > 1:
            return False
    return True


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list, dict)):
        return any(_holds_tensor(v) for v in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def unpacked(proxy: Any, value: Any) -> Any:
    """A container like `value`, whose tensors are items of `proxy`."""
    if isinstance(value, dict):
        return {k: unpacked(proxy[k], v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [unpacked(proxy[i], v) for i, v in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return proxy if isinstance(value, Tensor) else value


def record(kind: type[SymbolicTracer], model: nn.Module, example: Example) -> Traced:
    """Trace fresh copies of `model` until nothing fails that was not a leaf from the start."""
    opaque: dict[str, str] = {}
    while True:
        source = eval_copy(model)
        tracer = kind(source, example, frozenset(opaque))
        with torch.no_grad():  # what is computed from parameters alone is a constant
            graph = tracer.trace(source)
        if not tracer.failed:
            break
        if tracer.failed.keys() <= opaque.keys():
            raise TraceError(f"{', '.join(tracer.failed)} cannot be traced, not even as opaque modules")
        opaque |= tracer.failed
    for value in tracer.tensor_attrs:  # what a forward computes from trainable parameters is trainable
        if isinstance(value, Tensor) and value.is_floating_point() and tracer.sources.trainable(value):
            value.requires_grad_(True)
    graph._tracer_cls = None  # unpickling would trace with it again, without a model
    graph.set_codegen(ModelCodeGen(tracer.binding, tracer.fixed, tracer.structure))
    renamed = free_names(source, graph)
    opaque = {f"{renamed.get(path, path)}{dot}{rest}": why for (path, dot, rest), why in _split(opaque)}
    gm = fx.GraphModule(source, graph, type(model).__name__)
    for name, parameter in source.named_parameters():
        if not isinstance(parameter, nn.Parameter) and name in dict(gm.named_buffers()):  # of a scripted module
            owner, _, last = name.rpartition(".")
            del gm.get_submodule(owner)._buffers[last]
            made = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            gm.get_submodule(owner).register_parameter(last, made)
    norms = [(path, dot, rest) for (path, dot, rest), _ in _split(dict.fromkeys(tracer.norms, ""))]
    return Traced(gm, opaque, frozenset(f"{renamed.get(path, path)}{dot}{rest}" for path, dot, rest in norms))


def _split(opaque: dict[str, str]) -> list[tuple[tuple[str, str, str], str]]:
    return [(path.partition("."), why) for path, why in opaque.items()]


def free_names(root: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """Rename what a model calls as a GraphModule calls something of its own (`self.graph`); returns the new names."""
    own = (set(dir(fx.GraphModule)) - set(dir(nn.Module))) | {"meta"}
    renamed: dict[str, str] = {}
    for held in (root._modules, root._parameters, root._buffers):
        items: dict[str, Any] = held
        for name in own & items.keys():
            renamed[name] = f"{name}_"
            while hasattr(root, renamed[name]):
                renamed[name] += "_"
        for name in list(items):  # all of them, so that they keep their order
            items[renamed.get(name, name)] = items.pop(name)
    root._non_persistent_buffers_set = {renamed.get(n, n) for n in root._non_persistent_buffers_set}
    for node in graph.nodes:
        path, dot, rest = str(node.target).partition(".")
        if node.op in ("call_module", "get_attr") and path in renamed:
            node.target = f"{renamed[path]}{dot}{rest}"
    return renamed


def trace_symbolic(model: nn.Module, example: Example) -> Traced:
    """Trace with torch.fx; the graph runs at other batches and sizes. `model` is not changed."""
    return record(SymbolicTracer, model, example)
