"""What must hold for every network: the properties of the fuzzer. `check` raises `Wrong` at the first that does not."""

from __future__ import annotations

import math
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import lmfx
from benchmarks.shared.random_plans import random_plan
from lmfx.passes.errors import ExportError, LmfxError, SizeError, TraceError, VerifyError
from lmfx.passes.graph import ops
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans import factoring
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.fuzz.compare import Wrong, call, check_same, check_untouched, clones, leaves, noise_of, state_of, structure
from tests.fuzz.keys import check_keys
from tests.fuzz.oracle import check_span, factored_twice, narrowed_twice
from tests.fuzz.program import Program

__all__ = ["Outcome", "Shares", "check"]

FIXES = (":", "pass", "use", "make", "call", "ask", "return", "check", "convert", "move", "see", "try", "remove")


@dataclass(frozen=True)
class Shares:
    """How many of a hundred networks get the slow checks."""

    compress: int = 8
    again: int = 15
    save: int = 40
    onnx: int = 8  # of those that are compressed
    keys: int = 10
    simplify: int = 15


@dataclass
class Outcome:
    """What one network was and what it reached."""

    events: list[str] = field(default_factory=list)
    merges: int = 0  # spans that were composed or fitted, over all plans

    def note(self, event: str) -> None:
        self.events.append(event)


@contextmanager
def _only_lmfx_errors(what: str) -> Iterator[None]:
    """Anything but an LmfxError is a traceback in the user's face, and a VerifyError is always a bug."""
    try:
        yield
    except VerifyError as error:
        raise Wrong(what, f"VerifyError: {error}") from error
    except (LmfxError, Wrong):
        raise
    except Exception as error:
        raise Wrong(what, f"{type(error).__name__}: {str(error).strip()[:300]}") from error


def check(program: Program, seed: int, shares: Shares | None = None) -> Outcome:
    """Every property of one network. `seed` chooses plans, options and which slow checks are made."""
    shares = shares or Shares()
    rng = random.Random(seed)
    outcome = Outcome()
    with warnings.catch_warnings(), _small_ranks():
        warnings.simplefilter("ignore")
        _check(program, rng, shares, outcome)
    return outcome


@contextmanager
def _small_ranks() -> Iterator[None]:
    """Offers convs of few channels a rank as well: drawn networks have no others."""
    usual = factoring.LEAST_OUTPUTS, factoring.MULTIPLE
    factoring.LEAST_OUTPUTS, factoring.MULTIPLE = (4, 6), 1
    try:
        yield
    finally:
        factoring.LEAST_OUTPUTS, factoring.MULTIPLE = usual


def _check(program: Program, rng: random.Random, shares: Shares, outcome: Outcome) -> None:
    model, x = program.build(), program.example()
    try:
        reference = call(model, x)
    except Exception:
        return outcome.note("does not run")
    if not all(bool(t.isfinite().all()) for t in leaves(reference)):
        return outcome.note("not finite")
    floor = _Noise(model, x)
    before, kept_input = state_of(model), clones(x)
    try:
        with _only_lmfx_errors("trace"):
            gm = trace(model, x)
    except TraceError as error:
        _check_message(error)
        check_untouched(before, model)
        return outcome.note("untraced")
    finally:
        _check_inputs(kept_input, x)
    check_untouched(before, model)
    tracer = noted(gm).tracer
    outcome.note(f"tracer {tracer}")
    check_same("trace", reference, call(gm, x), 1e-12, floor)
    others: list[tuple[Any, Any]] = [(x, reference)]
    for what, larger in _elsewhere(program, x):
        elsewhere = _attempt(program.build(), larger)
        if elsewhere is None:
            continue
        try:
            with _only_lmfx_errors(f"the trace at another {what}"):
                result = call(gm, larger)
        except SizeError as error:
            _check_both_sizes(error, x, larger)
            outcome.note(f"fixed {what}")
            continue
        outcome.note(f"another {what}")
        check_same(f"the trace at another {what}", elsewhere, result, 1e-12, _Noise(model, larger))
        if what == "size":
            others.append((larger, elsewhere))
    _check_plans(gm, others, rng, outcome, floor)
    if rng.randrange(100) < shares.simplify:
        _check_simplify(gm, model, others, rng, outcome)
    if rng.randrange(100) < shares.again:
        with _only_lmfx_errors("trace of the trace"):
            check_same("trace of the trace", reference, call(trace(gm, x), x), 1e-12, floor)
    if rng.randrange(100) < shares.compress:
        _check_compress(program, model, x, reference, rng, shares, outcome)
    if rng.randrange(100) < shares.keys:
        for event in check_keys(program, model, x, rng):
            outcome.note(event)
    check_untouched(before, model)


class _Noise:
    """The noise of a network on an example, computed when it is asked for."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example = model, example
        self.value: float | None = None

    def __call__(self) -> float:
        if self.value is None:
            self.value = noise_of(self.model, self.example)
        return self.value


def _elsewhere(program: Program, x: Any) -> Iterator[tuple[str, Any]]:
    """The second example of a program, of another batch and size, and its first one with three images."""
    yield "size", program.example(other=True)
    batch = next(iter(program.inputs.values()))[0]
    rows = torch.arange(3) % batch
    yield "batch", pytree.tree_map(lambda v: 0.5 * v[rows] + v[rows].roll(1, -1) if isinstance(v, Tensor) else v, x)


def _check_both_sizes(error: SizeError, x: Any, larger: Any) -> None:
    """The message names a shape of the example and the shape that was given instead."""
    text = str(error)
    pairs = zip(leaves(x), leaves(larger), strict=True)
    if not any(str(tuple(a.shape)) in text and str(tuple(b.shape)) in text and a.shape != b.shape for a, b in pairs):
        raise Wrong("an error without both sizes", text)


def _attempt(model: nn.Module, example: Any) -> Any:
    """The output at another size, or None where the network has no such size."""
    try:
        result = call(model, example)
    except Exception:
        return None
    return result if all(bool(t.isfinite().all()) for t in leaves(result)) else None


def _check_inputs(kept: Any, example: Any) -> None:
    if not all(torch.equal(a, b) for a, b in zip(leaves(kept), leaves(example), strict=True)):
        raise Wrong("the example was changed", "")


def _check_message(error: LmfxError) -> None:
    text = str(error)
    if len(text) < 20 or not any(word in text.lower() for word in FIXES):
        raise Wrong("an error without a fix", f"{type(error).__name__}: {text}")


def _options(rng: random.Random) -> SpanOptions:
    some = [("compose", "fit"), ("compose",), ("compose", "fit", "drop"), ("fit",), ("narrow",), ("factor",)]
    realize: Any = rng.choice([*some, ("compose", "fit", "narrow", "factor")])
    return SpanOptions(realize=realize, max_kernel_size=rng.choice([7, None, 9, 3]), **_method(rng, realize))


def _method(rng: random.Random, realize: tuple[str, ...] = ("compose", "fit")) -> dict[str, Any]:
    """The paper's options, where they say something: mostly none."""
    method = rng.choice(["layermerge"] * 6 + ["depth", "layeronly"])
    if method == "layeronly":
        return {"method": method} if "compose" in realize else {}
    norm, after = rng.choice(["affine", "affine", "post"]), rng.choice([None, None, None, "relu6", "silu"])
    method = method if "compose" in realize else "layermerge"
    return {"method": method, "norm": norm, "activation_after": after}


def _check_plans(
    gm: fx.GraphModule, inputs: list[tuple[Any, Any]], rng: random.Random, outcome: Outcome, floor: _Noise
) -> None:
    with _only_lmfx_errors("spans"):
        spans = enumerate_spans(Network(gm), _options(rng))
    _check_refusals(spans)
    if spans.network.regions:
        outcome.note("regions")
    x, reference = inputs[0]
    if rng.random() < 0.5:
        with _only_lmfx_errors("the empty plan"):
            kept = call(merge(rewrite(gm, MergePlan())), x)
        check_same("the empty plan", reference, kept, 1e-13, floor)
    for _ in range(rng.choice([1, 2])):
        plan = random_plan(spans, random.Random(rng.randrange(10**9)))
        plan = replace(plan, activation_after=spans.options.activation_after)
        if not plan.candidates:
            continue
        with _only_lmfx_errors("rewrite"):
            text = gm.code
            student = rewrite(gm, plan)
            net = merge(student)
        if gm.code != text:
            raise Wrong("rewrite", "the graph that it was given was changed")
        for example, expected in inputs:
            with _only_lmfx_errors("a rewritten network"):
                trained, merged = call(student, example), call(net, example)
            if structure(expected) != structure(merged):
                raise Wrong("a rewritten network", f"{structure(expected)} became {structure(merged)}")
            check_same("merged is not trainable", trained, merged, 1e-12, _Noise(student, example))
        outcome.merges += sum(c.realization in ("compose", "fit") for c in plan.candidates)
        outcome.events += ["narrowed"] * any(c.cuts for c in plan.candidates)
        if rng.random() < 0.3:
            _check_trained(student, x, rng, outcome)
    composed = [c for c in spans if c.realization == "compose"]
    for candidate in rng.sample(composed, min(4, len(composed))):
        with _only_lmfx_errors("oracle"):
            outcome.note("oracle" if check_span(spans.network, candidate) else "no oracle")

    thinner = [c for c in spans if c.cuts]
    for candidate in rng.sample(thinner, min(4, len(thinner))):
        _check_twice(narrowed_twice, spans.network, candidate, inputs, rng, 1e-12)
        outcome.note("narrowed alone")
    products = [c for c in spans if c.realization == "factor"]
    for candidate in rng.sample(products, min(2, len(products))):
        _check_twice(factored_twice, spans.network, candidate, inputs, rng, 1e-9)
        outcome.note("a rank alone" if candidate.conv is not None and candidate.conv.rank else "factored alone")


def _check_twice(
    made: Callable[[Network, Candidate, random.Random], tuple[fx.GraphModule, fx.GraphModule]],
    network: Network,
    candidate: Candidate,
    inputs: list[tuple[Any, Any]],
    rng: random.Random,
    limit: float,
) -> None:
    """Two ways to the network of one candidate give the same."""
    with _only_lmfx_errors(made.__name__):
        whole, other = made(network, candidate, rng)
    for example, _ in inputs:
        with _only_lmfx_errors(f"a network of {made.__name__}"):
            expected, result = call(whole, example), call(other, example)
        if structure(expected) != structure(result):
            raise Wrong(made.__name__, f"{structure(expected)} became {structure(result)}")
        check_same(f"{made.__name__} gives two functions", expected, result, limit, _Noise(whole, example))


def _check_simplify(
    gm: fx.GraphModule, model: nn.Module, inputs: list[tuple[Any, Any]], rng: random.Random, outcome: Outcome
) -> None:
    """All loss-free merges: the same function at both sizes, no more convs, and nothing is left to be merged."""
    x, reference = inputs[0]
    growth = rng.choice([1.0, 1.0, 2.0, math.inf])
    try:
        with _only_lmfx_errors("simplify"):
            net = lmfx.simplify(model, x, growth=growth)
            lmfx.report(net)
    except LmfxError as error:
        _check_message(error)
        return outcome.note(f"simplify: {type(error).__name__}")
    for example, expected in inputs:
        with _only_lmfx_errors("a simplified network"):
            result = call(net, example)
        if structure(expected) != structure(result):
            raise Wrong("a simplified network", f"{structure(expected)} became {structure(result)}")
        check_same("simplified is not the model", expected, result, 1e-12, _Noise(model, example))
    if count(net) > count(gm):
        raise Wrong("simplify", f"{count(gm)} convolutions became {count(net)}")
    plan = lmfx.result_of(net).plan
    if not plan.candidates:
        return None
    outcome.note("simplified")
    if growth == 2:
        return None  # what has grown may grow again
    with _only_lmfx_errors("simplify twice"):
        again = lmfx.simplify(net, x, growth=growth)
    left = [c.key for c in lmfx.result_of(again).plan.candidates]
    if left or _steps(net) != _steps(again):
        raise Wrong("simplify twice", f"something was left ({left}): {_steps(net)} became {_steps(again)}")
    return check_same("simplified twice", reference, call(again, x), 1e-12, _Noise(model, x))


def _steps(net: fx.GraphModule) -> list[str]:
    """What a graph does, in no order: a new trace may record a reshape of the output earlier."""
    return sorted(f"{node.op} {node.name}" for node in net.graph.nodes)


def count(net: nn.Module) -> int:
    """The convolutions of a network."""
    return sum(isinstance(m, ops.CONVS) for m in net.modules())


def _check_trained(student: fx.GraphModule, x: Any, rng: random.Random, outcome: Outcome) -> None:
    """Merging is exact whatever training has made of the parameters and of the statistics of norms."""
    generator = torch.Generator().manual_seed(rng.randrange(10**9))
    with torch.no_grad():
        for value in [*student.parameters(), *student.buffers()]:
            if value.is_floating_point():
                factor = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5
                value.mul_(factor.to(value.dtype))
    with _only_lmfx_errors("a trained network"):
        trained, merged = call(student, x), call(merge(student), x)
    if all(bool(t.isfinite().all()) for t in leaves(trained)):
        check_same("merging after training", trained, merged, 1e-12, _Noise(student, x))
        outcome.note("trained")


def _check_refusals(spans: SpanSet) -> None:
    names = set(spans.network.nodes)
    for refusal in spans.refusals:
        unknown = set(refusal.nodes) - names
        if len(refusal.reason) < 10 or unknown:
            raise Wrong("a refusal", f"{refusal.reason!r} with the unknown nodes {sorted(unknown)}")
    keys = [c.key for c in spans]
    if len(set(keys)) != len(keys):
        raise Wrong("candidates", "two have one key")


def _compress(
    model: nn.Module, x: Any, rng: random.Random, folder: str, budget: float = 0.8, **options: Any
) -> fx.GraphModule:
    # Small bounds: what is tested is that all that is offered works, not how good it is.
    options = {"max_kernel_size": rng.choice([3, 5]), "max_span_convs": rng.choice([2, 4]), **_method(rng), **options}
    options["surrogate"] = rng.choice(["affine", "identity"])
    options.setdefault("realize", rng.choice([("compose", "fit"), ("compose", "fit", "narrow", "factor")]))
    return lmfx.compress(
        model, x, budget, latency="roofline", importance="magnitude", cache_dir=folder, progress=False, **options
    )


def _check_compress(
    program: Program, model: nn.Module, x: Any, reference: Any, rng: random.Random, shares: Shares, outcome: Outcome
) -> None:
    """The pipeline gives a network with the same kind of output, or an error with a fix."""
    budget, merged = rng.choice([0.8, 0.6, 0.9, 0.5, 0.3, 1.0]), rng.random() < 0.7
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _only_lmfx_errors("compress"):
                student = _compress(model, x, rng, folder, budget, merge=merged)
                net = student if merged else lmfx.merge(student)
        except LmfxError as error:
            _check_message(error)
            return outcome.note(f"compress: {type(error).__name__}")
        outcome.note("compressed")
        with _only_lmfx_errors("the compressed network"):
            result = call(net, x)
            lmfx.report(net)
        if structure(result) != structure(reference):
            raise Wrong("the compressed network", f"{structure(reference)} became {structure(result)}")
        if budget == 1:
            check_same("budget 1", reference, result, 1e-12, _Noise(model, x))
        if not merged:
            check_same("merged is not the student", call(student, x), result, 1e-10, _Noise(student, x))
            outcome.note("student")
        if rng.randrange(100) < shares.again:
            try:
                with _only_lmfx_errors("compress twice"):
                    twice = call(_compress(net, x, rng, folder), x)
                if structure(twice) != structure(reference):
                    raise Wrong("compress twice", f"{structure(reference)} became {structure(twice)}")
                outcome.note("compressed twice")
            except LmfxError as error:
                _check_message(error)
                outcome.note(f"compress twice: {type(error).__name__}")
        if rng.randrange(100) < shares.save:
            with _only_lmfx_errors("save and load"):
                other = program.build()
                with torch.no_grad():
                    for tensor in other.state_dict().values():
                        tensor.mul_(1.5 if tensor.is_floating_point() else 1)
                one = net if rng.random() < 0.7 else student
                expected = call(one, x)
                again = call(lmfx.load(lmfx.save(one, Path(folder) / "saved"), other), x)
            if structure(expected) != structure(again) or not _equal(expected, again):
                raise Wrong("save and load", "the loaded network gives another output")
            outcome.note("saved")
        if rng.randrange(100) < shares.onnx:
            _check_onnx(program, rng, folder, outcome)


def _equal(a: Any, b: Any) -> bool:
    return all(torch.equal(s, t) for s, t in zip(leaves(a), leaves(b), strict=True))


def _check_onnx(program: Program, rng: random.Random, folder: str, outcome: Outcome) -> None:
    """The merged network in float32 agrees with ONNX Runtime, where the network itself does."""
    model, x = program.build(torch.float32), program.example(torch.float32)
    try:
        with _only_lmfx_errors("compress in float32"):
            net = _compress(model, x, rng, folder)
    except LmfxError as error:
        return _check_message(error)
    try:
        with _only_lmfx_errors("export"):
            lmfx.export_onnx(net, x, Path(folder) / "net.onnx", tolerance=1e-4)
    except ExportError as error:
        try:
            lmfx.export_onnx(trace(model, x), x, Path(folder) / "model.onnx", tolerance=1e-4)
        except ExportError:
            return outcome.note("not exportable")
        raise Wrong("export", f"the network itself exports, the merged one does not: {error}") from error
    outcome.note("exported")
