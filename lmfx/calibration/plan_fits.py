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
from lmfx.calibration.recording import arguments_of, batches_for, record_batches
from lmfx.environment.progress import progress as progress_bar
from lmfx.passes.algebra.linear import LinearOp
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.graph.node_facts import call_of
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
    total = sum(len(batch[0]) for batch in batches)
    groups = {name: fit_groups(network, [candidate])[0] for name, candidate in fits.items()}
    counts = {name: group.images(network, False, total) for name, group in groups.items()}
    for name, seen in _inputs(student, batches, names, counts):
        candidate, group, count = fits[name], groups[name], counts[name]
        original = {n: v[:count] if len(v) >= count else v for n, v in targets.items()}
        # What enters a call that depends on another call is not known yet: the original's is close.
        xs = [seen[i][0] if i in seen else original[s.entry] for i, s in enumerate(candidate.spans)]
        values = dict(zip(group.sides, seen[0][1:], strict=True)) if group.sides else {}
        values.update((s.output, original[s.output]) for s in candidate.spans)
        op = group.fit(xs[0], values, others=xs[1:])[candidate.key]
        set_fitted(student.get_submodule(name), op)
        yield name, op


def _inputs(
    student: fx.GraphModule,
    batches: Sequence[tuple[Tensor, ...]],
    names: tuple[str, ...] | Frame,
    targets: Mapping[str, int],
) -> Iterator[tuple[str, dict[int, list[Tensor]]]]:
    """Stops before each of the modules `targets` with its name and its inputs on so many images, so that the caller can
    set the module before it runs: those of each call that can be had by then, by the call's number.

    Between two stops the batches run one after the other, so that only what is alive at a stop is held for all of them.
    """
    gathered = _gathered(student, set(targets))
    calls = _calls(gathered, set(targets))
    nodes = list(gathered.graph.nodes)
    stops = sorted((nodes.index(called[0]), name) for name, called in calls.items())
    runs = [fx.Interpreter(gathered) for _ in batches]
    for run, batch in zip(runs, batches, strict=True):
        run.args_iter = iter(arguments_of(gathered, batch, names))
    sizes = [len(batch[0]) for batch in batches]
    done = 0
    for place, (stop, name) in enumerate(stops):
        most = max(targets[later] for _, later in stops[place:])
        runs = runs[
            : next(i + 1 for i in range(len(runs)) if sum(sizes[: i + 1]) >= min(most, sum(sizes[: len(runs)])))
        ]
        for run in runs:
            for node in nodes[done:stop]:
                run.env[node] = run.run_node(node)
                for dead in run.user_to_last_uses.get(node, ()):
                    del run.env[dead]
        done = stop
        known = [n for n in calls[name] if all(value in runs[0].env for value in n.all_input_nodes)]
        sources = {n: [v for v in n.args if isinstance(v, fx.Node)] for n in known}
        values = {n: [_first(runs, v, targets[name]) for v in found] for n, found in sources.items()}
        yield name, {call_of(n): found for n, found in values.items()}


def _first(runs: Sequence[fx.Interpreter], node: fx.Node, count: int) -> Tensor:
    """The value of a node on the first `count` images."""
    return torch.cat([run.env[node] for run in runs])[:count]


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
