"""Whole networks against sums of rows: random plans, what is measured, and what the table then promises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lmfx
from lmfx.latency import Store
from lmfx.latency.backends.roofline import RooflineBackend
from lmfx.latency.profiling import profile_spans
from lmfx.latency.whole_networks import LEAST, calibrate_table, measure_wholes, random_plans, timing_form
from lmfx.passes.ir import MergePlan
from lmfx.passes.spans.enumeration import SpanSet

X = torch.randn(1, 8, 24, 24)


class Bent(RooflineBackend):
    """A machine on which a network takes 0.05 ms more than 1.3 times its rows, and that slows down in odd rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.networks: list[int] = []

    def measure_interleaved(self, modules: Sequence[Any], repeats: int = 5) -> list[list[float]]:
        self.networks.append(len(modules))
        true = super().measure_interleaved(modules, repeats)
        return [[(1.3 * ms + 0.05) * (1 + 0.5 * (i % 2)) for i, ms in enumerate(row)] for row in true]


def net() -> SpanSet:
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return lmfx.spans(lmfx.trace(nn.Sequential(*layers).eval(), X))


def test_random_plans_are_spread_from_the_fastest_to_the_original() -> None:
    spans = net()
    table = profile_spans(spans, RooflineBackend())
    plans = random_plans(spans, table, 12)
    sums = sorted(table.total(p) / table.total() for p in plans)
    assert len(plans) == 12 and sums[0] < 0.4 and sums[-1] > 0.8 and sums[0] >= 0.9 * LEAST
    assert len({p.candidates for p in plans}) >= 8
    assert [p.candidates for p in random_plans(spans, table, 12)] == [p.candidates for p in plans]
    assert [p.candidates for p in random_plans(spans, table, 12, seed=1)] != [p.candidates for p in plans]


def test_a_table_is_calibrated_on_networks_measured_beside_the_original() -> None:
    spans, backend = net(), Bent()
    table = calibrate_table(spans, profile_spans(spans, backend), backend)
    line = table.calibration
    assert line is not None and line.plans == 13
    assert (line.held_out, line.worst) == pytest.approx((0, 0), abs=1e-6) and line.kendall_tau == pytest.approx(1)
    (plan,) = random_plans(spans, table, 1, seed=5)
    ((true,),) = RooflineBackend().measure_interleaved([(timing_form(spans.network.gm, plan), [X])], 1)
    ((original,),) = RooflineBackend().measure_interleaved([(spans.network.gm, [X])], 1)
    assert table.predict(plan) / table.predict() == pytest.approx((1.3 * true + 0.05) / (1.3 * original + 0.05))


def test_solve_speaks_of_whole_networks_where_the_table_is_calibrated() -> None:
    spans, backend = net(), Bent()
    table = calibrate_table(spans, profile_spans(spans, backend), backend)
    scores = lmfx.score(spans.network.gm, "magnitude", spans=spans, latency=table, progress=False)
    frontier = lmfx.solve(spans.network.gm, table, scores, spans=spans)
    assert frontier.original == pytest.approx(table.predict())
    for point in frontier:
        assert point.latency == pytest.approx(table.predict(point.plan))


def test_networks_that_the_store_has_are_not_measured_again(tmp_path: Path) -> None:
    spans, backend = net(), Bent()
    table = profile_spans(spans, backend)
    plans = [MergePlan(), *random_plans(spans, table, 3)]
    with Store(tmp_path / "rows") as store:
        first = measure_wholes(spans, table, plans, backend, store)
        assert backend.networks == [5], "the sentinel, the original and three plans"
        assert measure_wholes(spans, table, plans, backend, store) == first and len(backend.networks) == 1
        more = random_plans(spans, table, 2, seed=9)
        measure_wholes(spans, table, [*plans, *more], backend, store)
        assert backend.networks == [5, 4]


def test_networks_too_large_to_be_held_together_are_measured_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    spans, backend = net(), Bent()
    table = profile_spans(spans, backend)
    plans = random_plans(spans, table, 4)
    together = measure_wholes(spans, table, plans, backend)
    monkeypatch.setattr("lmfx.latency.whole_networks.BYTES_AT_ONCE", 1)
    assert measure_wholes(spans, table, plans, backend) == pytest.approx(together)
    assert backend.networks == [6, 3, 3, 3, 3]


def test_a_network_in_which_nothing_pays_has_no_calibration() -> None:
    spans = lmfx.spans(lmfx.trace(nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU()).eval(), X), realize=("compose",))
    backend = Bent()
    assert calibrate_table(spans, profile_spans(spans, backend), backend).calibration is None
    assert not backend.networks


def test_profile_calibrates_unless_told_not_to(tmp_path: Path) -> None:
    graph = net().network.gm
    table = lmfx.profile(graph, Bent(), cache_dir=tmp_path, progress=False)
    assert table.calibration is None, "the roofline adds up by definition"
    machine = Bent()
    machine.name = "bent"
    assert lmfx.profile(graph, machine, cache_dir=tmp_path / "a", progress=False).calibration is not None
    assert lmfx.profile(graph, machine, cache_dir=tmp_path / "b", progress=False, calibrate=False).calibration is None
