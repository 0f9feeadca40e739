"""The documentation is a site that builds without a warning, and asks nothing of the network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOOKS = ROOT / "docs" / "_site" / "hooks.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(target)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return target


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("site_hooks", HOOKS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Sources(HTMLParser):
    """What a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        loads = tag in ("script", "img", "iframe") or (tag == "link" and values.get("rel") != "canonical")
        name = "href" if tag == "link" else "src"
        if loads and values.get(name):
            self.found.append(str(values[name]))


def test_every_page_of_docs_is_a_page_of_the_site(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").exists(), page.name
    assert {"contributing.html", "changelog.html"} <= {p.name for p in site.iterdir()}
    assert not (site / "_site").exists()


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        sources = Sources()
        sources.feed(page.read_text(encoding="utf-8"))
        assert [s for s in sources.found if re.match(r"(https?:)?//", s)] == [], page.name


def test_the_reference_is_made_of_docstrings_and_of_the_commands_help(site: Path) -> None:
    reference = (site / "reference" / "compress.html").read_text(encoding="utf-8")
    assert "unlabelled images, a tensor (images, ...) or a loader of batches" in reference
    commands = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    assert "lmfx doctor" in commands
    assert "--images FOLDER" in commands


def test_a_block_that_the_tests_do_not_run_is_a_block_of_the_site(site: Path) -> None:
    assert "no-run" not in (site / "tutorial.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("written", "becomes"),
    [
        ("[a](../latency.md#x)", "[a](../latency.md#x)"),
        ("[a](../../README.md)", "[a](../index.md)"),
        ("[a](../../CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("[`a`](../../lmfx/compress.py)", "`a`"),
        ("[a](https://example.org/x)", "[a](https://example.org/x)"),
        ("[a](#here)", "[a](#here)"),
        ("![a](../images/compose.svg)", "![a](../images/compose.svg)"),
        ("[a](../no-such-page.md)", "[a](../no-such-page.md)"),
    ],
)
def test_links_that_leave_the_documentation_are_led_or_taken_out(written: str, becomes: str, hooks: Any) -> None:
    assert hooks._links(written, "docs", "howto") == becomes


def test_pages_that_lie_outside_of_docs_lead_to_the_pages_inside(hooks: Any) -> None:
    assert hooks._links("[a](docs/latency.md) [b](Makefile)", "", "") == "[a](latency.md) b"
