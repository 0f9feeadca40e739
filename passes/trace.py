"""nn.Module -> GraphModule in one canonical form.

    def forward(self, x):                          %x     placeholder
        y = F.conv2d(x, self.weight)               %conv  call_module   nn.Conv2d
        y = self.bn(y).relu_()              ->     %bn    call_module   nn.BatchNorm2d
        y = F.dropout(y, 0.1, self.training)       %relu  call_module   nn.ReLU
        y += x                                     %add   call_function torch.add
        return y                                   output

The input is never changed: tracing works on a copy in eval mode, a fresh one for each tracer. Every node carries
`meta["shape"]` (tuple or None), `meta["dtype"]`, `meta["floating"]` and `meta["path"]` (the module it came from), and
the graph is compared with the model on the example before it is returned.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .canonical import canonicalize
from .errors import TraceError
from .inplace import make_pure
from .tracers import TRACERS, Example

__all__ = ["annotate", "example_arguments", "fingerprint", "trace"]

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def example_arguments(example_input: Any) -> Example:
    """The positional and keyword arguments that an example stands for: a tensor, a tuple or list, or a dict."""
    if isinstance(example_input, dict):
        return (), dict(example_input)
    if isinstance(example_input, (tuple, list)):
        return tuple(example_input), {}
    return (example_input,), {}


def trace(model: nn.Module, example_input: Any, tracers: tuple[str, ...] = tuple(TRACERS)) -> fx.GraphModule:
    """A canonical GraphModule that computes what `model` computes in eval mode.

    `example_input` is a tensor, a tuple of positional arguments or a dict of keyword arguments. Tracers are tried in
    the order given (`symbolic`, `shapes`, `export`); the first whose graph agrees numerically with the model is taken.
    `graph.meta["lmfx"]` holds the tracer's name, the reasons of opaque submodules and the example's shapes.

    Raises `TraceError` if none agrees, with the reason of each.
    """
    example = example_arguments(example_input)
    reference = _run(_copy(model), example)
    reasons = []
    for name in tracers:
        source = _copy(model)
        try:
            gm, opaque = TRACERS[name](source, example)
            gm.train(False)
            make_pure(gm)
            annotate(gm, example)
            canonicalize(gm)
            result = annotate(gm, example)
        except Exception as error:  # any tracer may fail in any way; the next one is tried
            text = str(error).strip().splitlines()
            reasons.append(f"{name}: {type(error).__name__}: {text[0] if text else ''}")
            continue
        difference = _difference(reference, result)
        if difference is not None:
            reasons.append(f"{name}: the graph does not compute what the model computes ({difference})")
            continue
        args, kwargs = example
        gm.meta["lmfx"] = {
            "tracer": name,
            "opaque": opaque,
            "positional": [_spec(a) for a in args],
            "keyword": {k: _spec(v) for k, v in kwargs.items()},
        }
        return gm
    detail = "\n  ".join(reasons)
    raise TraceError(
        f"{type(model).__name__} could not be traced:\n  {detail}\n"
        "Pass the traceable part of the model (its backbone), or make the data-dependent part a module of its own."
    )


def fingerprint(gm: fx.GraphModule) -> str:
    """A short digest of the graph's structure: ops, names, module types and weight shapes, but no weight values."""
    lines = []
    for node in gm.graph.nodes:
        what = str(node.target) if node.op != "call_function" else getattr(node.target, "__name__", "?")
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            what += f" {type(module).__name__}({module.extra_repr()})"
        operands = ",".join(n.name for n in node.all_input_nodes)
        lines.append(f"{node.op} {node.name} {what} {operands}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def annotate(gm: fx.GraphModule, example: Example) -> Any:
    """Run the example through the graph, note every node's shape, dtype and module path, and return the output."""
    return _Annotator(gm).run(*_placeholder_values(gm, example))


def _placeholder_values(gm: fx.GraphModule, example: Example) -> list[Any]:
    args, kwargs = example
    names = [str(n.target).lstrip("*") for n in gm.graph.nodes if n.op == "placeholder"]
    defaults = {str(n.target).lstrip("*"): n.args[0] for n in gm.graph.nodes if n.op == "placeholder" and n.args}
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    values = []
    for name in names:
        value = given.get(name)
        values.append(value.clone() if isinstance(value, Tensor) else value)
    return values


class _Annotator(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        versions = {s: v._version for s in n.all_input_nodes if isinstance(v := self.env.get(s), Tensor)}
        value = super().run_node(n)
        for source, version in versions.items():
            self._check_mutation(n, source, version)
        tensor = value if isinstance(value, Tensor) else None
        n.meta["shape"] = tuple(tensor.shape) if tensor is not None else None
        n.meta["dtype"] = tensor.dtype if tensor is not None else None
        n.meta["floating"] = tensor is not None and tensor.is_floating_point()
        if "path" not in n.meta:
            stack = n.meta.get("nn_module_stack")
            n.meta["path"] = (list(stack.values())[-1][0] if stack else "") or ""
        return value

    def _check_mutation(self, n: fx.Node, source: fx.Node, version: int) -> None:
        """Refuse an op that still writes into a value (an opaque module, say) which is read again afterwards."""
        mutated = self.env[source]
        if mutated._version == version:
            return
        for node, value in self.env.items():
            shared = isinstance(value, Tensor) and value._version == mutated._version and _same_memory(value, mutated)
            if shared and any(self.order[user] > self.order[n] for user in node.users):
                raise TraceError(f"{n.name} mutates {source.name} in place, and {node.name} is read afterwards")


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode with plain parameters (parametrizations such as weight norm are evaluated)."""
    # Old-style weight_norm keeps a computed tensor as an attribute, which deepcopy refuses.
    computed: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    clone = copy.deepcopy(model, computed).eval()
    for module in list(clone.modules()):
        if torch.nn.utils.parametrize.is_parametrized(module):
            _evaluate_parametrizations(module)
        hooks: list[Any] = list(module._forward_pre_hooks.values())
        for hook in hooks:
            if type(hook).__name__ == "WeightNorm":
                torch.nn.utils.remove_weight_norm(module, hook.name)
            elif type(hook).__name__ == "SpectralNorm":
                torch.nn.utils.remove_spectral_norm(module, hook.name)
    return clone


def _evaluate_parametrizations(module: Any) -> None:
    """Put plain parameters in place of parametrized ones.

    torch's `remove_parametrizations` deletes properties of the module's class, which a deep copy shares with its
    original: it would break the caller's model.
    """
    names = list(module.parametrizations)
    values = {name: getattr(module, name).detach().clone() for name in names}
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _run(model: nn.Module, example: Example) -> Any:
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)
    with torch.no_grad():
        return model(*args, **kwargs)


def _difference(expected: Any, actual: Any) -> str | None:
    """None if two outputs agree to the rounding of their dtype, else what differs."""
    left = [v for v in pytree.tree_leaves(_plain(expected)) if isinstance(v, Tensor)]
    right = [v for v in pytree.tree_leaves(_plain(actual)) if isinstance(v, Tensor)]
    if len(left) != len(right):
        return f"{len(left)} tensors became {len(right)}"
    for a, b in zip(left, right, strict=True):
        if a.dtype != b.dtype:
            return f"dtype {a.dtype} became {b.dtype}"
        if a.shape != b.shape:
            return f"shape {tuple(a.shape)} became {tuple(b.shape)}"
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return "integer outputs differ"
            continue
        a64, b64 = a.double(), b.double()
        scale = max(float(a64.norm()), 1e-30)
        error = float((a64 - b64).norm()) / scale
        if not error <= _TOLERANCE.get(a.dtype, 1e-3) and not torch.equal(torch.isnan(a), torch.isnan(b)):
            return f"relative error {error:.2e}"
        if error > _TOLERANCE.get(a.dtype, 1e-3):
            return f"relative error {error:.2e}"
    return None


def _plain(value: Any) -> Any:
    """Dataclass-like outputs as plain containers."""
    return dict(value) if isinstance(value, dict) else value
