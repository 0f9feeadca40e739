"""The drawing has every layer once, in the order of the network, and a change covers just the layers of its span."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.passes.ir import MergePlan, Refusal
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.report.advice import ADVICE, OTHERWISE, advice_for
from lmfx.report.blocks import picture_of
from lmfx.report.changes import change_of
from lmfx.report.drawing import draw, shortened, words_of
from lmfx.report.stops import say, stop_indices
from tests import page_networks


class Unet(nn.Module):
    """A long skip around a deeper level, a gate, and an output from the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.last = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top = torch.relu(self.top(x))
        low = torch.relu(self.down(top))
        low = low * self.gate(low)
        return self.last(torch.cat([self.up(low), top], 1)), low.mean((2, 3))


class Attention(nn.Module):
    """Tokens of a map that look at one another: a mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.q, self.k, self.v = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.before(x))
        q, k, v = (part(x).flatten(2) for part in (self.q, self.k, self.v))
        looked = torch.softmax(q.transpose(1, 2) @ k, -1)
        return x + self.after((v @ looked.transpose(1, 2)).view(x.shape))


def spans_of(model: nn.Module, size: int = 12) -> SpanSet:
    return lmfx.spans(lmfx.trace(model.eval(), torch.randn(1, 3, size, size)))


MODELS = {"blocks": page_networks.model, "unet": Unet, "attention": Attention}


@pytest.mark.parametrize("name", MODELS)
def test_every_op_is_in_one_row_and_edges_lead_downwards(name: str) -> None:
    network = spans_of(MODELS[name]()).network
    picture = picture_of(network)
    named = [n for block in picture.blocks for n in block.nodes]
    assert len(named) == len(set(named))
    expected = {n.name for n in network.gm.graph.nodes if n.op not in ("get_attr",) and (n.all_input_nodes or n.users)}
    assert expected <= {*named, *(n for n, node in network.nodes.items() if not node.all_input_nodes)}
    assert [b.row for b in picture.blocks] == list(range(len(picture.blocks)))
    assert all(a < b for a, b in picture.edges)
    reached = {b for _, b in picture.edges}
    assert {b.row for b in picture.blocks if b.kind != "input"} == reached


@pytest.mark.parametrize("name", MODELS)
def test_a_change_covers_the_rows_of_its_span_and_nothing_else(name: str) -> None:
    spans = spans_of(MODELS[name]())
    picture = picture_of(spans.network)
    for c in spans:
        change = change_of(c, spans, picture)
        layers = spans.network.series[c.span.series].layers[c.span.start : c.span.stop]
        inside = {n for layer in layers for n in layer.all_nodes()}
        for first, last in change.rows[:1]:
            covered = {n for block in picture.blocks[first : last + 1] for n in block.nodes}
            assert inside <= covered
            mesh = any(layer.parallel and layer.parallel.join == "mesh" for layer in layers)
            assert mesh or covered == inside, c.key
        for i in change.edges:
            b = picture.edges[i][1]
            assert any(first <= b <= last for first, last in change.rows)


def test_a_convolution_in_place_of_a_block_is_read_by_one_edge_and_gives_one_value() -> None:
    spans = spans_of(page_networks.model())
    picture = picture_of(spans.network)
    whole = [c for c in spans if c.puts_conv and len(c.convs) == 3 and c.convs[0].startswith("two")]
    assert whole
    for c in whole:
        change = change_of(c, spans, picture)
        ((first, last),) = change.rows
        left = [e for i, e in enumerate(picture.edges) if i not in change.edges]
        assert len([e for e in left if first <= e[1] <= last]) == 1
        assert {a for a, b in left if first <= a <= last} == {last}


def test_narrowed_layers_have_fewer_channels_up_to_what_reads_them() -> None:
    spans = lmfx.spans(lmfx.trace(page_networks.model(), torch.randn(1, 3, 12, 12)), realize=("narrow",))
    picture = picture_of(spans.network)
    c = next(c for c in spans if len(c.cuts) == 1 and c.cuts[0].conv == "one.body.0")
    change = change_of(c, spans, picture)
    row = next(b.row for b in picture.blocks if b.name == "one.body.0")
    assert change.widths == {row: c.cuts[0].width}
    assert change.edges == ()


def test_the_words_of_a_change_have_its_rows_of_the_tables() -> None:
    net = page_networks.compressed()
    frontier = lmfx.result_of(net).frontier
    assert frontier is not None and frontier.latencies is not None and frontier.scores is not None
    picture = picture_of(frontier.spans.network)
    c = next(c for c in frontier.plan(0).candidates if not c.exact)
    change = change_of(c, frontier.spans, picture, frontier.latencies, frontier.scores)
    assert change.after == frontier.latencies.ms(c.key)
    assert change.before == frontier.latencies.kept(c)
    assert change.loss == -frontier.scores[c.key]
    assert " ms · loss " in words_of(change) and words_of(change).startswith(change.word)


def test_places_are_within_the_drawing() -> None:
    spans = spans_of(Unet())
    picture = picture_of(spans.network)
    changes = [change_of(c, spans, picture) for c in spans if c.realization != "keep"]
    drawing = draw(picture, changes, None)
    assert drawing.height == 26 * len(picture.blocks)
    for glyph in (*drawing.original, *drawing.kept):
        assert glyph["x"] >= 0 and drawing.columns["original"] + glyph["x"] + glyph["wide"] < drawing.columns["result"]
        assert 0 <= glyph["top"] < drawing.height
    for edge in drawing.edges:
        assert all(float(v) >= 0 for v in re.findall(r"-?[\d.]+", edge["d"]))


def test_a_long_name_keeps_its_end() -> None:
    name = "encoder.stages.11.blocks.22.attention.projection.conv"
    assert shortened(name).endswith(".projection.conv") and len(shortened(name)) == 32 and "…" in shortened(name)
    assert shortened("short") == "short"
    assert shortened("a\nb") == "a\\nb"


def test_few_points_are_all_stops_and_many_are_thinned_evenly() -> None:
    frontier = lmfx.result_of(page_networks.compressed()).frontier
    assert frontier is not None
    assert stop_indices(frontier) == list(range(len(frontier)))
    some = stop_indices(frontier, most=10)
    assert len(some) <= 12 and some[0] == 0 and some[-1] == len(frontier) - 1
    gaps = [frontier.latency[b] - frontier.latency[a] for a, b in itertools.pairwise(some)]
    assert max(gaps) < (frontier.latency[-1] - frontier.latency[0]) / 3


def test_a_latency_that_is_not_positive_has_no_speed() -> None:
    assert say(0.5, 2.0, 0.1, MergePlan())["speed"] == "4.00×"
    assert say(-0.1, 2.0, 0.1, MergePlan())["speed"] == say(0.0, 2.0, None, MergePlan())["speed"] == "–"


@pytest.mark.parametrize("name", MODELS)
def test_each_refusal_has_advice_of_its_own(name: str) -> None:
    refusals = spans_of(MODELS[name]()).refusals
    assert refusals
    assert [r for r in refusals if advice_for(r.reason) == OTHERWISE] == []


def test_advice_follows_the_reason_and_there_is_always_some() -> None:
    assert "exclude=" in advice_for(Refusal("excluded: a.b matches exclude=('a',)").reason)
    assert "max_kernel_size=" in advice_for("the merged kernel would be 15 or more, over max_kernel_size=7")
    assert "dimension 1" in advice_for("the concatenation is not along the channels")
    assert advice_for("something that nobody has thought of") == OTHERWISE
    assert len({advice for _, advice in ADVICE}) == len(ADVICE)


class _Predicted:
    """A frontier as the stops see it, of given latencies."""

    def __init__(self, *latency: float) -> None:
        self.latency = np.array(latency)

    def __len__(self) -> int:
        return len(self.latency)


def test_points_at_which_the_line_predicts_nothing_or_less_are_no_stops() -> None:
    some: Any = _Predicted(-0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 1.0)
    assert stop_indices(some) == [3, 4, 5, 6]
    assert stop_indices(some, most=2) == [3, 6]
    nothing: Any = _Predicted(-0.2, 0.0)
    assert stop_indices(nothing) == [1]  # a page needs a point


def test_linear_layers_that_became_one_are_named_in_it() -> None:
    spans = spans_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 8), nn.ReLU(), nn.Linear(8, 4)))
    picture = picture_of(spans.network)
    found = [c for c in spans if c.realization in ("compose", "fit") and c.all_convs == ("2", "4")]
    assert found and {change_of(c, spans, picture).kernel for c in found} == {"linear"}
