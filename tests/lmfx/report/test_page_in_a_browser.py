"""The page works in a real browser: no errors, the slider changes the drawing, keys, light and dark, print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lmfx
from lmfx.report.page import page_text
from tests import page_networks
from tests.chromium import Chromium, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium on this machine")

SHOWN = "[...document.querySelectorAll('#result [data-change]')].filter((e) => !e.hasAttribute('hidden'))"
DRAWN = SHOWN + ".map((e) => Number(e.dataset.change))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    path = tmp_path_factory.mktemp("page") / "report.html"
    lmfx.report(page_networks.compressed()).html(path)
    with Chromium() as found:
        found.open(path)
        yield found


def data(browser: Chromium, what: str) -> Any:
    return browser.evaluate(f"JSON.parse(document.getElementById('data').textContent).{what}")


def show(browser: Chromium, name: str) -> None:
    """Scrolls to an element, and waits until it is drawn there."""
    browser.evaluate(f"document.getElementById('{name}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
    browser.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")


def test_it_opens_without_an_error_and_asks_for_nothing(browser: Chromium) -> None:
    assert browser.evaluate("document.body.classList.contains('ready')")
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


def test_the_slider_changes_the_drawing_to_the_plan_of_each_point(browser: Chromium) -> None:
    browser.evaluate("document.getElementById('budget').focus()")
    browser.press("Home")
    seen = []
    for _ in range(3):
        stop = int(browser.evaluate("document.getElementById('budget').value"))
        drawn = browser.evaluate(DRAWN)
        assert sorted(drawn) == sorted(data(browser, f"stops[{stop}].changes"))
        assert browser.evaluate("document.getElementById('say-ms').textContent") == data(
            browser, f"stops[{stop}].say.ms"
        )
        seen.append((stop, tuple(drawn)))
        browser.press("ArrowRight")
    assert [stop for stop, _ in seen] == [0, 1, 2]
    assert len({drawn for _, drawn in seen}) > 1
    browser.press("End")
    assert browser.evaluate(DRAWN) == []  # the slowest point is the original


def test_what_a_change_covers_is_not_drawn_beneath_it(browser: Chromium) -> None:
    browser.evaluate("document.getElementById('back').click()")
    rows = {
        row
        for number in data(browser, "result.changes")
        for first, last in data(browser, f"changes[{number}].rows")
        for row in range(first, last + 1)
    }
    hidden = browser.evaluate(
        "[...document.querySelectorAll('#result [data-row]')].filter((e) => e.hasAttribute('hidden'))"
        ".map((e) => Number(e.dataset.row))"
    )
    assert set(hidden) == rows and rows
    gone = "[...document.querySelectorAll('#result [data-edge][hidden]')].map((e) => Number(e.dataset.edge))"
    edges = {edge for number in data(browser, "result.changes") for edge in data(browser, f"changes[{number}].edges")}
    assert set(browser.evaluate(gone)) == edges
    assert browser.evaluate("document.getElementById('which').textContent") == "The result"


def test_labels_do_not_overlap_and_nothing_is_cut_off(browser: Chromium) -> None:
    browser.evaluate("document.getElementById('back').click()")
    overlapping = browser.evaluate(
        """(() => {
        const shown = [...document.querySelectorAll('#network text')]
          .map((e) => [e.textContent, e.getBoundingClientRect()]).filter(([, b]) => b.width > 0);
        const found = [];
        shown.forEach(([s, a], i) => shown.slice(i + 1).forEach(([t, b]) => {
          const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
          const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
          if (x > 1 && y > 2) found.push([s, t]);
        }));
        const edge = document.getElementById('network').getBoundingClientRect().right;
        shown.filter(([, b]) => b.right > edge).forEach(([s]) => found.push([s, 'cut off']));
        return found;
        })()"""
    )
    assert overlapping == []


def test_pointing_at_a_layer_says_what_it_is(browser: Chromium) -> None:
    show(browser, "drawing")
    row = "document.querySelectorAll('#network .row')[2]"
    x, y = browser.evaluate(
        f"(() => {{ const b = {row}.getBoundingClientRect(); return [b.left + 60, b.top + 12]; }})()"
    )
    browser.point(x, y)
    assert browser.evaluate("document.getElementById('tip').hidden") is False
    told = browser.evaluate("document.getElementById('tip').textContent")
    assert told == browser.evaluate(f"{row}.dataset.tip")
    assert "channels" in told and "kernel" in told and " ms" in told


def test_arrow_keys_go_from_layer_to_layer(browser: Chromium) -> None:
    browser.evaluate("document.getElementById('drawing').focus()")
    at = "Number(document.activeElement.dataset.at)"
    browser.press("ArrowDown")
    first = browser.evaluate(at)
    browser.press("ArrowDown")
    assert (first, browser.evaluate(at)) == (0, 1)
    browser.press("End")
    assert browser.evaluate(at) == browser.evaluate("document.querySelectorAll('#network .row').length") - 1


def test_a_click_on_the_frontier_goes_to_that_point(browser: Chromium) -> None:
    show(browser, "chart")
    x, y = browser.evaluate(
        "(() => { const b = document.querySelector('[data-stop=\"0\"]').getBoundingClientRect();"
        " return [b.left + b.width / 2, b.top + b.height / 2]; })()"
    )
    browser.point(x, y, click=True)
    assert browser.evaluate("document.getElementById('budget').value") == "0"
    place = "[...['cx', 'cy'].map((name) => document.{}.getAttribute(name))]"
    at, stop = place.format("getElementById('at')"), place.format("querySelector('[data-stop=\"0\"]')")
    assert browser.evaluate(at) == browser.evaluate(stop)
    browser.evaluate("document.getElementById('back').click()")
    assert browser.evaluate(at) != browser.evaluate(stop)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(browser: Chromium, scheme: str) -> None:
    browser.media("screen", scheme)
    low = browser.evaluate(
        """(() => {
        const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
        const linear = (v) => (v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4);
        const light = (c) => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
        const contrast = (a, b) => {
          const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
          return (x + .05) / (y + .05);
        };
        const found = [];
        const card = rgb(getComputedStyle(document.querySelector('section')).backgroundColor);
        for (const e of document.querySelectorAll('h1, h2, .detail, .lead, dt, dd, td, tbody th, .advice, .reason')) {
          if (e.closest('.warning')) continue;
          const c = contrast(rgb(getComputedStyle(e).color), card);
          if (c < 4.5) found.push([e.className || e.tagName, c]);
        }
        for (const e of document.querySelectorAll('#network .block text:not(.words)')) {
          const box = e.parentElement.querySelector('.g');
          if (!box) continue;
          const c = contrast(rgb(getComputedStyle(e).fill), rgb(getComputedStyle(box).fill));
          if (c < 4.5) found.push([e.textContent, c]);
        }
        return found;
        })()"""
    )
    browser.media("screen", "light")
    assert low == []


def test_dark_is_dark_and_paper_is_light(browser: Chromium) -> None:
    colour = "getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()"
    browser.media("screen", "light")
    light = browser.evaluate(colour)
    browser.media("screen", "dark")
    assert browser.evaluate(colour) != light
    browser.media("print", "dark")
    assert browser.evaluate(colour) == light
    assert browser.evaluate("getComputedStyle(document.querySelector('.slider')).display") == "none"
    assert browser.evaluate("getComputedStyle(document.querySelector('.drawing')).overflow") == "visible"
    browser.media("screen", "light")


def test_it_prints(browser: Chromium, tmp_path: Path) -> None:
    assert browser.pdf(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert browser.errors == []


def test_the_longest_bar_that_a_plan_shows_has_the_whole_width(browser: Chromium) -> None:
    browser.evaluate("document.getElementById('budget').focus()")
    for key in ("Home", "End"):
        browser.press(key)
        widest = browser.evaluate(
            "Math.max(...[...document.querySelectorAll('#bars tbody tr:not([hidden]) .bar > *')]"
            ".map((e) => e.getBoundingClientRect().width / e.parentElement.clientWidth))"
        )
        assert 0.8 < widest <= 1


def test_a_drawing_begins_where_the_first_change_is(tmp_path: Path) -> None:
    path = tmp_path / "deep.html"
    text = page_text(page_networks.compressed())
    # the same page whose drawing is so low that the changes would be out of sight
    path.write_text(text.replace("max-height: 640px", "max-height: 60px"))
    with Chromium() as browser:
        browser.open(path)
        seen = browser.evaluate(
            "(() => { const box = document.getElementById('drawing').getBoundingClientRect();"
            f" return {SHOWN}.map((e) => e.getBoundingClientRect().top - box.top); }})()"
        )
        assert browser.evaluate("document.getElementById('drawing').scrollTop") > 0
        assert browser.evaluate("scrollY") == 0
    assert min(seen) < 120
