"""Plans that are improved one or two places at a time."""

from itertools import product

import pytest
import torch
from torch import nn

import lmfx
from lmfx.calibration.images import as_calibration
from lmfx.importance import Reconstruction
from lmfx.importance.change import Scorer
from lmfx.importance.joint import JointLoss, overlap
from lmfx.latency import LatencyTable
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.planning.exchange import exchanged, neighbours
from lmfx.planning.joint_search import propose
from tests.helpers import double
from tests.passes.spans.test_narrowing import conv
from tests.toys import images

Found = tuple[SpanSet, LatencyTable, JointLoss, list[Candidate]]


@pytest.fixture(scope="module")
def found() -> Found:
    """A chain with three cuts of four channels, every change known."""
    torch.manual_seed(0)
    layers = [conv(3, 4, 3), nn.Tanh(), conv(4, 3), conv(3, 4, 3), nn.Tanh(), conv(4, 3)]
    model = double(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 6)))
    x = images(48).double()
    spans = lmfx.spans(lmfx.trace(model, x[:1]), realize=("narrow",))
    table = lmfx.profile(spans.network.gm, "roofline", spans=spans, progress=False)
    narrow = [c for c in spans if c.cuts and c.key in table]
    scorer = Scorer(Reconstruction(exact=True), spans, as_calibration(x, x[:1]), None, narrow)
    return spans, table, JointLoss(scorer, narrow), narrow


def plans(candidates: list[Candidate]) -> list[list[Candidate]]:
    """All plans of at most two candidates that do not overlap."""
    pairs = [[a, b] for a, b in product(candidates, candidates) if a.key < b.key and not overlap(a, b)]
    return [[], *([c] for c in candidates), *pairs]


def test_exchanges_end_at_the_best_plan_or_near_it(found: Found) -> None:
    _spans, table, joint, narrow = found
    single = [c for c in narrow if len(c.cuts) == 1]
    for c in single:
        joint.change(c)
    total = table.total()
    most = min(table.ms(c.key) - table.kept(c) for c in single)
    for share in (0.5, 1.0, 1.5):
        limit = total + share * most
        within = [p for p in plans(single) if total + sum(table.ms(c.key) - table.kept(c) for c in p) <= limit]
        best = min(joint.loss(p) for p in within)
        worst = max(within, key=joint.loss)
        plan, loss = exchanged(worst, joint, table, limit)
        assert loss == pytest.approx(joint.loss(plan)) and loss <= joint.loss(worst)
        assert loss <= best * 1.05 + 1e-12
        assert total + sum(table.ms(c.key) - table.kept(c) for c in plan) <= limit * (1 + 1e-9)
        assert not any(overlap(a, b) for a in plan for b in plan if a is not b)


def test_neighbours_are_one_step_of_width_away(found: Found) -> None:
    _, _, _, narrow = found
    reader = narrow[0].cuts[0].reader
    listed = [c for c in narrow if [cut.reader for cut in c.cuts] == [reader]]
    widths = [c.cuts[0].width for c in listed]
    assert widths == [1, 2, 3]

    def near(plan: list[Candidate]) -> list[int]:
        return sorted(c.cuts[0].width for c in neighbours(plan, listed))

    assert near([listed[0]]) == [1, 2] and near([listed[1]]) == [1, 2, 3] and near([]) == [3]


def test_proposals_hold_the_limit_and_name_their_sum(found: Found) -> None:
    spans, table, joint, narrow = found
    scores = lmfx.score(spans.network.gm, "magnitude", spans=spans, progress=False)
    limit = table.total() + 1.5 * min(table.ms(c.key) - table.kept(c) for c in narrow if len(c.cuts) == 1)
    proposals = propose(spans, table, scores, joint, limit)
    assert proposals
    for p in proposals:
        assert p.sum <= limit * (1 + 1e-9) and p.sum == pytest.approx(table.total(p.plan))
        assert p.loss == pytest.approx(joint.loss(p.plan.candidates))
