"""Plans of least joint loss are found though the importances mislead, and of the candidates few are run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

import lmfx
from lmfx.importance import ImportanceTable
from lmfx.importance.joint import overlap
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.planning import joint_search
from lmfx.planning.joint_search import Proposal, propose
from lmfx.stages import worth_scoring
from tests.toys import images, toy

DATA = images(1)


class Vectors:
    """A joint loss whose changes are given vectors: loss(P) = 1/2 |sum over c of P of u_c|^2."""

    def __init__(self, vectors: dict[str, np.ndarray], candidates: Iterable[Candidate]) -> None:
        self.vectors, self.candidates = vectors, {c.key: c for c in candidates}
        self.changes: dict[str, np.ndarray] = {}  # of those that were run

    def run(self, key: str) -> np.ndarray:
        self.changes[key] = self.vectors[key]
        return self.vectors[key]

    def alone(self, key: str) -> float:
        return 0.5 * float(self.changes[key] @ self.changes[key])

    def loss(self, candidates: Iterable[Candidate]) -> float:
        total = sum((self.run(c.key) for c in candidates), np.zeros(4))
        return 0.5 * float(total @ total)

    def seen_from(self, plan: Iterable[Candidate]) -> dict[str, float]:
        chosen, found = list(plan), {}
        for key, u in self.changes.items():
            c = self.candidates[key]
            beside = [self.vectors[d.key] for d in chosen if d.key != key and not overlap(c, d)]
            found[key] = -(0.5 * float(u @ u) + float(sum((u @ v for v in beside), 0.0)))
        return found


@dataclass(frozen=True)
class Made:
    spans: SpanSet
    table: lmfx.LatencyTable
    candidates: list[Candidate]

    @property
    def limit(self) -> float:
        return 0.6 * self.table.total()

    def joint(self, seed: int) -> Vectors:
        """Changes in random directions, which may add up or cancel, larger for more convs."""
        draw = np.random.default_rng(seed)
        vectors = {}
        for c in self.candidates:
            size = len(c.all_convs) * draw.lognormal(0, 0.5)
            direction = draw.standard_normal(4)
            vectors[c.key] = size * direction / np.linalg.norm(direction)
        return Vectors(vectors, self.candidates)

    def propose(self, joint: Vectors, scores: dict[str, float], draws: int = 0) -> list[Proposal]:
        return propose(self.spans, self.table, ImportanceTable(scores, {}), joint, self.limit, draws=draws)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made() -> Made:
    graph = lmfx.trace(toy(), DATA)
    spans = lmfx.spans(graph, max_kernel_size=5)
    table = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    return Made(spans, table, [c for c in worth_scoring(spans, table) if c.realization != "keep"])


def best(made: Made, joint: Vectors) -> float:
    """The least sum of losses alone within the limit: what the solver gives for the truth of all."""
    truth = {k: -0.5 * float(u @ u) for k, u in joint.vectors.items()}
    frontier = lmfx.solve(made.spans.network.gm, made.table, ImportanceTable(truth, {}), spans=made.spans)
    index = int(np.searchsorted(frontier.raw.latency, made.limit * (1 + 1e-12), side="right")) - 1
    return -float(frontier.importance[index])


class Alone(Vectors):
    """Changes that neither help nor harm each other: the loss of a plan is the sum of its candidates' losses."""

    def loss(self, candidates: Iterable[Candidate]) -> float:
        keys = [c.key for c in candidates]
        return sum(0.5 * float(self.run(k) @ self.run(k)) for k in keys)

    def seen_from(self, plan: Iterable[Candidate]) -> dict[str, float]:
        return {key: -self.alone(key) for key in self.changes}


@pytest.mark.parametrize("seed", range(3))
def test_what_turned_out_worse_than_it_was_said_to_be_is_left(
    made: Made, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint_search, "TRUTH", 1000)
    monkeypatch.setattr(joint_search, "DESCENT", 0)
    vectors = made.joint(seed).vectors
    joint = Alone(vectors, made.candidates)
    draw = np.random.default_rng(seed + 100)
    # Each is said to lose less than it does, by a random part: what is run is only what seems best.
    said = {k: -0.5 * float(u @ u) * draw.uniform(0.05, 1) for k, u in vectors.items()}
    found = made.propose(joint, said)
    assert found[0].loss == pytest.approx(best(made, joint))
    assert len(joint.changes) < len(made.candidates)
    assert all(a.loss <= b.loss for a, b in pairwise(found)) and all(p.sum <= made.limit * (1 + 1e-9) for p in found)


def test_candidates_whose_changes_cancel_are_found_from_the_plan_that_has_one(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    gained = []
    for seed in range(4):
        found = {}
        for rounds in (0, 8):
            monkeypatch.setattr(joint_search, "DESCENT", rounds)
            joint = made.joint(seed)
            for key in joint.vectors:
                joint.run(key)
            truth = {k: -joint.alone(k) for k in joint.vectors}
            found[rounds] = made.propose(joint, truth)[0].loss
        assert found[8] <= found[0]
        gained.append(found[8] / found[0])
    assert min(gained) < 0.7


def test_random_factors_propose_more(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_search, "DESCENT", 0)
    joint = made.joint(0)
    truth = {k: -0.5 * float(u @ u) for k, u in joint.vectors.items()}
    plain = made.propose(joint, truth)
    more = made.propose(made.joint(0), truth, draws=12)
    assert len(more) > len(plain) and more[0].loss < 0.7 * plain[0].loss


def test_no_plan_within_the_limit_is_no_proposal(made: Made) -> None:
    joint = made.joint(0)
    scores = dict.fromkeys(joint.vectors, -1.0)
    assert propose(made.spans, made.table, ImportanceTable(scores, {}), joint, 1e-9) == []  # type: ignore[arg-type]
    assert not joint.changes, "nothing was run"


def test_a_proposal_has_the_importance_that_was_scored(made: Made) -> None:
    joint = made.joint(0)
    said = {k: -1.0 - i / 1000 for i, k in enumerate(joint.vectors)}
    for proposal in made.propose(joint, said, draws=3):
        assert proposal.plan.importance == pytest.approx(sum(said[c.key] for c in proposal.plan.candidates))
        assert proposal.loss == pytest.approx(joint.loss(proposal.plan.candidates))
