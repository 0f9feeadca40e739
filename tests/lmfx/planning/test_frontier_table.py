"""A frontier as rows, in plots with other ways to be as fast, and in notebooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lmfx
from lmfx.environment.rows import SHOWN, RowTable
from lmfx.passes.errors import InputError, OptionError
from lmfx.passes.ir import Refusal
from lmfx.planning.frontier import Frontier
from tests import page_networks


@pytest.fixture(scope="module")
def net() -> Any:
    return page_networks.compressed()


@pytest.fixture(scope="module")
def frontier(net: Any) -> Frontier:
    found = lmfx.result_of(net).frontier
    assert found is not None
    return found


def test_each_point_is_a_row_with_its_figures(frontier: Frontier) -> None:
    rows = frontier.table()
    assert len(rows) == len(frontier)
    for row, point in zip(rows, frontier, strict=True):
        assert row["latency_ms"] == point.latency
        assert row["loss"] == -point.importance
        assert row["of_original"] == pytest.approx(point.latency / frontier.original)
        for way in ("compose", "fit", "narrow", "factor", "drop"):
            assert row[way] == sum(c.realization == way for c in point.plan.candidates)


def test_a_table_prints_with_one_line_a_row_and_says_what_it_leaves_out(frontier: Frontier) -> None:
    text = str(frontier.table()).splitlines()
    assert text[0].split()[:3] == ["latency_ms", "of_original", "loss"]
    assert len(text) == SHOWN + 2 and text[-1].startswith(f"{SHOWN} of {len(frontier)} rows")
    few = RowTable([{"a": 1.23456, "b": "x\ny"}])
    assert str(few).splitlines() == ["    a  b", "1.235  x\\ny"]
    assert str(RowTable()) == "no rows"


def test_notebooks_show_values_and_escape_names(net: Any, frontier: Frontier) -> None:
    result = lmfx.result_of(net)
    assert frontier.latencies is not None and frontier.scores is not None
    shown = [result, frontier, frontier.plan(0), frontier.table(), frontier.latencies, frontier.scores, frontier.spans]
    shown += [Refusal("<script>alert(1)</script>", ("a<b",))]
    for value in shown:
        text = value._repr_html_()
        assert text.count("<table") == text.count("</table>")
        assert "<script" not in text and "<b>&amp; x" not in text
    assert "&lt;b&gt;&amp;amp; x" in frontier.spans._repr_html_() + frontier.plan(0)._repr_html_()
    assert f"{result.ratio:.1%}" in result._repr_html_()


def test_printed_values_say_in_a_few_lines_what_a_notebook_shows(net: Any) -> None:
    result = lmfx.result_of(net)
    assert result.frontier is not None
    spans = result.frontier.spans
    assert str(result).startswith("lmfx: a compressed network\n") and f"{result.ratio:.1%}" in str(result)
    assert f"candidates  {len(spans)}\n" in str(spans) and str(spans.refusals[0]) in str(spans)
    changes = str(result.plan).splitlines()[1:]
    assert [line.split()[0] for line in changes] == [c.realization for c in result.plan.candidates]
    assert all(name in line for line, c in zip(changes, result.plan.candidates, strict=True) for name in c.all_convs)


def test_names_with_control_characters_are_printed_as_text(frontier: Frontier) -> None:
    spans = replace(frontier.spans, refusals=(Refusal("why", ("a\x1b[31m",)),))
    assert str(spans).endswith(r"why (a\x1b[31m)")


def test_other_ways_are_drawn_where_they_were_measured(net: Any, frontier: Frontier, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    quality = lmfx.result_of(net).quality
    assert quality is not None
    ax = frontier.plot(tmp_path / "f.png", alternatives=[lmfx.Alternative("pruned", 0.5, quality)])
    (line,) = [line for line in ax.lines if str(line.get_label()).startswith("pruned")]
    assert line.get_xdata()[0] == pytest.approx(0.5 * frontier.original)
    assert line.get_ydata()[0] == pytest.approx(-quality.loss())
    losses = [-float(v) for v in frontier.importance if v < 0]
    # No loss lies at 0 that is more than rounding beside the largest.
    assert ax.yaxis.get_transform().linthresh <= max(min(losses), 1e-6 * max(losses))
    with pytest.raises(OptionError, match="lmfx.alternative"):
        frontier.plot(alternatives=[("pruned", 0.5)])  # type: ignore[list-item]


def test_any_network_is_measured_and_judged_beside_the_original() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
    thin = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    images = torch.randn(8, 3, 10, 10)
    graph = lmfx.trace(model, images[:1])
    found = lmfx.alternative("thin", thin, graph, images, "roofline")
    assert found.what == "thin" and 0 < found.ratio < 1 and found.quality.images == 8
    same = lmfx.alternative("same", model, graph, images, "roofline")
    assert same.ratio == pytest.approx(1.0) and same.quality.divergence < 1e-9


def test_what_is_no_network_or_no_traced_graph_is_said() -> None:
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match="lmfx.trace"):
        lmfx.alternative("a", model, model, x)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nn.Module"):
        lmfx.alternative("a", "model", lmfx.trace(model, x[:1]), x)  # type: ignore[arg-type]
