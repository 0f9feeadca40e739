"""Judges plans by the networks that they give: those that are worth it are found, built, fitted and run.

    scores ─▶ solver ─▶ a plan that holds the budget     `planning.search`
                 │
                 └▶ proposals of as little latency        `planning.joint_search`: by a sum of vectors
                        ├▶ the best few as students       with the fits that were scored; of widths alone and of
                        │                                 layers alone as well
                        └▶ steps from a slower plan       `planning.context_search`: where the sum of vectors
                              │                           does not tell what those networks lose
                              └▶ those within the budget  `planning.finals`: measured, then refitted and compared

Networks are judged on the images that choose; where those are few, on some more that fits have seen: what a fit
flatters itself by is much the same for all plans, and a few dozen images do not tell plans apart (docs/quality.md).

Nothing depends on the clock: with the same rows of latency the same plan is chosen, and of two plans of equal quality
the faster one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from statistics import median
from typing import Literal

from torch import fx

from lmfx.calibration.images import COMPARED, Calibration
from lmfx.calibration.students import Students
from lmfx.environment.progress import progress as progress_bar
from lmfx.importance import ImportanceTable
from lmfx.importance.joint import JointLoss
from lmfx.importance.macs import multiply_accumulates
from lmfx.importance.reconstruction import ReconstructionSession
from lmfx.latency import LatencyTable
from lmfx.passes.ir import Candidate, MergePlan, Surrogate
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.spans.layers import Network
from lmfx.planning.context_search import ContextSearch
from lmfx.planning.joint_search import Proposal, propose
from lmfx.quality import Judge, Quality, QualityName

__all__ = ["Finalist", "Judged", "compared"]

FINALISTS = 5  # proposals that are built
PART_FINALISTS, PART_DRAWS = 2, 4  # the same of widths alone and layers alone
NEAR = 1.5  # those that are predicted to lose up to this many times what the best one does
LEAST_LOSS = 1e-6  # below which a loss is rounding
TRUSTED = 1.25  # by how much predictions may be off, in the middle of those that were judged
SLOWER = 1.35  # the latency from which steps go down to what is asked for, where predictions are off there
STEPPED = 64  # images that each step looks at
LEAST_COMPARED, COMPARED_MACS = 16, 1.5e11  # images that judge plans, and multiply-adds of a network on them
SEARCH_MACS, LEAST_RUNS, MOST_RUNS = 1e12, 16, 80  # multiply-adds of all steps, how many for each limit, and in all


def compared(network: Network, most: int = COMPARED) -> int:
    """How many images plans are compared on: at most `most`, and fewer by networks that take long for each."""
    affordable = COMPARED_MACS / max(multiply_accumulates(network), 1.0)
    return int(min(max(affordable, LEAST_COMPARED), most))


Search = Literal["all", "widths", "layers", "steps"]  # proposals of all candidates, of some, and what steps led to


@dataclass(frozen=True)
class Finalist:
    """A plan whose network was judged: `loss` on the images that plans are chosen by; `search` found it."""

    proposal: Proposal
    loss: float
    search: Search = "all"


class Judged:
    """Judges the plans of one graph. `name` says by which quality."""

    def __init__(
        self,
        spans: SpanSet,
        table: LatencyTable,
        scores: ImportanceTable,
        session: ReconstructionSession,
        images: Calibration,
        name: QualityName,
        surrogate: Surrogate,
        progress: bool = False,
    ) -> None:
        self.spans, self.table, self.scores, self.session = spans, table, scores, session
        self.name, self.surrogate, self.progress = name, surrogate, progress
        self.analysis = Analysis.of(spans.network)
        self.roles = images.roles()
        self.students = Students(self.analysis, self.roles.fit)
        self.qualities: dict[tuple[str, ...], Quality] = {}

    @cached_property
    def joint(self) -> JointLoss:
        """What predicts the losses of whole plans."""
        return JointLoss(self.session.scorer, self.session.candidates)

    @cached_property
    def judge(self) -> Judge:
        """What judges the students."""
        images = self.roles.comparing(compared(self.spans.network))
        return Judge(self.analysis.graph, images, held_out=not self.roles.seen)

    @cached_property
    def search(self) -> ContextSearch:
        """What goes from plan to plan in steps."""
        images = self.roles.comparing(compared(self.spans.network, STEPPED))
        judge = Judge(self.analysis.graph, images, held_out=not self.roles.seen)
        like = MergePlan((), self.analysis.fingerprint, surrogate=self.surrogate)
        like = replace(like, activation_after=self.spans.options.activation_after)
        search = ContextSearch(
            self.spans, self.table, self.joint, judge, lambda cs: self.sketch(replace(like, candidates=cs))
        )
        cost = multiply_accumulates(self.spans.network) * len(judge.images) / 2
        search.left = min(MOST_RUNS, int(SEARCH_MACS / max(cost, 1.0)))
        return search

    @staticmethod
    def key(plan: MergePlan) -> tuple[str, ...]:
        """What a plan is told by."""
        return tuple(c.key for c in plan.candidates)

    def plan(self, candidates: tuple[Candidate, ...]) -> MergePlan:
        """The plan of some candidates, with what they were scored to be worth together."""
        rows = self.scores.rows
        lossy = [c for c in candidates if not c.exact]
        worth = sum(rows[c.key] if c.key in rows else -self.joint.alone(c.key) for c in lossy)
        return MergePlan(
            candidates,
            self.analysis.fingerprint,
            self.table.total(MergePlan(candidates, "")),
            worth,
            self.surrogate,
            activation_after=self.spans.options.activation_after,
        )

    def sketch(self, plan: MergePlan) -> fx.GraphModule:
        """A plan's student, with the fits that were scored."""
        return self.students.sketch(plan, lambda c: self.session.scorer.made(c)[0])

    def quality(self, plan: MergePlan) -> Quality:
        """What a plan's student keeps, on the images that plans are chosen by."""
        key = self.key(plan)
        if key not in self.qualities:
            self.qualities[key] = self.judge(self.sketch(plan))
        return self.qualities[key]

    def loss(self, plan: MergePlan) -> float:
        """The loss by which plans are chosen."""
        return self.quality(plan).loss(self.name)

    def proposals(self, limit: float) -> list[Proposal]:
        """The plans within `limit` ms (a sum of rows), the one of least predicted loss first."""
        return propose(self.spans, self.table, self.scores, self.joint, limit, self.surrogate)

    def finalists(self, limit: float, also: Iterable[Proposal] = ()) -> list[Finalist]:
        """The plans within `limit` ms (a sum of rows) that are worth judging, and `also` others; the best first."""
        proposals = self.proposals(limit)
        near = [p for p in proposals if p.loss <= NEAR * proposals[0].loss][:FINALISTS]
        found = self._judged((*near, *also))
        trusted = not near or self._trusted(found)
        for search, spans in self.parts.items():
            some = propose(spans, self.table, self.scores, self.joint, limit, self.surrogate, draws=PART_DRAWS)
            found += self._new(search, some[:PART_FINALISTS], found)
        if not trusted:
            best = min(found, key=lambda f: f.loss).proposal
            found += self._new("steps", self._stepped(limit, best), found)
        return sorted(found, key=lambda f: (f.loss, f.proposal.sum))

    @cached_property
    def parts(self) -> dict[Search, SpanSet]:
        """The candidates that change widths alone, and those that change layers alone, where there are both."""
        changing = [c for c in self.spans if c.realization != "keep" and not c.exact]
        widths = {c.key for c in changing if c.cuts}
        if not 0 < len(widths) < len(changing):
            return {}
        layers = {c.key for c in changing} - widths
        parts: dict[Search, set[str]] = {"widths": layers, "layers": widths}
        return {
            name: replace(self.spans, candidates=tuple(c for c in self.spans if c.key not in left))
            for name, left in parts.items()
        }

    def _new(self, search: Search, proposals: Iterable[Proposal], found: Iterable[Finalist]) -> list[Finalist]:
        """Those of the proposals of a search that are not there yet, judged."""
        known = {self.key(f.proposal.plan) for f in found}
        new = self._judged(p for p in proposals if self.key(p.plan) not in known)
        return [replace(f, search=search) for f in new]

    def _judged(self, proposals: Iterable[Proposal]) -> list[Finalist]:
        """The networks of some proposals, the best first."""
        unique = {self.key(p.plan): p for p in proposals}
        with progress_bar(len(unique), "judging plans", self.progress) as bar:
            found = []
            for proposal in unique.values():
                found.append(Finalist(proposal, self.loss(proposal.plan)))
                bar.update(1)
        return sorted(found, key=lambda f: (f.loss, f.proposal.sum))

    def _stepped(self, limit: float, best: Proposal) -> list[Proposal]:
        """What steps come to within `limit` ms, from a slower plan and from the best that there is."""
        slower = self.proposals(SLOWER * limit)[:FINALISTS]
        start = self._judged(slower)[0].proposal
        self.search.left = max(self.search.left, LEAST_RUNS)
        found = [self.search.down(s.plan.candidates, limit) for s in (start, best)]
        found = [s for s in found if s.sum <= limit * (1 + 1e-9)]
        if found:
            found.append(self.search.improved(min(found, key=lambda s: s.loss), limit))
        return [Proposal(self.plan(s.candidates), s.sum, self.joint.loss(s.candidates)) for s in found]

    def _trusted(self, found: Iterable[Finalist]) -> bool:
        """Whether the joint loss says what the networks lose that were judged."""
        truths = [(self.quality(f.proposal.plan).loss(), f.proposal.loss) for f in found]
        return median(abs(log((a + LEAST_LOSS) / (b + LEAST_LOSS))) for a, b in truths) <= log(TRUSTED)
