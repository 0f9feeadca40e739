"""Words and columns of a text report: tables, lists of names that are cut short, sizes, strides, counts, shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lmfx.environment.bounded_reading import in_one_line
from lmfx.passes.ir import ConvConfig

__all__ = ["count", "more", "percent", "short", "size", "stride_of", "table"]

NAMES = 4  # of a list of names


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns as wide as their widest entry, two spaces apart; those in `right` are aligned to the right.

    Names may come from files, so control characters in an entry are written out.
    """
    lines = [[in_one_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * w for w in widths])
    aligned = set(right)

    def text(line: Sequence[str]) -> str:
        cells = [c.rjust(w) if i in aligned else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return ("  " + "  ".join(cells)).rstrip()

    return "\n".join(text(line) for line in lines)


def stride_of(config: ConvConfig) -> str:
    """The stride as people read it: `2`, and `1/2` for an op that makes its map twice as large."""
    return f"1/{size(config.upscale)}" if config.upscale else size(config.stride)


def size(values: Sequence[int]) -> str:
    """3x3, or 1x7, or a dash for what has no spatial dimensions."""
    return "x".join(map(str, values)) or "-"


def short(names: Sequence[str], full: bool = False) -> str:
    """All names, or the first two and the last with their count; control characters in them are written out."""
    names = [in_one_line(name) for name in names]
    if full or len(names) <= NAMES:
        return ", ".join(names)
    return f"{', '.join(names[: NAMES - 2])}, ... {names[-1]} ({len(names)})"


def more(count: int) -> str:
    """The line that stands for what is left out of a list."""
    return f"\n  ... and {count} more; full=True lists them" if count > 0 else ""


def count(number: int, word: str) -> str:
    """1 network, 2 networks."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def percent(fraction: float) -> str:
    """A share with one digit after the point: 12.3 %."""
    return f"{100 * fraction:.1f} %"
