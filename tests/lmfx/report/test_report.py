"""The report says what was done, how fast it is, and what was refused and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import fx, nn

from lmfx.budget import Budget
from lmfx.latency import CalibrationLine, LatencyTable, Measurement
from lmfx.made_of import MadeOf, set_made_of
from lmfx.passes.algebra.linear_span import AffineChain, LinearSpan
from lmfx.passes.errors import InputError
from lmfx.passes.ir import Candidate, ConvConfig, MergePlan, Realization, Refusal, Span
from lmfx.report import report
from lmfx.report.spans import refusals_list
from lmfx.report.text import calibration_text, group_refusals
from lmfx.report.words import short, table
from lmfx.result import Result

CONV = ConvConfig(8, 8, (5, 3), (2, 1), ((2, 2), (1, 1)), (1, 1))


def candidate(start: int, realization: Realization, convs: tuple[str, ...], kept: tuple[str, ...] = ()) -> Candidate:
    span = Span("0", start, start + 1, f"in{start}", f"out{start}", f"out{start}", None)
    return Candidate(span, realization, None if realization == "drop" else CONV, convs, convs, kept)


RESULT = Result(
    plan=MergePlan(
        (
            candidate(0, "compose", ("a.conv1", "a.conv2", "a.conv3"), ("a.conv1", "a.conv3")),
            candidate(1, "drop", ("b.conv1", "b.conv2")),
            candidate(2, "fit", ("c.conv1", "c.conv2")),
        )
    ),
    budget=Budget.parse(0.6),
    merged=True,
    backend={"backend": "onnxruntime", "version": "1.31", "device": "some CPU", "threads": 1, "layout": "network"},
    names=("a.merged", "b.merged", "c.merged"),
    refusals=(
        Refusal("MaxPool2d is not affine", ("pool1",)),
        Refusal("the value of relu is read by 3 ops that do not rejoin", ("relu", "add", "cat", "out")),
        Refusal("the value of relu_1 is read by 3 ops that do not rejoin", ("relu_1", "add_1", "cat_1", "out")),
    ),
    kept=("stem", "last.conv"),
    candidates=34,
    predicted=2.9,
    measured=2.95,
    original=5.0,
    ratio=0.59,
    line=CalibrationLine(0.125, 1.5, 0.012, 0.98, float("nan")),
)


def network(result: Any, trainable: bool = False) -> fx.GraphModule:
    """Any network that carries a result."""
    root = nn.Module()
    body = LinearSpan(AffineChain([nn.Conv2d(8, 8, 5)]), ((2, 2), (2, 2)), CONV) if trainable else nn.ReLU()
    root.add_module("span", body)
    graph = fx.Graph()
    graph.output(graph.call_module("span", (graph.placeholder("x"),)))
    gm = fx.GraphModule(root, graph)
    set_made_of(gm, MadeOf(RESULT.plan, None, result))
    return gm


def line_with(text: str, word: str) -> str:
    (line,) = [line for line in text.splitlines() if word in line]
    return line


def test_the_head_counts_convolutions_and_spans() -> None:
    head = report(network(RESULT)).splitlines()[0]
    assert head == "9 convolutions became 4: 3 spans changed (1 compose, 1 fit, 1 drop)"


def test_latencies_are_given_as_predicted_and_as_measured() -> None:
    text = report(network(RESULT))
    assert line_with(text, "budget") == "  budget     0.6 (at most 3 ms)"
    assert line_with(text, "latency") == (
        "  latency    5 ms before, 2.95 ms after (59.0 %, 1.69x as fast); predicted 2.9 ms"
    )
    assert line_with(text, "backend") == "  backend    onnxruntime 1.31 on some CPU, 1 thread"


def test_the_error_of_the_table_is_told_where_it_is_known() -> None:
    text = report(network(RESULT))
    assert line_with(text, "rows") == (
        "  table      network = 0.125 ms + 1.5 x sum of its rows; off by 1.2 %, Kendall tau 0.98"
    )
    assert "rows" not in report(network(replace(RESULT, line=None)))


def test_merged_spans_are_a_table_of_name_kept_kernel_and_stride() -> None:
    text = report(network(RESULT))
    assert line_with(text, "a.merged").split() == (
        ["a.merged", "a.conv1,", "a.conv2,", "a.conv3", "2", "of", "3", "5x3", "2x1", "compose"]
    )
    assert line_with(text, "c.merged").split()[-6:] == ["fitted", "for", "2", "5x3", "2x1", "fit"]
    assert "b.merged" not in text


def test_dropped_pruned_and_kept_convolutions_are_named() -> None:
    text = report(network(RESULT))
    assert "dropped whole\n  b.conv1, b.conv2\n" in text
    assert "pruned before merging\n  a.conv2\n" in text
    assert "kept as they are\n  stem, last.conv\n" in text


def test_refusals_of_one_reason_are_one_line_with_examples() -> None:
    text = report(network(RESULT))
    assert line_with(text, "do not rejoin") == (
        "  2 x the value of ... is read by 3 ops that do not rejoin: relu, add, ... cat_1 (7)"
    )
    assert line_with(text, "MaxPool2d") == "  1 x MaxPool2d is not affine: pool1"


def test_the_form_is_that_of_the_network_and_not_of_the_result() -> None:
    # lmfx.merge keeps the result of the trainable form.
    assert "merged, 34 candidates" in line_with(report(network(replace(RESULT, merged=False))), "form  ")
    assert "trainable; lmfx.merge(net)" in report(network(RESULT, trainable=True))


def test_a_network_that_was_not_changed_says_so() -> None:
    nothing = replace(RESULT, plan=MergePlan(), names=(), measured=None, original=None, ratio=None, refusals=())
    text = report(network(nothing))
    assert text.startswith("nothing was changed: all 2 convolutions are as they were")
    assert "not measured" in text
    assert "at most" not in text
    assert "refused" not in text
    assert "dropped" not in text


def test_an_absolute_budget_is_not_told_twice() -> None:
    assert line_with(report(network(replace(RESULT, budget=Budget.parse("4.5ms")))), "budget") == "  budget     4.5ms"


def test_long_lists_end_in_a_count_and_full_lists_all() -> None:
    many = tuple(candidate(i, "fit", (f"layer{i}.conv",)) for i in range(20))
    result = replace(
        RESULT,
        plan=MergePlan(many),
        names=tuple(f"layer{i}.merged" for i in range(20)),
        kept=tuple(f"kept{i}" for i in range(9)),
    )
    text = report(network(result))
    assert "layer0.merged" in text
    assert "layer19.merged" not in text
    assert "... and 8 more; full=True lists them" in text
    assert "kept0, kept1, ... kept8 (9)" in text
    everything = report(network(result), full=True)
    assert "layer19.merged" in everything
    assert "kept4" in everything
    assert "more; full" not in everything


def test_a_report_is_text_that_a_prompt_shows_without_quotes() -> None:
    text = report(network(RESULT))
    assert isinstance(text, str)
    assert repr(text) == str(text)
    assert not any(line != line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    "what", [nn.Conv2d(1, 1, 1), None, "net", network(None)], ids=["module", "none", "text", "empty"]
)
def test_what_carries_no_result_is_refused(what: Any) -> None:
    with pytest.raises(InputError, match="carries no result of lmfx: pass what lmfx.compress"):
        report(what)


def test_the_most_frequent_reason_comes_first_and_options_in_it_stay() -> None:
    refusals = [
        Refusal("Flatten works on a vector, not on a feature map", ("flatten",)),
        Refusal("excluded: layer1.0.conv1 matches exclude=('layer1.*',)", ("x", "y")),
        Refusal("excluded: layer1.1.conv1 matches exclude=('layer1.*',)", ("y", "z")),
    ]
    reasons = [(reason, len(members)) for reason, members in group_refusals(refusals)]
    assert reasons == [
        ("excluded: ... matches exclude=('layer1.*',)", 2),
        ("Flatten works on a vector, not on a feature map", 1),
    ]


def test_a_table_aligns_its_columns() -> None:
    assert table(("name", "ms"), [("a", "1.5"), ("longer", "12.25")], right=[1]).splitlines() == [
        "  name       ms",
        "  ------  -----",
        "  a         1.5",
        "  longer  12.25",
    ]


@pytest.mark.parametrize(("count", "text"), [(0, ""), (4, "n0, n1, n2, n3"), (5, "n0, n1, ... n4 (5)")])
def test_a_list_of_names_is_short(count: int, text: str) -> None:
    assert short([f"n{i}" for i in range(count)]) == text


def test_what_a_table_promises_is_said_in_one_line() -> None:
    rows = {"0:0-1:keep": Measurement(1.0), "0:1-2:keep": Measurement(1.0, quality="busy")}
    assert calibration_text(LatencyTable(rows, {})) == (
        "not calibrated on whole networks\n1 row only seen while the machine was busy"
    )
    known = LatencyTable({"0:0-1:keep": Measurement(1.0)}, {}, CalibrationLine(0.5, 1.25, 0.01, 0.9, 0.02, 0.08, 13))
    assert calibration_text(known) == (
        "network = 0.5 ms + 1.25 x sum of its rows; off by 1.0 %, 2.0 % held out, at worst 8.0 %, Kendall tau 0.90 "
        "(13 networks)"
    )


BAD = "a\x1b]0;owned\x07\x9b2J\u202e\u2028b\nmerged"


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    "place", ["names", "convs", "dropped", "pruned", "kept", "reason", "nodes", "backend", "device"]
)
def test_names_of_a_file_hold_no_escape_codes_and_begin_no_line(place: str, full: bool) -> None:
    plain = {p: "name" for p in ("names", "convs", "dropped", "pruned", "kept", "reason", "nodes", "backend", "device")}

    def text(n: dict[str, str]) -> str:
        spans = (
            candidate(0, "compose", (n["convs"], n["pruned"], "a"), ("a",)),
            candidate(1, "drop", (n["dropped"],)),
        )
        made = replace(
            RESULT,
            plan=MergePlan(spans),
            names=(n["names"], "b.merged"),
            kept=(n["kept"],),
            refusals=(Refusal(n["reason"], (n["nodes"],)),),
            backend={"backend": n["backend"], "version": "1", "device": n["device"]},
        )
        return report(network(made), full=full)

    seen, usual = text({**plain, place: BAD}), text(plain)
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\u2028", "\r"} & set(seen)
    assert r"a\x1b]0;owned\x07\x9b2J\u202e\u2028b\nmerged" in seen
    assert len(seen.splitlines()) == len(usual.splitlines())


def test_a_table_is_as_wide_as_what_it_shows() -> None:
    text = table(("name", "ms"), [("a\x1b[31m", "1"), ("b", "2")])
    assert text.splitlines() == ["  name       ms", "  ---------  --", r"  a\x1b[31m  1", "  b          2"]


def test_a_list_of_refusals_holds_no_escape_codes() -> None:
    text = refusals_list([Refusal("why \x1b[2J", ("a\nb", "c\x07"))])
    assert text == "1 x why \\x1b[2J\n    a\\nb, c\\x07\n\n1 refusals"
