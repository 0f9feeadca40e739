"""Closed-form fits on calibration data: of many candidates at once (for scores), and of a chosen plan.

A `FitGroup` is all fit candidates that share the value they read, their stride and output size: one Gram matrix at the
union of their windows serves them all. `fit_plan` goes through the compressed network in order, so that each conv sees
what the convs before it really give (X), and aims at what the original network has there (Y).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.calibration import Calibration, Frame
from lmfx.passes import fit
from lmfx.passes.errors import OptionError
from lmfx.passes.fit import Gram, fit_cg, sample_positions
from lmfx.passes.gram import MAX_UNKNOWNS
from lmfx.passes.ir import Candidate, ConvConfig, MergePlan
from lmfx.passes.layers import Network
from lmfx.passes.linear import LinearOp
from lmfx.passes.linear_span import LinearSpan
from lmfx.passes.rewrite import span_names
from lmfx.progress import progress as progress_bar
from lmfx.values import batches_for, placeholder_values, record_batches

__all__ = ["FitGroup", "fit_groups", "fit_plan"]

LEAST_SAMPLES = 4096
MOST_SAMPLES = {True: 10000, False: 20000}  # quick or not
FLOAT32_ROUNDING = 1e-6
SAMPLES_AN_UNKNOWN = {True: 2, False: 4}
CG_ITERATIONS, CG_IMAGES = {True: 6, False: 20}, {True: 16, False: 64}


@dataclass(frozen=True)
class FitGroup:
    """Fit candidates that can share one Gram matrix: one entry, stride, output size, and dense or depthwise alike."""

    entry: str
    depthwise: bool
    candidates: tuple[Candidate, ...]

    def fit(self, x: Tensor, ys: dict[str, Tensor], quick: bool = False) -> dict[str, LinearOp]:
        """The fitted op of each candidate, by its key. `x` (images, in, size...), `ys` the value at each output node.

        `quick` takes fewer samples and a rule's damping instead of the best on held-out images.
        """
        if x.dim() == 2:
            return self.fit_vectors(x, ys, quick)
        narrow = [c for c in self.candidates if _unknowns(c) <= MAX_UNKNOWNS]
        found = {c.key: _fit_wide(c, x, ys[c.span.output], quick) for c in self.candidates if c not in narrow}
        # The largest kernel decides the cost of all, so kernels that would make it too large are left out in turn.
        while narrow and _union(narrow).unknowns(self.depthwise) > MAX_UNKNOWNS:
            largest = max(narrow, key=_unknowns)
            narrow.remove(largest)
            found.update(FitGroup(self.entry, self.depthwise, (largest,)).fit(x, ys, quick))
        if not narrow:
            return found
        window = _union(narrow)
        targets = {c.span.output: ys[c.span.output].shape[1] for c in narrow}
        gram = Gram(
            x.shape[1],
            window.kernel,
            window.stride,
            window.padding,
            targets,
            depthwise=self.depthwise,
            holdout=not quick,
            dtype=torch.float32 if quick else torch.float64,
            rounding=0.0 if x.dtype == torch.float64 else FLOAT32_ROUNDING,
        )
        size = ys[narrow[0].span.output].shape[2:]
        unknowns = window.unknowns(self.depthwise)
        want = min(max(SAMPLES_AN_UNKNOWN[quick] * unknowns, LEAST_SAMPLES), MOST_SAMPLES[quick])
        positions = sample_positions(tuple(size), len(x), -(-want // len(x)), torch.Generator().manual_seed(0))
        gram.update(x, {n: ys[n] for n in targets}, positions)
        for c in narrow:
            assert c.conv is not None
            before = tuple(lo for lo, _ in c.conv.padding)
            solved = fit.solve(
                gram,
                c.span.output,
                c.conv.kernel_size,
                self.depthwise,
                damping=min(1.0, 0.4 * _unknowns(c) / gram.samples) if quick else "auto",
                before=before,
                heldout=False,
            )
            found[c.key] = _op(c.conv, solved.weight, solved.bias)
        return found

    def fit_vectors(self, x: Tensor, ys: dict[str, Tensor], quick: bool) -> dict[str, LinearOp]:
        """The same for vectors, as maps of one pixel."""
        group = FitGroup(self.entry, self.depthwise, tuple(replace(c, conv=_one_pixel(c)) for c in self.candidates))
        found = group.fit(x[..., None], {name: y[..., None] for name, y in ys.items()}, quick)
        ops = [found[c.key] for c in group.candidates]
        return {
            c.key: LinearOp(op.weight[..., 0], op.bias, (), (), ()) for c, op in zip(self.candidates, ops, strict=True)
        }


def _one_pixel(candidate: Candidate) -> ConvConfig:
    assert candidate.conv is not None
    return ConvConfig(candidate.conv.in_channels, candidate.conv.out_channels, (1,), (1,), ((0, 0),), (1,))


def _op(config: ConvConfig, weight: Tensor, bias: Tensor) -> LinearOp:
    return LinearOp(weight, bias, config.stride, config.padding, config.dilation, config.groups)


def _unknowns(candidate: Candidate) -> int:
    assert candidate.conv is not None
    return _Window.of(candidate.conv).unknowns(candidate.conv.groups > 1)


@dataclass(frozen=True)
class _Window:
    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, c: ConvConfig) -> _Window:
        return cls(c.in_channels, c.kernel_size, c.stride, c.padding)

    def unknowns(self, depthwise: bool) -> int:
        taps = 1
        for k in self.kernel:
            taps *= k
        return taps * (1 if depthwise else self.channels)


def _union(candidates: Sequence[Candidate]) -> _Window:
    """The smallest window that holds those of all candidates, with a padding that gives the same output size."""
    configs = [c.conv for c in candidates if c.conv is not None]
    kernel, padding = [], []
    for i in range(len(configs[0].kernel_size)):
        before = max(c.padding[i][0] for c in configs)
        behind = max(c.kernel_size[i] - 1 - c.padding[i][0] for c in configs)
        excess = sum(configs[0].padding[i]) - (configs[0].kernel_size[i] - 1)
        kernel.append(before + behind + 1)
        padding.append((before, max(excess + behind, 0)))
    first = configs[0]
    return _Window(first.in_channels, tuple(kernel), first.stride, tuple(padding))


def fit_groups(network: Network, candidates: Sequence[Candidate]) -> list[FitGroup]:
    """The fit candidates in groups, in the order in which their entries appear in the graph."""
    found: dict[tuple[Any, ...], list[Candidate]] = {}
    order = {name: i for i, name in enumerate(network.nodes)}
    for c in candidates:
        if c.conv is None:
            raise OptionError(f"candidate {c.key} has no conv to fit")
        excess = tuple(sum(p) - k for p, k in zip(c.conv.padding, c.conv.kernel_size, strict=True))
        key = (c.span.entry, c.conv.groups > 1, c.conv.stride, excess, network.shape(c.span.output)[2:])
        found.setdefault(key, []).append(c)
    return [
        FitGroup(key[0], key[1], tuple(group)) for key, group in sorted(found.items(), key=lambda kv: order[kv[0][0]])
    ]


def _fit_wide(candidate: Candidate, x: Tensor, y: Tensor, quick: bool) -> LinearOp:
    """Conjugate gradients, where the Gram matrix would not fit."""
    config = candidate.conv
    assert config is not None
    images = CG_IMAGES[quick]
    solved = fit_cg([x[:images]], [y[:images]], config, iterations=CG_ITERATIONS[quick])
    return _op(config, solved.weight, solved.bias)


# --- a chosen plan ----------------------------------------------------------------------------------------------------


def fit_plan(
    network: Network, student: fx.GraphModule, plan: MergePlan, calibration: Calibration, progress: bool = False
) -> fx.GraphModule:
    """A copy of `student` (the trainable form of `plan`) whose fitted convs are set, in the order of the graph."""
    names = dict(zip(span_names(network.gm, plan), plan.candidates, strict=True))
    fits = {name: c for name, c in names.items() if c.realization == "fit"}
    student = copy.deepcopy(student)
    if not fits:
        return student
    targets = record_batches(network.gm, calibration, {c.span.output for c in fits.values()})
    batches = list(batches_for(network.gm, calibration))
    with torch.no_grad(), progress_bar(len(fits), "fitting", progress) as bar:
        for node, x in _inputs(student, batches, calibration.names, set(fits)):
            candidate = fits[str(node.target)]
            group = FitGroup(
                candidate.span.entry, candidate.conv is not None and candidate.conv.groups > 1, (candidate,)
            )
            op = group.fit(x, {candidate.span.output: targets[candidate.span.output]})[candidate.key]
            set_fitted(student.get_submodule(str(node.target)), op)
            bar.update(1)
    return student


def _inputs(
    student: fx.GraphModule, batches: list[tuple[Tensor, ...]], names: tuple[str, ...] | Frame, targets: set[str]
) -> Iterator[tuple[fx.Node, Tensor]]:
    """Runs all batches side by side, node by node, and stops before each of the modules `targets` with its input on
    all images, so that the caller can set the module before it runs."""
    runs = [fx.Interpreter(student) for _ in batches]
    for run, batch in zip(runs, batches, strict=True):
        run.args_iter = iter(placeholder_values(student, batch, names))
    for node in student.graph.nodes:
        if node.op == "output":
            return
        if node.op == "call_module" and str(node.target) in targets:
            yield node, torch.cat([run.env[node.args[0]] for run in runs])
        for run in runs:
            run.env[node] = run.run_node(node)
            for dead in run.user_to_last_uses.get(node, ()):
                del run.env[dead]


def set_fitted(module: nn.Module, op: LinearOp) -> None:
    """Write a fitted op into the conv that stands for it (inside a `LinearSpan` where its padding is uneven)."""
    conv: Any = module.body[0] if isinstance(module, LinearSpan) else module
    with torch.no_grad():
        conv.weight.copy_(op.weight)
        conv.bias.copy_(op.bias)
