"""What is timed: a small graph, its inputs, and a signature that is equal for equal operator configurations.

    conv2d(64,64,k3x3,s1x1,p1.1x1.1,d1x1,g1,bias)      zero pads before a conv are counted into its own
    relu
    add(%0,%2)                                         operands by position, so names do not matter

Values and names do not matter for the time, so they are not in it; nor are eps, momentum and in-place flags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lmfx.export.specs import InputSpec, input_specs

__all__ = ["Workload", "sentinel_workload", "signature"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ZERO_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_IRRELEVANT = re.compile(r"(?:inplace|eps|momentum|negative_slope|alpha|track_running_stats)=[^,]+(?:, )?")
_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


@dataclass(frozen=True)
class Workload:
    """One thing to time. `build` makes the graph when it is needed (its parameters may be on the meta device).

    `inputs` are `(shape, dtype)` pairs. Two workloads with one `signature` are measured once.
    """

    signature: str
    build: Callable[[], nn.Module]
    inputs: tuple[InputSpec, ...]

    @classmethod
    def of(cls, module: nn.Module, *inputs: Any) -> Workload:
        """The workload of a module that is there, with example tensors or `(shape, dtype)` pairs.

        A module that is not a GraphModule has no signature that says what it computes; it gets one of its own, so it
        is never taken from a store.
        """
        specs = input_specs(inputs)
        if isinstance(module, fx.GraphModule):
            return cls(signature(module, specs), lambda: module, specs)
        return cls(f"{type(module).__name__}@{id(module)}", lambda: module, specs)


def sentinel_workload() -> Workload:
    """One fixed conv, known on every backend."""
    conv = fx.symbolic_trace(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()))
    return Workload.of(conv, ((1, 64, 28, 28), torch.float32))


def signature(gm: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """The normalised text of a canonical graph: what must be equal for the same time. Inputs as for `Workload.of`."""
    lines = [f"{_DTYPES.get(dtype, str(dtype))}[{','.join(map(str, shape))}]" for shape, dtype in input_specs(inputs)]
    index: dict[fx.Node, int] = {}
    pads: dict[fx.Node, tuple[int, ...]] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            index[node] = len(index)
            continue
        if node.op == "output":
            lines.append(f"out({_arguments(node.args, index)})")
            continue
        source = node.args[0] if node.args else None
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if isinstance(source, fx.Node) and type(module) in _NOTHING:
                index[node], pads = index[source], {**pads, **({node: pads[source]} if source in pads else {})}
                continue
            if isinstance(source, fx.Node) and _absorbed(gm, node, module):
                index[node], pads[node] = index[source], tuple(module.padding)  # type: ignore[arg-type]
                continue
            text = _module_text(module, pads.get(source, ()) if isinstance(source, fx.Node) else ())
        elif node.op == "get_attr":
            text = "const" + str(list(_attribute(gm, str(node.target)).shape))
        else:
            text = getattr(node.target, "__name__", str(node.target))
        keywords = "".join(f",{k}={_arguments(v, index)}" for k, v in sorted(node.kwargs.items()))
        lines.append(f"{text}({_arguments(node.args, index)}{keywords})")
        index[node] = max(index.values(), default=-1) + 1
    return ";".join(lines)


def _absorbed(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> bool:
    """A zero pad that only one conv reads: the conv's own padding, for the time and for the emitter."""
    if type(module) not in _ZERO_PADS or getattr(module, "value", 0) != 0 or min(module.padding) < 0:  # type: ignore[arg-type]
        return False
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return False
    conv = gm.get_submodule(str(users[0].target))
    return type(conv) in _CONVS and 2 * len(conv.kernel_size) == len(module.padding)  # type: ignore[arg-type]


def _module_text(module: nn.Module, pad: tuple[int, ...]) -> str:
    name = type(module).__name__
    if isinstance(module, _CONVS) and type(module) in _CONVS:
        own = list(module._reversed_padding_repeated_twice)
        total = [a + b for a, b in zip(own, pad or [0] * len(own), strict=True)]
        n = len(module.kernel_size)
        before_after = [(total[2 * i], total[2 * i + 1]) for i in range(n)][::-1]
        mode = "" if module.padding_mode == "zeros" else f",{module.padding_mode}"
        return (
            f"{name}<{module.in_channels},{module.out_channels},k{_x(module.kernel_size)},s{_x(module.stride)},"
            f"p{'x'.join(f'{lo}.{hi}' for lo, hi in before_after)},d{_x(module.dilation)},g{module.groups}"
            f"{',bias' if module.bias is not None else ''}{mode}>"
        )
    extra = _IRRELEVANT.sub("", module.extra_repr()).rstrip(", ")
    if not extra and any(True for _ in module.parameters()):
        extra = ",".join(str(list(p.shape)) for p in module.parameters())
    inner = [] if type(module).__module__.startswith("torch.nn.") else [str(list(p.shape)) for p in module.parameters()]
    return f"{name}<{extra}{';'.join(inner)}>"


def _x(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    owner: Any = gm
    for part in target.split("."):
        owner = getattr(owner, part)
    return owner


def _arguments(argument: Any, index: dict[fx.Node, int]) -> str:
    if isinstance(argument, fx.Node):
        return f"%{index[argument]}"
    if isinstance(argument, (tuple, list)):
        return ",".join(_arguments(a, index) for a in argument)
    if isinstance(argument, dict):
        return ",".join(f"{k}:{_arguments(v, index)}" for k, v in argument.items())
    return str(argument)
