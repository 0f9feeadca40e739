"""Steps from plan to plan: each network is run as it is, begun where it first differs, and never invalid."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.calibration.images import as_calibration
from lmfx.importance import Reconstruction
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.model.trace_facts import noted
from lmfx.planning import context_search
from lmfx.planning.context_search import ContextSearch
from lmfx.planning.judged import Judged
from tests.helpers import double
from tests.toys import Net


class Bottleneck(nn.Module):
    """Channels to be cut, an inplace activation, and a gate of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 32, 1),
            nn.ReLU6(inplace=True),
            nn.Conv2d(32, 32, 3, padding=1, groups=32),
            nn.ReLU(inplace=True),
        )
        self.out = nn.Conv2d(32, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x)) + x


class Branches(nn.Module):
    """Two branches whose sum goes on, one with a conv that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        make = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))  # noqa: E731
        self.a, self.shared = make(), make()
        self.tail = nn.Sequential(nn.ReLU(), Bottleneck(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a(x) + self.shared(torch.relu(self.shared(x)))
        return self.head(self.tail(y).mean((2, 3)))


def judged(model: nn.Module, seed: int) -> Judged:
    """What judges plans of a network in float64, on odd sizes and random statistics."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(48, 3, 11, 9, dtype=torch.float64, generator=generator)
    graph = lmfx.trace(double(model), images[:1])
    spans = lmfx.spans(graph, realize=("compose", "fit", "narrow"))
    table = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    data = as_calibration(images, images[:1])
    session = Reconstruction().session(spans, lmfx.stages.worth_scoring(spans, table), data)
    scores = session.score(spans, session.candidates, data)
    return Judged(spans, table, scores, session, data, "auto", "affine")


@pytest.fixture(scope="module", params=[Net, Branches])
def case(request: pytest.FixtureRequest) -> Judged:
    torch.manual_seed(3)
    return judged(request.param(), 5)


def fresh(case: Judged, left: int = 60) -> ContextSearch:
    """A search that knows the changes of all candidates, and of no network yet."""
    case.__dict__.pop("search", None)
    search = case.search
    search.left = left
    for c in search.usable:
        case.joint.change(c)
    return search


def test_a_network_that_begins_where_it_differs_gives_what_the_whole_one_gives(case: Judged) -> None:
    search, draw = fresh(case, 10**6), random.Random(1)
    state = search.run(())
    for _ in range(5):
        search.hold(state)
        steps = draw.sample(search.exchanges(state), 4)
        for step in steps:
            whole = case.judge.outputs(case.sketch(case.plan(step.candidates)))
            for ours, theirs in zip(search.outputs(step.candidates), whole, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        state = search.run(steps[0].candidates)


def test_without_room_for_values_the_whole_network_is_run(case: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_search, "HELD_BYTES", 0)
    search = fresh(case)
    state = search.run(())
    search.hold(state)
    assert search._held is not None and all(len(values) == 1 for values in search._held[1]), "the input alone"
    step = search.exchanges(state)[-1]
    whole = case.judge.outputs(case.sketch(case.plan(step.candidates)))
    torch.testing.assert_close(search.outputs(step.candidates), whole, rtol=1e-10, atol=1e-10)


def test_plans_of_all_exchanges_can_be_made_and_take_what_their_rows_say(case: Judged) -> None:
    search, draw = fresh(case, 10**6), random.Random(2)
    state = search.run(())
    for _ in range(4):
        steps = search.exchanges(state)
        assert steps
        for step in steps:
            assert step.sum == pytest.approx(case.table.total(MergePlan(step.candidates, "")), rel=1e-9)
            chosen = step.candidates
            assert not any(search.overlap(c, d) for i, c in enumerate(chosen) for d in chosen[:i])
        step = draw.choice(steps)
        lmfx.rewrite(case.analysis.graph, case.plan(step.candidates), calibration=case.roles.fit, progress=False)
        state = search.run(step.candidates)


@pytest.mark.parametrize("part", [0.85, 0.6])
def test_steps_lead_to_the_latency_and_no_further_than_one_step_below(case: Judged, part: float) -> None:
    search = fresh(case)
    limit = part * search.original
    state = search.down((), limit)
    assert state.sum <= limit * (1 + 1e-9)
    assert state.loss == pytest.approx(case.judge(case.sketch(case.plan(state.candidates))).loss(), rel=1e-9)
    better = search.improved(state, limit)
    assert better.sum <= limit * (1 + 1e-9) and better.loss <= state.loss


def test_the_step_that_is_taken_is_the_best_of_those_that_are_run(
    case: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_search, "AT_ONCE", 10**6)
    search = fresh(case, 10**6)
    state = search.run(())
    least = 0.002 * search.original
    steps = [e for e in search.exchanges(state) if state.sum - e.sum >= least]
    over = 0.1 * search.original
    prices = {
        search.key(e.candidates): case.judge(case.sketch(case.plan(e.candidates))).loss() / min(state.sum - e.sum, over)
        for e in steps
    }
    found = search.step(state, over)
    assert found is not None and len(prices) > 5
    assert prices[search.key(found.candidates)] == pytest.approx(min(prices.values()), rel=1e-9)


def test_a_step_is_dear_by_what_it_loses_for_what_it_saves(case: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    search = fresh(case)
    state = search.run(())
    least, most = (f(search.exchanges(state), key=lambda e: state.sum - e.sum) for f in (min, max))
    part = {least.candidates: 0.01, most.candidates: 0.5}  # of the original's latency that is saved
    lost = {least.candidates: 0.1, most.candidates: 1.0}
    steps = [replace(e, sum=(1 - part[e.candidates]) * state.sum, loss=lost[e.candidates]) for e in (least, most)]
    monkeypatch.setattr(search, "exchanges", lambda state: steps)
    monkeypatch.setattr(search, "run", lambda candidates: replace(state, candidates=candidates, loss=lost[candidates]))
    for over, wanted in ((state.sum, most), (0.01 * state.sum, least)):  # no more is needed than is asked for
        found = search.step(state, over)
        assert found is not None and found.candidates == wanted.candidates


def test_plans_name_their_candidates_in_the_order_of_the_solver(case: Judged) -> None:
    search = fresh(case)
    plans = [p.plan.candidates for p in case.proposals(0.6 * search.original) if len(p.plan.candidates) > 1]
    assert plans
    for candidates in plans:
        assert search.ordered(reversed(candidates)) == candidates


def test_what_comes_back_over_the_limit_is_no_improvement(case: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    search = fresh(case)
    limit = 0.6 * search.original
    state = search.down((), limit)
    monkeypatch.setattr(search, "down", lambda start, limit: search.run(()))  # the original, which loses nothing
    assert search.improved(state, limit) is state


def test_the_next_widths_of_a_plan_are_looked_at_though_nothing_is_known_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(3)
    search = fresh(judged(Branches(), 5))
    monkeypatch.setattr(search.joint, "changes", {})
    by_cut: dict[tuple[str, ...], list[Candidate]] = {}
    for c in search.usable:
        if c.cuts:
            by_cut.setdefault((str(c.span), *(cut.reader for cut in c.cuts)), []).append(c)
    widths = sorted(max(by_cut.values(), key=len), key=lambda c: sum(cut.width for cut in c.cuts))
    assert len(widths) >= 3
    state = search.run((widths[1],))
    known = {c.key for c in search.known(state) if not c.exact}
    assert known == {widths[0].key, widths[2].key}


def test_estimates_of_steps_come_from_the_plan_that_is_there(case: Judged) -> None:
    """From the original it is the loss of the candidate alone; from a plan, the outputs of that plan count."""
    search = fresh(case)
    state = search.run(())
    for e in search.exchanges(state):
        (c,) = e.candidates
        assert e.loss == pytest.approx(0.0 if c.exact else case.joint.alone(c.key), abs=1e-9)
    far = search.down((), 0.6 * search.original)
    back = next(e for e in search.exchanges(far) if len(e.candidates) == len(far.candidates) - 1)
    (out,) = set(far.candidates) - set(back.candidates)
    change = far.change - case.joint.change(out)
    assert back.loss == pytest.approx(case.joint.space.loss(change), rel=1e-9)


def test_with_no_runs_left_one_network_a_step_is_run(case: Judged) -> None:
    search = fresh(case, 0)
    steps = 0
    ran = search.student

    def counted(candidates: object) -> object:
        nonlocal steps
        steps += 1
        return ran(candidates)  # type: ignore[arg-type]

    search.student = counted  # type: ignore[assignment]
    state = search.down((), 0.6 * search.original)
    assert state.sum <= 0.6 * search.original * (1 + 1e-9)
    held = len(search.states)  # each plan on the way once, and once more for the values that the next step begins at
    assert steps <= 2 * held
    assert search.improved(state, 0.6 * search.original) is state
    assert len(search.states) == held, "and none to improve it"


def test_a_network_of_one_batch_size_is_searched_too() -> None:
    """The joint loss looks at fewer images than steps do, and not at a whole number of batches of them."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.reshape(3, 3, 11, 9)).view(3, 5)

    torch.manual_seed(4)
    images = torch.randn(30, 3, 11, 9, dtype=torch.float64)  # of which four choose: no whole number of batches
    graph = lmfx.trace(double(Fixed()), images[:3])
    spans = lmfx.spans(graph)
    table = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    data = as_calibration(images, images[:3])
    session = Reconstruction().session(spans, lmfx.stages.worth_scoring(spans, table), data)
    case = Judged(spans, table, session.score(spans, session.candidates, data), session, data, "auto", "affine")
    search = fresh(case)
    state = search.down((), 0.7 * search.original)
    assert state.sum <= 0.7 * search.original * (1 + 1e-9)
    assert state.change.shape == case.joint.space.reference.shape
    assert not noted(graph).any_batch, "else this says nothing"
