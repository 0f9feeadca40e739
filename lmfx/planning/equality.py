"""Checks that a merged network is its model: compared in float64, and rounded to the model's dtype only afterwards.

    model, in float64    what is asked for
    trace, in float64    what was merged: its constants were computed in the model's dtype (a norm written by hand)
    merged, in float64   within 1e-9 of the model; if it is not because of such constants, it is made again from a trace
                         of the model in float64, and that is compared; its weights are those of the first to rounding
    net                  the merged network, rounded once

A model with float32 written into it runs in its own dtype only, and is compared in that; so is one that computes
values in float32 or less also when it runs in float64, if that is seen: in the output, or because a merge took in what
widened them again. A network without such values is compared in float64 or refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lmfx.passes.errors import LmfxError, VerifyError
from lmfx.passes.graph.node_facts import note_like
from lmfx.passes.ir import MergePlan
from lmfx.passes.model.interface import plain_output
from lmfx.passes.model.model_copy import deep_copy, eval_copy
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.trace.tracing import example_arguments, trace

__all__ = ["check_equal", "in_double", "merged_form", "rounded"]

GROWN = 13  # pixels that the second size of the check has more
RELATIVE = 1e-9  # of the largest output, in float64
INSIDE = 1e-12  # of the largest value anywhere in the network
SINGLE = 1e-3  # of the largest output, where the network cannot be run in float64


def in_double(graph: fx.GraphModule) -> fx.GraphModule:
    """A float64 copy of a traced graph, whose nodes keep what the trace noted."""
    made: fx.GraphModule = deep_copy(graph).double()
    for old, new in zip(graph.graph.nodes, made.graph.nodes, strict=True):
        note_like(new, old)
    made.meta = {**graph.meta}
    return made


def merged_form(graph: fx.GraphModule, plan: MergePlan) -> fx.GraphModule:
    """The deploy form of a copy of the plan's graph; untouched layers share their tensors with it."""
    return merge(rewrite(graph, replace(plan, fingerprint=""), share_tensors=True), share_tensors=True)


def rounded(merged: fx.GraphModule, graph: fx.GraphModule, plan: MergePlan) -> fx.GraphModule:
    """The network that was merged in float64 in the dtypes of `graph`, sharing nothing with either."""
    dtypes = {t.dtype for t in (*graph.parameters(), *graph.buffers()) if t.is_floating_point()}
    if len(dtypes) == 1:
        net: fx.GraphModule = deep_copy(merged).to(dtypes.pop())
    else:
        net = deep_copy(merged_form(graph, plan))
    net.meta = {}
    return net


def check_equal(
    model: nn.Module,
    example_input: Any,
    traced: fx.GraphModule,
    merged: fx.GraphModule,
    net: fx.GraphModule,
    plan: MergePlan,
) -> str:
    """How the merged network was compared with the model. Raises `VerifyError` if it is not its function.

    `traced` and `merged` are in float64, `net` is what is returned.
    """
    if not plan.candidates:
        return "nothing was merged; the trace was compared with the model"
    example = example_arguments(example_input)
    _same_weights(merged, net)
    wide = _cast(example)
    doubled = eval_copy(model).double()
    try:
        expected = _run(doubled, wide)
    except Exception as error:  # a model with float32 written into it: it can only be run as it is
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:90]
        return _equal_as_it_is(model, net, example, f"in float64 the model stops at {why!r}")
    try:
        return _equal_in_double(doubled, example_input, traced, merged, net, plan, expected)
    except Exception:  # rounding within the model is seen, or a merge took in what made float64 of float32 again
        rounding = _Rounding()
        with rounding:
            _run(doubled, wide)
        if not rounding.dtype:
            raise
    return _equal_as_it_is(model, net, example, f"in float64 the model still has values in {rounding.dtype}")


def _equal_in_double(
    doubled: nn.Module,
    example_input: Any,
    traced: fx.GraphModule,
    merged: fx.GraphModule,
    net: fx.GraphModule,
    plan: MergePlan,
    expected: list[Tensor],
) -> str:
    """Where the networks were compared. Raises `VerifyError`."""
    wide = _cast(example_arguments(example_input))
    amplitude = _Amplitude(traced)
    amplitude.run(*_values(traced, wide), enable_io_processing=False)
    limit = RELATIVE * _largest(expected) + INSIDE * amplitude.largest
    actual = _run(merged, wide)
    where = "the example"
    try:
        _compare(expected, actual, limit, where)
    except VerifyError as error:
        _compare(_run(traced, wide), actual, limit, where)
        anew = _traced_anew(doubled, _cast(example_input), plan, error)
        _same_weights(anew, net, units=32)
        _compare(expected, _run(anew, wide), limit, where)
    for growth in (GROWN, 1):
        other = _grown(wide, growth)
        try:
            expected = _run(traced, other)
        except Exception:  # the network, or its trace, takes the example's size only
            continue
        where = f"{growth} pixel{'s' * (growth > 1)} more"
        _compare(expected, _run(merged, other), limit + RELATIVE * _largest(expected), where)
        return f"in float64, within {RELATIVE:g}, on the example and at {where}"
    return f"in float64, within {RELATIVE:g}, on the example"


def _equal_as_it_is(model: nn.Module, net: nn.Module, example: Any, why: str) -> str:
    """Compare in the model's own dtype, and say why. Raises `VerifyError`."""
    expected = _run(eval_copy(model), example)
    _compare(expected, _run(net, example), SINGLE * _largest(expected), "the example")
    kinds = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in expected}))
    return f"in {kinds} only, within {SINGLE:g}: {why}"


def _traced_anew(doubled: nn.Module, example: Any, plan: MergePlan, error: VerifyError) -> fx.GraphModule:
    """The same merges in a trace of the float64 model, whose constants are computed in float64. Raises `error`."""
    try:
        return merged_form(trace(doubled, example), plan)
    except LmfxError:  # it is traced in another way
        raise error from None


def _same_weights(merged: fx.GraphModule, net: fx.GraphModule, units: int = 4) -> None:
    """Whether the network to return is the checked one, rounded."""
    left, right = merged.state_dict(), net.state_dict()
    if left.keys() != right.keys():
        raise VerifyError(f"the merged networks differ in {sorted(left.keys() ^ right.keys())[:4]}: please report this")
    for name, value in left.items():
        if not value.is_floating_point():
            continue
        error = float((value - right[name].double()).abs().max()) if value.numel() else 0.0
        allowed = units * torch.finfo(right[name].dtype).eps * float(value.abs().max()) if value.numel() else 0.0
        if not error <= allowed + torch.finfo(right[name].dtype).tiny:
            raise VerifyError(
                f"merging loses the weight {name} to rounding ({error:.2e} of {float(value.abs().max()):.2e} in "
                f"{right[name].dtype}): leave its layer out with exclude="
            )


class _Amplitude(fx.Interpreter):
    """Runs a graph and keeps the largest number in it, which its rounding errors go with."""

    largest = 0.0

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        if n.op != "output" and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            self.largest = max(self.largest, float(value.detach().abs().max()))
        return value


class _Rounding(TorchDispatchMode):
    """Sees whether a model in float64 makes narrower values of others; constants that it makes of nothing are none."""

    dtype = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        given = [v for v in pytree.tree_leaves((args, kwargs or {})) if isinstance(v, Tensor)]
        if any(v.dtype == torch.float64 or not v.is_floating_point() for v in given):
            made = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor) and v.is_floating_point()]
            narrow = [v.dtype for v in made if v.dtype != torch.float64]
            self.dtype = str(narrow[0]).removeprefix("torch.") if narrow else self.dtype
        return value


def _values(graph: fx.GraphModule, example: Any) -> list[Any]:
    args, kwargs = example
    names = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [given.get(name) for name in names]


def _cast(example: Any) -> Any:
    return pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, example)


def _grown(example: Any, pixels: int) -> Any:
    """Noise of the same batch with maps that are larger; the rest stays."""
    generator = torch.Generator().manual_seed(0)

    def grown(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 3:
            return value
        shape = (*value.shape[:2], *(n + pixels for n in value.shape[2:]))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(value)

    return pytree.tree_map(grown, example)


def _run(module: nn.Module, example: Any) -> list[Tensor]:
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)
    with torch.no_grad():
        output = module(*args, **kwargs)
    return [v for v in pytree.tree_leaves(plain_output(output)) if isinstance(v, Tensor)]


def _largest(values: list[Tensor]) -> float:
    """The largest finite number in the outputs."""
    finite = (v[v.isfinite()].abs() for v in values if v.is_floating_point() or v.is_complex())
    return max((float(v.max()) for v in finite if v.numel()), default=0.0)


def _compare(expected: list[Tensor], actual: list[Tensor], limit: float, where: str) -> None:
    if [v.shape for v in expected] != [v.shape for v in actual]:
        raise VerifyError(
            f"merging changes the output's shape from {[tuple(v.shape) for v in expected]} to "
            f"{[tuple(v.shape) for v in actual]} ({where}): leave layers out with exclude=, and please report this"
        )
    for a, b in zip(expected, actual, strict=True):
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        apart = (a - b).abs()[~((a == b) | (a.isnan() & b.isnan()))]  # infinities and what is no number stay these
        error = float(apart.max()) if apart.numel() else 0.0
        if not error <= limit:
            raise VerifyError(
                f"merging changes the output by {error:.2e}, more than {limit:.2e} ({where}): leave layers out with "
                "exclude=, and please report this"
            )
