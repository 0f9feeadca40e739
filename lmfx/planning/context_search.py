"""Searches plans step by step, each judged as the network that it gives: for budgets at which estimates fail.

    down        the exchange that loses least of the whole network, for what it saves, until the plan is fast enough
    up          an exchange the other way, and down again from there, as long as that gives a better plan

An exchange puts one candidate in the place of those that it cannot stand beside, or takes one out. Which are worth a
run is said by changes of outputs: that of the plan's own network is known, and of what is taken out and comes in, those
that each makes alone (`lmfx.importance.joint`):

    D' = D_P  -  sum over c taken out of d_c  +  d_new          a step = (loss of D' - loss of D_P) / latency saved

Far from the original, changes do not add up, but those of one step nearly do. What a step leaves as it is before its
first changed layer is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from lmfx.calibration.recording import floating_outputs, record, resume
from lmfx.importance.joint import JointLoss, overlap
from lmfx.latency import LatencyTable
from lmfx.passes.graph.node_facts import shape_of
from lmfx.passes.graph.raw_nodes import dependents
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.quality import Judge

__all__ = ["ContextSearch"]

AT_ONCE = 4  # exchanges that are run for each step
LEAST_STEP = 0.002  # of the original's latency
ROUNDS = 4  # of going up and down again
HELD_BYTES = 2**29  # of values, where runs begin


@dataclass(frozen=True)
class _Run:
    """A plan whose network was run: its loss, the change of the outputs that the joint loss looks at, and the sum of
    its rows in ms."""

    candidates: tuple[Candidate, ...]
    loss: float
    change: Tensor
    sum: float


@dataclass(frozen=True)
class _Exchange:
    """What a plan becomes, and what its loss is thought to be."""

    candidates: tuple[Candidate, ...]
    sum: float
    loss: float


class ContextSearch:
    """Searches the plans of one graph. `student` makes the network of some candidates, `left` says how many it may."""

    def __init__(
        self,
        spans: SpanSet,
        table: LatencyTable,
        joint: JointLoss,
        judge: Judge,
        student: Callable[[tuple[Candidate, ...]], fx.GraphModule],
    ) -> None:
        self.spans, self.joint, self.judge, self.student = spans, joint, judge, student
        self.left = 0  # networks that may still be run
        self.original = table.total()
        self.usable = [c for c in spans if c.realization != "keep" and c.key in table]
        self.saved = {c.key: table.kept(c) - table.ms(c.key) for c in self.usable}
        self.order = {name: i for i, name in enumerate(spans.network.nodes)}
        self.states: dict[tuple[str, ...], _Run] = {}
        # A plan, and a batch at a time the values in its network at which others may begin to differ.
        self._held: tuple[tuple[str, ...], list[dict[str, Tensor]]] | None = None
        self._overlaps: dict[tuple[str, str], bool] = {}

    # --- the search ---------------------------------------------------------------------------------------------------

    def down(self, start: Iterable[Candidate], limit: float) -> _Run:
        """From a plan to one whose rows add up to at most `limit` ms, or to as little as it comes to."""
        state = self.run(self.ordered(start))
        while state.sum > limit * (1 + 1e-9):
            better = self.step(state, max(state.sum - limit, LEAST_STEP * self.original))
            if better is None:
                break
            state = better
        return state

    def step(self, state: _Run, over: float) -> _Run | None:
        """The exchange of least price of those that are run; None without one.

        Those of least estimated price are run; with no runs left, the first one.
        """

        def price(e: _Exchange, loss: float) -> float:
            return (loss - state.loss) / min(state.sum - e.sum, over)

        least = min(LEAST_STEP * self.original, over)
        steps = [e for e in self.exchanges(state) if state.sum - e.sum >= least]
        self.hold(state)
        found: tuple[float, _Run] | None = None
        for e in sorted(steps, key=lambda e: price(e, e.loss))[:AT_ONCE]:
            if found is not None and self.left <= 0 and self.key(e.candidates) not in self.states:
                break
            made = self.run(e.candidates)
            if found is None or price(e, made.loss) < found[0]:
                found = price(e, made.loss), made
        return None if found is None else found[1]

    def improved(self, state: _Run, limit: float) -> _Run:
        """The best of what some rounds of going up and down again come to."""
        for _ in range(ROUNDS):
            if self.left <= 0:
                break
            rises = [e for e in self.exchanges(state) if e.sum - state.sum >= LEAST_STEP * self.original]
            rises.sort(key=lambda e: (e.loss - state.loss) / (e.sum - state.sum))
            found = state
            for rise in rises[:AT_ONCE]:
                other = self.down(rise.candidates, limit)
                if other.sum <= limit * (1 + 1e-9) and other.loss < found.loss:
                    found = other
            if found is state:
                break
            state = found
        return state

    def exchanges(self, state: _Run) -> list[_Exchange]:
        """All plans that are one exchange away and can be told anything of."""
        chosen = {c.key for c in state.candidates}
        found = [self.exchange(state, None, [c]) for c in state.candidates]
        for c in self.known(state):
            if c.key not in chosen:
                found.append(self.exchange(state, c, [p for p in state.candidates if self.overlap(c, p)]))
        return found

    def overlap(self, c: Candidate, d: Candidate) -> bool:
        """Whether no plan can have both."""
        pair = (c.key, d.key)
        if pair not in self._overlaps:
            self._overlaps[pair] = overlap(c, d)
        return self._overlaps[pair]

    def exchange(self, state: _Run, new: Candidate | None, out: Sequence[Candidate]) -> _Exchange:
        """The plan with a candidate in place of others."""
        change = state.change - sum((self.joint.change(c) for c in out), torch.zeros(()))
        left = [c for c in state.candidates if c not in out]
        latency = state.sum + sum(self.saved[c.key] for c in out)
        if new is not None:
            change = change + self.joint.change(new)
            left.append(new)
            latency -= self.saved[new.key]
        return _Exchange(self.ordered(left), latency, self.joint.space.loss(change))

    def known(self, state: _Run) -> list[Candidate]:
        """Candidates whose change was seen already, and the next widths of what the plan narrows."""
        found = {c.key: c for c in self.usable if c.exact or c.key in self.joint.changes}
        for c in state.candidates:
            for other in _next_widths(c, self.usable):
                found[other.key] = other
        return list(found.values())

    # --- networks -----------------------------------------------------------------------------------------------------

    def run(self, candidates: tuple[Candidate, ...]) -> _Run:
        """A plan's network, run on the judge's images; what was run is known."""
        key = self.key(candidates)
        if key not in self.states:
            self.left -= 1
            outputs = self.outputs(candidates)
            # The images of the joint loss are the first ones.
            seen = len(self.joint.space.reference)
            rows = [
                o if dim is None else o.narrow(dim, 0, seen) for o, dim in zip(outputs, self.judge.rows, strict=True)
            ]
            change = self.joint.space.flat(rows) - self.joint.space.reference
            latency = self.original - sum(self.saved[c.key] for c in candidates)
            self.states[key] = _Run(candidates, self.judge.of(outputs).loss(), change, latency)
        return self.states[key]

    def hold(self, state: _Run) -> None:
        """Keep the values of a plan's network where others begin to differ from it."""
        key = self.key(state.candidates)
        if self._held is not None and self._held[0] == key:
            return
        self._held = None
        entries = {span.entry for c in self.known(state) for span in c.spans}
        net = self.student(state.candidates)
        names = {n.name for n in net.graph.nodes if n.op == "placeholder"}
        # Small maps first: those are late, and save most of a run.
        sizes = {name: prod(shape_of(self.spans.network.nodes[name]) or (1,)) for name in entries}
        left = HELD_BYTES / (4 * len(self.judge.images))
        for name in sorted(entries, key=lambda n: (sizes[n], n)):
            left -= sizes[name]
            if left < 0:
                break
            names.add(name)
        with torch.no_grad():
            found = [record(net, batch, names, self.judge.images.names)[0] for batch in self.judge.batches]
        self._held = key, found

    @torch.no_grad()
    def outputs(self, candidates: tuple[Candidate, ...]) -> list[Tensor]:
        """What the network of a plan gives, from the first layer on in which it differs from the plan that is held."""
        net = self.student(candidates)
        if self._held is None:
            return self.judge.outputs(net)
        now = {c.key: c for c in candidates}
        before = {c.key: c for c in self.states[self._held[0]].candidates}
        differing = [(now | before)[k] for k in now.keys() ^ before.keys()]
        nodes = self.spans.network.nodes
        entries = [nodes[span.entry] for c in differing for span in c.spans]
        changed = {n.name for n in dependents(user for e in entries for user in e.users)}
        parts = []
        for values in self._held[1]:
            known = {n: values[n.name] for n in net.graph.nodes if n.name in values and n.name not in changed}
            parts.append(floating_outputs(resume(net, known)))
        return self.judge.joined(parts)

    # --- names --------------------------------------------------------------------------------------------------------

    @staticmethod
    def key(candidates: Iterable[Candidate]) -> tuple[str, ...]:
        """What a plan is told by."""
        return tuple(c.key for c in candidates)

    def ordered(self, candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
        """In the order that plans have."""
        return tuple(sorted(candidates, key=lambda c: self.order[c.span.exit]))


def _next_widths(c: Candidate, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The narrower and the wider neighbour of a narrowed candidate: the same cuts at the nearest other widths."""
    if not c.cuts:
        return []
    own = sum(cut.width for cut in c.cuts)
    readers = {cut.reader for cut in c.cuts}
    same = [d for d in candidates if d.span == c.span and {cut.reader for cut in d.cuts} == readers and d.key != c.key]
    total = {d.key: sum(cut.width for cut in d.cuts) for d in same}
    narrower = max((d for d in same if total[d.key] < own), key=lambda d: total[d.key], default=None)
    wider = min((d for d in same if total[d.key] > own), key=lambda d: total[d.key], default=None)
    return [d for d in (narrower, wider) if d is not None]
