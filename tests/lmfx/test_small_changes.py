"""Seven small changes of the code that no test noticed once; each is named with the test that notices it now."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lmfx
from lmfx.budget import Budget
from lmfx.importance.reconstruction import Reconstruction
from lmfx.latency import Store
from lmfx.latency.backend import REFERENCE, SENTINEL
from lmfx.latency.backends.roofline import RooflineBackend
from lmfx.latency.profiling import profile_spans
from lmfx.latency.whole_networks import measure_wholes, timing_form
from lmfx.passes.errors import InfeasibleBudget, OptionError
from lmfx.passes.graph.shapes import add_configs
from lmfx.passes.ir import ConvConfig, MergePlan
from lmfx.passes.spans.fit_kernels import centred
from lmfx.planning.search import LONGEST, REPEATS, find_plan
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")


def chain(*activations: nn.Module, channels: int = 8) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, activation in enumerate(activations):
        layers += [nn.Conv2d(3 if i == 0 else channels, channels, 3, padding=1), activation]
    return nn.Sequential(*layers).eval()


# --- search: the last refusal -----------------------------------------------------------------------------------------


class Late(RooflineBackend):
    """A machine on which every network but the original takes twice as long when it is measured closely."""

    def measure_interleaved(self, modules: Sequence[Any], repeats: int = 5) -> list[list[float]]:
        times = super().measure_interleaved(modules, repeats)
        return times if repeats <= LONGEST * REPEATS else [times[0], *([2 * ms for ms in row] for row in times[1:])]


@pytest.mark.parametrize("room", [1.02, 1.2, 1.9])
def test_a_plan_that_is_over_the_budget_when_it_is_measured_closely_is_refused(tmp_path: Path, room: float) -> None:
    x = torch.randn(1, 3, 33, 31)
    graph = lmfx.trace(chain(*(nn.ReLU() for _ in range(4))), x)
    table = lmfx.profile(graph, "roofline", cache_dir=tmp_path, progress=False)
    scores = lmfx.score(graph, "magnitude", latency=table, cache_dir=tmp_path, progress=False)
    frontier = lmfx.solve(graph, table, scores)
    fastest = float(frontier.latency[0] / frontier.original)
    assert fastest * room < 1
    with pytest.raises(InfeasibleBudget) as refusal:
        find_plan(graph, frontier, Budget.parse(fastest * room), Late(), x)
    assert refusal.value.latency > fastest * room * frontier.original * 0.99


# --- importance: norms are a part of what a score is good for ---------------------------------------------------------


def test_scores_with_other_norms_are_not_found_again(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
    ).eval()
    for norm in (model[1], model[4]):
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 3.0)
    images = torch.randn(16, 3, 9, 7)
    graph = lmfx.trace(model, images[:1])
    options: dict[str, Any] = {"calibration": images, "cache_dir": tmp_path, "progress": False}
    kept = lmfx.score(graph, Reconstruction(exact=True, norms="kept"), **options)
    batch = lmfx.score(graph, Reconstruction(exact=True, norms="batch"), **options)
    fresh = lmfx.score(graph, Reconstruction(exact=True, norms="batch"), **{**options, "cache_dir": tmp_path / "new"})
    assert dict(batch) == pytest.approx(dict(fresh))
    changed = [k for k in kept if not k.endswith(":keep")]
    assert changed and any(abs(kept[k] - batch[k]) > 1e-3 * abs(kept[k]) for k in changed)


# --- idempotence: the same type with other bounds is another function -------------------------------------------------


@pytest.mark.parametrize(
    ("second", "left"), [(nn.Hardtanh(-1, 1), 1), (nn.Hardtanh(-0.25, 2), 2)], ids=["same", "other"]
)
def test_only_the_same_activation_with_the_same_bounds_is_dropped_after_itself(second: nn.Module, left: int) -> None:
    x = torch.randn(1, 8, 7, 5, dtype=torch.float64)
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.Hardtanh(-1, 1), nn.Conv2d(8, 8, 3, padding=1), second, nn.Conv2d(8, 8, 1)
    ).double().eval()  # fmt: skip
    graph = lmfx.trace(model, x)
    drop = next(
        c for c in lmfx.spans(graph, realize=("drop", "compose")) if c.realization == "drop" and c.all_convs == ("2",)
    )
    net = lmfx.merge(lmfx.rewrite(graph, MergePlan((drop,))))
    assert sum(isinstance(m, nn.Hardtanh) for m in net.modules()) == left
    torch.testing.assert_close(net(x), model[4](second(model[1](model[0](x)))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("second", "pair"), [(nn.Hardtanh(-1, 1), False), (nn.Hardtanh(-0.25, 2), True)], ids=["same", "other"]
)
def test_a_drop_of_two_layers_is_listed_unless_two_drops_give_the_same(second: nn.Module, pair: bool) -> None:
    graph = lmfx.trace(chain(nn.ReLU(), nn.Hardtanh(-1, 1), second), torch.randn(1, 3, 9, 9))
    drops = {c.all_convs for c in lmfx.spans(graph, realize=("drop", "compose")) if c.realization == "drop"}
    assert {("2",), ("4",)} <= drops
    assert (("2", "4") in drops) is pair


# --- spans: where a fitted kernel lies --------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_a_fitted_kernel_lies_on_the_centre_of_the_window_or_half_a_pixel_after_it(window: int, size: int) -> None:
    geometry = ConvConfig(4, 4, (window,), (2,), ((9, 8),), (1,))
    config = centred(geometry, (size,), (1,), 4, 4)
    assert config is not None
    (before, after), (lo, hi) = config.padding[0], geometry.padding[0]
    assert (size - 1) / 2 - before - ((window - 1) / 2 - lo) == (0 if (window - size) % 2 == 0 else 0.5)
    assert before + after - (size - 1) == lo + hi - (window - 1)  # the size rule


# --- shapes: branches that agree at some sizes only -------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_branches_whose_sizes_differ_by_a_stride_or_more_never_meet(stride: int) -> None:
    def branch(more: int) -> ConvConfig:
        return ConvConfig(2, 2, (3,), (stride,), ((1, 1 + more),), (1,))

    for more in range(2 * stride):
        sizes = [(branch(0).output_size((n,)), branch(more).output_size((n,))) for n in range(4, 30)]
        if any(a == b for a, b in sizes):
            whole = add_configs([branch(0), branch(more)])
            assert all(whole.output_size((n,)) == a for n, (a, b) in zip(range(4, 30), sizes, strict=True) if a == b)
        else:
            with pytest.raises(OptionError, match="never have the same output size"):
                add_configs([branch(0), branch(more)])
        assert any(a == b for a, b in sizes) is (more < stride)


# --- store: a folder that moves ---------------------------------------------------------------------------------------


def test_a_store_whose_folder_was_moved_goes_on_in_a_new_one(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.put("latency", {"backend": "a"}, "first", 1.0)
        os.rename(store.path, tmp_path / "moved")
        assert store.get("latency", {"backend": "a"}, "first") is None
        store.put("latency", {"backend": "a"}, "second", 2.0)
        assert store.path.exists()
    with Store.open(tmp_path) as again:
        assert again.get_many("latency", {"backend": "a"}) == {"second": 2.0}


# --- wholes: a machine that becomes slower ----------------------------------------------------------------------------


class Drifting(RooflineBackend):
    """A machine that is slower in every round, by `first` in the first one; within a round by as much for all."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.first = first

    def measure_interleaved(self, modules: Sequence[Any], repeats: int = 5) -> list[list[float]]:
        times = super().measure_interleaved(modules, repeats)
        return [[ms * (self.first + 0.1 * i) for i, ms in enumerate(row)] for row in times]


@pytest.mark.parametrize("first", [1.0, 2.5])
def test_a_whole_network_is_in_the_milliseconds_of_the_rows_whatever_the_machine_does_meanwhile(
    tmp_path: Path, first: float
) -> None:
    x = torch.randn(1, 3, 17, 17)
    spans = lmfx.spans(lmfx.trace(chain(*(nn.ReLU() for _ in range(3))), x))
    backend = Drifting(first)
    table = profile_spans(spans, backend)
    from lmfx.latency.workload import sentinel_workload

    ((sentinel,),) = RooflineBackend().measure_interleaved([sentinel_workload()], 1)
    ((true,),) = RooflineBackend().measure_interleaved([(spans.network.gm, [x])], 1)
    with Store.open(tmp_path) as store:
        store.put(SENTINEL, backend.identity(), REFERENCE, sentinel)
        plan = MergePlan((next(c for c in spans if c.realization == "fit" and len(c.convs) == 3),))
        original, merged = measure_wholes(spans, table, [MergePlan(), plan], backend, store)
    assert original == pytest.approx(true, rel=1e-6)
    ((alone,),) = RooflineBackend().measure_interleaved([(timing_form(spans.network.gm, plan), [x])], 1)
    assert merged == pytest.approx(alone, rel=1e-6) and merged < original
