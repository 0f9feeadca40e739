"""Which convs a merged span keeps does not hang on scales that a norm undoes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import double, spans_of

X = torch.randn(1, 3, 9, 7, dtype=torch.float64)


def chain(scales: tuple[float, ...], first: bool = False) -> nn.Module:
    """Convs and norms; each conv's weight is multiplied by a scale that the norm after (or before) it undoes."""
    torch.manual_seed(0)
    body: list[nn.Module] = []
    for i in range(len(scales)):
        conv = nn.Conv2d(4, 4, 3, padding=1, groups=2 if i == 1 else 1, bias=False)
        pair: list[nn.Module] = [nn.BatchNorm2d(4, eps=1e-30), conv] if first else [conv, nn.BatchNorm2d(4, eps=1e-30)]
        body += [*pair, nn.ReLU()]
    model = double(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), *body))
    for i, scale in enumerate(scales):
        conv, norm = (body[3 * i + 1], body[3 * i]) if first else (body[3 * i], body[3 * i + 1])
        conv.weight.data *= scale  # type: ignore[operator, union-attr]
        if first:
            norm.weight.data /= scale  # type: ignore[operator, union-attr]
            norm.bias.data /= scale  # type: ignore[operator, union-attr]
        else:
            norm.running_mean *= scale  # type: ignore[operator]
            norm.running_var *= scale**2  # type: ignore[operator]
    return model


@pytest.mark.parametrize("first", [False, True])
def test_the_kept_convs_are_the_same_whatever_scale_a_norm_undoes(first: bool) -> None:
    plain, scaled = chain((1.0, 1.0, 1.0), first), chain((1e-3, 50.0, 0.2), first)
    torch.testing.assert_close(plain(X), scaled(X), rtol=1e-9, atol=1e-9)
    kept = [[(c.key, c.kept) for c in lmfx.spans(lmfx.trace(m, X))] for m in (plain, scaled)]
    assert kept[0] == kept[1] and any(0 < len(k) < 3 for _, k in kept[0])
    scores = [lmfx.score(lmfx.trace(m, X), "magnitude", progress=False) for m in (plain, scaled)]
    assert dict(scores[0]) == pytest.approx(dict(scores[1]))


def test_the_size_of_a_conv_is_that_of_its_weight_with_the_norms_of_its_layer_folded_in() -> None:
    model = chain((1.0, 2.0), first=True)
    model.append(nn.Conv2d(4, 4, 1).double())  # type: ignore[operator]
    network = Network(trace(model, X))
    norm, conv = model[5], model[6]  # type: ignore[index]
    factor = norm.weight.detach().abs() / norm.running_var.sqrt()
    grouped = conv.weight.detach().abs() * factor.view(2, 2).repeat_interleave(2, 0).view(4, 2, 1, 1)
    found = {network.path(name): network.l1(name) for name in ("_6", "_8") if name in network.nodes}
    assert found["6"] == pytest.approx(float(grouped.sum()))
    assert found["8"] == pytest.approx(float(model[8].weight.detach().abs().sum()))  # type: ignore[index]


class Cat(nn.Module):
    """A branch of two convs, of which either may go, beside one of a norm, which has one state."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 5, padding=2))
        self.norm, self.last = nn.BatchNorm2d(2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(torch.cat([self.a(x), self.norm(x)], 1)))


@pytest.mark.parametrize(
    "most, left",
    [(4, {("a.0",), ("a.2",), ("a.0", "a.2"), ()}), (3, {("a.0", "a.2"), ()}), (1, {("a.0", "a.2")})],
    ids=["all", "the most and the least", "the most"],
)
def test_of_too_many_combinations_those_that_keep_all_or_little_are_left(
    most: int, left: set[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmfx.passes.spans.pruning.MOST_COMBINATIONS", most)
    found = spans_of(Cat().eval(), torch.randn(1, 2, 6, 6), realize=("compose",))
    whole = {c.kept[:-1] for c in found if c.realization == "compose" and c.kept[-1:] == ("last",)}
    assert whole == left
