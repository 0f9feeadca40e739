"""Writes what values say of themselves: small HTML for notebooks, everything in it escaped, and lines for `print`.

Names of modules come from models and files, so no string reaches a page but through `escaped`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["escaped", "html_facts", "html_table", "plain_facts"]


def escaped(value: object) -> str:
    """A value as text that HTML shows as it is, control characters written out."""
    return html.escape(_printable(value), quote=True)


def _printable(value: object) -> str:
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = (), caption: str = ""
) -> str:
    """A table; the columns in `right` are aligned to the right. It inherits the colours of the notebook."""
    aligned = set(right)

    def line(cells: Sequence[object], tag: str) -> str:
        side = ("right" if i in aligned else "left" for i in range(len(cells)))
        joined = zip(cells, side, strict=True)
        return "".join(f'<{tag} style="text-align: {where}">{escaped(cell)}</{tag}>' for cell, where in joined)

    title = f'<caption style="text-align: left">{escaped(caption)}</caption>' if caption else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table>{title}<thead><tr>{line(header, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def html_facts(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """A heading and what there is to say, a line each."""
    rows = "".join(
        f'<tr><th style="text-align: left">{escaped(k)}</th><td style="text-align: left">{escaped(v)}</td></tr>'
        for k, v in facts
    )
    return f"<div><strong>{escaped(title)}</strong><table><tbody>{rows}</tbody></table></div>"


def plain_facts(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """The same for `print`: a heading, and a line for each fact, control characters written out."""
    listed = list(facts)
    width = max((len(name) for name, _ in listed), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {_printable(value)}" for name, value in listed)])
