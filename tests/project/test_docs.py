"""What the documentation shows works: its Python runs, its links lead somewhere, its commands exist.

A block marked ```python is run, all blocks of one page in one namespace and in an empty folder. One marked
```python no-run (it needs a download, a GPU or minutes) is compiled only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS = {"", "text", "bash", "json", "python", "python no-run"}


@dataclass(frozen=True)
class Block:
    kind: str
    line: int  # of its first line of code, counted from 1
    code: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page in order. ValueError for a fence that is open or of an unknown kind."""
    found: list[Block] = []
    start: int | None = None
    kind = ""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if start is None:
            start, kind = number + 1, line.removeprefix("```").strip()
            if kind not in KINDS:
                raise ValueError(f"line {number}: a block of the unknown kind {kind!r}; known are {sorted(KINDS)}")
        else:
            found.append(Block(kind, start, "\n".join(lines[start - 1 : number - 1])))
            start = None
    if start is not None:
        raise ValueError(f"line {start - 1}: the block is never closed")
    return found


def run(page: Path) -> int:
    """Runs a page's Python and returns how many blocks were run. A traceback shows the page's own line numbers."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    count = 0
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.kind.startswith("python"):
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            if block.kind == "python":
                exec(code, namespace)
                count += 1
    return count


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    count = run(page)
    if page.name == "README.md":
        assert count, "the README shows no Python that runs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_to_files_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_make_targets_that_a_page_names_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= targets


def test_the_readme_starts_with_the_commands() -> None:
    first = blocks((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    assert [line.split("  ")[0] for line in first.code.splitlines()[-2:]] == ["make demo", "make test"]


def test_the_license_is_the_one_that_the_package_names() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2026 the lmfx authors" in text


def test_blocks_of_one_page_share_a_namespace(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\na = 1\n```\ntext\n```python\nassert a == 1\n```\n")
    assert run(page) == 2


def test_a_block_that_raises_fails_with_the_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("one\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run(page)
    assert caught.traceback[-1].lineno + 1 == 5


def test_a_block_that_is_not_run_must_still_be_python(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python no-run\nraise SystemExit\n```\n")
    assert run(page) == 0
    page.write_text("```python no-run\nif:\n```\n")
    with pytest.raises(SyntaxError):
        run(page)


@pytest.mark.parametrize(
    ("text", "says"),
    [("```python\nx = 1\n", "never closed"), ("```py\nx = 1\n```\n", "'py'"), ("```python norun\n```\n", "norun")],
)
def test_a_block_that_would_be_skipped_by_mistake_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        blocks(text)
