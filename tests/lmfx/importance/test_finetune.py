"""The paper's importance: what a row is, how rows add up, and that no executor, order or crash changes a table."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import random
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import lmfx
from lmfx.calibration.images import Calibration
from lmfx.importance import Finetune
from lmfx.importance.jobs import Job, PackedNetwork, isolated, run_job
from lmfx.importance.objective import Objective, importances
from lmfx.latency import Store
from lmfx.passes.ir import Candidate, MergePlan, Span
from lmfx.passes.solve.dynamic_program import solve_series
from lmfx.passes.spans.enumeration import SpanSet
from tests import finetune_toys as toys
from tests.helpers import assert_unchanged, run, snapshot
from tests.helpers import one_thread as one_thread
from tests.toys import images, toy

DATA = images(24)
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Made:
    graph: fx.GraphModule
    spans: SpanSet
    data: Calibration
    wanted: list[Candidate]

    def score(self, **options: Any) -> lmfx.ImportanceTable:
        where = {n: options.pop(n) for n in ("executor", "store") if n in options}
        candidates = options.pop("candidates", self.wanted)
        functions = {"train": toys.train, "evaluate": toys.accuracy}
        return Finetune(**{**functions, **options}).score(self.spans, candidates, self.data, **where)


@pytest.fixture(scope="module")
def made() -> Made:
    graph = lmfx.trace(toy(), DATA[:1])
    spans = lmfx.spans(graph)
    every = [c for c in spans if c.realization in ("compose", "fit", "drop")]
    kinds = {kind: [c for c in every if c.realization == kind and len(c.convs) > 1] for kind in ("compose", "fit")}
    drops = [c for c in every if c.realization == "drop"]
    return Made(graph, spans, Calibration((DATA,)), [*kinds["compose"][:2], *kinds["fit"][:2], *drops[:1]])


def by_hand(made: Made, candidate: Candidate) -> tuple[float, float]:
    """(performance of the original, and of the network with the candidate after training), without Finetune."""
    net: nn.Module = lmfx.rewrite(made.graph, MergePlan((candidate,), surrogate="affine"), calibration=DATA)
    with isolated(0, 1):
        toys.train(net.requires_grad_(True).train())
        return toys.accuracy(made.graph), toys.accuracy(net.eval())


# --- what a row is ----------------------------------------------------------------------------------------------------


def test_a_row_is_the_change_of_the_performance_after_training_with_that_candidate_alone(made: Made) -> None:
    table = made.score()
    assert {c.realization for c in made.wanted} == {"compose", "fit", "drop"}
    for candidate in made.wanted:
        before, after = by_hand(made, candidate)
        assert table[candidate.key] == pytest.approx(after - before, abs=1e-12)
    assert len({table[c.key] for c in made.wanted}) == len(made.wanted)


def test_the_training_matters_and_the_original_is_not_trained(made: Made) -> None:
    trained, untrained = made.score(), made.score(train=toys.nothing)
    assert trained.identity["original"] == untrained.identity["original"] == pytest.approx(toys.accuracy(made.graph))
    assert all(trained[c.key] != untrained[c.key] for c in made.wanted)


def test_losses_are_compared_by_their_relative_difference_and_less_is_better(made: Made) -> None:
    one = made.wanted[:1]
    table = made.score(candidates=one, evaluate=toys.loss, metric="loss")
    net = lmfx.rewrite(made.graph, MergePlan(tuple(one), surrogate="affine"), calibration=DATA)
    with isolated(0, 1):
        toys.train(net.requires_grad_(True).train())
    before, after = float(toys.loss(made.graph)), float(toys.loss(net.eval()))
    assert table[one[0].key] == pytest.approx(-(after - before) / before, rel=1e-6)


def test_a_training_may_return_another_module(made: Made) -> None:
    one = made.wanted[:1]
    table = made.score(candidates=one, train=lambda model: made.graph)
    assert table[one[0].key] == 0.0


def test_the_graph_and_the_random_numbers_stay_as_they_were(made: Made) -> None:
    before, states = snapshot(made.graph), (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
    threads = torch.get_num_threads()
    made.score(candidates=made.wanted[:2], keep="retrained", threads=2)
    assert_unchanged(before, made.graph)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[arg-type]
    assert states[2] == random.getstate() and torch.get_num_threads() == threads


def test_keeping_costs_nothing_and_is_not_trained(made: Made) -> None:
    keeps = [c for c in made.spans if c.realization == "keep"]

    def never(model: nn.Module) -> None:
        pytest.fail("trained")

    table = made.score(candidates=keeps, train=never)
    assert set(table.values()) == {0.0} and len(table) == len(keeps)


def test_the_baseline_may_be_the_original_after_the_same_training(made: Made) -> None:
    plain, trained = made.score(), made.score(baseline="trained")
    with isolated(0, 1):
        net = PackedNetwork.of(made.graph).unpack().requires_grad_(True).train()
        toys.train(net)
    shift = toys.accuracy(net.eval()) - toys.accuracy(made.graph)
    assert abs(shift) > 1e-6
    assert [plain[c.key] - trained[c.key] for c in made.wanted] == pytest.approx([shift] * len(made.wanted), abs=1e-12)
    assert plain.identity["original"] == trained.identity["original"]


def test_a_retrained_layer_is_initialised_anew_trained_and_subtracted(made: Made, tmp_path: Path) -> None:
    candidate = next(c for c in made.wanted if len(c.convs) == 2)
    with Store.open(tmp_path) as store:
        table = made.score(candidates=[candidate], keep="retrained", key="a", store=store)
        rows = store.get_many("importance", {k: table.identity[k] for k in _STORED})
    assert len(rows) == 4  # the original, the candidate, and its two layers
    found = {k: v["performance"] for k, v in rows.items()}
    original = found.pop("original")
    layers = [v for k, v in found.items() if k.endswith(":keep")]
    expected = (found[candidate.key] - original) - sum(v - original for v in layers)
    assert table[candidate.key] == pytest.approx(expected, abs=1e-12)
    assert all(v != original for v in layers) and layers[0] != layers[1]


_STORED = (
    "estimator", "version", "key", "seed", "threads", "surrogate", "activation_after", "prunes", "weights",
    "calibration",
)  # fmt: skip


def test_an_activation_behind_merged_convs_is_there_when_they_are_scored(made: Made, tmp_path: Path) -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(i, 5, 3, padding=1) for i in (3, 5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(torch.relu(self.a(x)))).mean((2, 3))

    graph = lmfx.trace(Linear().eval(), DATA[:1])
    after, before = (
        Made(graph, lmfx.spans(graph, realize=("compose",), activation_after=a), made.data, []) for a in ("relu6", None)
    )
    candidate = next(c for c in after.spans if c.realization == "compose" and c.convs == ("a", "b"))
    with Store.open(tmp_path) as store:
        options: dict[str, Any] = {"candidates": [candidate], "train": toys.nothing, "key": "a", "store": store}
        values = [m.score(**options)[candidate.key] for m in (after, before)]
    plans = [MergePlan((candidate,), surrogate="affine", activation_after=a) for a in ("relu6", None)]
    nets = [lmfx.rewrite(graph, plan, calibration=DATA) for plan in plans]
    expected = [toys.accuracy(net.eval()) - toys.accuracy(graph) for net in nets]
    assert values == pytest.approx(expected, abs=1e-7) and abs(values[0] - values[1]) > 1e-5


# --- how rows add up --------------------------------------------------------------------------------------------------


def chain(layers: int, seed: int) -> tuple[list[Candidate], dict[str, float], dict[str, float], dict[str, float]]:
    """Made-up candidates of a chain, with performances, latencies and the performances of the kept layers."""
    draw = random.Random(seed)
    names = tuple(f"conv{i}" for i in range(layers))
    candidates, performances, latency = [], {}, {}
    for start, stop in itertools.combinations(range(layers + 1), 2):
        for kind in ("keep",) * (stop == start + 1) + ("compose",) * draw.randint(0, 2):
            span = Span(f"{len(candidates)}", start, stop, "a", "b", "b", None)  # the number makes the key unique
            c = Candidate(span, kind, None, names[start:stop])  # type: ignore[arg-type]
            candidates.append(c)
            performances[c.key] = draw.uniform(0.2, 0.9)
            latency[c.key] = draw.uniform(1, 2) if kind == "keep" else draw.uniform(0.5, 2)
    return candidates, performances, latency, {n: draw.uniform(0.2, 0.9) for n in names}


def plans(candidates: list[Candidate], layers: int) -> Iterator[list[Candidate]]:
    """Every way through the chain."""
    ways: list[list[Candidate]] = [[]]
    for position in range(layers):
        ways = [w for w in ways if (w[-1].span.stop if w else 0) != position] + [
            [*w, c] for w in ways if (w[-1].span.stop if w else 0) == position for c in candidates
            if c.span.start == position
        ]  # fmt: skip
    return (w for w in ways if w[-1].span.stop == layers)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("retrained", [False, True])
@pytest.mark.parametrize("name", ["paper", "change"])
def test_the_solver_maximises_the_objective_over_all_plans(name: Any, retrained: bool, metric: Any) -> None:
    differing = 0
    for seed in range(6):
        candidates, performances, latency, kept = chain(5, seed)
        original = 0.8
        rows = importances(Objective(metric, name), candidates, performances, original, kept if retrained else None)
        frontier = solve_series(
            [(c.span.start, c.span.stop, latency[c.key], rows[c.key]) for c in candidates], max_points=None
        )

        def worth(c: Candidate, kept: Any = kept, performances: Any = performances) -> float:
            """I of one span of a plan, straight from the paper's definition."""
            p = performances[c.key] if c.realization != "keep" else kept[c.convs[0]] if retrained else 0.8
            return math.exp((p - 0.8) if metric == "accuracy" else (0.8 - p) / 0.8)

        every = list(plans(candidates, 5))
        times = [sum(latency[c.key] for c in w) for w in every]
        terms = [[worth(c) for c in w] for w in every]
        sums = [sum(t) if name == "paper" else sum(map(math.log, t)) for t in terms]
        others = [sum(map(math.log, t)) if name == "paper" else sum(t) for t in terms]
        for budget in sorted(times)[5 :: len(times) // 7]:
            within = [i for i, t in enumerate(times) if t <= budget + 1e-12]
            best = max(within, key=lambda i: sums[i])
            chosen = [candidates[i] for i in frontier.choice(frontier.at(budget + 1e-9))]
            total = [worth(c) for c in chosen]
            assert (sum(total) if name == "paper" else sum(map(math.log, total))) == pytest.approx(sums[best])
            differing += max(within, key=lambda i: others[i]) != best
    assert differing > 5  # else the two objectives were not told apart


def test_a_change_is_zero_for_the_network_as_it_is_and_the_paper_pays_a_span() -> None:
    merge = Candidate(Span("0", 0, 3, "a", "b", "b", None), "compose", None, ("x", "y", "z"))
    for name, expected in (("change", 0.0), ("paper", -2.0)):
        assert importances(Objective("accuracy", name), [merge], {merge.key: 0.7}, 0.7) == {merge.key: expected}  # type: ignore[arg-type]


def test_a_span_without_convolutions_counts_as_one_layer() -> None:
    pool = Candidate(Span("0", 0, 1, "a", "b", "b", None), "fit")
    assert importances(Objective("accuracy", "paper"), [pool], {pool.key: 0.7}, 0.7) == {pool.key: 0.0}


def test_percent_are_divided_by_their_scale() -> None:
    c = Candidate(Span("0", 0, 1, "a", "b", "b", None), "fit", None, ("x",))
    fraction = importances(Objective("accuracy", "paper"), [c], {c.key: 0.6}, 0.9)
    percent = importances(Objective("accuracy", "paper", 100), [c], {c.key: 60.0}, 90.0)
    assert percent[c.key] == pytest.approx(fraction[c.key]) == pytest.approx(math.exp(-0.3) - 1)
    with pytest.raises(lmfx.InputError, match="scale="):
        importances(Objective("accuracy", "paper"), [c], {c.key: 150.0}, 1.0)


# --- the same table, whatever happens ---------------------------------------------------------------------------------


def processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def reference(made: Made) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = dict(made.score())
    torch.set_num_threads(threads)
    return table


def test_threads_and_another_order_give_the_same_table_bit_for_bit(made: Made, reference: dict[str, float]) -> None:
    with ThreadPoolExecutor(3) as pool:
        assert dict(made.score(executor=pool)) == reference
    assert dict(made.score(candidates=made.wanted[::-1])) == reference
    for candidate in made.wanted[:2]:
        assert made.score(candidates=[candidate])[candidate.key] == reference[candidate.key]


def test_processes_of_which_one_is_killed_give_the_same_table_bit_for_bit(
    made: Made, reference: dict[str, float], tmp_path: Path
) -> None:
    pools: list[ProcessPoolExecutor] = []

    def pool() -> Executor:
        pools.append(processes())
        return pools[-1]

    with Store.open(tmp_path) as store:
        table = made.score(train=toys.KillOnce(tmp_path), executor=pool, key="a", store=store)
        assert set(store.times_put("importance").values()) == {1}
    assert dict(table) == reference
    assert (tmp_path / "killed0").exists() and len(pools) == 2
    with pytest.raises(RuntimeError, match="after shutdown"):
        pools[-1].submit(print)


class Dying(ThreadPoolExecutor):
    """A pool in which the n-th job that is handed in breaks it, as a killed process does."""

    def __init__(self, at: int) -> None:
        super().__init__(1)
        self.left = at
        self.dead = False

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self.dead:
            raise BrokenProcessPool("dead")
        self.left -= 1
        if self.left < 0:
            self.dead = True

            def die() -> None:
                raise BrokenProcessPool("died")

            return super().submit(die)
        return super().submit(function, *args, **kwargs)


def test_a_broken_pool_that_can_not_be_replaced_is_said_and_finished_rows_are_kept(
    made: Made, reference: dict[str, float], tmp_path: Path
) -> None:
    with Store.open(tmp_path) as store:
        with pytest.raises(lmfx.InputError, match=r"executor=lambda: ProcessPoolExecutor\(2\)"):
            made.score(executor=Dying(3), ahead=1, key="a", store=store)
        assert store.count("importance") == 3
        assert dict(made.score(key="a", store=store)) == reference
        assert set(store.times_put("importance").values()) == {1}


def test_a_job_that_kills_every_worker_is_named(made: Made) -> None:
    made_pools: list[Dying] = []

    def pool() -> Executor:
        made_pools.append(Dying(0 if made_pools else 2))
        return made_pools[-1]

    with pytest.raises(lmfx.InputError, match=rf"worker of {made.wanted[1].key} died 3 times"):
        made.score(executor=pool, retries=2, ahead=1)
    assert len(made_pools) == 3


def test_a_pool_may_die_more_often_than_a_job_may(made: Made, reference: dict[str, float]) -> None:
    deaths = iter([2, 1, 1, 50])
    assert dict(made.score(executor=lambda: Dying(next(deaths)), retries=1, ahead=1)) == reference


# --- rows are kept ----------------------------------------------------------------------------------------------------


def test_stored_rows_are_not_trained_again_and_another_key_is(made: Made, tmp_path: Path) -> None:
    def never(model: nn.Module) -> float:
        raise AssertionError("again")

    with Store.open(tmp_path) as store:
        first = made.score(key="a", store=store)
        again = {"train": never, "evaluate": never, "store": store}
        assert dict(made.score(key="a", **again)) == dict(first)
        # How performances become importances is no property of the rows.
        assert dict(made.score(key="a", objective="paper", **again)) != dict(first)
        for change in ({"key": "b"}, {"key": "a", "seed": 1}, {"key": "a", "surrogate": "identity"}, {"key": None}):
            with pytest.raises(lmfx.InputError, match="again"):
                made.score(**change, **again)
        other = replace(made, data=Calibration((DATA[:12],)))
        with pytest.raises(lmfx.InputError, match="again"):
            other.score(key="a", **again)


def test_a_run_that_was_stopped_goes_on_where_it_was(made: Made, reference: dict[str, float], tmp_path: Path) -> None:
    trained = 0

    def stopped(model: nn.Module) -> None:
        nonlocal trained
        trained += 1
        if trained == 3:
            raise KeyboardInterrupt
        toys.train(model)

    with Store.open(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt):
            made.score(train=stopped, key="a", store=store)
        assert store.count("importance") == 3  # the original and two candidates
        assert dict(made.score(train=stopped, key="a", store=store)) == reference
    assert trained == 3 + len(made.wanted) - 2


def test_without_a_key_nothing_is_stored(made: Made, tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        made.score(candidates=made.wanted[:1], store=store)
        assert store.count() == 0


# --- performances that are no numbers, and functions that fail --------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_candidate_that_diverges_is_named_stored_and_never_chosen(made: Made, tmp_path: Path, bad: float) -> None:
    key, calls = made.wanted[1].key, 0

    def evaluate(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return bad if calls == 3 else 0.5  # the original, the first, this one

    with Store.open(tmp_path) as store:
        for _ in range(2):
            with pytest.warns(UserWarning, match="1 of 5 candidates ended with a performance that is no finite"):
                table = made.score(evaluate=evaluate, key="a", store=store)
            assert table.unusable == (key,) and key not in table and len(table) == len(made.wanted) - 1
    assert calls == 1 + len(made.wanted)
    latency = lmfx.profile(made.graph, "roofline", spans=made.spans, progress=False)
    frontier = lmfx.solve(made.graph, latency, table, spans=made.spans)
    assert all(c.key != key for point in frontier for c in point.plan.candidates)


def test_an_original_without_a_performance_is_refused(made: Made) -> None:
    with pytest.raises(lmfx.InputError, match="gives nan for the original"):
        made.score(evaluate=lambda model: math.nan)
    with pytest.raises(lmfx.InputError, match="gives 0.0 for the original network, and a loss"):
        made.score(evaluate=lambda model: 0.0, metric="loss")


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor(2)])
def test_an_error_of_the_users_function_names_it_and_the_candidate(made: Made, executor: Any) -> None:
    def fails(model: nn.Module) -> None:
        raise ValueError("no such file: train.csv")

    with pytest.raises(lmfx.InputError, match=rf"train\(model\) failed.*{made.wanted[0].key}.*no such file"):
        made.score(train=fails, executor=executor, candidates=made.wanted[:1])


@pytest.mark.parametrize("value", [None, "0.9", True, torch.ones(2), [0.5]])
def test_an_evaluation_gives_one_number(made: Made, value: Any) -> None:
    with pytest.raises(lmfx.InputError, match="return one number"):
        made.score(evaluate=lambda model: value)


@pytest.mark.parametrize(
    "option",
    [
        {"train": None}, {"evaluate": 3}, {"metric": "error"}, {"objective": "sum"}, {"keep": "no"}, {"scale": 0},
        {"baseline": "no"},
        {"scale": math.inf}, {"key": ""}, {"key": 3}, {"seed": -1}, {"threads": 0}, {"ahead": 0}, {"retries": 1.5},
        {"surrogate": "none"},
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(lmfx.OptionError, match=next(iter(option))):
        Finetune(**{"train": toys.train, "evaluate": toys.accuracy, **option})


def test_without_functions_or_with_a_wrong_executor_it_is_refused(made: Made) -> None:
    with pytest.raises(lmfx.OptionError, match="train"):
        lmfx.score(made.graph, "finetune", spans=made.spans)
    with pytest.raises(lmfx.OptionError, match="executor"):
        made.score(executor=4)
    with pytest.raises(lmfx.InputError, match="calibration="):
        Finetune(toys.train, toys.accuracy).score(made.spans, made.wanted, None)


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_score_and_compress_take_it(made: Made) -> None:
    options: dict[str, Any] = {"calibration": DATA, "progress": False}
    table = lmfx.score(made.graph, "finetune", spans=_few(made), train=toys.nothing, evaluate=toys.accuracy, **options)
    assert len(table) == len(_few(made).candidates)
    estimator = Finetune(toys.nothing, toys.accuracy)
    options |= {"realize": ("compose",), "max_span_convs": 2, "latency": "roofline"}
    net = lmfx.compress(toy(), DATA[:1], 0.9, importance=estimator, **options)
    assert lmfx.result_of(net).ratio <= 0.9  # type: ignore[operator]
    assert run(net, DATA).isfinite().all()


def _few(made: Made) -> SpanSet:
    return lmfx.spans(made.graph, realize=("compose",), max_span_convs=2)


def test_a_packed_network_computes_the_same_and_keeps_what_is_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(torch.relu(self.conv(x))))

    graph = lmfx.trace(Twice().eval(), DATA[:1])
    packed = PackedNetwork.of(graph)
    assert all(t.is_meta for t in [*packed.structure.parameters(), *packed.structure.buffers()])
    first, second = packed.unpack(), packed.unpack()
    assert torch.equal(run(first, DATA), run(graph, DATA))
    assert len(list(first.parameters())) == len(list(graph.parameters()))
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert torch.equal(run(second, DATA), run(graph, DATA))
    assert not torch.equal(run(first, DATA), run(graph, DATA))
    arrived = ForkingPickler.loads(ForkingPickler.dumps(packed))
    assert torch.equal(run(arrived.unpack(), DATA), run(graph, DATA))
    assert len(list(arrived.unpack().parameters())) == len(list(graph.parameters()))


def test_a_job_that_arrives_in_a_worker_is_not_unpacked_beside_one_that_runs() -> None:
    """torch.fx traces a graph that is unpickled, and then every module call of the process is the tracer's."""
    packed = PackedNetwork.of(lmfx.trace(toy(), DATA[:1]))
    sent = bytes(ForkingPickler.dumps(Job("a", packed, None, toys.accuracy, 0, 1)))
    arrived = ForkingPickler.loads(sent)
    assert isinstance(arrived.network.structure, bytes)

    with ThreadPoolExecutor(1) as pool:
        with isolated(0, 1):  # as a job that runs
            future = pool.submit(run_job, arrived)
            with pytest.raises(TimeoutError):
                future.result(0.2)
        assert future.result(30).performance == pytest.approx(toys.accuracy(packed.unpack()))


def test_nothing_warns_where_all_is_well(made: Made) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.score(candidates=made.wanted[:1]).unusable == ()
