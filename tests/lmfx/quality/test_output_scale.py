"""How sure a network is is set by its last layer, where nothing else reads it, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lmfx
from lmfx.calibration.images import Calibration
from lmfx.calibration.refitting import refit
from lmfx.quality import Judge
from lmfx.quality.output_scale import best_temperature, set_scale

IMAGES = torch.randn(64, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Scores by a Linear, after a pool or before one, perhaps through a softmax, perhaps read twice."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.end = end
        self.conv = nn.Conv2d(3, 6, 3)
        self.head = nn.Conv2d(6, 5, 1) if end == "conv" else nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.conv(x))
        if self.end == "conv":
            return self.head(x).mean((2, 3))
        y = self.head(x.mean((2, 3)))
        if self.end == "softmax":
            return y.softmax(-1)
        if self.end == "norm":
            return y / y.norm(dim=-1, keepdim=True)
        return (y, y + 1) if self.end == "twice" else y


def too_sure(end: str, factor: float) -> tuple[fx.GraphModule, fx.GraphModule, Judge]:
    """(a network whose scores are `factor` times as large as the original's, the original, its judge)."""
    torch.manual_seed(0)
    model = Net(end).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    graph = lmfx.trace(model, IMAGES[:1])
    other = Net(end).double().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.head.weight.mul_(factor)
        other.head.bias.mul_(factor)
    return lmfx.trace(other, IMAGES[:1]), graph, Judge(graph, Calibration((IMAGES,)))


@pytest.mark.parametrize("end", ["linear", "conv", "softmax"])
@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_the_scale_of_the_original_is_found_again(end: str, factor: float) -> None:
    net, graph, judge = too_sure(end, factor)
    before = judge(net)
    (found,) = set_scale(net, judge)
    assert found == pytest.approx(factor, rel=1e-4)
    assert (before.kl or 0) > 1e-2 > 1e-6 > (judge(net).kl or 0)
    assert judge(net).agreement == before.agreement == 1
    torch.testing.assert_close(net(IMAGES), graph(IMAGES), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("end", ["twice", "norm"])
def test_what_else_is_read_or_normalised_stays(end: str) -> None:
    net, _, judge = too_sure(end, 3.0)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert all(t == 1 for t in set_scale(net, judge))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_what_may_not_be_changed_and_what_is_right_already_stays() -> None:
    net, _, judge = too_sure("linear", 3.0)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert set_scale(net, judge, lambda name: name != "head") == []
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    net, _, judge = too_sure("linear", 1.0)
    assert set_scale(net, judge) == [1.0]


def test_a_few_rows_say_nothing_of_the_scale() -> None:
    net, graph, _ = too_sure("linear", 3.0)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert set_scale(net, Judge(graph, Calibration((IMAGES[:15],)))) == []
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert len(set_scale(net, Judge(graph, Calibration((IMAGES[:16],))))) == 1


def test_the_best_temperature_has_the_least_kl_of_all() -> None:
    generator = torch.Generator().manual_seed(3)
    y = 3 * torch.randn(50, 7, dtype=torch.float64, generator=generator)
    z = 2.5 * (y + torch.randn(50, 7, dtype=torch.float64, generator=generator))
    best, gain = best_temperature(y, z)

    def kl(t: float) -> float:
        p = y.log_softmax(-1)
        return float((p.exp() * (p - (z / t).log_softmax(-1))).sum(-1).mean())

    assert gain == pytest.approx(1 - kl(best) / kl(1.0), rel=1e-9)
    assert all(kl(best) <= kl(t) + 1e-12 for t in torch.linspace(0.3, 4, 200).tolist())


def test_scores_that_are_no_numbers_are_left() -> None:
    y = torch.randn(4, 3, dtype=torch.float64)
    assert best_temperature(y, torch.full_like(y, torch.nan))[1] == 0.0


@pytest.mark.parametrize("exclude", [(), ("2",)])
def test_what_compress_returns_is_as_sure_as_it_should_be(
    exclude: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refit that makes the network too sure is mended, unless the last layer was to stay as it is."""
    torch.manual_seed(2)
    layers = [m for width in (3, 8, 8) for m in (nn.Conv2d(width, 8, 3, padding=1), nn.ReLU())]
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(160, 3, 10, 10)
    head = nn.Linear(8, 6)
    with torch.no_grad():
        features = body(images)
        head.weight.div_(features.std(0) / 4)
        head.bias.copy_(-head.weight @ features.mean(0))
    model = nn.Sequential(body, nn.Identity(), head).eval()

    def made_too_sure(*args: Any, **options: Any) -> fx.GraphModule:
        student = refit(*args, **options)
        for p in student.get_submodule("2").parameters():
            p.data.mul_(1.5)
        return student

    monkeypatch.setattr("lmfx.planning.compression.refit_layers", made_too_sure)
    net = lmfx.compress(
        model, images[:1], 0.6, calibration=images, latency="roofline", progress=False, merge=False, exclude=exclude
    )
    judge = Judge(lmfx.trace(model, images[:1]), Calibration((images[3::8],)))
    assert judge.kinds[0].kind == "scores"
    temperature, gain = best_temperature(judge.reference[0].double(), judge.outputs(net)[0].double())
    if exclude:
        assert temperature > 1.4 and gain > 0.05
    else:
        assert temperature == pytest.approx(1, rel=1e-3)
