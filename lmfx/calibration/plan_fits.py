"""Sets the fitted convs of a student on calibration data, in the order of the graph.

Each conv sees what the student so far gives it (X), the convs before it set already, and aims at what the original
network has at its output (Y). The student runs on all images side by side, node by node, and stops before each conv
that is to be fitted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.fitting import FittedOp, fit_groups
from lmfx.calibration.images import Calibration, Frame
from lmfx.calibration.recording import batches_for, placeholder_values, record_batches
from lmfx.environment.progress import progress as progress_bar
from lmfx.passes.algebra.linear import LinearOp
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.trainable import span_names
from lmfx.passes.spans.layers import Network

__all__ = ["fit_plan", "fit_student", "set_fitted"]


def fit_plan(
    network: Network, student: fx.GraphModule, plan: MergePlan, calibration: Calibration, progress: bool = False
) -> fx.GraphModule:
    """A copy of `student` (the trainable form of `plan`) whose fitted convs are set, in the order of the graph."""
    names = dict(zip(span_names(network.gm, plan), plan.candidates, strict=True))
    fits = {name: c for name, c in names.items() if c.realization == "fit"}
    student = copy.deepcopy(student)
    if not fits:
        return student
    calls = {span.entry for c in fits.values() if c.calls for span in c.spans}
    targets = record_batches(network.gm, calibration, {s.output for c in fits.values() for s in c.spans} | calls)
    batches = list(batches_for(network.gm, calibration))
    with progress_bar(len(fits), "fitting", progress) as bar:
        for _ in fit_student(network, student, fits, targets, batches, calibration.names):
            bar.update(1)
    return student


@torch.no_grad()
def fit_student(
    network: Network,
    student: fx.GraphModule,
    fits: Mapping[str, Candidate],
    targets: Mapping[str, Tensor],
    batches: Sequence[tuple[Tensor, ...]],
    names: tuple[str, ...] | Frame,
) -> Iterator[tuple[str, FittedOp]]:
    """Sets the fitted convs `fits` (module name -> candidate) of `student` itself, in the order of the graph, and gives
    each name with its op. `targets` is what the original has at their outputs and, where they have several calls, at
    their entries."""
    for name, seen in _inputs(student, batches, names, set(fits)):
        candidate = fits[name]
        (group,) = fit_groups(network, [candidate])
        # What enters a call that depends on another call is not known yet: the original's is close.
        xs = [seen[i][0] if i in seen else targets[s.entry] for i, s in enumerate(candidate.spans)]
        values = dict(zip(group.sides, seen[0][1:], strict=True)) if group.sides else {}
        values.update((s.output, targets[s.output]) for s in candidate.spans)
        op = group.fit(xs[0], values, others=xs[1:])[candidate.key]
        set_fitted(student.get_submodule(name), op)
        yield name, op


def _inputs(
    student: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]], names: tuple[str, ...] | Frame, targets: set[str]
) -> Iterator[tuple[str, dict[int, list[Tensor]]]]:
    """Runs all batches side by side, node by node, and stops before each of the modules `targets` with its name and its
    inputs on all images, so that the caller can set the module before it runs: those of each call that can be had by
    then, by the call's number."""
    gathered = _gathered(student, targets)
    calls = _calls(gathered, targets)
    runs = [fx.Interpreter(gathered) for _ in batches]
    for run, batch in zip(runs, batches, strict=True):
        run.args_iter = iter(placeholder_values(gathered, batch, names))
    left = set(targets)
    for node in gathered.graph.nodes:
        if node.op == "output":
            return
        if node.op == "call_module" and str(node.target) in left:
            left.remove(str(node.target))
            known = [n for n in calls[str(node.target)] if all(value in runs[0].env for value in n.all_input_nodes)]
            sources = {n: [v for v in n.args if isinstance(v, fx.Node)] for n in known}
            values = {n: [torch.cat([r.env[v] for r in runs]) for v in found] for n, found in sources.items()}
            yield str(node.target), {int(n.meta.get("call", 0)): found for n, found in values.items()}
        for run in runs:
            run.env[node] = run.run_node(node)
            for dead in run.user_to_last_uses.get(node, ()):
                del run.env[dead]


def _calls(gm: fx.GraphModule, targets: set[str]) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and str(node.target) in targets:
            found.setdefault(str(node.target), []).append(node)
    return found


def _gathered(student: fx.GraphModule, targets: set[str]) -> fx.GraphModule:
    """The same modules and nodes: what a module's other calls need comes before its first, unless they need that."""
    gm = fx.GraphModule(student, copy.deepcopy(student.graph))
    for first, *others in _calls(gm, targets).values():
        for call in others:
            needed: set[fx.Node] = set()
            queue = list(call.all_input_nodes)
            while queue:
                node = queue.pop()
                if node not in needed:
                    needed.add(node)
                    queue += node.all_input_nodes
            if needed.isdisjoint([first, *others]):
                order = list(gm.graph.nodes)
                for node in order[order.index(first) :]:
                    if node in needed:
                        first.prepend(node)
    return gm


def set_fitted(module: nn.Module, op: LinearOp) -> None:
    """Write a fitted op into the conv that stands for it (inside a `LinearSpan` where its padding is uneven or vectors
    come from the side)."""
    conv: Any = module.body[0] if isinstance(module, LinearSpan) else module
    with torch.no_grad():
        conv.weight.copy_(op.weight)
        conv.bias.copy_(op.bias)
        for i, matrix in enumerate(op.sides if isinstance(op, FittedOp) else ()):
            module.body[1 + i].weight.copy_(matrix)  # type: ignore[union-attr, index]
