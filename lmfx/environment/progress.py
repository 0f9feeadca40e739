"""Shows progress bars on everything long: tqdm with an ETA, on stderr, and nothing where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

__all__ = ["progress"]

T = TypeVar("T")
NO_TERMINAL_SECONDS = 10.0  # a log file gets a line this often, not ten a second


def progress(work: Iterable[T] | int, desc: str, enabled: bool = True) -> tqdm[T]:
    """A bar over an iterable, or one of `work` steps to `update(1)`.

    Use it with `with`, so that Ctrl-C leaves a clean line.

    Disabled, it prints nothing. On something that is not a terminal it prints a line every ten seconds.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        None if isinstance(work, int) else work,
        total=work if isinstance(work, int) else None,
        desc=desc,
        disable=not enabled or sys.stderr is None,
        file=sys.stderr,
        mininterval=0.1 if terminal else NO_TERMINAL_SECONDS,
        miniters=None if terminal else 1,
        dynamic_ncols=terminal,
        leave=True,
    )
