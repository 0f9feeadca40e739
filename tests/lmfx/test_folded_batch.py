"""Networks that run the frames of each sequence as images of one batch, so that parts have more rows than the batch."""

from statistics import median

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.calibration.images import as_calibration
from lmfx.importance import Reconstruction
from lmfx.passes.identity.fingerprint import fingerprint
from lmfx.passes.ir import MergePlan


class Frames(nn.Module):
    """A convolutional network on every frame, then what the frames say together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.head = nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, frames, channels, h, w = x.size()
        y = self.c(self.b(self.a(x.view(n * frames, channels, h, w)).relu()).relu())
        return self.head(y.mean((2, 3)).view(n, frames, -1).mean(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Frames().eval()


@pytest.mark.parametrize("exact", [True, False])
def test_scores_are_relative_to_the_sequences(model: nn.Module, exact: bool) -> None:
    """A score is half the squared change over that of the sequences from their mean, not of frames."""
    x = torch.randn(128, 5, 3, 12, 12)
    graph = lmfx.trace(model, x[:1])
    spans = lmfx.spans(graph, realize=("compose",))
    estimator = Reconstruction(exact=exact, surrogate="identity", probes=16)
    scores = lmfx.score(graph, estimator, calibration=x, spans=spans)
    judged = as_calibration(x, x[:1]).split(estimator.images)[1].tensors[0]
    wanted = model(judged).double().detach()
    distance = (wanted - wanted.mean(0)).square().sum()
    ratios = []
    for c in (c for c in spans if c.key in scores.rows and not c.exact and c.realization == "compose"):
        net = lmfx.merge(lmfx.rewrite(graph, MergePlan((c,), fingerprint(graph)), calibration=x, spans=spans))
        change = float((net(judged).detach() - wanted).square().sum() / distance)
        ratios.append(0.5 * change / -scores.rows[c.key])
    assert len(ratios) > 2
    if exact:
        assert ratios == pytest.approx([1.0] * len(ratios), rel=1e-3)
    else:  # what comes after most of the spans is linear, so only the probes are a sample
        assert 0.7 < median(ratios) < 1.4


def test_a_network_of_frames_is_compressed(model: nn.Module) -> None:
    x = torch.randn(32, 5, 3, 12, 12)
    net = lmfx.compress(model, x[:1], 0.7, calibration=x, latency="roofline")
    result = lmfx.result_of(net)
    assert result.ratio is not None and result.ratio <= 0.7
    assert result.quality is not None and result.quality.images == 4
    assert net(torch.randn(3, 7, 3, 14, 10)).shape == (3, 4)
