"""Keys tell networks apart: change something anywhere, and they differ; spell a network otherwise, and they do not.

    changed    a literal of the source, an attribute, weight or buffer of the model, a constant of the example
    spelled    other names of variables, functions for methods and the other way round, in place or not

What a key must tell is what it is used for: rows of importances the output, rows of latencies the work, and the
fingerprint of a saved folder the output once the weights are equal.
"""

from __future__ import annotations

import copy
import random
import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from lmfx.latency.candidate_workloads import Workloads
from lmfx.passes.errors import LmfxError
from lmfx.passes.identity.fingerprint import Origin, fingerprint, identify
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.spans.enumeration import enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.fuzz.compare import Wrong, call, distance, leaves, structure
from tests.fuzz.program import Program

__all__ = ["Keyed", "changed_model", "changed_source", "check_keys", "keyed", "respelled"]

DIFFERENT = 1e-9  # relative; less is rounding
_NUMBER = re.compile(r"(?<![\w.'\]])(\d+\.\d+|\d+)(?![\w.'])")
_FLAG = re.compile(r"\b(True|False)\b")
_NAME = r"(\w+)"
# Spellings of one op; {v} is a variable.
_ACTIVATIONS = (
    ("F.relu({v})", "torch.relu({v})", "{v}.relu()", "{v}.clone().relu_()", "F.relu({v}.clone(), inplace=True)"),
    ("torch.sigmoid({v})", "{v}.sigmoid()", "{v}.clone().sigmoid_()"),
    ("F.silu({v})", "F.silu({v}.clone(), True)"),
    ("{v}.tanh()", "torch.tanh({v})", "{v}.clone().tanh_()"),
    ("F.relu6({v})", "{v}.clamp(0, 6)", "F.hardtanh({v}, 0.0, 6.0)"),
    ("torch.sin({v})", "{v}.sin()"),
    ("{v}.abs()", "torch.abs({v})"),
    ("{v}.square()", "torch.square({v})"),
    ("F.leaky_relu({v}, 0.3)", "F.leaky_relu({v}, negative_slope=0.3)"),
    ("{v} * 0.5", "torch.mul({v}, 0.5)", "{v}.mul(0.5)", "{v}.clone().mul_(0.5)"),
)
_JOINS = (
    ("{v} + {w}", "torch.add({v}, {w})", "{v}.add({w})", "{v}.clone().add_({w})", "operator.add({v}, {w})"),
    ("{v} - {w}", "torch.sub({v}, {w})", "{v}.sub({w})", "{v}.clone().sub_({w})"),
)


@dataclass(frozen=True)
class Keyed:
    """A traced network, what it gives, and its keys."""

    gm: fx.GraphModule
    output: Any
    work: int
    values: str
    structure: str
    fingerprint: str
    origin: Origin
    rows: dict[str, tuple[str, int]]  # of kept layers: the signature, and the work


def keyed(model: nn.Module, example: Any) -> Keyed | None:
    """The keys of a model, or None if it does not run, is not traced, or cannot be told from all others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            output = call(model, example)
            gm = trace(model, example)
        except Exception:
            return None  # a changed literal gives anything
        values, parts = identify(gm, "values"), identify(gm)
        if not (values.certain and all(bool(t.isfinite().all()) for t in leaves(output))):
            return None
        try:
            rows = _rows(gm)
        except LmfxError:
            return None  # a conv whose numbers are not those of its weight
        return Keyed(gm, output, _work(gm, example), values.digest, parts.digest, fingerprint(gm), Origin.of(gm), rows)


def _work(module: nn.Module, example: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call(module, example)
    return counter.get_total_flops()


def _rows(gm: fx.GraphModule) -> dict[str, tuple[str, int]]:
    spans = enumerate_spans(Network(gm))
    make, found = Workloads(spans.network), {}
    for candidate in spans:
        workload = make(candidate) if candidate.realization == "keep" else None
        if workload is not None:
            drawn = tuple(torch.ones(shape).to(dtype) for shape, dtype in workload.inputs)
            found[candidate.key] = workload.signature, _work(workload.build(), drawn)
    return found


def differ(one: Keyed, two: Keyed) -> bool:
    """Whether two networks give different outputs for one example."""
    if structure(one.output) != structure(two.output):
        return True
    if distance(one.output, two.output) > DIFFERENT:
        return True
    return any(not torch.equal(a, b) for a, b in zip(leaves(one.output), leaves(two.output), strict=True) if _whole(a))


def _whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype == torch.bool


def check_told_apart(one: Keyed, two: Keyed, what: str, example: Any) -> None:
    """Raise `Wrong` if a key of one network is that of another one."""
    if differ(one, two) and one.values == two.values:
        raise Wrong("keys: importance", f"{what}: the outputs differ, and the digests do not")
    if one.work != two.work and one.structure == two.structure:
        raise Wrong("keys: table", f"{what}: {one.work} and {two.work} operations have one digest")
    works: dict[str, int] = {}
    for signature, work in (*one.rows.values(), *two.rows.values()):
        if works.setdefault(signature, work) != work:
            raise Wrong("keys: latency", f"{what}: {works[signature]} and {work} operations are one row, {signature}")
    if one.fingerprint == two.fingerprint and one.origin == two.origin:
        other, weights = copy.deepcopy(two.gm), one.gm.state_dict()
        for name, target in other.state_dict(keep_vars=True).items():  # as `lmfx.load` does it
            if name not in weights or weights[name].shape != target.shape:
                raise Wrong("keys: fingerprint", f"{what}: the weights do not fit")
            target.data = weights[name].clone()
        loaded = replace(two, output=call(other, example))
        if differ(one, loaded):
            raise Wrong("keys: fingerprint", f"{what}: one network loads into the other, which gives something else")


def check_same_keys(one: Keyed, two: Keyed, what: str) -> None:
    """Raise `Wrong` if the same network in two spellings has two keys."""
    if noted(one.gm).tracer != noted(two.gm).tracer:
        return  # torch.export's graph of the same network is another one
    if noted(one.gm).opaque or noted(two.gm).opaque:
        return  # what no tracer could follow is told by its code, which is another one in another spelling
    if (one.values, one.structure) != (two.values, two.structure):
        raise Wrong("keys: spelling", f"{what}: another digest")
    if {k: s for k, (s, _) in one.rows.items()} != {k: s for k, (s, _) in two.rows.items()}:
        raise Wrong("keys: spelling", f"{what}: other signatures")


# --- changes and spellings --------------------------------------------------------------------------------------------


def changed_source(program: Program, rng: random.Random) -> tuple[Program, str] | None:
    """The program with another literal at one place, and what was changed."""
    source = program.source
    places = [*_NUMBER.finditer(source), *_FLAG.finditer(source)]
    if not places:
        return None
    place = rng.choice(places)
    old = place.group(1)
    if old in ("True", "False"):
        new = "False" if old == "True" else "True"
    else:
        new = str(float(old) * 1.5 + 0.25) if "." in old else str(int(old) + rng.choice((1, 1, 2)))
    text = source[: place.start()] + new + source[place.end() :]
    line = source[: place.start()].count("\n")
    return replace(program, bodies=(), text=text), f"{old} became {new} in {source.splitlines()[line].strip()!r}"


def changed_model(model: nn.Module, rng: random.Random) -> tuple[nn.Module, str] | None:
    """A copy of a model with another weight, buffer or number somewhere, and what was changed."""
    other = copy.deepcopy(model)
    places: list[tuple[str, nn.Module, str]] = []
    for path, module in other.named_modules():
        tensors = [k for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]
        numbers = [k for k, v in vars(module).items() if type(v) in (int, float) and not k.startswith("_")]
        places += [(path, module, k) for k in (*tensors, *numbers)]
    if not places:
        return None
    path, module, name = rng.choice(places)
    value = getattr(module, name)
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.add_(1)
    else:
        setattr(module, name, value + 1)
    return other, f"{path}.{name}"


def respelled(program: Program, rng: random.Random) -> Program:
    """The same network: other names of variables, and each op that has several spellings in one of them."""
    text = re.sub(r"\bv(\d+)\b", r"w\1", program.source)
    for forms in _ACTIVATIONS:
        text = _spell(text, forms, rng)
    for forms in _JOINS:
        pattern = re.compile(rf"^( +\w+ = ){_form(forms[0])}$", re.M)
        for found in reversed(list(pattern.finditer(text))):
            other = found[1] + rng.choice(forms).format(v=found[2], w=found[3])
            text = text[: found.start()] + other + text[found.end() :]
    return replace(program, bodies=(), text=text)


def _spell(text: str, forms: tuple[str, ...], rng: random.Random) -> str:
    for form in forms:
        pattern = re.compile(rf"^( +\w+ = ){_form(form)}$", re.M)
        if pattern.search(text):
            return pattern.sub(lambda m: m[1] + rng.choice(forms).format(v=m[2]), text)
    return text


def _form(form: str) -> str:
    return re.escape(form).replace(re.escape("{v}"), _NAME).replace(re.escape("{w}"), _NAME)


def check_keys(program: Program, model: nn.Module, example: Any, rng: random.Random, tries: int = 2) -> list[str]:
    """Both properties of one network; returns what was reached."""
    one = keyed(model, example)
    if one is None:
        return ["keys: not certain"]
    reached = []
    for _ in range(tries):
        changed = changed_source(program, rng) if rng.random() < 0.7 else None
        two, what = None, ""
        if changed is not None:
            two, what = _built(changed[0], example), changed[1]
        elif (made := changed_model(model, rng)) is not None:
            two, what = keyed(made[0], example), made[1]
        if two is not None:
            check_told_apart(one, two, what, example)
            reached.append("keys: told apart" if differ(one, two) else "keys: no difference")
    other = _built(respelled(program, rng), example)
    if other is not None and not differ(one, other):
        check_same_keys(one, other, "another spelling")
        reached.append("keys: spelled")
    return reached


def _built(program: Program, example: Any) -> Keyed | None:
    try:
        model = program.build()
    except Exception:  # a changed literal gives a program that is none
        return None
    return keyed(model, example)
