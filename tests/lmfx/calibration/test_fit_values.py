"""The values that quick fits are made from: on how many images, in which order, and how exactly."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.calibration.bounded import Bounded
from lmfx.calibration.fit_values import FitValues, evenly_ordered
from lmfx.calibration.fitting import FitGroup, fit_groups
from lmfx.calibration.images import Calibration
from lmfx.calibration.recording import mean_square_distance, record_batches, resume
from lmfx.passes.spans.layers import Network

SIZE = 40  # 1,600 pixels: three images have the samples of a small fit


def network(scale: float = 1.0) -> Network:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight *= scale
        model[0].weight[0] *= 1e-6  # a channel far smaller than the others
        model[0].bias *= 0
    return Network(lmfx.trace(model, torch.randn(1, 3, SIZE, SIZE)))


def groups_of(net: Network) -> list[FitGroup]:
    spans = lmfx.spans(net.gm)
    return fit_groups(net, [c for c in spans if c.realization == "fit"])


def images(count: int) -> Calibration:
    return Calibration((torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)),))


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_values_in_half_precision_are_good_to_a_thousandth_in_every_channel(scale: float) -> None:
    net = network(scale)
    data = evenly_ordered(images(40))
    for group in groups_of(net):
        _, values, _ = FitValues(net, images(40), groups_of(net), quick=True).of(group)
        whole = record_batches(net.gm, data, group.names)
        for name, value in values.items():
            wanted = whole[name][: len(value)]
            error = (value - wanted).abs().amax((0, 2, 3))
            assert bool((error <= 1e-3 * wanted.abs().amax((0, 2, 3))).all()), name


def test_values_for_the_chosen_plan_are_exact() -> None:
    net = network()
    (group, *_) = groups_of(net)
    x, values, _ = FitValues(net, images(120), [group], quick=False).of(group)
    whole = record_batches(net.gm, evenly_ordered(images(120)), group.names)
    assert torch.equal(x, whole[group.entry][: len(x)])
    assert all(torch.equal(v, whole[n][: len(v)]) for n, v in values.items())


def test_a_large_map_is_held_on_few_images_and_all_of_a_group_on_as_many() -> None:
    net = network()
    values = FitValues(net, images(60), groups_of(net), quick=True)
    for group in groups_of(net):
        x, ys, _ = values.of(group)
        assert len(x) == 24 and {len(v) for v in ys.values()} == {24}


def test_what_does_not_fit_beside_the_others_is_recorded_when_it_is_asked_for() -> None:
    net, data = network(), images(40)
    groups = groups_of(net)
    wide, narrow = FitValues(net, data, groups, quick=True), FitValues(net, data, groups, quick=True, limit=1)
    for group in (*groups, groups[0]):
        (x, ys, _), (other, theirs, _) = wide.of(group), narrow.of(group)
        assert torch.equal(x, other) and all(torch.equal(v, theirs[n]) for n, v in ys.items())
    assert len(narrow.held) < len(wide.held)


def test_each_beginning_of_the_order_is_spread_over_all_images() -> None:
    order = evenly_ordered(Calibration((torch.arange(100.0)[:, None],))).tensors[0].flatten()
    assert sorted(order.tolist()) == list(range(100))
    for count in (5, 10, 25):
        first = order[:count].sort().values
        assert float(first.diff().max()) < 2 * 100 / count
        assert float(first[0]) < 100 / count and float(first[-1]) > 100 - 1.5 * 100 / count


def test_the_least_recently_used_goes_first() -> None:
    kept: Bounded[str] = Bounded(len, 6)
    for key in "abc":
        kept.put(key, key * 2)
    assert kept.get("a") == "aa"
    kept.put("d", "dd")
    assert kept.get("b") is None
    assert [kept.get(k) for k in "acd"] == ["aa", "cc", "dd"]
    assert kept.held == 6


@pytest.mark.parametrize(
    "z, wanted",
    [
        (torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 1.0),
        (torch.tensor([[3.0, 4.0]]), 25.0),
        (torch.tensor([[3.0, 4.0], [3.0, 4.0]]), 25.0),
        (torch.zeros(3, 2), 1.0),
    ],
    ids=["apart", "one image", "all alike", "nothing"],
)
def test_the_unit_of_an_output_is_its_distance_from_the_mean_or_its_size(z: Tensor, wanted: float) -> None:
    assert mean_square_distance(z) == pytest.approx(wanted)


def test_only_what_the_output_needs_runs_again() -> None:
    net = network()
    nodes, ran = net.nodes, []
    hooks = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in net.gm.children()]
    x = torch.randn(2, 3, SIZE, SIZE)
    whole = record_batches(net.gm, Calibration((x,)), ["_1", "_3"])
    ran.clear()
    again = resume(net.gm, {nodes["_1"]: whole["_1"]})
    assert torch.equal(again, whole["_3"]) and len(ran) == 2
    for hook in hooks:
        hook.remove()


def test_a_value_that_no_other_node_reads_any_more_is_freed() -> None:
    torch.manual_seed(0)
    net = Network(lmfx.trace(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(6))).eval(), torch.randn(1, 3, 5, 5)))
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def count(module: nn.Module, args: Any, out: Tensor) -> None:
        alive.append(sum(ref() is not None for ref in held))
        held.append(weakref.ref(out))

    hooks = [m.register_forward_hook(count) for m in net.gm.children()]
    first = next(n for n in net.gm.graph.nodes if n.op == "placeholder")
    resume(net.gm, {first: torch.randn(2, 3, 5, 5)})
    assert alive == [0, 1, 1, 1, 1, 1], "each module finds its own input alone"
    for hook in hooks:
        hook.remove()
