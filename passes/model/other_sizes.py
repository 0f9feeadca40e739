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
smaller and a larger size as well; what such a tracer decides at sizes that are far away (`far`) it is asked there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import SizeError, TraceError
from .autocast import FullPrecision
from .interface import Example, bind, plain_output
from .model_copy import eval_copy
from .quiet import quiet
from .size_limits import Limit
from .trace_facts import SizeState, noted

__all__ = ["Probes", "Verdict", "differs"]

KINDS = ("batch", "size")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # a size in the wrong place changes far more
HALF = 5e-2
COARSE = 5e-2  # what was computed while tracing is another image altogether
MOST_REFUSALS = 6  # sizes that are tried where the model refuses them
MANY = 1024  # images or pixels more; what is divided by powers of two leaves the same rest
MOST_ALONE = 8  # inputs that are changed one by one


@dataclass(frozen=True)
class Verdict:
    """What was found for each kind, and what a graph has to refuse."""

    states: dict[str, SizeState]
    limits: tuple[Limit, ...]

    @property
    def fixed(self) -> int:
        """How many of batch and size are fixed."""
        return sum(state == "fixed" for state in self.states.values())


@dataclass(frozen=True)
class _Leaf:
    """One tensor of the example that may have other sizes."""

    name: str  # as the graph's code reads it
    place: int  # among the flat values
    shape: tuple[int, ...]
    dims: tuple[int, ...]  # its spatial dimensions
    batched: bool

    def resized(self, change: Change, batch: int) -> tuple[int, ...] | None:
        """The shape when this tensor alone changes."""
        return _resized(self, change, batch, (self,))


@dataclass(frozen=True)
class _Probe:
    given: dict[str, Any]  # by placeholder
    expected: Any
    leaves: tuple[_Leaf, ...]


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
        self.known: dict[str, list[_Probe]] = {}
        self.inherited: dict[str, tuple[_Leaf, ...]] = {}  # kinds that the model itself refuses with a SizeError

    def verdict(self, gm: fx.GraphModule, thorough: bool) -> Verdict:
        """What the graph `gm` is right at. `gm` is not changed.

        Raises `TraceError` if it is not even right for other images of the example's size.
        """
        alone = [(kind, probe) for kind in KINDS for probe in self.taken(f"{kind} alone") if not _agrees(gm, probe)]
        found = self._together(gm, thorough)
        if not alone:
            return found
        limits = [limit for kind, probe in alone for limit in _limits(kind, probe.leaves)]
        states = found.states | {kind: "fixed" for kind, _ in alone}
        return Verdict(states, (*found.limits, *(v for v in limits if v not in found.limits)))

    def _together(self, gm: fx.GraphModule, thorough: bool) -> Verdict:
        """What the graph is right at when all inputs change alike."""
        states: dict[str, SizeState] = {}
        limits: list[Limit] = []
        both = self.taken("both")
        others = self.taken("more") + self.taken("one") if thorough else []
        if both and all(_agrees(gm, p) for p in [*both, *others]):
            return Verdict(dict.fromkeys(KINDS, "any"), ())
        if not all(_agrees(gm, p, COARSE) for p in self.taken("same")):
            raise TraceError("the graph does not compute what the model computes on other images than the example")
        for kind in KINDS:
            probes = self.taken(kind) + (self.taken("more" if kind == "size" else "one") if thorough else [])
            if not probes:
                fixed = self.inherited.get(kind)
                states[kind] = "fixed" if fixed else "refused" if self.layouts(kind) else "none"
                limits += _limits(kind, fixed or ())
            elif all(_agrees(gm, p) for p in probes):
                states[kind] = "any"
            else:
                states[kind] = "fixed"
                limits += _limits(kind, next(p for p in probes if not _agrees(gm, p)).leaves)
        if both and not limits:  # each alone is right, and both together are not
            states["size"], limits = "fixed", _limits("size", both[0].leaves)
        return Verdict(states, tuple(limits))

    def taken(self, kind: str) -> list[_Probe]:
        """Inputs that the model takes: at most one, and of `more` (sizes) one for each that runs."""
        if kind not in self.known:
            self.known[kind] = list(self._taken(kind))
        return self.known[kind]

    def freed(self, kind: str) -> tuple[Example, dict[int, tuple[int, ...]]] | None:
        """An example of another batch or size, and which dimensions of its tensors (counted among all) are others.

        Sizes of one can be told from no other one, so there is none where the model takes only that.
        """
        for probe in self.taken(kind):
            example: Example = self.binding.call(lambda *args, **kwargs: (args, kwargs), probe.given)
            values = pytree.tree_leaves(probe.given)
            numbers = {place: n for n, place in enumerate(i for i, v in enumerate(values) if isinstance(v, Tensor))}
            free = {numbers[v.place]: (*((0,) if v.batched else ()), *v.dims) for v in probe.leaves}
            if all(values[v.place].shape[d] > 1 for v in probe.leaves for d in free[numbers[v.place]]):
                return example, free
        return None

    def far(self, kind: str) -> Example | None:
        """An example of many more images, or of much larger ones, without memory: for tracers, not for the model."""
        leaves = next(iter(self.layouts(kind)), ())
        values = list(self.values)
        for v in leaves:
            shape = [n + MANY * (d in v.dims) for d, n in enumerate(v.shape)]
            shape[0] += MANY if v.batched else 0
            values[v.place] = values[v.place].new_zeros(1).expand(shape)
        given: dict[str, Any] = pytree.tree_unflatten(values, self.spec)
        return self.binding.call(lambda *args, **kwargs: (args, kwargs), given) if leaves else None

    def fixed(self, verdict: Verdict, kinds: Iterable[str]) -> Verdict:
        """The same verdict with more kinds that are fixed."""
        limits = [limit for kind in kinds for limit in _limits(kind, next(iter(self.layouts(kind)), ()))]
        new = [limit for limit in limits if limit not in verdict.limits]
        return Verdict(verdict.states | dict.fromkeys(kinds, "fixed"), (*verdict.limits, *new))

    def _taken(self, kind: str) -> Iterator[_Probe]:
        if kind.endswith(" alone"):
            yield from self._alone(kind.partition(" ")[0])
            return
        refusals = 0
        batch = 1 if kind == "one" else 3 if self.batch == 2 else 2
        for leaves in self.layouts(kind):
            for change in _CHANGES[kind]:
                shapes = [_resized(v, change, batch, leaves) for v in leaves]
                if (shapes == [v.shape for v in leaves] and kind != "same") or any(s is None for s in shapes):
                    continue
                made = self._run(kind, leaves, [s for s in shapes if s is not None])
                if made is not None:
                    yield made
                    if kind != "more":
                        return
                refusals += made is None
                if refusals >= MOST_REFUSALS or kind in self.inherited:
                    return

    def _alone(self, kind: str) -> Iterator[_Probe]:
        """Inputs of which one only is another; a network of several may take one that broadcasts."""
        leaves = next((found for found in self.layouts(kind) if len(found) > 1), ())
        for leaf in leaves[:MOST_ALONE]:
            if kind == "batch":
                tries = [[leaf.resized(_kept, rows)] for rows in (1, 3 if self.batch == 2 else 2)]
            else:
                tries = [[leaf.resized(_single, 0)], [leaf.resized(change, 0) for change in _ONE]]
            for shapes in tries:
                runs = (self._run(kind, (leaf,), [s]) for s in shapes if s is not None and s != leaf.shape)
                made = next((probe for probe in runs if probe is not None), None)
                if made is not None:
                    yield made

    def layouts(self, kind: str) -> list[tuple[_Leaf, ...]]:
        """Which tensors may vary, and in which dimensions: maps with channels first, then with channels last, then
        sequences; tensors with as many rows as the images, all or only those of two dimensions and more."""
        tensors = [(i, v) for i, v in enumerate(self.values) if isinstance(v, Tensor) and v.dim()]
        found: list[tuple[_Leaf, ...]] = []
        rank = max((v.dim() for _, v in tensors if _is_map(v)), default=0)
        spatial: list[Callable[[Tensor], tuple[int, ...]]] = [lambda v: ()]
        if kind == "same":
            spatial = [lambda v: tuple(range(1, v.dim()))]
        elif kind not in ("batch", "one"):
            spatial = [lambda v: tuple(range(2, v.dim())), lambda v: tuple(range(1, v.dim() - 1))] if rank > 2 else []
        one_batch = kind in ("size", "more", "same")
        rows = [1] if one_batch else [1, 2]
        for dims in spatial:
            for least in rows:
                leaves = tuple(
                    _Leaf(
                        self.names[i],
                        i,
                        tuple(v.shape),
                        dims(v) if kind == "same" or (v.dim() == rank and _is_map(v)) else (),
                        not one_batch and v.dim() >= least and len(v) == self.batch,
                    )
                    for i, v in tensors
                )
                leaves = tuple(v for v in leaves if v.dims or v.batched)
                if leaves and leaves not in found:
                    found.append(leaves)
        return found

    def _run(self, kind: str, leaves: tuple[_Leaf, ...], shapes: list[tuple[int, ...]]) -> _Probe | None:
        values = list(self.values)
        for leaf, shape in zip(leaves, shapes, strict=True):
            values[leaf.place] = _drawn(values[leaf.place], shape)
        given: dict[str, Any] = pytree.tree_unflatten(values, self.spec)
        model, own = eval_copy(self.model), _cloned(given)
        binding = bind(model, self.example)
        with torch.no_grad(), quiet(), FullPrecision():
            try:
                output = binding.call(model, own)
            except SizeError:  # a graph of lmfx in it
                if kind in KINDS:
                    self.inherited[kind] = leaves
                return None
            except Exception:  # the caller's forward alone runs here, and refuses a size in a way of its own
                return None
        expected = plain_output(output)
        floating = [v for v in pytree.tree_leaves(expected) if isinstance(v, Tensor) and v.is_floating_point()]
        if not all(v.numel() and bool(v.isfinite().all()) for v in floating):
            return None
        return _Probe(given, expected, leaves)


def _is_map(value: Tensor) -> bool:
    return value.dim() > (2 if value.is_floating_point() else 3)


def _name(path: tuple[Any, ...]) -> str:
    """The expression that reads a value from the placeholders: `given['x'][0]`."""
    text = str(path[0].key)
    for entry in path[1:]:
        if isinstance(entry, pytree.GetAttrKey):
            text += f".{entry.name}"
        else:
            text += f"[{entry.idx if hasattr(entry, 'idx') else entry.key!r}]"
    return text


def _limits(kind: str, leaves: tuple[_Leaf, ...]) -> list[Limit]:
    dims = [(v, (0,) if kind == "batch" and v.batched else v.dims if kind == "size" else ()) for v in leaves]
    return [Limit(v.name, v.shape, d, kind) for v, d in dims if d]


# --- sizes ------------------------------------------------------------------------------------------------------------


def _smaller(n: int, axis: int) -> int | None:
    if n < 8:
        return n + 3 + axis  # kernels may be larger than a map that is smaller still
    return max(4, n * (5 + axis) // 8) | 1


def _of_32(n: int, axis: int) -> int | None:
    """Networks of stride 32 that add what they have at other strides."""
    if n % 32:
        return None
    return max(32, (n * (5 + axis) // 8) // 32 * 32) if n > 64 else n + 32 * (1 + axis)


def _half(n: int, axis: int) -> int | None:
    return None if n % 2 or n < 8 else n // 2


def _square(n: int, axis: int) -> int | None:
    return None if n % 32 or n <= 64 else n - 32


def _twice(n: int, axis: int) -> int | None:
    return 2 * n


def _larger(n: int, axis: int) -> int | None:
    return n + 32 * (1 + axis) if n % 32 == 0 else n + n // 4 + 2 + axis


def _quarter(n: int, axis: int) -> int | None:
    return None if n < 16 else n // 4 + axis


def _few(n: int, axis: int) -> int | None:
    return n // 2 + axis if 3 <= n < 16 else None


def _tiny(n: int, axis: int) -> int | None:
    return 2 + axis if n >= 8 else None


def _single(n: int, axis: int) -> int | None:
    return 1


def _kept(n: int, axis: int) -> int | None:
    return n


Change = Callable[[int, int], int | None]
_ONE: tuple[Change, ...] = (_smaller, _of_32, _half, _square, _twice)
_CHANGES: dict[str, tuple[Change, ...]] = {
    "batch": (_kept,),
    "one": (_kept,),
    "same": (_kept,),
    "size": _ONE,
    "both": _ONE,
    "more": (_larger, _quarter, _few, _tiny),
}


def _resized(leaf: _Leaf, change: Change, batch: int, leaves: tuple[_Leaf, ...]) -> tuple[int, ...] | None:
    """The new shape: along each axis the smallest map changes, and maps that are a multiple of it keep that."""
    shape = list(leaf.shape)
    for axis, d in enumerate(leaf.dims):
        least = min(v.shape[v.dims[axis]] for v in leaves if len(v.dims) == len(leaf.dims))
        new = change(least, axis)
        if new is None:
            return None
        shape[d] = shape[d] * new // least if shape[d] % least == 0 else shape[d] + new - least
    if leaf.batched:
        shape[0] = batch
    return tuple(shape)


def _drawn(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of another shape with values like those of `value`; images differ, and none is constant."""
    for d, n in enumerate(shape):
        at = torch.arange(n, device=value.device)
        value = value.index_select(d, at % value.shape[d]) if n != value.shape[d] else value
    if not value.is_floating_point() or value.dim() < 2:
        return value.clone()
    dtype, value = value.dtype, value.double()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(value.device)
    spread = float(value.std()) if value.numel() > 1 else 0.0
    mixed = value + 0.5 * (spread if math.isfinite(spread) and spread > 0 else 1.0) * noise
    if spread > 0:  # within what the example has: images of [0, 1] stay images
        mixed = mixed.clamp(float(value.min()), float(value.max()))
    return mixed.to(dtype)


# --- comparing --------------------------------------------------------------------------------------------------------


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


def differs(expected: Any, actual: Any, tolerance: float | None = None) -> bool:
    """Whether plain outputs differ by more than rounding, in values, in shapes, or in numbers beside the tensors."""
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(actual)
    return len(left) != len(right) or any(_differ(a, b, tolerance) for a, b in zip(left, right, strict=True))


def _differ(a: Any, b: Any, tolerance: float | None) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is not type(b) or (isinstance(a, (int, float, str)) and a != b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    if not a.is_floating_point():
        return float((a != b).double().mean()) > 0.01  # ties of an argmax
    scale = max(float(a.double().norm()), 1e-30)
    error = float((a.double() - b.double()).norm()) / scale
    return not error <= (TOLERANCE.get(a.dtype, HALF) if tolerance is None else tolerance)


def _cloned(value: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)
