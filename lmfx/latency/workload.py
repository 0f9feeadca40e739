"""Holds what is timed: a small graph, its inputs, and a signature that is equal for equal operator configurations.

    conv2d(64,64,k3x3,s1x1,p1.1x1.1,d1x1,g1,bias)      zero pads before a conv are counted into its own
    relu
    add(%0,%2)                                         operands by position, so names do not matter

Names and the values of weights do not matter for the time, so they are not in it; nor are a norm's eps, momentum and
in-place flags. All else is: constants of functions, attributes, and of modules that neither torch nor lmfx knows the
code, and where what they do depends on values, these too (`lmfx.passes.identity.content`). A workload that cannot be
told from
all others that way has a signature that no other one has: it shares no measurement, and is not stored.
"""

from __future__ import annotations

import copy
import operator
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lmfx.export.specs import InputSpec, input_specs
from lmfx.passes.identity.content import Describer, is_foreign
from lmfx.passes.identity.fingerprint import node_text
from lmfx.passes.model.quiet import quiet

__all__ = ["Workload", "sentinel_workload", "signature"]

VERSION = "2"  # of the text of a signature: rows that an older one named are not found any more
Original = tuple[str, nn.Module]
"""The path and the module of which a workload has a copy without values."""
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ZERO_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


@dataclass(frozen=True)
class Workload:
    """One thing to time. `build` makes the graph when it is needed (its parameters may be on the meta device).

    `inputs` are `(shape, dtype)` pairs. Two workloads with one `signature` are measured once. One that is not `lasting`
    cannot be told from others for sure: its signature is its own, and its measurement is not stored.
    """

    signature: str
    build: Callable[[], nn.Module]
    inputs: tuple[InputSpec, ...]
    lasting: bool = True

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *inputs: Any,
        originals: Mapping[str, Original] | None = None,
        volatile: Sequence[str] = (),
    ) -> Workload:
        """The workload of a module that is there, with example tensors or `(shape, dtype)` pairs.

        A module that is not a GraphModule has no signature that says what it computes, so it is not lasting.
        `originals` have the values that modules of the graph lack, `volatile` are paths of what changes while they run.
        """
        specs = input_specs(inputs)
        if isinstance(module, fx.GraphModule):
            text, certain = _described(module, specs, originals or {}, volatile)
            return cls(text, lambda: module, specs, certain)
        return cls(f"only {uuid.uuid4().hex};{type(module).__name__}", lambda: module, specs, False)


def sentinel_workload() -> Workload:
    """One fixed conv, known on every backend."""
    conv = fx.symbolic_trace(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()))
    return Workload.of(conv, ((1, 64, 28, 28), torch.float32))


def signature(gm: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """The normalised text of a canonical graph: what must be equal for the same time. Inputs as for `Workload.of`."""
    return _described(gm, input_specs(inputs), {}, ())[0]


def _described(
    gm: fx.GraphModule, specs: Sequence[InputSpec], originals: Mapping[str, Original], volatile: Sequence[str]
) -> tuple[str, bool]:
    """(the signature, whether it tells the graph from all others)."""
    lines = [f"{_DTYPES.get(dtype, str(dtype))}[{','.join(map(str, shape))}]" for shape, dtype in specs]
    known = {
        str(n.target): originals.get(str(n.target)) or (str(n.target), gm.get_submodule(str(n.target)))
        for n in gm.graph.nodes
        if n.op == "call_module"
    }
    foreign = {target for target, (_, module) in known.items() if is_foreign(module)}
    looks = bool(foreign) and not _runs_without_values(gm, specs)
    plain, strict = (
        Describer(weights, code=True, timing=True, volatile=volatile)
        for weights in ("types", "values" if looks else "types")
    )  # fmt: skip
    index: dict[fx.Node, int] = {}
    pads: dict[fx.Node, tuple[int, ...]] = {}

    def ref(node: fx.Node) -> str:
        return f"%{index[node]}"

    for node in gm.graph.nodes:
        if node.op == "placeholder":
            index[node] = len(index)
            continue
        source = node.args[0] if node.args else None
        target = str(node.target)
        if node.op == "call_module" and target not in foreign:
            module = known[target][1]
            if isinstance(source, fx.Node) and type(module) in _NOTHING:
                index[node], pads = index[source], {**pads, **({node: pads[source]} if source in pads else {})}
                continue
            if isinstance(source, fx.Node) and _absorbed(gm, node, module):
                index[node], pads[node] = index[source], tuple(module.padding)  # type: ignore[arg-type]
                continue

        def text(
            target: str, pad: tuple[int, ...] = pads.get(source, ()) if isinstance(source, fx.Node) else ()
        ) -> str:
            path, module = known[target]
            if target in foreign:
                return strict.module(module, path)
            return _conv_text(module, pad) if type(module) in _CONVS else plain.module(module, path)

        if node.op == "get_attr":
            lines.append(f"const{_constant(operator.attrgetter(target)(gm), strict, looks)}")
        else:
            lines.append(node_text(gm, node, plain, ref, module=text))
        index[node] = max(index.values(), default=-1) + 1
    certain = not (plain.unsure or strict.unsure)
    return ";".join([VERSION, *lines] if certain else [f"only {uuid.uuid4().hex}", *lines]), certain


def _runs_without_values(gm: fx.GraphModule, specs: Sequence[InputSpec]) -> bool:
    """Whether a graph runs where no tensor has values: what it does then depends on no weight."""
    try:
        with torch.no_grad(), quiet():
            empty = copy.deepcopy(gm).to("meta")
            empty(*(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in specs))
    except Exception:  # modules of others, which may raise anything; then all of their values are looked at
        return False
    return True


def _constant(value: Any, describer: Describer, looks: bool) -> str:
    """A constant by its values where these may matter for the time: whole numbers and masks choose what is computed."""
    if not isinstance(value, torch.Tensor):
        return describer.value(value, "a constant")
    exact = looks or not (value.is_floating_point() or value.is_complex())
    return describer.array(value, "a constant", "values" if exact else "types")


def _absorbed(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> bool:
    """A zero pad that only one conv reads: the conv's own padding, for the time and for the emitter."""
    if type(module) not in _ZERO_PADS or getattr(module, "value", 0) != 0 or min(module.padding) < 0:  # type: ignore[arg-type]
        return False
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return False
    conv = gm.get_submodule(str(users[0].target))
    return type(conv) in _CONVS and 2 * len(conv.kernel_size) == len(module.padding)  # type: ignore[arg-type]


def _conv_text(module: nn.Module, pad: tuple[int, ...]) -> str:
    conv: Any = module
    own = list(conv._reversed_padding_repeated_twice)
    total = [a + b for a, b in zip(own, pad or [0] * len(own), strict=True)]
    n = len(conv.kernel_size)
    before_after = [(total[2 * i], total[2 * i + 1]) for i in range(n)][::-1]
    mode = "" if conv.padding_mode == "zeros" else f",{conv.padding_mode}"
    return (
        f"{type(conv).__name__}<{conv.in_channels},{conv.out_channels},k{_x(conv.kernel_size)},s{_x(conv.stride)},"
        f"p{'x'.join(f'{lo}.{hi}' for lo, hi in before_after)},d{_x(conv.dilation)},g{conv.groups}"
        f"{',bias' if conv.bias is not None else ''}{mode}>"
    )


def _x(values: Sequence[int]) -> str:
    return "x".join(map(str, values))
