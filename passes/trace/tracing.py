"""Traces a module: nn.Module -> GraphModule in one canonical form, compared with the model.

    def forward(self, x):                          %x     placeholder
        y = F.conv2d(x, self.weight)               %conv  call_module   nn.Conv2d
        y = self.bn(y).relu_()              ->     %bn    call_module   nn.BatchNorm2d
        y = F.dropout(y, 0.1, self.training)       %relu  call_module   nn.ReLU
        y += x                                     %add   call_function torch.add
        return y                                   output

The input is never changed: tracing works on a copy in eval mode, a fresh one for each tracer. Of every
node its shape, dtype and path are noted (`node_facts`), and the graph is compared with the model on the example before
it is returned.

The first tracer whose graph hides nothing in opaque submodules and is right at every size is taken. Where there is
none, the best one: fewest convolutions hidden, then fewest sizes fixed, then fewest other understood ops hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from ..canonical.canonical_form import canonicalize
from ..canonical.constants import fold_constants
from ..errors import ModelError, TraceError
from ..graph import ops
from ..graph.node_facts import shape_of
from ..identity.fingerprint import changes_while_it_runs, fingerprint, states_of
from ..model.autocast import FullPrecision
from ..model.interface import Example, bind, plain_output
from ..model.model_copy import eval_copy, unwrapped
from ..model.other_sizes import Probes
from ..model.quiet import quiet, tracing
from ..model.random_ops import random_error
from ..model.randomness import kept_random_state
from ..model.size_changes import Trial
from ..model.size_limits import hand_on, set_limits
from ..model.stateful import run_unchanged
from ..model.trace_facts import SizeKind, TraceFacts, note, noted
from .annotation import Annotator, annotate, cloned, example_values, spec_of
from .exported import FixedSizes, trace_export, trace_free
from .hidden import HiddenOps
from .inplace import make_pure
from .local_sizes import localize_sizes
from .shape_tracer import trace_shapes
from .tracers import Traced, first_line, trace_symbolic

__all__ = ["TRACERS", "example_arguments", "fingerprint", "graph_of", "trace"]

TRACERS: dict[str, Callable[[nn.Module, Example], Traced]] = {
    "symbolic": trace_symbolic,
    "shapes": trace_shapes,
    "export": trace_export,
}
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# What fake tensors say when the values of the data decide, which torch.export cannot know either.
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
    that understands most is taken (see above), and the first of equals. The graph takes what the model takes and gives
    what the model gives (see `interface`). `noted(graph)` holds the tracer's name, the reasons of opaque submodules,
    and the example's shapes. Global random states stay.

    Raises `TraceError` if none agrees, with the reason of each, and `InputError` for an example that the model's
    forward does not take, and `ModelError` for a model that changes while it is run.
    """
    with kept_random_state():
        return _TracerSearch(unwrapped(model), example_arguments(example_input)).run(list(tracers))


# Of a graph of one batch and one image size that torch.export is asked to free, at most: 229 took it 16 CPU seconds.
FREE_NODES = 150
RESTS = 7, 4  # sizes one after the other that are tried far away: every rest of strides to 7, of large graphs to 4


@dataclass(frozen=True, order=True)
class _Rank:
    """What is wrong with a graph; the smaller the better."""

    convs: int  # convolutions inside opaque submodules
    fixed: int  # of batch and image size, those of the example only
    known: int  # other understood ops inside opaque submodules


_Attempt = tuple[str, Callable[[], Traced]]


class _TracerSearch:
    """Tries tracers one by one and keeps the best graph."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        bind(model, example)
        self.model, self.example = model, example
        with FullPrecision():
            self.reference = run_unchanged(model, example)
        self.probes = Probes(model, example)
        self.reasons: list[str] = []
        self.best: tuple[_Rank, fx.GraphModule] | None = None

    def run(self, tracers: list[str]) -> fx.GraphModule:
        """The best graph. Raises `TraceError` if there is none."""
        late: list[_Attempt] = []  # only worth finishing if no other tracer does better
        for name in tracers:
            for attempt in (
                self._export(tracers == ["export"])
                if name == "export"
                else [(name, partial(_traced, name, *self._source()))]
            ):
                if self._try(*attempt, late if name != tracers[-1] else None):
                    return self._found()
        for attempt in late:
            if self._try(*attempt, None):
                break
        return self._found()

    def _source(self) -> tuple[nn.Module, Example]:
        return self.model, self.example

    def _export(self, alone: bool) -> Iterator[_Attempt]:
        """torch.export with the example's sizes and, where a graph of this batch size only is found, with free sizes.

        It takes seconds, so it is not asked for ops that another graph of all sizes hides, as long as no conv is one.
        Nor is it for the image size, unless it is asked `alone`: what computes with sizes (pads, say) would be opaque,
        and merge less.
        """
        if any(kind in reason for kind in _DATA_DEPENDENT for reason in self.reasons):
            self.reasons.append("export: not tried, because the control flow depends on data")
            return
        rank = self.best[0] if self.best else None
        if rank is None or rank.convs:
            before = self.best
            yield "export", partial(_traced, "export", *self._source())
            if self.best is before:
                return
        elif not rank.fixed:
            return
        found = None if self.best is None or alone else self.best[1]
        if found is not None and len(found.graph.nodes) > FREE_NODES and noted(found).fixes("size"):
            return
        trials = [Trial.BOTH, Trial.BATCH, Trial.SIZE]
        wanted: tuple[SizeKind, ...] = ("batch", "size") if alone else ("batch",)
        while trials and self.best is not None and noted(self.best[1]).fixes(*wanted):
            trial = trials.pop(0)
            freed = self.probes.freed(trial)
            if freed is None:
                continue
            before, fixed = self.best, _Fixed()
            yield "export", partial(fixed.watch, partial(_quietly, trace_free, self.model, *freed))
            if self.best is not before:
                return
            if fixed.seen is not None and trial is Trial.BOTH:
                trials = [Trial.SIZE] * (not fixed.seen.size) + [Trial.BATCH] * (not fixed.seen.batch)

    def _try(self, name: str, make: Callable[[], Traced], late: list[_Attempt] | None) -> bool:
        """Whether the graph that `make` traces leaves nothing to be wished for."""
        try:
            traced = make()
            if late is not None and _holds_convs(traced):
                late.append((name, lambda: traced))
                return False
            words = _words(traced)
            gm, hidden = graph_of(name, traced, self.example, self.reference)
            rank = _Rank(hidden.convs, self._sized(gm, name, words), hidden.known)
        except _Differs as error:
            _check_repeats(self.model, self.example, self.reference)  # another tracer would not agree with it either
            self.reasons.append(f"{name}: {type(error).__name__.lstrip('_')}: {first_line(error)}")
            return False
        except ModelError:
            raise
        except Exception as error:  # any tracer may fail in any way; the next one is tried
            self.reasons.append(f"{name}: {type(error).__name__}: {first_line(error)}")
            return False
        if self.best is None or rank < self.best[0]:
            self.best = rank, gm
        return rank == _Rank(0, 0, 0)

    def _sized(self, gm: fx.GraphModule, name: str, words: list[str]) -> int:
        """How many of batch and image size are the example's only; the graph refuses others from now on."""
        with quiet():
            verdict = self.probes.verdict(gm, thorough=name != "symbolic")
            if name == "shapes":
                kinds = [kind for kind, state in verdict.states.items() if state == "any"]
                verdict = self.probes.fixed(verdict, [kind for kind in kinds if self._differs_far_away(kind, words)])
        note(gm, replace(noted(gm), sizes=verdict.states))
        if verdict.limits:
            set_limits(gm, verdict.limits)
        return verdict.fixed

    def _differs_far_away(self, kind: SizeKind, words: list[str]) -> bool:
        """Whether the shape tracer decides otherwise for many images, or for large ones: by a branch on a size, say, or
        by a pad that is computed from it. Sizes of every rest are tried: a stride of 3 gives one pad in three sizes."""
        rests = 1 if kind == "batch" else RESTS[len(words) > FREE_NODES]
        return any(self._differs_at(self.probes.far(kind, more), words) for more in range(rests))

    def _differs_at(self, example: Example | None, words: list[str]) -> bool:
        try:
            return example is not None and _words(_quietly(trace_shapes, self.model, example)) != words
        except Exception:  # a model need not run there
            return False

    def _found(self) -> fx.GraphModule:
        if self.best is not None:
            hand_on(self.model, self.best[1])
            return self.best[1]
        detail = "\n  ".join(self.reasons)
        raise TraceError(
            f"{type(self.model).__name__} could not be traced:\n  {detail}\n"
            "Pass the traceable part of the model (its backbone), or make the data-dependent part a module of its own."
        )


class _Fixed:
    """Remembers which sizes torch.export could not leave free."""

    seen: FixedSizes | None = None

    def watch(self, make: Callable[[], Traced]) -> Traced:
        try:
            return make()
        except FixedSizes as error:
            self.seen = error
            raise


def _words(traced: Traced) -> list[str]:
    """What ops a raw graph has, in order, each with its numbers: pads, crops, shapes."""
    nodes = [n for n in traced.gm.graph.nodes if n.op.startswith("call_")]
    return [f"{n.op} {n.target} {_numbers(n)}" for n in nodes]


def _numbers(node: fx.Node) -> list[int | float]:
    found: list[int | float] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda v: found.append(v) if isinstance(v, (int, float)) else None)
    return found


class _Differs(TraceError):
    """A graph whose output is not the model's."""


def _check_repeats(model: nn.Module, example: Example, reference: Any) -> None:
    """Raises `ModelError`, which names the op, if the model itself gives another output for the same input."""
    with FullPrecision():
        again = run_unchanged(model, example)
    if _difference(reference, again) is not None:
        raise random_error(eval_copy(model), cloned(example))


def _traced(name: str, model: nn.Module, example: Example) -> Traced:
    return _quietly(TRACERS[name], model, example)


def _quietly(tracer: Callable[..., Traced], *args: Any) -> Traced:
    with quiet(), tracing():
        return tracer(*args)


def _holds_convs(traced: Traced) -> bool:
    """Whether there are convolution modules in what the tracer could not follow."""
    modules = dict(traced.gm.named_modules())
    opaque = [modules[name] for name in traced.opaque if name in modules]
    return any(isinstance(m, _ConvNd) for module in opaque for m in module.modules())


def graph_of(name: str, traced: Traced, example: Example, reference: Any) -> tuple[fx.GraphModule, HiddenOps]:
    """(the canonical graph of what a tracer gave, what it hides). Raises what an op raises, or `TraceError`."""
    gm = traced.gm
    gm.train(False)
    make_pure(gm)
    before = states_of(gm)
    annotate(gm, example)
    fold_constants(gm)
    canonicalize(gm)
    runner = Annotator(gm, frozenset(traced.opaque) | _unknown_norms(gm, traced))
    difference = _difference(reference, runner.run(*example_values(gm, example)))
    if difference is not None:
        raise _Differs(f"the graph does not compute what the model computes ({difference})")
    if runner.hidden.autocast:
        raise ModelError(
            f"one of {', '.join(traced.opaque)} has an autocast region, and cannot be traced: take the region out, "
            "and run the result under torch.autocast instead"
        )
    args, kwargs = example
    facts = TraceFacts(
        tracer=name,
        opaque=traced.opaque,
        volatile=changes_while_it_runs(before, gm),
        positional=[spec_of(a) for a in args],
        keyword={k: spec_of(v) for k, v in kwargs.items()},
    )
    note(gm, facts)
    if localize_sizes(gm):
        canonicalize(gm)  # an expansion to sizes of the value that it meets has a plain form only now
        if (difference := _difference(reference, annotate(gm, example))) is not None:
            raise _Differs(
                f"the graph does not compute what the model computes once sizes are read elsewhere ({difference})"
            )
    return gm, runner.hidden


def _unknown_norms(gm: fx.GraphModule, traced: Traced) -> frozenset[str]:
    """The norms that could not be traced, without those that are known as one op by what they are."""
    calls = [n for n in gm.graph.nodes if n.op == "call_module" and n.target in traced.norms]
    shapes = [(str(n.target), shape_of(n) or ()) for n in calls]
    return frozenset(name for name, shape in shapes if not ops.normalizes(gm.get_submodule(name), shape))


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
