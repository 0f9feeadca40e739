"""`RowTable`: a list of dicts that shows itself as a table, in a terminal and in a notebook; pandas and polars read it.

pandas.DataFrame(frontier.table())
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lmfx.environment.bounded_reading import in_one_line
from lmfx.passes.html_text import html_table

__all__ = ["RowTable"]

SHOWN = 24  # rows that are shown; all are there


class RowTable(list[dict[str, Any]]):
    """Rows of plain values with the same keys, in order. `str()` is a table of text, a notebook shows one of HTML."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(rows)

    def __str__(self) -> str:
        if not self:
            return "no rows"
        header = tuple(self[0])
        lines = [header, *(tuple(in_one_line(_cell(v)) for v in row.values()) for row in self._shown())]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        right = self._numbers()
        text = "\n".join(
            "  ".join(
                c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )
        return "\n".join(line.rstrip() for line in text.split("\n")) + self._more("\n")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self:
            return "no rows"
        rows = [[_cell(v) for v in row.values()] for row in self._shown()]
        return html_table(tuple(self[0]), rows, self._numbers(), self._more(""))

    def _shown(self) -> list[dict[str, Any]]:
        """All rows, or the first and last of evenly spaced ones where there are many."""
        if len(self) <= SHOWN:
            return list(self)
        return [self[round(i * (len(self) - 1) / (SHOWN - 1))] for i in range(SHOWN)]

    def _numbers(self) -> list[int]:
        return [i for i, v in enumerate(self[0].values()) if isinstance(v, (int, float))]

    def _more(self, before: str) -> str:
        return f"{before}{SHOWN} of {len(self)} rows, evenly spaced" if len(self) > SHOWN else ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)
