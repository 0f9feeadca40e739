"""Importances say how far the network's output moves, and in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import lmfx
from lmfx.calibration.fitting import fit_groups
from lmfx.calibration.images import Calibration
from lmfx.calibration.plan_fits import set_fitted
from lmfx.calibration.recording import record_batches
from lmfx.calibration.surrogates import affine_surrogates
from lmfx.importance import Magnitude, Reconstruction, get_estimator
from lmfx.importance.change import Scorer
from lmfx.importance.macs import multiply_accumulates
from lmfx.latency import Store
from lmfx.latency.table import kendall_tau
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.trainable import rewrite, span_names
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import fingerprint
from tests.helpers import run
from tests.toys import Block, Net, images, toy

DATA = images(24)


def trained() -> Net:
    """A toy that has learnt to tell smooth images of five kinds apart, for a moment."""
    torch.manual_seed(0)
    model = toy()
    centres = images(5, seed=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(60):
        labels = torch.arange(20) % 5
        x = centres[labels] + 0.5 * images(20, seed=step + 100)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Made:
    model: nn.Module
    graph: fx.GraphModule
    spans: SpanSet
    data: Calibration
    wanted: list[Candidate]


def make(model: nn.Module, data: Tensor = DATA, **options: Any) -> Made:
    graph = lmfx.trace(model, data[:1])
    spans = lmfx.spans(graph, **options)
    latency = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    wanted = [c for c in spans if c.key in latency and c.realization != "keep"]
    return Made(model, graph, spans, Calibration((data,)), wanted)


@pytest.fixture(scope="module")
def made() -> Made:
    return make(trained())


def applied(made: Made, candidate: Candidate, surrogate: str = "affine") -> fx.GraphModule:
    """The whole network with this one candidate, set on the images that an estimator may fit on."""
    fitted, _ = made.data.split(16)
    plan = MergePlan((candidate,), fingerprint(made.graph))
    network = Network(made.graph)
    surrogates = affine_surrogates(network, fitted) if surrogate == "affine" else None
    student = rewrite(made.graph, plan, surrogates)
    if candidate.realization == "fit":
        (group,) = fit_groups(network, [candidate])
        held = record_batches(made.graph, fitted, {candidate.span.entry, candidate.span.output})
        op = group.fit(held[candidate.span.entry], {candidate.span.output: held[candidate.span.output]}, quick=True)
        set_fitted(student.get_submodule(span_names(made.graph, plan)[0]), op[candidate.key])
    return student


def divergence(made: Made, net: nn.Module) -> float:
    judged = made.data.split(16)[1].tensors[0]
    z, new = run(made.model, judged).double(), run(net, judged).double()
    return 0.5 * float((new - z).square().sum(1).mean() / (z - z.mean(0)).square().sum(1).mean())


# --- reconstruction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", ["affine", "identity"])
def test_exact_is_what_the_whole_network_with_the_candidate_gives(made: Made, surrogate: str) -> None:
    chosen = made.wanted[::3]
    assert {c.realization for c in chosen} >= {"compose", "fit"}
    scores = Reconstruction(exact=True, surrogate=surrogate).score(made.spans, chosen, made.data)
    for candidate in chosen:
        expected = divergence(made, applied(made, candidate, surrogate))
        # A composed span pads once at its entry, alone or in the network; so both see the same borders.
        # One candidate is fitted alone here, with others there: the sampled pixels are the same, the window may differ.
        slack = 0.35 if candidate.realization == "fit" else 1e-4
        assert -scores[candidate.key] == pytest.approx(expected, rel=slack, abs=1e-6), candidate.key


def test_exact_fits_are_those_of_a_fit_alone(made: Made) -> None:
    fits = [c for c in made.wanted if c.realization == "fit"][::4]
    assert len(fits) > 2
    for candidate in fits:
        scores = Reconstruction(exact=True).score(made.spans, [candidate], made.data)
        expected = divergence(made, applied(made, candidate))
        # The values that a quick fit is made from are held in half precision.
        assert -scores[candidate.key] == pytest.approx(expected, rel=3e-3, abs=1e-7), candidate.key


def test_the_second_order_estimate_ranks_as_the_exact_one_does(made: Made) -> None:
    exact = Reconstruction(exact=True).score(made.spans, made.wanted, made.data)
    cheap = Reconstruction(exact=False, probes=4).score(made.spans, made.wanted, made.data)
    assert len(exact) == len(cheap) == len(made.wanted) > 30
    keys = [c.key for c in made.wanted]
    tau = kendall_tau([exact[k] for k in keys], [cheap[k] for k in keys])
    assert tau > 0.6, tau


def test_the_second_order_estimate_of_a_small_error_is_close_to_the_exact_one(made: Made) -> None:
    exact = Reconstruction(exact=True).score(made.spans, made.wanted, made.data)
    cheap = Reconstruction(exact=False, probes=64).score(made.spans, made.wanted, made.data)
    small = [k for k in exact if -0.01 < exact[k] < -1e-6]
    assert len(small) >= 5
    assert 0.5 < np.median([cheap[k] / exact[k] for k in small]) < 2


@pytest.mark.parametrize("exact", [True, False])
def test_importances_are_never_positive_and_keeping_costs_nothing(made: Made, exact: bool) -> None:
    scores = Reconstruction(exact=exact).score(made.spans, made.spans.candidates, made.data)
    assert set(scores) == {c.key for c in made.spans}
    for candidate in made.spans:
        value = scores[candidate.key]
        assert math.isfinite(value) and value <= 0
        assert candidate.realization != "keep" or value == 0


class Idle(nn.Module):
    """A block that does nothing: its last conv is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.idle, self.busy = Block(6), Block(6)
        self.idle.conv2.requires_grad_(False).weight.zero_()
        self.idle.conv2.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.busy(self.idle(torch.relu(self.stem(x)))).mean((2, 3))


@pytest.mark.parametrize("exact", [True, False])
def test_dropping_a_block_without_effect_costs_nothing_and_one_with_effect_does(exact: bool) -> None:
    made = make(Idle().eval())
    drops = {c.convs: c for c in made.wanted if c.realization == "drop" and "/" not in c.span.series}
    idle, busy = (drops[f"{name}.conv1", f"{name}.conv2"] for name in ("idle", "busy"))
    scores = Reconstruction(exact=exact).score(made.spans, [idle, busy], made.data)
    assert scores[idle.key] == pytest.approx(0, abs=1e-10)
    assert scores[busy.key] < -1e-4


def test_a_fit_with_more_unknowns_than_pixels_is_not_taken_for_perfect() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()  # fmt: skip
    made = make(model, torch.randn(8, 3, 4, 4), max_kernel_size=3)
    wide = [
        c for c in made.wanted if c.realization == "fit" and c.conv and c.conv.in_channels == 24 and len(c.convs) > 1
    ]
    wide = [c for c in wide if c.conv and c.conv.kernel_size == (3, 3)]
    assert wide and 24 * 9 > 6 * 16  # unknowns, and pixels of the fitted images
    scores = Reconstruction(exact=True).score(made.spans, wide, made.data)
    assert max(scores.values()) < -0.01


def test_more_images_give_a_better_fit() -> None:
    model = trained()
    few, many = (make(model, images(n, seed=11)) for n in (8, 96))
    keys = [c for c in few.wanted if c.realization == "fit" and len(c.convs) > 1]
    scored = [Reconstruction(exact=True).score(m.spans, keys, m.data) for m in (few, many)]
    better = [scored[1][c.key] > scored[0][c.key] for c in keys]
    assert sum(better) > 0.7 * len(better)


def test_integer_inputs_and_frozen_weights_are_scored_as_well() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6)
            self.body = nn.Sequential(
                nn.Conv1d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 6, 3, padding=1), nn.ReLU()
            )

        def forward(self, t: Tensor) -> Tensor:
            return self.body(self.embed(t).transpose(1, 2)).mean(2)

    model = Tokens().requires_grad_(False).eval()
    made = make(model, torch.randint(0, 9, (12, 20)))
    assert made.wanted
    scores = Reconstruction(exact=False).score(made.spans, made.wanted, made.data)
    assert min(scores.values()) < -1e-6


def test_what_is_stored_is_not_scored_again(made: Made, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = made.wanted[:6]
    with Store.open(tmp_path) as store:
        mine = Reconstruction(exact=False)
        first = mine.score(made.spans, chosen, made.data, store)
        monkeypatch.setattr("lmfx.importance.reconstruction.Scorer.run", lambda *_: pytest.fail("scored again"))
        second = mine.score(made.spans, chosen, made.data, store)
        assert dict(first) == dict(second)
        for change in ({"exact": True}, {"images": 3}, {"probes": 3}, {"surrogate": "identity"}):
            with pytest.raises(pytest.fail.Exception, match="scored again"):
                replace(mine, **change).score(made.spans, chosen, made.data, store)


@pytest.mark.parametrize(
    "option",
    [
        {"images": 0},
        {"images": 2.0},
        {"probes": True},
        {"surrogate": "none"},
        {"norms": "all"},
        {"norms": "batch", "exact": False},
    ],
)
def test_options_that_cannot_be_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(lmfx.OptionError, match=next(iter(option))):
        get_estimator("reconstruction", **option)


def chain() -> nn.Sequential:
    """Convolutions without a bias, each with a norm whose statistics are nothing special."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (3, 6, 6):
        norm = nn.BatchNorm2d(6)
        torch.nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        layers += [nn.Conv2d(width, 6, 3, padding=1, bias=False), norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


def test_new_statistics_repair_a_wrong_scale_in_front_of_a_norm() -> None:
    made = make(chain())
    before = {k: v.clone() for k, v in made.graph.state_dict().items()}
    first = next(c for c in made.wanted if c.convs == ("0",))
    changes = {}
    for norms in ("kept", "batch"):
        scorer = Scorer(Reconstruction(exact=True, norms=norms), made.spans, made.data, None)  # type: ignore[arg-type]
        scorer.prepare([first])
        (part,), _ = scorer.judged_parts
        y = part.values[first.span.output]
        assert scorer.squared_change(first, y, part) == 0
        turned = y[:, [1, 0, 2, 3, 4, 5]]
        changes[norms] = [scorer.squared_change(first, new, part) for new in (3 * y, turned)]
    assert changes["batch"][0] < 1e-3 * changes["kept"][0]
    assert changes["batch"][1] > 100 * changes["batch"][0]  # what statistics do not repair
    for key, value in made.graph.state_dict().items():
        assert torch.equal(value, before[key])


def test_new_statistics_need_two_images_and_run_the_network() -> None:
    made = make(chain(), DATA[:1])
    new = Reconstruction(norms="batch")
    with pytest.raises(lmfx.InputError, match="norms='batch' needs statistics of two images"):
        new.score(made.spans, made.wanted[:1], made.data)
    assert new.resolved(made.spans.network, 10**12, made.data).exact
    assert replace(new, exact=True) != Reconstruction(exact=True)
    assert not Reconstruction().resolved(made.spans.network, 10**12, made.data).exact


def test_as_many_images_are_scored_on_as_can_be_afforded(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    network, data = made.spans.network, Calibration((images(128),))  # 16 of them choose
    cost = multiply_accumulates(network) * 100 / 2
    for affordable, exact, wanted in ((100, True, 16), (11.5, True, 11), (8.5, True, 8), (7.5, False, 64)):
        monkeypatch.setattr("lmfx.importance.reconstruction.EXACT_MACS", affordable * cost)
        found = Reconstruction().resolved(network, 100, data)
        assert (found.exact, found.images) == (exact, wanted)
        new = Reconstruction(norms="batch").resolved(network, 100, data)
        assert new.exact and new.images == max(wanted if exact else 0, 8)


@pytest.mark.parametrize("exact", [True, False])
def test_scores_are_made_on_so_many_images_of_those_that_choose(made: Made, exact: bool) -> None:
    some = [c for c in made.wanted if c.realization == "drop"][:3]

    def scored(data: Tensor) -> list[float]:
        table = Reconstruction(exact=exact, images=2).score(made.spans, some, Calibration((data,)))
        return [table[c.key] for c in some]

    plain = scored(DATA)
    later, first = DATA.clone(), DATA.clone()
    later[19], first[3] = 9.0, 9.0  # those that choose are 3, 11 and 19
    assert scored(later) == pytest.approx(plain, rel=1e-6)
    assert scored(first) != pytest.approx(plain, rel=1e-2)


def test_a_missing_row_is_an_error_and_never_a_guess(made: Made) -> None:
    scores = Reconstruction().score(made.spans, made.wanted[:2], made.data)
    with pytest.raises(lmfx.TableError, match="no row 'nothing'"):
        scores["nothing"]


# --- magnitude --------------------------------------------------------------------------------------------------------


def test_magnitude_prefers_pruning_small_convs() -> None:
    model = toy()
    with torch.no_grad():
        model.blocks[0].conv1.weight.mul_(1e-3)
        model.blocks[0].conv2.weight.mul_(1e-3)
    made = make(model)
    drops = [c for c in made.spans if c.realization == "drop"]
    scores = Magnitude().score(made.spans, drops)
    alone = {c.convs: scores[c.key] for c in drops if len(c.all_convs) == 2}
    small = max(v for convs, v in alone.items() if convs[0].startswith("blocks.0"))
    large = max(v for convs, v in alone.items() if convs[0].startswith("blocks.1"))
    assert large < small < 0


def test_magnitude_takes_more_for_pruning_more(made: Made) -> None:
    scores = Magnitude().score(made.spans, made.spans.candidates)
    assert all(scores[c.key] == 0 for c in made.spans if c.realization == "keep")
    by_span: dict[Any, list[Candidate]] = {}
    for c in made.spans:
        if c.realization == "compose":
            by_span.setdefault(c.span, []).append(c)
    compared = 0
    for group in by_span.values():
        for a in group:
            for b in group:
                if set(a.kept) < set(b.kept):
                    assert scores[a.key] < scores[b.key]
                    compared += 1
    assert compared


def test_magnitude_charges_for_every_activation_that_goes() -> None:
    made = make(nn.Sequential(*[m for _ in range(4) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())]).eval())
    fits = [c for c in made.spans if c.realization == "fit" and c.span.start == 0 and c.key.endswith(":3x3s1x1g1")]
    values = [Magnitude(activation=0.2).score(made.spans, [c])[c.key] for c in sorted(fits, key=lambda c: c.span.stop)]
    assert len(values) > 2 and values == sorted(values, reverse=True)
    assert np.diff(values) == pytest.approx(-0.2)


def test_a_candidate_whose_arithmetic_overflows_gets_no_row(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, (first, second) = Scorer.value, made.wanted[:2]

    def value(self: Any, c: Candidate, *others: Any) -> float:
        return math.inf if c.key == first.key else honest(self, c, *others)

    monkeypatch.setattr(Scorer, "value", value)
    assert set(Reconstruction().score(made.spans, [first, second], made.data)) == {second.key}


class Unactivated(nn.Module):
    """A residual block whose branch ends without an activation, and one after it: the sum is where one is added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = 2 * (x + self.b(torch.relu(self.a(x))))
        return self.head(torch.relu(self.d(self.c(x))).mean((2, 3)))


@pytest.mark.parametrize("after", ["relu6", None])
def test_an_activation_that_is_added_after_the_merged_conv_is_a_part_of_what_is_judged(after: str | None) -> None:
    torch.manual_seed(0)
    model = Unactivated().double().eval()
    made = make(model, DATA.double(), realize=("compose",), activation_after=after)
    chosen = [c for c in made.wanted if c.realization == "compose" and len(c.all_convs) == 2 and not c.exact]
    assert {("a", "b")} <= {c.kept for c in chosen}
    scores = Reconstruction(exact=True, surrogate="identity").score(made.spans, chosen, made.data)
    cheap = Reconstruction(exact=False, surrogate="identity", probes=400).score(made.spans, chosen, made.data)
    plain = Reconstruction(exact=True, surrogate="identity")
    other = make(model, DATA.double(), realize=("compose",))
    for candidate in chosen:
        plan = MergePlan((candidate,), fingerprint(made.graph), activation_after=after)
        expected = divergence(made, rewrite(made.graph, plan))
        assert -scores[candidate.key] == pytest.approx(expected, rel=1e-6)
        assert 0.3 < cheap[candidate.key] / scores[candidate.key] < 3
        if after and candidate.kept == ("a", "b"):
            (same,) = [c for c in other.wanted if c.key == candidate.key]
            assert -plain.score(other.spans, [same], made.data)[same.key] != pytest.approx(expected, rel=0.05)
