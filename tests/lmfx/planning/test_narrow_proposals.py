"""Proposals of narrowed spans."""

import pytest
import torch
from torch import nn

import lmfx
from lmfx.calibration.images import as_calibration
from lmfx.importance import Reconstruction
from lmfx.importance.change import Scorer
from lmfx.importance.joint import JointLoss
from lmfx.latency import LatencyTable
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanSet
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


def test_proposals_hold_the_limit_and_name_their_sum(found: Found) -> None:
    spans, table, joint, narrow = found
    scores = lmfx.score(spans.network.gm, "magnitude", spans=spans, progress=False)
    limit = table.total() + 1.5 * min(table.ms(c.key) - table.kept(c) for c in narrow if len(c.cuts) == 1)
    proposals = propose(spans, table, scores, joint, limit)
    assert proposals
    for p in proposals:
        assert p.sum <= limit * (1 + 1e-9) and p.sum == pytest.approx(table.total(p.plan))
        assert p.loss == pytest.approx(joint.loss(p.plan.candidates))
