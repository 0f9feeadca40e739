"""A page is one file that needs nothing else, says what the result says, and is HTML whatever names a model has."""

from __future__ import annotations

import builtins
import copy
import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import lmfx
from lmfx.made_of import MadeOf, made_of, set_made_of
from lmfx.passes.errors import InputError, MissingExtra, OptionError
from lmfx.quality.measures import OutputQuality, Quality
from lmfx.report.page import page_text
from lmfx.report.stops import MOST
from lmfx.result import Alternative, Result
from tests import page_networks

MOST_BYTES = 3_000_000
VOID = {"meta", "link", "br", "input", "hr", "img"}


class Balanced(HTMLParser):
    """Checks that what is opened is closed, and keeps the text and the attributes of all elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def read(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def words(text: str) -> str:
    return " ".join(" ".join(read(text).text).split())


def data(text: str) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


@pytest.fixture(scope="module")
def net() -> Any:
    return page_networks.compressed()


@pytest.fixture(scope="module")
def page(net: Any) -> str:
    return page_text(net, title="a <i>model</i>", command="lmfx compress '<net>' & more")


@pytest.fixture(scope="module")
def result(net: Any) -> Result:
    return lmfx.result_of(net)


def changed(net: Any, **values: Any) -> Any:
    """A network with another result, and the same graph."""
    made = made_of(net)
    assert made is not None and made.result is not None
    other = fx.GraphModule(net, net.graph)
    set_made_of(other, MadeOf(made.plan, made.origin, replace(made.result, **values)))
    return other


def test_the_report_writes_its_page_and_says_where(net: Any, tmp_path: Path) -> None:
    path = lmfx.report(net).html(tmp_path / "new" / "report.html", title="mine")
    assert path == tmp_path / "new" / "report.html"
    assert "<title>mine – lmfx</title>" in path.read_text(encoding="utf-8")


def test_a_page_is_one_small_file_that_asks_for_nothing_from_elsewhere(page: str) -> None:
    assert len(page.encode()) < MOST_BYTES
    for _, attributes in read(page).seen:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "action"):
            link = attributes.get(name)
            assert link is None or link.startswith(("#", "data:")), link
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\s*\(", page)
    assert not re.search(r"https?://", page)


def test_every_element_is_closed_and_no_id_is_used_twice(page: str) -> None:
    ids = [a["id"] for _, a in read(page).seen if "id" in a]
    assert len(ids) == len(set(ids)) > 10


def test_names_and_commands_that_are_markup_are_shown_as_text(page: str) -> None:
    assert all("style" in a for tag, a in read(page).seen if tag == "b")  # bars, and no name
    assert page_networks.SHARP not in page
    assert html.escape(page_networks.SHARP) in page
    assert "<i>model" not in page and "a <i>model</i>" in words(page)
    assert "<net>" not in page and "lmfx compress '<net>' & more" in words(page)


def test_data_for_the_script_cannot_end_the_script(page: str) -> None:
    (raw,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert "<" not in raw and "&" not in raw


def test_the_answer_has_the_figures_of_the_result(page: str, result: Result) -> None:
    assert result.ratio is not None and result.quality is not None
    text = words(page)
    assert f"{1 / result.ratio:.2f}× as fast, {result.quality.kept:.1%} of what it computes is kept" in text
    assert f"Judged on {result.quality.images} images that no fit saw" in text
    assert f"{result.ratio:.1%}" in text
    assert f"budget {result.budget}" in text
    assert "Calculated" in text and "Measured:" not in text  # by a backend that is no clock


def test_the_slider_stops_at_the_points_of_the_frontier(page: str, result: Result) -> None:
    frontier = result.frontier
    assert frontier is not None and len(frontier) <= MOST
    found = data(page)
    assert [s["point"] for s in found["stops"]] == list(range(len(frontier)))
    assert [s["ms"] for s in found["stops"]] == frontier.latency.tolist()
    assert [s["loss"] for s in found["stops"]] == [0.0 - v for v in frontier.importance.tolist()]
    for stop in found["stops"]:
        plan = frontier.plan(stop["point"]).candidates
        assert [found["changes"][i]["kind"] for i in stop["changes"]] == [c.realization for c in plan]
        assert stop["say"]["share"] == f"{stop['ms'] / frontier.original:.1%}"
    (slider,) = [a for tag, a in read(page).seen if tag == "input"]
    assert (slider["min"], slider["max"]) == ("0", str(len(frontier) - 1))


def test_the_result_is_shown_first(page: str, result: Result) -> None:
    found = data(page)
    kinds = [found["changes"][i]["kind"] for i in found["result"]["changes"]]
    assert kinds == [c.realization for c in result.plan.candidates]
    assert found["result"]["ms"] == result.predicted
    same = [i for i, s in enumerate(found["stops"]) if s["changes"] == found["result"]["changes"]]
    gaps = [abs(s["ms"] - found["result"]["ms"]) for s in found["stops"]]
    assert found["nearest"] == (same[0] if same else gaps.index(min(gaps)))


def test_the_result_has_the_place_of_its_own_figures_and_else_that_of_the_nearest_stop(
    net: Any, result: Result
) -> None:
    places = [(a["cx"], a["cy"]) for _, a in read(page_text(net)).seen if "data-stop" in a]

    def own(other: Any) -> tuple[str | None, str | None]:
        (found,) = [(a["cx"], a["cy"]) for _, a in read(page_text(other)).seen if a.get("id") == "at"]
        return found

    frontier = result.frontier
    assert frontier is not None
    point = frontier.plan(3)
    here = own(changed(net, plan=replace(result.plan, importance=point.importance), predicted=point.latency))
    assert here == places[3]
    assert own(changed(net, plan=replace(point, importance=None))) == places[3]


def test_what_is_calculated_is_not_called_measured(net: Any, result: Result) -> None:
    assert result.evidence is not None
    evidence = replace(result.evidence, measured=((1.0, 1.1), (2.0, 2.1)))
    assert "Predicted against calculated" in words(page_text(changed(net, evidence=evidence)))
    clock = words(page_text(changed(net, evidence=evidence, backend={"backend": "onnxruntime"})))
    assert "Predicted against measured" in clock and "Calculated" not in clock


def test_errors_on_images_that_fits_saw_are_not_called_held_out(net: Any, result: Result) -> None:
    assert result.quality is not None and result.quality.held_out
    seen = words(page_text(changed(net, quality=replace(result.quality, held_out=False))))
    assert "on images that no fit saw" in words(page_text(net))
    assert "no fit saw" not in seen and "on images that the fits saw as well: 0 is exact" in seen


def test_without_scripts_the_plan_of_the_result_is_shown(page: str) -> None:
    found = data(page)
    wanted = set(found["result"]["changes"])
    seen = [(int(a["data-change"]), "hidden" in a) for _, a in read(page).seen if "data-change" in a]  # type: ignore[arg-type]
    assert {i for i, hidden in seen if not hidden} == wanted
    assert {i for i, hidden in seen if hidden} == set(range(len(found["changes"]))) - wanted
    edges = {int(a["data-edge"]) for _, a in read(page).seen if "data-edge" in a and "hidden" in a}  # type: ignore[arg-type]
    assert edges == {edge for i in wanted for edge in found["changes"][i]["edges"]}


def test_the_latencies_of_layers_are_rows_of_the_table(page: str, result: Result) -> None:
    assert result.frontier is not None and result.frontier.latencies is not None
    table = result.frontier.latencies
    cells = re.findall(r'data-row="\d+"[^>]*>.*?<td class="num">(.*?)</td><td class="num">(.*?)</td>', page)
    assert len(cells) > 5
    rows = {f"{m.ms:.3g}" for key, m in table.items() if key.endswith(":keep")}
    for before, after in cells:
        assert before == after
        assert f"{float(before):.3g}" in rows


def test_the_longest_bar_that_is_seen_has_the_whole_width(page: str) -> None:
    (most,) = (float(m) for m in re.findall(r'id="bars" style="--most:([\d.]+)"', page))
    rows = re.findall(r"<tr class=\"k-\w+\" data-(?:row|change)([^>]*)>.*?--w:([\d.]+).*?--w:([\d.]+)", page)
    seen = [max(float(a), float(b)) for start, a, b in rows if "hidden" not in start]
    longest = [max(float(a), float(b)) for _, a, b in rows]
    assert max(seen) == most < max(longest) == 100


def test_the_errors_of_spans_are_those_that_were_measured(page: str, result: Result) -> None:
    assert result.evidence is not None
    text = words(page)
    assert len(result.evidence.errors) == len(result.plan.candidates) > 0
    for error in result.evidence.errors:
        assert error is not None and f"{error:.3g}" in text.replace(",", "")


def test_each_refusal_comes_with_what_to_do(page: str, result: Result) -> None:
    text = words(page)
    assert result.refusals
    assert text.count("The channels are needed elsewhere") >= 1
    assert "AdaptiveAvgPool2d is not affine" in text


def test_other_ways_to_be_as_fast_stand_beside_the_result(net: Any, result: Result) -> None:
    assert result.quality is not None
    text = page_text(net, alternatives=[Alternative("pruned <x>", 0.625, result.quality)])
    assert "pruned <x>" in words(text) and "62.5%" in words(text)
    assert "Other ways to be as fast" not in words(page_text(net))


def of_classes(net: Any, images: int, agreement: float) -> Any:
    """The network, judged as a classifier with this agreement."""
    output = OutputQuality("y", "scores", 0.1, agreement, kl=0.25)
    return changed(net, quality=Quality((output,), images))


@pytest.mark.parametrize(
    ("images", "agreement", "said"),
    [(16, 11 / 16, "11 of 16 answers are the same"), (32, 1.0, "32 of 32 answers are the same")],
)
def test_of_few_images_answers_are_counted_and_their_share_has_bounds(
    net: Any, images: int, agreement: float, said: str
) -> None:
    text = words(page_text(of_classes(net, images, agreement)))
    assert said in text and f"{agreement:.1%}of" not in text and f"{agreement:.1%} of the" not in text
    low, high = map(int, re.findall(r"leave it between (\d+)% and (\d+)%", text)[0])
    # a binomial of that share gives as few, or as many, with a chance of a few per cent
    count = round(agreement * images)
    most = sum(
        math.comb(images, k) * (low / 100) ** k * (1 - low / 100) ** (images - k) for k in range(count, images + 1)
    )
    assert 0.005 < most < 0.08
    assert low < 100 * agreement and (high == 100 if agreement == 1 else 100 * agreement < high < 90)


@pytest.mark.parametrize(("images", "agreement"), [(200, 0.6875), (16, 0.7031), (1, 1.0)])
def test_shares_of_many_images_of_places_and_of_one_image_are_in_per_cent(
    net: Any, images: int, agreement: float
) -> None:
    text = words(page_text(of_classes(net, images, agreement)))
    assert f"{agreement:.1%} of the answers are the same" in text
    assert "leave it between" not in text


def test_ways_that_keep_as_much_are_told_apart_by_how_far_their_outputs_went(net: Any, result: Result) -> None:
    near, far = (Quality((OutputQuality("y", "scores", 0.1, 0.5, kl=kl),), 16) for kl in (0.125, 0.875))
    text = words(page_text(changed(net, quality=near), alternatives=[Alternative("smaller", 0.5, far)]))
    assert re.search(r"kept\s*KL\b", text) and "0.125" in text and "0.875" in text
    assert result.quality is not None and result.quality.kl is None
    text = words(page_text(net, alternatives=[Alternative("smaller", 0.5, far)]))
    assert re.search(r"kept\s*divergence\b", text)


def test_of_random_weights_nothing_is_said_that_their_outputs_would_have_to_tell(net: Any, result: Result) -> None:
    assert result.quality is not None
    output = replace(result.quality.outputs[0], divergence=3.0)
    bad = changed(net, quality=replace(result.quality, outputs=(output,)))
    other = Alternative("pruned", 0.625, result.quality)
    text = page_text(bad, alternatives=[other], random_weights=True)
    assert "The weights are random: latencies hold" in words(text)
    (hero,) = re.findall(r'<section id="answer".*?</section>', text, re.DOTALL)
    assert "% of" not in words(hero) and "Collapsed." not in hero and "the same" not in hero and "PSNR" not in hero
    assert "Other ways" not in words(text)
    assert re.search(r"<h1[^>]*>[\d.]+× as fast</h1>", text)
    assert "weights are random" not in words(page_text(bad))


def test_a_collapse_is_said_aloud(net: Any, result: Result) -> None:
    assert result.quality is not None
    output = replace(result.quality.outputs[0], divergence=3.0)
    bad = changed(net, quality=replace(result.quality, outputs=(output,)))
    assert "Collapsed." in words(page_text(bad))
    assert "Collapsed." not in words(page_text(net))


def test_a_network_from_a_folder_has_a_page_without_frontier_and_drawing(net: Any, tmp_path: Path) -> None:
    lmfx.save(net, tmp_path)
    text = page_text(lmfx.load(tmp_path, page_networks.model()))
    assert "How it was made" in words(text)
    assert 'id="budget"' not in text and 'id="network"' not in text
    assert "loaded from a file" in words(text) and "loaded from a file" not in words(page_text(net))


def test_a_page_of_loss_free_merges_says_that_the_function_is_the_same(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3), nn.ReLU()).eval()
    text = page_text(lmfx.simplify(model, torch.randn(1, 3, 9, 9)))
    assert "computes the same" in words(text)
    assert 'id="network"' in text and 'id="budget"' not in text


def test_without_jinja2_the_error_names_the_extra(net: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "jinja2":
            raise ImportError("No module named 'jinja2'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r'pip install "lmfx\[html\]"'):
        lmfx.report(net).html(tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_an_error_that_names_it(net: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="report.html"):
        lmfx.report(net).html(tmp_path / "file" / "report.html")


def test_a_report_is_text_and_is_copied_as_text(net: Any) -> None:
    text = lmfx.report(net)
    assert isinstance(text, str) and repr(text) == str(text)
    assert type(copy.deepcopy(text)) is str and copy.deepcopy(text) == str(text)
    with pytest.raises(InputError, match="lmfx.report"):
        type(text)("made by hand").html("nowhere.html")
