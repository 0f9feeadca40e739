"""Runs one network of the zoo through all stages, one by one: a dict that goes into one row of the table.

    trace     a tracer gives a graph that computes what the model computes
    sizes     the graph at another batch, and at another image size: agrees, says so (SizeError), or not taken (the
              model itself refuses what was tried)
    regions   which of the convs on maps lie in a region, and in a candidate, together with another conv
    exact     in float64, at odd sizes where the network takes them: the graph against the model, and the merged form of
              one random plan against its trainable form
    compress  lmfx.compress to 0.8 of the roofline's latency, or InfeasibleBudget with what can be reached
    onnx      the merged network through ONNX Runtime; where that fails, whether the model as it is exports

A stage that fails says so in its own cells, and the next one goes on.
"""

from __future__ import annotations

import copy
import random
import re
import signal
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lmfx
from benchmarks.shared.random_plans import random_plan
from benchmarks.zoo.models import SIZES, build, examples
from lmfx.passes.graph import ops
from lmfx.passes.graph.node_facts import shape_of
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import example_arguments
from lmfx.result import result_of

__all__ = ["STAGES", "examine"]

STAGES = ("exact", "compress", "onnx")  # those that can be left out
BUDGET = 0.8
TOLERANCE = 1e-12
HEAVY, GIANT = (
    150e6,
    250e6,
)  # parameters from which float64, and all but the trace, would not fit beside another network
LARGEST_KERNEL = 2**22  # entries of a merged kernel in a random plan


class StageTimeout(BaseException):
    """A stage took longer than it may. No `except Exception` on the way, of which torch has many, holds it up."""


def examine(
    name: str, stages: tuple[str, ...] = STAGES, seconds: int = 60, sizes: tuple[int, ...] = SIZES
) -> dict[str, Any]:
    """The stages of one network at the first of `sizes` that it takes, each within `seconds` of CPU time.

    Returns the cells of its row; raises nothing.
    """
    row: dict[str, Any] = {"model": name}
    state: dict[str, Any] = {"name": name, "sizes": sizes}
    for stage, run in (("build", _build), ("trace", _trace), ("regions", _regions)):
        if not _stage(row, stage, run, state, seconds):
            return row
    _stage(row, "sizes", _sizes, state, seconds)
    parameters = 1e6 * row["parameters_m"]
    for stage, run, most in (("compress", _compress, GIANT), ("exact", _exact, HEAVY), ("onnx", _onnx, GIANT)):
        if stage not in stages:
            continue
        if parameters > most:
            row[stage] = f"skipped: {parameters / 1e6:.0f} M parameters"
        else:
            _stage(row, stage, run, state, seconds)
    return row


def _stage(row: dict[str, Any], stage: str, run: Callable[..., None], state: dict[str, Any], seconds: int) -> bool:
    begin = time.process_time()
    try:
        with _at_most(seconds), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            run(row, state)
    except StageTimeout:
        row[stage] = f"error: more than {seconds} CPU s"
    except Exception as error:  # the table shows every failure
        known = "" if isinstance(error, lmfx.LmfxError) else "UNEXPECTED "
        row[stage] = f"error: {known}{type(error).__name__}: {_short(str(error))}"
    else:
        return True
    finally:
        row.setdefault("cpu", {})[stage] = round(time.process_time() - begin, 1)
    return False


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise StageTimeout

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU time: a busy machine fails no stage
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _short(text: str) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines() if line.strip())[:600]


class _CountConvs(TorchDispatchMode):
    """Counts convolutions whose result is a map and not a vector, whatever called them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and not args[6] and max(result.shape[2:]) > 1:
            self.count += 1
        return result


def _call(model: nn.Module, example: Any) -> Any:
    args, kwargs = example_arguments(example)
    return model(*args, **kwargs)


def _first_that_runs(state: dict[str, Any], model: nn.Module, odd: bool = False) -> tuple[Any, Any]:
    """(input, output) of the model at the smallest size that it takes."""
    failure: Exception | None = None
    for example in examples(state["name"], model, odd, state["sizes"]):
        try:
            cast = pytree.tree_map(lambda v: _like(model, v), example)
            output = _call(model, cast)
        except Exception as error:  # models refuse sizes in many ways
            failure = error
        else:
            return cast, output
    assert failure is not None
    raise failure


def _like(model: nn.Module, value: Any) -> Any:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _build(row: dict[str, Any], state: dict[str, Any]) -> None:
    model = build(state["name"])
    torch.manual_seed(0)
    example, output = _first_that_runs(state, model)
    with _CountConvs() as counter:
        _call(model, example)
    tensors = [v for v in pytree.tree_leaves(output) if isinstance(v, torch.Tensor)]
    if not all(torch.isfinite(v).all() for v in tensors if v.is_floating_point()):
        raise ValueError("the model's own output is not finite")
    shapes = [tuple(v.shape) for v in pytree.tree_leaves(example) if isinstance(v, torch.Tensor)]
    row["parameters_m"] = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    row |= {"input": " ".join("x".join(map(str, s)) or "scalar" for s in shapes), "convs": counter.count}
    state |= {"model": model, "example": example, "output": output}


def _trace(row: dict[str, Any], state: dict[str, Any]) -> None:
    graph = lmfx.trace(state["model"], state["example"])
    facts = noted(graph)
    row |= {"tracer": facts.tracer, "opaque": len(facts.opaque), "opaque_reasons": dict(facts.opaque)}
    error = relative_error(state["output"], _call(graph, state["example"]))
    row["trace_error"] = error
    row["trace"] = "equal" if error <= 1e-4 else f"error: off by {error:.1e}"
    state["graph"] = graph


def _sizes(row: dict[str, Any], state: dict[str, Any]) -> None:
    for kind in ("batch", "size"):
        row[f"other_{kind}"] = _elsewhere(state, kind)


def _elsewhere(state: dict[str, Any], kind: str) -> str:
    """What the graph does where the model runs at another batch or size."""
    for example in _resized(state["example"], kind):
        try:
            expected = _call(copy.deepcopy(state["model"]), example)
        except Exception:  # models refuse sizes in many ways
            continue
        try:
            actual = _call(state["graph"], example)
        except lmfx.SizeError:
            return "says so"
        except Exception as error:  # what a graph raises instead is a fault
            return f"error: {type(error).__name__}: {_short(str(error))}"
        try:
            off = relative_error(expected, actual)
        except lmfx.LmfxError as error:
            return f"error: {_short(str(error))}"
        return "agrees" if off <= 1e-3 else f"error: off by {off:.1e}"
    return "not taken"


def _resized(example: Any, kind: str) -> Iterator[Any]:
    """Inputs of another batch, or of other image sizes; not those that `trace` tries itself."""
    rank = max(v.dim() for v in pytree.tree_leaves(example) if isinstance(v, torch.Tensor))
    generator = torch.Generator().manual_seed(3)

    def drawn(v: Any, way: int) -> Any:
        if not isinstance(v, torch.Tensor):
            return v
        if kind == "batch":
            shape = (3, *v.shape[1:]) if v.dim() > way else tuple(v.shape)
        else:
            more = [2 * n if way or n < 32 else n + 32 for n in v.shape[2:]]
            shape = (*v.shape[:2], *more) if v.dim() == rank > 2 else tuple(v.shape)
        return torch.randn(shape, generator=generator).to(v.dtype) if v.is_floating_point() else v.expand(shape)

    for way in (0, 1):
        yield pytree.tree_map(lambda v: drawn(v, way), example)  # noqa: B023  (used at once)


def _regions(row: dict[str, Any], state: dict[str, Any]) -> None:
    spans = lmfx.spans(state["graph"])
    network = spans.network
    counted = {n for n in network.nodes if _conv_on_map(n, network, state["model"])}
    together: set[str] = set()
    for region in network.regions:
        found = set(network.convs(region.series.layers)[1])
        together |= found if len(found & counted) > 1 else set()
    paths = {network.path(n): n for n in counted}
    mergeable = {c for s in spans if s.realization != "keep" and len(s.all_convs) > 1 for c in s.all_convs}
    row["convs"] = max(row["convs"], len(counted))
    row |= {
        "in_region": len(together & counted),
        "in_candidate": sum(path in mergeable for path in paths),
        "candidates": len(spans),
        "refusals": len(spans.refusals),
        "reasons": dict(_reasons(spans).most_common()),
    }
    state["spans"] = spans


def _conv_on_map(name: str, network: Network, model: nn.Module) -> bool:
    """Whether a node is one of the model's own convs and gives a map; a Linear that became a conv does not count."""
    node = network.nodes[name]
    if node.op != "call_module" or not isinstance(network.module(name), ops.CONVS):
        return False
    try:
        linear = isinstance(model.get_submodule(str(node.target)), nn.Linear)
    except AttributeError:
        linear = False
    shape = shape_of(node)
    return not linear and shape is not None and max(shape[2:], default=0) > 1


def _reasons(spans: SpanSet) -> Counter[str]:
    """Refusals by their text, with the names of values and numbers taken out."""
    names = {*spans.network.nodes, *(n for n, _ in spans.network.gm.named_modules())}
    found: Counter[str] = Counter()
    for refusal in spans.refusals:
        text = re.sub(
            r"[\w.]+", lambda m: "_" if m.group() in names and not m.group().isalpha() else m.group(), refusal.reason
        )
        text = re.sub(r"\((\d+|None)(, *(\d+|None))*,?\)|\b\d+\b", "#", text)
        found[_short(text)[:160]] += 1
    return found


def _compress(row: dict[str, Any], state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        try:
            net = lmfx.compress(
                state["model"],
                state["example"],
                BUDGET,
                latency="roofline",
                importance="magnitude",
                cache_dir=cache,
                progress=False,
            )
        except lmfx.InfeasibleBudget as error:
            reached = re.search(r"\(([\d.]+)%\)", str(error))
            row |= {"compress": "infeasible", "ratio": float(reached[1]) / 100 if reached else float("nan")}
            return
        except lmfx.ModelError as error:
            if "can be merged" not in str(error):
                raise
            row["compress"] = "nothing to merge"
            return
    result = result_of(net)
    outputs = [v for v in pytree.tree_leaves(_call(net, state["example"])) if isinstance(v, torch.Tensor)]
    expected = [v for v in pytree.tree_leaves(state["output"]) if isinstance(v, torch.Tensor)]
    if [v.shape for v in outputs] != [v.shape for v in expected]:
        raise ValueError(f"the output has shapes {[tuple(v.shape) for v in outputs]}")
    assert result.ratio is not None and result.predicted is not None and result.original is not None
    row |= {"compress": "ok", "ratio": result.ratio, "predicted": result.predicted / result.original}
    state["net"] = net


def _exact(row: dict[str, Any], state: dict[str, Any]) -> None:
    model = build(state["name"]).double()
    torch.manual_seed(1)
    try:
        example, output = _first_that_runs(state, model, odd=True)
    except RuntimeError as error:
        row["exact"] = f"skipped: the model does not run in float64: {_short(str(error))}"
        return
    graph = lmfx.trace(model, example)
    del model  # large ones hold a gigabyte
    same = merge(rewrite(graph, lmfx.MergePlan(), share_tensors=True), share_tensors=True)
    row["keep_error"] = relative_error(output, _call(same, example))
    # A fit has its one conv in both forms, so it cannot tell them apart.
    spans = enumerate_spans(Network(graph), SpanOptions(realize=("compose", "drop"), max_kernel_size=5))
    plan = random_plan(_bounded(spans), random.Random(zlib.crc32(state["name"].encode())), ("compose", "drop"))
    trainable = rewrite(graph, plan, share_tensors=True)
    merged = merge(trainable, share_tensors=True)
    result = _call(merged, example)
    if [v.shape for v in pytree.tree_leaves(result)] != [v.shape for v in pytree.tree_leaves(output)]:
        raise ValueError("the merged network's output has another shape")
    reference = _call(trainable, example)
    row["exact_error"] = relative_error(reference, result)
    row["composed"] = sum(c.realization == "compose" for c in plan.candidates)
    worst = max(row["keep_error"], row["exact_error"])
    row["exact"] = "exact" if worst <= TOLERANCE else f"error: off by {worst:.1e}"
    if worst > TOLERANCE >= row["keep_error"]:
        last_bit = _last_bit(trainable, example, reference)
        if worst <= 20 * last_bit:
            row["exact"] = f"exact to rounding: a change of the weights' last bit changes the output by {last_bit:.0e}"
    state["random"] = (merged, example)


def _last_bit(net: nn.Module, example: Any, reference: Any) -> float:
    """How far the output moves where every weight is off by its last bit: what no other order of sums can keep."""
    generator = torch.Generator().manual_seed(2)
    for parameter in net.parameters():
        if parameter.is_floating_point():
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1
            parameter.mul_(1 + sign.to(parameter.dtype) * torch.finfo(parameter.dtype).eps)
    return relative_error(reference, _call(net, example))


def _bounded(spans: SpanSet) -> SpanSet:
    """Without the merged convs that would be large: exact too, but slow to make in float64."""

    def small(c: Any) -> bool:
        if c.conv is None:
            return True
        taps = 1
        for k in c.conv.kernel_size:
            taps *= k
        return bool(c.conv.out_channels * c.conv.in_channels // c.conv.groups * taps <= LARGEST_KERNEL)

    return replace(spans, candidates=tuple(c for c in spans if c.realization == "keep" or small(c)))


def _onnx(row: dict[str, Any], state: dict[str, Any]) -> None:
    net, example = state.get("net"), state["example"]
    row["onnx_of"] = "compressed"
    if net is None and "random" in state:
        merged, drawn = state["random"]
        net, example = merged.float(), pytree.tree_map(_single, drawn)
        row["onnx_of"] = "random plan"
    if net is None:
        net, row["onnx_of"] = state["graph"], "graph"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        try:
            lmfx.export_onnx(net, example, file)
        except lmfx.LmfxError as error:
            failure = f"{type(error).__name__}: {_short(str(error))}"
        else:
            row["onnx"] = "agrees"
            return
        try:
            lmfx.export_onnx(state["model"], state["example"], file)
        except lmfx.LmfxError as unmodified:
            row["onnx"] = f"unmodified fails: {_short(str(unmodified))}"
            return
        rounding = _rounding(net, example)
        row["onnx"] = f"error: {failure} (torch's own rounding: {rounding:.0e})"
        if "differ by" in failure and rounding > 1e-4:  # fits on a single image can be that badly conditioned
            with suppress(lmfx.LmfxError):
                lmfx.export_onnx(net, example, file, tolerance=10 * rounding)
                row["onnx"] = f"agrees to rounding: {rounding:.0e}"


def _rounding(net: nn.Module, example: Any) -> float:
    """How far the network is in float32 from itself in float64, relative to the largest entry of each output."""
    exact = copy.deepcopy(net).double()
    pairs = zip(
        pytree.tree_leaves(_call(net, example)),
        pytree.tree_leaves(_call(exact, pytree.tree_map(lambda v: _like(exact, v), example))),
        strict=True,
    )
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if isinstance(a, torch.Tensor))


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
