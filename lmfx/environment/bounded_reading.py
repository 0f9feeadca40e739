"""Reads files that somebody else may have made, up to a bound, and never more deeply than lmfx writes.

    a folder, a fifo, a device     refused: reading one may never end
    more than MOST_BYTES           refused before it is read
    deeper than DEEPEST            refused; whatever walks the document afterwards may be recursive
    NaN, Infinity, 1e999           refused: JSON has no such numbers, and comparisons with them are all false

What is printed of such a file goes through `printable`, because a terminal obeys escape codes.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["DEEPEST", "MOST_BYTES", "in_one_line", "parse_json", "printable", "read_bounded"]

MOST_BYTES = 2**28  # of a JSON file; the largest table of the zoo has 2 MB
DEEPEST = 64
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)  # strings, so that brackets in them do not count


def read_bounded(path: str | os.PathLike[str], most: int = MOST_BYTES) -> str:
    """The text of a regular file of at most `most` bytes. Raises `OSError`, or `ValueError` for any other file."""
    target = Path(path)
    seen = target.stat()
    if not stat.S_ISREG(seen.st_mode) and not stat.S_ISDIR(seen.st_mode):
        raise ValueError("it is no regular file")
    if seen.st_size > most:
        raise ValueError(f"it has {seen.st_size} bytes, and lmfx reads {most} at most")
    with open(target, "rb") as file:
        data = file.read(most + 1)  # it may have grown meanwhile
    if len(data) > most:
        raise ValueError(f"it has more than the {most} bytes that lmfx reads at most")
    return data.decode("utf-8")


def parse_json(text: str, most: int = MOST_BYTES) -> Any:
    """The value of a JSON text. Raises `ValueError` for anything that lmfx does not write: see the module."""
    if len(text) > most:
        raise ValueError(f"it has {len(text)} characters, and lmfx reads {most} at most")
    _check_depth(text)
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _check_depth(text: str) -> None:
    """Counts brackets outside of strings, before a parser recurses into them."""
    depth = 0
    for found in _TOKENS.finditer(text):
        if found[0] in ("[", "{"):
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        elif found[0] in ("]", "}"):
            depth -= 1


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"it has the number {name}, which is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def printable(text: str) -> str:
    """The text with control and direction characters written out (`\\x1b`), except for line ends and tabs."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else c.encode("unicode_escape").decode()
        for c in text
    )


def in_one_line(text: str) -> str:
    """`printable`, with line ends and tabs written out as well: a name cannot pretend to be a line of its own."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c
        for c in text
    )
