"""Shows what is being done on stderr: a line for each step, with its time, and a bar with an ETA on everything long.

measuring candidates on onnxruntime ...
profile: 100%|█████████████████████████| 148/148 [00:21<00:00]
  22 s
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

__all__ = ["duration", "progress", "step"]

T = TypeVar("T")
WORTH_SAYING = 1.0  # seconds; the end of a shorter step is no news
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


@contextlib.contextmanager
def step(text: str, enabled: bool = True) -> Iterator[None]:
    """Says what is done inside, and afterwards how long it took, where that was a second or more."""
    shown = enabled and sys.stderr is not None
    if shown:
        tqdm.write(f"{text} ...", file=sys.stderr)  # leaves a bar that is being drawn alone
    start = time.monotonic()
    yield
    spent = time.monotonic() - start
    if shown and spent >= WORTH_SAYING:
        tqdm.write(f"  {duration(spent)}", file=sys.stderr)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 2.3 s, 41 s, 3 min 5 s, 1 h 2 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
