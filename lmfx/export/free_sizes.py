"""Says which sizes of an exported network are free, and at which other sizes it has to agree with torch.

    dynamic_batch=True                      the first dimension of what has as many rows as the images
    dynamic_shapes=True                     height and width of the maps (all their spatial dimensions)
    dynamic_shapes=("batch", "height")      these
    dynamic_shapes={"x": (0, 2, 3)}         these dimensions of these inputs, or {"x": {0: "batch", 2: "rows"}}

An exporter decides by the sizes that it sees: a size of one is a number to it, and a branch goes the way of that size.
So a file is exported with several images that are larger than the example's (no map inside is one pixel then that
is more elsewhere), and run at up to three other sizes, odd ones where the network takes that: several smaller images,
a single larger one, several still larger ones.

A network that has a size as a number (`SizeError`) cannot be exported for others: it would be wrong there in silence.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmfx.environment.caller_state import one_line
from lmfx.passes.errors import ExportError, LmfxError, OptionError, SizeError
from lmfx.passes.model.interface import Example, bind
from lmfx.passes.model.quiet import quiet
from lmfx.passes.model.size_changes import Leaf, SizeChange, Trial, drawn, layouts, resized
from lmfx.passes.model.size_limits import ConditionError

__all__ = ["Dynamic", "FreeSizes", "dimension", "free_sizes"]

Dynamic = bool | Sequence[str] | Mapping[str, Any]
AXES = {1: ("width",), 2: ("height", "width"), 3: ("depth", "height", "width")}
KNOWN = ("batch", "depth", "height", "width")


@dataclass(frozen=True)
class FreeSizes:
    """What is free: for each tensor of the example (counted in order) its dimensions and their names.

    `shown` is the example to export with, `trials` are examples of other sizes, with words that say which.
    """

    dims: dict[int, dict[int, str]] = field(default_factory=dict)
    shown: Example = ((), {})
    trials: tuple[tuple[str, Example], ...] = ()

    def specs(self, of_dim: Any) -> Any:
        """torch.export's `dynamic_shapes` for `shown`, one entry an argument; `of_dim(name)` makes a dimension."""
        leaves, spec = pytree.tree_flatten(list(self.shown[0]) + list(self.shown[1].values()))
        tensors = itertools.count()
        dims = [self.dims.get(next(tensors), {}) if isinstance(v, Tensor) else {} for v in leaves]
        made = [{d: of_dim(name) for d, name in free.items()} or None for free in dims]
        return tuple(pytree.tree_unflatten(made, spec))

    def renamed(self, shapes: Sequence[Sequence[Any]]) -> dict[str, str]:
        """What an exporter called the free sizes -> what they are here; `shapes` are those of its inputs, in order."""
        found: dict[str, str] = {}
        for n, dims in self.dims.items():
            for d, name in dims.items():
                found.setdefault(str(shapes[n][d]), name)
        return found


def dimension(name: str) -> Any:
    """torch.export's free dimension: an error where the network takes it for a number."""
    return torch.export.Dim("batch", min=1) if name == "batch" else torch.export.Dim.DYNAMIC


def free_sizes(net: nn.Module, example: Example, batch: bool, shapes: Dynamic) -> FreeSizes | None:
    """What is free of a network, None if nothing is.

    Raises `OptionError` for a description that fits no input, `ExportError` for a network that has such a size as a
    number, or runs at none of the others that were tried.
    """
    if not batch and not shapes:
        return None
    asked = f"dynamic_shapes={shapes!r}" if shapes else "dynamic_batch=True"
    values, spec = pytree.tree_flatten(example)
    names = _input_names(net, example)
    reasons: list[str] = []
    for leaves in _choices(values, names, batch, shapes, asked):
        trials = _trials(net, values, spec, leaves, asked, reasons)
        if any(_all_large(e, leaves) for _, e in trials):
            order = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
            dims = {order.index(v.place): _named(v, batch, shapes) for v in leaves}
            return FreeSizes(dims, next(e for _, e in reversed(trials) if _all_large(e, leaves)), tuple(trials))
    raise ExportError(
        f"{asked}: {type(net).__name__} runs at none of the other sizes that were tried, so a file for them cannot be "
        f"checked{f' ({reasons[0]})' if reasons else ''}; export it without"
    )


def _input_names(net: nn.Module, example: Example) -> list[str]:
    """The name of the argument that each flat value of the example belongs to."""
    args, kwargs = example
    given = bind(net, example).given
    by_id = {id(v): name for name, v in given.items()}
    tops = [by_id.get(id(v), str(i)) for i, v in enumerate((*args, *kwargs.values()))]
    return [n for n, v in zip(tops, (*args, *kwargs.values()), strict=True) for _ in pytree.tree_leaves(v)]


# --- what is asked for ------------------------------------------------------------------------------------------------


def _choices(
    values: Sequence[Any], names: Sequence[str], batch: bool, shapes: Dynamic, asked: str
) -> list[tuple[Leaf, ...]]:
    """The dimensions that may be meant: channels first, then channels last."""
    if isinstance(shapes, Mapping):
        return [_by_name(values, names, batch, shapes, asked)]
    words = KNOWN if shapes is True else tuple(shapes or ())
    if isinstance(shapes, str) or any(w not in KNOWN for w in words):
        raise OptionError(
            f"{asked}: use True for height and width, a tuple of {', '.join(map(repr, KNOWN))}, or the dimensions of "
            'each input, {"x": (0, 2, 3)}'
        )
    batch = batch or (shapes is not True and "batch" in words)
    sized = any(w != "batch" for w in words)
    tensors = [v for v in values if isinstance(v, Tensor) and v.dim()]
    images = next((v for v in tensors if v.dim() > 2), tensors[0] if tensors else None)
    rows = len(images) if images is not None else 0
    trial = Trial.BOTH if batch and sized else Trial.BATCH if batch else Trial.SIZE
    found = []
    for leaves in layouts(values, names, rows, trial):
        kept = tuple(_only(v, words) for v in leaves)
        kept = tuple(v for v in kept if v.dims or v.batched)
        if kept and kept not in found and (not sized or any(v.dims for v in kept)):
            found.append(kept)
    if not found:
        raise OptionError(f"{asked}: no input of the example has such a dimension")
    return found


def _only(leaf: Leaf, words: Sequence[str]) -> Leaf:
    axes = AXES.get(len(leaf.dims), ())
    return replace(leaf, dims=tuple(d for d, name in zip(leaf.dims, axes, strict=False) if name in words))


def _by_name(
    values: Sequence[Any], names: Sequence[str], batch: bool, shapes: Mapping[str, Any], asked: str
) -> tuple[Leaf, ...]:
    leaves: list[Leaf] = []
    for name, dims in shapes.items():
        place = next((i for i, n in enumerate(names) if n == name and isinstance(values[i], Tensor)), None)
        if place is None:
            known = ", ".join(dict.fromkeys(n for n, v in zip(names, values, strict=True) if isinstance(v, Tensor)))
            raise OptionError(f"{asked}: there is no input {name!r}, only {known}")
        rank = values[place].dim()
        if not all(type(d) is int and 0 <= d < rank for d in dims or ()):
            raise OptionError(f"{asked}: the dimensions of {name} are whole numbers from 0 to {rank - 1}")
        wanted = tuple(d for d in dims or () if d)
        leaves.append(Leaf(name, place, tuple(values[place].shape), wanted, batch or 0 in (dims or ())))
    return tuple(v for v in leaves if v.dims or v.batched)


def _named(leaf: Leaf, batch: bool, shapes: Dynamic) -> dict[int, str]:
    """The name of each free dimension of one input."""
    found = {0: "batch"} if leaf.batched else {}
    rank = len(leaf.shape)
    given = shapes.get(leaf.name) if isinstance(shapes, Mapping) else None
    axes: dict[int, str] = dict(enumerate(AXES.get(rank - 2, ()), 2 if 1 not in leaf.dims else 1))
    for d in leaf.dims:
        found[d] = axes.get(d, f"{leaf.name}_{d}")
    if isinstance(given, Mapping):
        found |= {d: name for d, name in given.items() if isinstance(name, str) and name.isidentifier()}
    return found


# --- where it is tried ------------------------------------------------------------------------------------------------


def _smaller(n: int, axis: int) -> int | None:
    return max(4, n * (5 + axis) // 8) | 1 if n >= 8 else None


def _larger(n: int, axis: int) -> int | None:
    return (n + n // 4 + 2 + axis) | 1


def _far(n: int, axis: int) -> int | None:
    return (n + n // 2 + 4 + 2 * axis) | 1


def _steps(step: int, many: int) -> SizeChange:
    """Networks that add what they have at other strides; images are no squares."""

    def change(n: int, axis: int) -> int | None:
        new = n + many * step * (1 + axis)
        return new if n % step == 0 and new > 0 else None

    return change


def _alike(step: int, many: int) -> SizeChange:
    """A square, for networks that take nothing else."""
    return lambda n, axis: n + many * step if n % step == 0 and n + many * step > 0 else None


def _kept(n: int, axis: int) -> int | None:
    return n


_STEPS = (2, 4, 8, 16, 32, 64)


def _changes(odd: SizeChange, many: int) -> tuple[SizeChange, ...]:
    """Sizes to try until one runs: an odd one, then `many` steps from the example's own."""
    return odd, *(_steps(s, many) for s in _STEPS), *(_alike(s, many) for s in (1, 8, 32))


_SIZES = (_changes(_smaller, -1), _changes(_larger, 1), _changes(_far, 2))


def _trials(
    net: nn.Module, values: Sequence[Any], spec: Any, leaves: tuple[Leaf, ...], asked: str, reasons: list[str]
) -> list[tuple[str, Example]]:
    """Several smaller images, a single larger one, several still larger ones: what of that is free, and runs.

    Adds to `reasons` what the network said of those that it does not take.
    """
    sized = any(v.dims for v in leaves)
    rows = max((v.shape[0] for v in leaves if v.batched), default=0)
    found: list[tuple[str, Example]] = []
    several, other = 3 if rows == 2 else 2, 1 if rows != 1 else 5
    for changes, batch in zip(_SIZES if sized else _SIZES[:2], (several, other, several), strict=False):
        for change in changes if sized else (_kept,):
            shapes = [resized(v, change, batch, leaves) for v in leaves]
            if any(s is None for s in shapes) or [v.shape for v in leaves] == shapes:
                continue
            example = _drawn(values, spec, leaves, [s for s in shapes if s is not None])
            sizes = ", ".join(f"{v.name} {' x '.join(map(str, s or ()))}" for v, s in zip(leaves, shapes, strict=True))
            if (problem := _refusal(net, example, asked)) is not None:
                reasons.append(f"at {sizes}: {problem}")
            else:
                found.append((f"a random input of another {'size' if sized else 'batch'} ({sizes})", example))
                break
    return found


def _all_large(example: Example, leaves: tuple[Leaf, ...]) -> bool:
    values = pytree.tree_leaves(example)
    free = [(v, d) for v in leaves for d in (*((0,) if v.batched else ()), *v.dims)]
    return all(values[v.place].shape[d] > 1 for v, d in free)


def _drawn(values: Sequence[Any], spec: Any, leaves: tuple[Leaf, ...], shapes: Sequence[tuple[int, ...]]) -> Example:
    new = list(values)
    for leaf, shape in zip(leaves, shapes, strict=True):
        new[leaf.place] = drawn(new[leaf.place], shape)
    args, kwargs = pytree.tree_unflatten(new, spec)
    return args, kwargs


def _refusal(net: nn.Module, example: Example, asked: str) -> str | None:
    """What a network says of an example that it does not take. Raises `ExportError` if it has a size as a number."""
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)
    try:
        with torch.no_grad(), quiet():
            net(*args, **kwargs)
    except ConditionError as error:
        return str(error)
    except SizeError as error:
        raise ExportError(f"{asked}: what is exported would be wrong at other sizes, in silence: {error}") from error
    except LmfxError:
        raise
    except Exception as error:  # a network may refuse a size in any way; another one is tried, and the reason kept
        return f"{type(error).__name__}: {one_line(error)}"
    return None
