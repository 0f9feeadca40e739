"""Computes latencies from an analytic model instead of a device: deterministic, for tests and for planning.

    t = sum over ops of  max(flops / peak, bytes / bandwidth) + overhead

`bytes` are those of the operands, the weights and the result. A pointwise op (activation, norm, add) of which an
operand is made just for it is fused into the op that makes it, as runtimes do: its flops are added to that op's, its
other operands are read, and it has no overhead and no traffic of its own. (Williams, Waterman, Patterson: Roofline,
CACM 2009.)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import fx, nn

from lmfx.export.specs import eval_shapes
from lmfx.latency.backend import KIND, Measurement, Prune, Whole, check_rounds, stored_rows
from lmfx.latency.workload import Workload
from lmfx.passes.errors import OptionError
from lmfx.passes.graph.modules import ChannelSelect, DepthToSpace, PixelSlice, SpaceToDepth
from lmfx.passes.graph.pointwise import Pointwise
from lmfx.store.rows import Store

__all__ = ["RooflineBackend"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_FREE = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_MOVES = (*_PADS, ChannelSelect, PixelSlice, SpaceToDepth, DepthToSpace, nn.PixelShuffle, nn.PixelUnshuffle)
_JOINS = (torch.add, torch.sub, torch.mul, operator.add, operator.sub, operator.mul)


class RooflineBackend:
    """The roofline of a machine with `peak_gflops` (GFLOP/s), `bandwidth_gbs` (GB/s) and `overhead_us` a kernel."""

    name = "roofline"

    def __init__(self, peak_gflops: float = 100.0, bandwidth_gbs: float = 20.0, overhead_us: float = 2.0) -> None:
        for option, value in (("peak_gflops", peak_gflops), ("bandwidth_gbs", bandwidth_gbs)):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise OptionError(f"{option} must be a positive number, not {value!r}")
        if not (isinstance(overhead_us, (int, float)) and math.isfinite(overhead_us) and overhead_us >= 0):
            raise OptionError(f"overhead_us must be a number that is not negative, not {overhead_us!r}")
        self.peak_gflops, self.bandwidth_gbs, self.overhead_us = peak_gflops, bandwidth_gbs, overhead_us

    def identity(self) -> dict[str, Any]:
        """Backend, formula version and the three numbers of the machine."""
        return {
            "backend": self.name,
            "version": 2,
            "device": f"{self.peak_gflops:g} GFLOP/s, {self.bandwidth_gbs:g} GB/s, {self.overhead_us:g} us",
            "threads": 1,
        }

    def measure(
        self,
        workloads: Iterable[Workload],
        store: Store | None = None,
        progress: bool = False,
        rounds: int | None = None,
        prune: Prune | None = None,
    ) -> dict[str, Measurement]:
        """Computes every row; nothing is run. `rounds` and `prune` change nothing, because a row costs nothing."""
        identity = self.identity()
        unique = {w.signature: w for w in workloads}
        lasting = [k for k, w in unique.items() if w.lasting]
        known = stored_rows(store, identity, lasting)
        result = {}
        for signature, workload in unique.items():
            if signature in known:
                result[signature] = known[signature]
                continue
            ms = self.ms(workload.build(), workload.inputs)
            result[signature] = Measurement(ms, 0.0, 1, identity["device"], self.name, "analytic")
            if store is not None and workload.lasting:
                store.put(KIND, identity, signature, asdict(result[signature]))
        return result

    def measure_interleaved(self, modules: Sequence[Whole], repeats: int = 5) -> list[list[float]]:
        """The same number `repeats` times for every network."""
        check_rounds(repeats)
        times = [self.ms(m.build(), m.inputs) if isinstance(m, Workload) else self.ms(*m) for m in modules]
        return [[ms] * repeats for ms in times]

    def ms(self, module: nn.Module, inputs: Sequence[Any]) -> float:
        """The latency of a graph in ms. Raises `OptionError` for a module that torch.fx cannot trace."""
        gm = module
        if not isinstance(gm, fx.GraphModule):
            try:
                gm = fx.symbolic_trace(module)
            except Exception as error:  # tracing runs the user's code, which may raise anything
                raise OptionError(
                    f"roofline needs a graph, and torch.fx cannot trace {type(module).__name__}: {error}; "
                    "give the GraphModule that lmfx.trace makes"
                ) from error
        try:
            shapes = eval_shapes(gm, inputs)
        except RuntimeError as error:
            raise OptionError(
                f"roofline needs a graph whose shapes do not depend on values ({str(error).splitlines()[0]}); measure "
                "with latency='onnxruntime' or 'torch'"
            ) from error
        size = _element_size(gm, inputs)
        flops: dict[fx.Node, float] = {}
        moved: dict[fx.Node, float] = {}
        leader: dict[fx.Node, fx.Node] = {}  # the op whose kernel a fused op runs in
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr") or node not in shapes:
                continue
            out = math.prod(shapes[node])
            module_ = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
            sources = [n for n in node.all_input_nodes if n in shapes]
            if type(module_) in _FREE or node.target is torch.flatten:
                if sources and sources[0] in leader:
                    leader[node] = leader[sources[0]]
                continue
            host = next((leader[n] for n in sources if n in leader and len(n.users) == 1), None)
            if host is not None and _pointwise(node, module_):
                leader[node] = host
                flops[host] += _flops(module_, shapes, node) if isinstance(module_, Pointwise) else out
                others = [n for n in sources if leader.get(n) is not host]
                moved[host] += size * sum(math.prod(shapes[n]) for n in others)
                continue
            leader[node] = node
            weights = sum(p.numel() for p in module_.parameters()) if module_ is not None else 0
            flops[node] = _flops(module_, shapes, node)
            read = (
                out if isinstance(module_, (ChannelSelect, PixelSlice)) else sum(math.prod(shapes[n]) for n in sources)
            )
            moved[node] = size * (out + weights + read)
        peak, bandwidth = self.peak_gflops * 1e6, self.bandwidth_gbs * 1e6  # per ms
        return sum(max(flops[n] / peak, moved[n] / bandwidth) + self.overhead_us / 1e3 for n in flops)


def _pointwise(node: fx.Node, module: nn.Module | None) -> bool:
    if module is None:
        return node.target in _JOINS
    return isinstance(module, (*_NORMS, Pointwise)) or type(module).__module__ == "torch.nn.modules.activation"


def _flops(module: nn.Module | None, shapes: dict[fx.Node, tuple[int, ...]], node: fx.Node) -> float:
    """A multiply-add is two. What has no rule counts one for each entry of its result."""
    out = math.prod(shapes[node])
    if isinstance(module, _CONVS):
        return 2.0 * out * math.prod(module.kernel_size) * module.in_channels / module.groups
    if isinstance(module, _TRANSPOSED):
        read = math.prod(shapes[node.all_input_nodes[0]]) if node.all_input_nodes[0] in shapes else out
        return 2.0 * read * math.prod(module.kernel_size) * module.out_channels / module.groups
    if isinstance(module, nn.Linear):
        return 2.0 * out * module.in_features
    if isinstance(module, _POOLS):
        kernel: Any = module.kernel_size  # torch.fx makes lists of tuples that are arguments of a function
        listed = isinstance(kernel, (tuple, list))
        return float(out) * (math.prod(kernel) if listed else kernel ** (len(shapes[node]) - 2))
    if isinstance(module, Pointwise):
        return float(out) * len(module.steps)
    return 0.0 if isinstance(module, _MOVES) else float(out)


def _element_size(gm: nn.Module, inputs: Sequence[Any]) -> int:
    dtypes = [v.dtype if isinstance(v, torch.Tensor) else v[1] for v in inputs]
    dtype = next((d for d in dtypes if d.is_floating_point), dtypes[0])  # a time step may come first
    return int(torch.empty((), dtype=dtype).element_size())
