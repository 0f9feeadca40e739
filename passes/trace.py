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

The first tracer that works and hides no convolution in an opaque submodule is taken, else the one that hides fewest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .autocast import FullPrecision, autocast_on
from .canonical import canonicalize
from .copies import eval_copy, unwrapped
from .errors import ModelError, TraceError
from .exported import trace_export
from .fold import fold_constants
from .identity import changes_while_it_runs, fingerprint, states_of
from .inplace import make_pure
from .interface import Example, bind, plain_output
from .limits import set_limits
from .quiet import quiet, tracing
from .random_ops import random_error
from .shape_tracer import trace_shapes
from .sizes import Probes, Verdict
from .stateful import run_unchanged
from .tracers import Traced, first_line, trace_symbolic

__all__ = ["TRACERS", "annotate", "example_arguments", "fingerprint", "trace"]

TRACERS: dict[str, Callable[[nn.Module, Example], Traced]] = {
    "symbolic": trace_symbolic,
    "shapes": trace_shapes,
    "export": trace_export,
}
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# What fake tensors say when the values of the data decide, which torch.export can not know either.
_DATA_DEPENDENT = ("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode")


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
    the order given (`symbolic`, `shapes`, `export`); of those whose graph agrees numerically with the model, the one
    that hides fewest convolutions in opaque submodules is taken, and the first of equals. The graph takes what the
    model takes and gives what the model gives (see `interface`). `graph.meta["lmfx"]` holds the tracer's name, the
    reasons of opaque submodules, how many convolutions run inside them, and the example's shapes.

    Raises `TraceError` if none agrees, with the reason of each, and `InputError` for an example that the model's
    forward does not take, and `ModelError` for a model that changes while it is run.
    """
    example = example_arguments(example_input)
    model = unwrapped(model)
    bind(model, example)
    with FullPrecision():
        reference = run_unchanged(eval_copy(model), example)
    reasons: list[str] = []
    best: tuple[tuple[int, int], fx.GraphModule] | None = None
    probes = Probes(model, example)
    queue = list(tracers)
    deferred: dict[str, Traced] = {}
    while queue:
        name = queue.pop(0)
        if name == "export" and any(kind in reason for kind in _DATA_DEPENDENT for reason in reasons):
            reasons.append(f"{name}: not tried, because the control flow depends on data")
            continue
        try:
            traced = deferred.get(name)
            if traced is None:
                traced = _traced(name, model, example)
                if queue and _holds_convs(traced):  # only worth finishing if no other tracer does better
                    deferred[name] = traced
                    queue.append(name)
                    continue
            gm = _graph_of(name, traced, example, reference)
            fixed = _sized(gm, name, probes)
        except _Differs as error:
            _check_repeats(model, example, reference)  # another tracer would not agree with it either
            reasons.append(f"{name}: {type(error).__name__.lstrip('_')}: {first_line(error)}")
            continue
        except ModelError:
            raise
        except Exception as error:  # any tracer may fail in any way; the next one is tried
            reasons.append(f"{name}: {type(error).__name__}: {first_line(error)}")
            continue
        rank = gm.meta["lmfx"]["hidden_convs"], fixed
        if best is None or rank < best[0]:
            best = rank, gm
        if rank == (0, 0):
            break
    if best is not None:
        return best[1]
    detail = "\n  ".join(reasons)
    raise TraceError(
        f"{type(model).__name__} could not be traced:\n  {detail}\n"
        "Pass the traceable part of the model (its backbone), or make the data-dependent part a module of its own."
    )


def _sized(gm: fx.GraphModule, name: str, probes: Probes) -> int:
    """How many of batch and image size are the example's only; the graph refuses others from now on."""
    with quiet():
        verdict: Verdict = probes.verdict(gm, thorough=name != "symbolic")
    gm.meta["lmfx"]["sizes"] = verdict.states
    if verdict.limits:
        set_limits(gm, verdict.limits)
    return verdict.fixed


class _Differs(TraceError):
    """A graph whose output is not the model's."""


def _check_repeats(model: nn.Module, example: Example, reference: Any) -> None:
    """Raises `ModelError`, which names the op, if the model itself gives another output for the same input."""
    with FullPrecision():
        again = run_unchanged(eval_copy(model), example)
    if _difference(reference, again) is not None:
        raise random_error(eval_copy(model), _clone(example))


def _traced(name: str, model: nn.Module, example: Example) -> Traced:
    with quiet(), tracing():
        return TRACERS[name](model, example)


def _holds_convs(traced: Traced) -> bool:
    """Whether there are convolution modules in what the tracer could not follow."""
    modules = dict(traced.gm.named_modules())
    opaque = [modules[name] for name in traced.opaque if name in modules]
    return any(isinstance(m, _ConvNd) for module in opaque for m in module.modules())


def _graph_of(name: str, traced: Traced, example: Example, reference: Any) -> fx.GraphModule:
    """The canonical graph of what a tracer gave. Raises anything that an op raises, or `TraceError`."""
    gm = traced.gm
    gm.train(False)
    make_pure(gm)
    before = states_of(gm)
    annotate(gm, example)
    fold_constants(gm)
    canonicalize(gm)
    runner = _Annotator(gm, frozenset(traced.opaque))
    difference = _difference(reference, runner.run(*_placeholder_values(gm, example)))
    if difference is not None:
        raise _Differs(f"the graph does not compute what the model computes ({difference})")
    if runner.hidden.autocast:
        raise ModelError(
            f"one of {', '.join(traced.opaque)} has an autocast region, and can not be traced: take the region out, "
            "and run the result under torch.autocast instead"
        )
    args, kwargs = example
    gm.meta["lmfx"] = {
        "tracer": name,
        "opaque": traced.opaque,
        "hidden_convs": runner.hidden.count,
        "volatile": changes_while_it_runs(before, gm),
        "positional": [_spec(a) for a in args],
        "keyword": {k: _spec(v) for k, v in kwargs.items()},
    }
    return gm


class _ConvCounter(TorchFunctionMode):
    """Counts the convolutions that run, whether modules or functions call them, and notes autocast regions."""

    count = 0
    autocast = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.autocast |= bool(autocast_on())
        self.count += getattr(func, "__name__", "").startswith(("conv1d", "conv2d", "conv3d", "conv_transpose"))
        return func(*args, **(kwargs or {}))


def annotate(gm: fx.GraphModule, example: Example) -> Any:
    """Run the example through the graph, note every node's shape, dtype and module path, and return the output."""
    return _Annotator(gm).run(*_placeholder_values(gm, example))


def _placeholder_values(gm: fx.GraphModule, example: Example) -> list[Any]:
    args, kwargs = example
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [_clone(given.get(name)) for name in names]


def _clone(value: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


class _Annotator(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, opaque: frozenset[str] = frozenset()) -> None:
        super().__init__(gm)
        self.opaque = opaque
        self.hidden = _ConvCounter()
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        versions = {s: v._version for s in n.all_input_nodes if isinstance(v := self.env.get(s), Tensor)}
        with self.hidden if n.op == "call_module" and n.target in self.opaque else contextlib.nullcontext():
            value = super().run_node(n)
        for source, version in versions.items():
            self._check_mutation(n, source, version)
        tensor = value if isinstance(value, Tensor) else None
        n.meta["shape"] = tuple(tensor.shape) if tensor is not None else None
        n.meta["dtype"] = tensor.dtype if tensor is not None else None
        n.meta["device"] = tensor.device if tensor is not None else None
        first = n.args[0] if n.args else None
        n.meta["same"] = tensor is not None and isinstance(first, fx.Node) and self.env.get(first) is tensor
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
    """What a saved network needs to know of an input: a tensor's shape and type, a constant as it is.

    Containers say what they are, so that no dict is taken for a tensor and no tuple for a list.
    """
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": {str(k): _spec(v) for k, v in value.items()}}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_spec(v) for v in value]}
    return value


def _difference(expected: Any, actual: Any) -> str | None:
    """None if two outputs agree to the rounding of their dtype, else what differs."""
    left = [v for v in pytree.tree_leaves(plain_output(expected)) if isinstance(v, Tensor)]
    right = [v for v in pytree.tree_leaves(plain_output(actual)) if isinstance(v, Tensor)]
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
        error = float((a64 - b64).norm()) / (float(a64.norm()) or float(b64.norm()) or 1.0)
        if not error <= _TOLERANCE.get(a.dtype, 1e-3) and not torch.equal(torch.isnan(a), torch.isnan(b)):
            return f"relative error {error:.2e}"
        if error > _TOLERANCE.get(a.dtype, 1e-3):
            return f"relative error {error:.2e}"
    return None
