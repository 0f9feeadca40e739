"""Keeps freed memory with the process while a job runs, where its environment would give it back at once.

Dask starts its workers with MALLOC_TRIM_THRESHOLD_=65536. In glibc this also switches off the threshold that grows with
what is freed, so every tensor beyond 128 KB is mapped, faulted in page by page, and unmapped: small networks trained at
half or a third of their speed. A job raises both thresholds, and when it ends sets them back and gives back what it has
freed. Neither changes a result.

The allocator is the application's and not a library's. Here it is changed all the same, because it is Dask that changed
it first, in a worker that runs nothing else, for as long as one job takes; and because the other way, a variable that
every user sets before the workers start, loses half of the machine without a word where it is forgotten: two workers
were 0.62 times as fast as one process without this (docs/benchmarks.md). Processes that Dask did not start are left as
they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

__all__ = ["memory_kept"]

VARIABLE = "MALLOC_TRIM_THRESHOLD_"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
DEFAULT_MMAP_THRESHOLD = 128 << 10
LARGEST_MMAP_THRESHOLD = 32 << 20  # what glibc takes on 64 bits
TRIM_THRESHOLD = 1 << 30


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Does nothing where the variable is not set, or where the C library is not glibc."""
    before = os.environ.get(VARIABLE, "")
    libc = _glibc() if before.isdecimal() else None
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, DEFAULT_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, min(int(before), 2**31 - 1))
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
