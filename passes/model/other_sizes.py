"""Checks whether a graph is right at another batch and at other image sizes, by running it beside the model.

    def forward(self, x):                            %view = view(%y, 1, 5, -1)       traced at a batch of 1
        return y.view(len(y), 5, -1)                 at a batch of 2 the model gives (2, 5, n), this graph (1, 5, 2 n)

A tracer that sees sizes as numbers writes them into the graph, as shapes, as pads and crops, as tables of positions, as
the number of times that a loop runs. What a size went into can have the right shape and wrong values, so shapes alone
prove nothing: the values are compared, on images that differ from each other and are not square.

    batch, size      any       agrees with the model wherever it was tried
                     fixed     the graph is right at the example's only; other inputs raise SizeError (`size_limits`)
                     refused   the model itself runs at none of the others that were tried
                     none      nothing of the kind to vary

Of several inputs each is changed alone as well, where the model takes that. One small input of another batch *and* size
says all of most graphs. A graph whose tracer decides by numbers (`thorough`) has to agree for a single image, and at a
smaller and a larger size as well; what such a tracer decides at sizes that are far away (`far`), which leave other
rests than the example's when they are divided by a stride, it is asked there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import SizeError, TraceError
from .autocast import FullPrecision
from .differences import differs
from .interface import Example, bind, plain_output
from .model_copy import eval_copy
from .quiet import quiet
from .size_changes import KINDS, Leaf, Trial, changes_alone, drawn, layouts, resized
from .size_limits import ConditionError, Limit
from .trace_facts import SizeKind, SizeState, noted

__all__ = ["Probes", "Verdict"]

COARSE = 5e-2  # what was computed while tracing is another image altogether
MOST_REFUSALS = 6  # sizes that are tried where the model refuses them
MANY = 1024  # images or pixels more; what is divided by powers of two leaves the same rest
MOST_ALONE = 8  # inputs that are changed one by one


@dataclass(frozen=True)
class Verdict:
    """What was found for each kind, and what a graph has to refuse."""

    states: dict[SizeKind, SizeState]
    limits: tuple[Limit, ...]

    @property
    def fixed(self) -> int:
        """How many of batch and size are fixed."""
        return sum(state == "fixed" for state in self.states.values())


@dataclass(frozen=True)
class _Probe:
    given: dict[str, Any]  # by placeholder
    expected: Any
    leaves: tuple[Leaf, ...]


class Probes:
    """Inputs of other sizes that a model takes, with what it gives; made when they are asked for, once for all graphs.

    The model is run on copies, as it is: what a run leaves in it (tables for the last size) does not meet the next.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.model, self.example = model, example
        self.binding = bind(model, example)
        self.given = self.binding.given
        self.values, self.spec = pytree.tree_flatten(self.given)
        self.names = [_name(path) for path, _ in pytree.tree_flatten_with_path(self.given)[0]]
        tensors = [v for v in self.values if isinstance(v, Tensor) and v.dim()]
        images = next((v for v in tensors if v.dim() > 2), tensors[0] if tensors else None)
        self.batch = len(images) if images is not None else 0
        self.known: dict[Trial, list[_Probe]] = {}
        self.known_alone: dict[SizeKind, list[_Probe]] = {}
        self.inherited: dict[Trial, tuple[Leaf, ...]] = {}  # kinds that the model itself refuses with a SizeError

    def verdict(self, gm: fx.GraphModule, thorough: bool) -> Verdict:
        """What the graph `gm` is right at. `gm` is not changed.

        Raises `TraceError` if it is not even right for other images of the example's size.
        """
        alone = [(kind, probe) for kind in KINDS for probe in self.taken_alone(kind) if not _agrees(gm, probe)]
        found = self._together(gm, thorough)
        if not alone:
            return found
        limits = [limit for kind, probe in alone for limit in _limits(kind, probe.leaves)]
        states = found.states | {kind: "fixed" for kind, _ in alone}
        return Verdict(states, (*found.limits, *(v for v in limits if v not in found.limits)))

    def _together(self, gm: fx.GraphModule, thorough: bool) -> Verdict:
        """What the graph is right at when all inputs change alike."""
        states: dict[SizeKind, SizeState] = {}
        limits: list[Limit] = []
        both = self.taken(Trial.BOTH)
        others = self.taken(Trial.MORE) + self.taken(Trial.ONE) if thorough else []
        if both and all(_agrees(gm, p) for p in [*both, *others]):
            return Verdict(dict.fromkeys(KINDS, "any"), ())
        if not all(_agrees(gm, p, COARSE) for p in self.taken(Trial.SAME)):
            raise TraceError("the graph does not compute what the model computes on other images than the example")
        for kind in KINDS:
            trial, further = Trial(kind), Trial.MORE if kind == "size" else Trial.ONE
            probes = self.taken(trial) + (self.taken(further) if thorough else [])
            if not probes:
                fixed = self.inherited.get(trial)
                states[kind] = "fixed" if fixed else "refused" if self.layouts(trial) else "none"
                limits += _limits(kind, fixed or ())
            elif all(_agrees(gm, p) for p in probes):
                states[kind] = "any"
            else:
                states[kind] = "fixed"
                limits += _limits(kind, next(p for p in probes if not _agrees(gm, p)).leaves)
        if both and not limits:  # each alone is right, and both together are not
            states["size"], limits = "fixed", _limits("size", both[0].leaves)
        return Verdict(states, tuple(limits))

    def layouts(self, trial: Trial) -> list[tuple[Leaf, ...]]:
        """Which tensors may vary, and in which dimensions."""
        return layouts(self.values, self.names, self.batch, trial)

    def taken(self, trial: Trial) -> list[_Probe]:
        """Inputs that the model takes: at most one, and of `MORE` (sizes) one for each that runs."""
        if trial not in self.known:
            self.known[trial] = self._taken(trial)
        return self.known[trial]

    def taken_alone(self, kind: SizeKind) -> list[_Probe]:
        """Inputs that the model takes of which one only is another."""
        if kind not in self.known_alone:
            self.known_alone[kind] = list(self._taken_alone(kind))
        return self.known_alone[kind]

    def freed(self, trial: Trial) -> tuple[Example, dict[int, tuple[int, ...]]] | None:
        """An example of another batch or size, and which dimensions of its tensors (counted among all) are others.

        Sizes of one can be told from no other one, so there is none where the model takes only that.
        """
        for probe in self.taken(trial):
            example: Example = self.binding.call(lambda *args, **kwargs: (args, kwargs), probe.given)
            values = pytree.tree_leaves(probe.given)
            numbers = {place: n for n, place in enumerate(i for i, v in enumerate(values) if isinstance(v, Tensor))}
            free = {numbers[v.place]: (*((0,) if v.batched else ()), *v.dims) for v in probe.leaves}
            if all(values[v.place].shape[d] > 1 for v in probe.leaves for d in free[numbers[v.place]]):
                return example, free
        return None

    def far(self, kind: SizeKind, more: int = 0) -> Example | None:
        """An example of many more images, or of much larger ones, without memory: for tracers, not for the model.

        It has `more` images or pixels than another one of the kind.
        """
        leaves = next(iter(self.layouts(Trial(kind))), ())
        values = list(self.values)
        for v in leaves:
            shape = [n + (MANY + more) * (d in v.dims) for d, n in enumerate(v.shape)]
            shape[0] += MANY + more if v.batched else 0
            values[v.place] = values[v.place].new_zeros(1).expand(shape)
        given: dict[str, Any] = pytree.tree_unflatten(values, self.spec)
        return self.binding.call(lambda *args, **kwargs: (args, kwargs), given) if leaves else None

    def fixed(self, verdict: Verdict, kinds: Iterable[SizeKind]) -> Verdict:
        """The same verdict with more kinds that are fixed."""
        limits = [limit for kind in kinds for limit in _limits(kind, next(iter(self.layouts(Trial(kind))), ()))]
        new = [limit for limit in limits if limit not in verdict.limits]
        return Verdict(verdict.states | dict.fromkeys(kinds, "fixed"), (*verdict.limits, *new))

    def _taken(self, trial: Trial) -> list[_Probe]:
        found = list(self._tried(trial))
        several = trial.sized and any(sum(bool(v.dims) for v in leaves) > 1 for leaves in self.layouts(trial))
        if not found and several and trial not in self.inherited:
            found = list(self._tried(trial, strided=True))
        return found

    def _tried(self, trial: Trial, strided: bool = False) -> Iterator[_Probe]:
        refusals = 0
        batch = 1 if trial is Trial.ONE else 3 if self.batch == 2 else 2
        for leaves in self.layouts(trial):
            for change in trial.changes:
                shapes = [resized(v, change, batch, leaves, strided) for v in leaves]
                if strided and shapes == [resized(v, change, batch, leaves) for v in leaves]:
                    continue
                if (shapes == [v.shape for v in leaves] and trial is not Trial.SAME) or any(s is None for s in shapes):
                    continue
                made = self._run(trial, leaves, [s for s in shapes if s is not None])
                if made is not None:
                    yield made
                    if trial is not Trial.MORE:
                        return
                refusals += made is None
                if refusals >= MOST_REFUSALS or trial in self.inherited:
                    return

    def _taken_alone(self, kind: SizeKind) -> Iterator[_Probe]:
        """A network of several inputs may take one that broadcasts."""
        trial = Trial(kind)
        leaves = next((found for found in self.layouts(trial) if len(found) > 1), ())
        for leaf in leaves[:MOST_ALONE]:
            for shapes in changes_alone(leaf, kind, self.batch):
                runs = (self._run(trial, (leaf,), [s]) for s in shapes if s is not None and s != leaf.shape)
                made = next((probe for probe in runs if probe is not None), None)
                if made is not None:
                    yield made

    def _run(self, trial: Trial, leaves: tuple[Leaf, ...], shapes: list[tuple[int, ...]]) -> _Probe | None:
        values = list(self.values)
        for leaf, shape in zip(leaves, shapes, strict=True):
            values[leaf.place] = drawn(values[leaf.place], shape)
        given: dict[str, Any] = pytree.tree_unflatten(values, self.spec)
        model, own = eval_copy(self.model), _cloned(given)
        binding = bind(model, self.example)
        with torch.no_grad(), quiet(), FullPrecision():
            try:
                output = binding.call(model, own)
            except ConditionError:  # this size only
                return None
            except SizeError:  # a graph of lmfx in it
                if trial in (Trial.BATCH, Trial.SIZE):
                    self.inherited[trial] = leaves
                return None
            except Exception:  # the caller's forward alone runs here, and refuses a size in a way of its own
                return None
        expected = plain_output(output)
        floating = [v for v in pytree.tree_leaves(expected) if isinstance(v, Tensor) and v.is_floating_point()]
        if not all(v.numel() and bool(v.isfinite().all()) for v in floating):
            return None
        return _Probe(given, expected, leaves)


def _name(path: tuple[Any, ...]) -> str:
    """The expression that reads a value from the placeholders: `given['x'][0]`."""
    text = str(path[0].key)
    for entry in path[1:]:
        if isinstance(entry, pytree.GetAttrKey):
            text += f".{entry.name}"
        else:
            text += f"[{entry.idx if hasattr(entry, 'idx') else entry.key!r}]"
    return text


def _limits(kind: SizeKind, leaves: tuple[Leaf, ...]) -> list[Limit]:
    dims = [(v, (0,) if kind == "batch" and v.batched else v.dims if kind == "size" else ()) for v in leaves]
    return [Limit(v.name, v.shape, d, kind) for v, d in dims if d]


def _agrees(gm: fx.GraphModule, probe: _Probe, tolerance: float | None = None) -> bool:
    """Whether the graph gives what the model gives. Modules that keep something of a run keep it in a copy."""
    tensors = [*gm.parameters()]
    own = copy.deepcopy(gm, {id(t): t for t in tensors}) if noted(gm).opaque else gm
    given = _cloned(probe.given)
    values = [given.get(str(n.target)) for n in own.graph.nodes if n.op == "placeholder"]
    with torch.no_grad(), quiet():
        try:
            actual = fx.Interpreter(own).run(*values, enable_io_processing=False)
        except Exception:  # an op, or a module of the caller's, that meets a number where a size should be
            return False
    return not differs(probe.expected, plain_output(actual), tolerance)


def _cloned(value: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)
