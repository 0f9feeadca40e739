"""Silences one thread's logs, warnings and prints, and lets one thread trace at a time; others are not affected.

A tracer that fails logs whole graphs, prints them, and warns of what the model has warned of before. `logging.disable`,
`warnings.catch_warnings` and `contextlib.redirect_stdout` belong to the process: two threads that use them side by side
undo each other in the wrong order, and the process stays silent for good. So silence is a filter that asks which thread
is speaking:

    handler.filter(record)        False in a thread that is inside `quiet`           every handler of every logger
    warnings.filters[0]           matches in such a thread only, and ignores
    sys.stdout, sys.stderr        write nothing in such a thread

They are put in when the first thread comes in and taken out when the last one leaves. Tracing patches `nn.Module` for
the whole process, so `tracing` lets one thread in at a time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

__all__ = ["quiet", "tracing"]


class _Depth(threading.local):
    value = 0


_DEPTH = _Depth()


class _Here(logging.Filter):
    """Both a filter of log records and the `match` of a warning's text."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _DEPTH.value

    def match(self, text: str) -> bool:
        return bool(_DEPTH.value)


class _Hushed:
    """A stream that drops what silent threads write."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return len(text) if _DEPTH.value else int(self.stream.write(text) or 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Shared:
    """What the silent threads share: how many there are, and what was put where."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """As at the start of the process; after a fork the other threads, and what they held, are gone."""
        self.tracing = threading.RLock()
        self.lock = threading.Lock()
        self.count = 0
        self.handlers: list[logging.Handler] = []
        self.streams: dict[str, _Hushed] = {}

    def enter(self) -> None:
        with self.lock:
            self.count += 1
            for handler in _handlers():
                if _HERE not in handler.filters:
                    handler.addFilter(_HERE)
                    self.handlers.append(handler)
            if not any(entry is _IGNORE for entry in warnings.filters):
                warnings.filters.insert(0, _IGNORE)  # type: ignore[attr-defined]
                warnings._filters_mutated()  # type: ignore[attr-defined]
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if stream is not None and not isinstance(stream, _Hushed):
                    self.streams[name] = _Hushed(stream)
                    setattr(sys, name, self.streams[name])

    def leave(self) -> None:
        with self.lock:
            self.count -= 1
            if self.count:
                return
            for handler in self.handlers:
                handler.removeFilter(_HERE)
            self.handlers.clear()
            if any(entry is _IGNORE for entry in warnings.filters):
                warnings.filters[:] = [entry for entry in warnings.filters if entry is not _IGNORE]  # type: ignore[index]
                warnings._filters_mutated()  # type: ignore[attr-defined]
            for name, hushed in self.streams.items():
                if getattr(sys, name) is hushed:  # else somebody has redirected it meanwhile
                    setattr(sys, name, hushed.stream)
            self.streams.clear()

    def after_fork(self) -> None:
        """The child of a fork has one thread: others that were silent, or traced, are not there to end it."""
        self.begin()
        self.count = 1
        self.handlers = [h for h in _handlers() if _HERE in h.filters]
        self.streams = {n: s for n in ("stdout", "stderr") if isinstance(s := getattr(sys, n), _Hushed)}
        if not _DEPTH.value:
            self.leave()


_HERE = _Here()
_IGNORE: Any = ("ignore", _HERE, Warning, None, 0)
_SHARED = _Shared()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_SHARED.after_fork)


def _handlers() -> list[logging.Handler]:
    known = [
        logging.root,
        *(v for v in list(logging.root.manager.loggerDict.values()) if isinstance(v, logging.Logger)),
    ]
    last = [] if logging.lastResort is None else [logging.lastResort]
    return [*last, *(handler for logger in known for handler in logger.handlers)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No logging, no warnings and no prints of this thread within; those of other threads go on."""
    _DEPTH.value += 1
    try:
        if _DEPTH.value > 1:
            yield
            return
        _SHARED.enter()
        try:
            yield
        finally:
            _SHARED.leave()
    finally:
        _DEPTH.value -= 1


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """The only thread that traces: torch.fx and torch.export patch `nn.Module` for the whole process."""
    with _SHARED.tracing:
        yield
