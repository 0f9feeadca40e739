"""Hooks of the documentation site: pages from outside of docs/, the command line's help, links that leave docs/.

CONTRIBUTING.md, CHANGELOG.md    pages of the site
reference/command-line.md        what --help says, of every command
a link to a file of the code     its text: the site has no copy of the repository
```python no-run                 a block of Python like the others
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
LINK = re.compile(r"\[([^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\(([^)\s]+)\)")
WIDTH = "100"


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are not in docs/."""
    for source, target in PAGES.items():
        if target != "index.md":
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, target, content=_links(text, "", "")))
    files.append(File.generated(config, "reference/command-line.md", content=_command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Takes out what only GitHub and the tests understand."""
    text = markdown.replace("```python no-run", "```python")
    source = page.file.src_uri
    return text if page.file.generated_by else _links(text, "docs", posixpath.dirname(source))


def _links(text: str, base: str, folder: str) -> str:
    """The text with links that leave docs/ led to the site's pages or taken out; the page is in `folder` of `base`."""

    def changed(found: re.Match[str]) -> str:
        shown, target = found[1], found[2]
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return found[0]
        inside = posixpath.normpath(posixpath.join(base, folder, path))
        if inside.startswith("docs/"):
            page = inside.removeprefix("docs/")
        elif inside in PAGES:
            page = PAGES[inside]
        else:
            return shown
        if not (ROOT / "docs" / page).exists() and page not in PAGES.values():
            return found[0]  # mkdocs will warn of it
        relative = posixpath.relpath(page, folder or ".")
        return f"[{shown}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(changed, text)


def _command_line() -> str:
    os.environ["COLUMNS"] = WIDTH  # argparse looks there
    from lmfx.cli.command_line import _parser

    parser = _parser()
    parts = ["# The command line\n", *_help(parser)]
    return "\n".join(parts)


def _help(parser: argparse.ArgumentParser) -> list[str]:
    parts = [f"## {parser.prog}\n", f"```text\n{parser.format_help().rstrip()}\n```\n"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for made in action.choices.values():
                parts += _help(made)
    return parts
