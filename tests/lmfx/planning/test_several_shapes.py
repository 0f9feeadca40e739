"""A plan for several shapes: rows, search and budget are those of the weighted sum over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.latency import get_backend
from lmfx.latency.profiling import profile_spans
from lmfx.passes.errors import InputError, OptionError
from lmfx.planning.several_shapes import OverShapes, shapes_of
from tests.helpers import one_thread as one_thread
from tests.toys import Net, TwoInputs, images

pytestmark = pytest.mark.usefixtures("one_thread")
A, B = images(1, 12), images(1, 28)
OPTIONS: dict[str, Any] = {"realize": ("compose", "fit", "narrow"), "max_span_convs": 4}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def over(model: nn.Module) -> OverShapes:
    return OverShapes(get_backend("roofline"), model, [A, B], [3.0, 0.5], OPTIONS)


def test_rows_are_the_weighted_sums_of_the_rows_at_each_shape(model: nn.Module, over: OverShapes) -> None:
    backend = get_backend("roofline")
    spans = [lmfx.spans(lmfx.trace(model, x), **OPTIONS) for x in (A, B)]
    alone = [profile_spans(s, backend) for s in spans]
    table = over.table(spans[0], None, False)
    assert set(table) == set(alone[0]) & set(alone[1])
    for key in table:
        assert table.ms(key) == pytest.approx(3 * alone[0].ms(key) + 0.5 * alone[1].ms(key))
    assert {c.key for c in spans[0] if c.realization == "keep"} <= set(table)
    assert table.identity != alone[0].identity


def test_networks_are_timed_at_every_shape_with_the_same_weights(over: OverShapes) -> None:
    backend = get_backend("roofline")
    graph = over.graphs[0]
    alone = [backend.measure_interleaved([(graph, [x])], 1)[0][0] for x in (A, B)]
    expected = 3 * alone[0] + 0.5 * alone[1]
    assert over.measure_interleaved([(graph, [A]), (graph, [A])], 2) == [[pytest.approx(expected)] * 2] * 2


def test_the_budget_holds_for_the_sum_and_the_result_has_each_shape(model: nn.Module, tmp_path: Path) -> None:
    net = lmfx.compress(model, [A, B], 0.7, weights=(1, 4), calibration=images(24), latency="roofline", progress=False)
    result = lmfx.result_of(net)
    assert [s.shape for s in result.shapes] == ["1 x 3 x 12 x 12", "1 x 3 x 28 x 28"]
    before, after = (sum(s.weight * getattr(s, name) for s in result.shapes) for name in ("original", "measured"))
    assert after / before <= 0.7 and result.ratio == pytest.approx(after / before)
    assert result.plan.candidates
    text = str(lmfx.report(net))
    assert all(f"at {s.shape}: {100 * s.ratio:.1f} %, weight {s.weight:g}" in text for s in result.shapes)
    lmfx.save(net, tmp_path / "net")
    assert lmfx.result_of(lmfx.load(tmp_path / "net", model)).shapes == result.shapes


def test_weights_decide_which_shape_the_plan_is_for(model: nn.Module) -> None:
    ratios = []
    for weights in ((1, 1e-6), (1e-6, 1)):
        options: dict[str, Any] = {"importance": "magnitude", "latency": "roofline", "progress": False}
        net = lmfx.compress(model, [A, images(1, 96)], 0.6, weights=weights, **options)
        ratios.append([s.ratio for s in lmfx.result_of(net).shapes])
    assert ratios[0][0] <= 0.6 and ratios[1][1] <= 0.6


def test_a_list_that_the_forward_takes_is_one_example() -> None:
    two = TwoInputs().eval()
    assert shapes_of(two, [A, A], None) is None
    assert shapes_of(Net(), A, None) is None
    assert shapes_of(Net(), (A,), None) is None
    assert shapes_of(Net(), [A], None) is None
    assert shapes_of(Net(), [A, B], None) == ([A, B], [1.0, 1.0])
    examples = [(A, A), {"image": B, "depth": B}, (A, A)]
    assert shapes_of(two, examples, None) == (examples, [1.0] * 3)
    assert shapes_of(two, [(A, A), (B, B)], (1, 2)) == ([(A, A), (B, B)], [1.0, 2.0])


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1), (1, float("nan")), (1, "2"), (1, True)])
def test_weights_that_do_not_fit_are_an_error(weights: Any) -> None:
    with pytest.raises(OptionError, match="one number above 0 for each of the 2 shapes"):
        shapes_of(Net(), [A, B], weights)


@pytest.mark.parametrize("example", [A, (A, B), {"x": A}, []])
def test_weights_without_a_list_are_an_error(example: Any) -> None:
    with pytest.raises(OptionError, match="a list of inputs"):
        shapes_of(Net(), example, (1, 2))


def test_shapes_of_a_network_of_several_inputs_are_tuples_or_dicts() -> None:
    two = TwoInputs().eval()
    over = OverShapes(get_backend("roofline"), two, [(A, A), {"image": B, "depth": B}], [1, 1], {})
    assert over.shapes == ["1 x 3 x 12 x 12 and 1 x 3 x 12 x 12", "1 x 3 x 28 x 28 and 1 x 3 x 28 x 28"]
    assert over.table(lmfx.spans(over.graphs[0]), None, False)


def test_a_network_of_one_size_is_refused_with_both_shapes() -> None:
    program = torch.export.export(Net().eval(), (A,))
    with pytest.raises(lmfx.LmfxError, match="28"):
        lmfx.compress(program, [A, B], 0.7, latency="roofline", progress=False)

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x)) if x.shape[2] < 20 else self.conv(self.conv(x)[:, :3])

    with pytest.raises(InputError, match=r"1 x 3 x 12 x 12 is not right at 1 x 3 x 28 x 28"):
        lmfx.compress(Branch().eval(), [A, B], 0.7, latency="roofline", progress=False)


@pytest.mark.parametrize("more", [{"input_sizes": (8,)}, {"precision": "int8"}])
def test_what_does_not_go_with_several_shapes_is_said(model: nn.Module, more: Any) -> None:
    with pytest.raises(OptionError, match="several shapes"):
        lmfx.compress(model, [A, B], 0.7, latency="roofline", progress=False, **more)
