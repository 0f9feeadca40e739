"""Runs a function for each name in a process of its own: limits on time and memory, results as they come.

Processes are forked from a parent that has imported everything already, which saves seconds a network, and each result
is one line of a JSON file, so that a run that is stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Row", "read_rows", "run_all"]

Row = dict[str, Any]


@dataclass
class _Job:
    name: str
    pipe: int
    begin: float
    heavy: bool
    data: bytes = b""


def read_rows(file: Path, source: str | None) -> dict[str, Row]:
    """The finished rows with this `source` (None: any), by name, the last of each; half-written lines are left out."""
    rows: dict[str, Row] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if source in (None, row.get("source")):
                rows[row["model"]] = row
    return rows


def run_all(
    names: Sequence[str],
    work: Callable[[str], Row],
    file: Path,
    source: str,
    *,
    jobs: int = 2,
    seconds: float = 300.0,
    memory_gb: float = 6.0,
    heavy: Callable[[str], bool] = lambda name: False,
    tick: Callable[[Row], None] = lambda row: None,
) -> dict[str, Row]:
    """`work(name)` for each name, at most `jobs` at a time and one heavy one; appends a line a name to `file`.

    A process that takes longer than `seconds` is killed, one that asks for more than `memory_gb` over what the parent
    has mapped gets a MemoryError or a RuntimeError; both end in a row with an `error`.
    """
    rows: dict[str, Row] = {}
    waiting, running = list(names), dict[int, _Job]()
    file.parent.mkdir(parents=True, exist_ok=True)
    stopped: list[int] = []  # a signal may come between a fork and its entry in `running`, so it only leaves a note
    before = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    try:
        while waiting or running:
            if stopped:
                sys.exit(128 + stopped[0])
            while len(running) < jobs and (name := _next(waiting, running, heavy)) is not None:
                pid, pipe = _fork(name, work, memory_gb)
                running[pid] = _Job(name, pipe, time.monotonic(), heavy(name))
            for pid, job in list(running.items()):
                row = _poll(pid, job, seconds)
                if row is not None:
                    del running[pid]
                    rows[job.name] = row = {**row, "source": source}
                    with file.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(row) + "\n")
                    tick(row)
            time.sleep(0.02)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        signal.signal(signal.SIGTERM, before)
    return rows


def _next(waiting: list[str], running: dict[int, _Job], heavy: Callable[[str], bool]) -> str | None:
    """The first name that may run now: a heavy one only while no other is heavy."""
    full = any(job.heavy for job in running.values())
    for i, name in enumerate(waiting):
        if not (full and heavy(name)):
            return waiting.pop(i)
    return None


def _fork(name: str, work: Callable[[str], Row], memory_gb: float) -> tuple[int, int]:
    read, write = os.pipe()
    os.set_blocking(read, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside the progress bar's thread
        pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    status = 1
    try:
        os.close(read)
        silent = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        os.dup2(silent.fileno(), 1)
        os.dup2(silent.fileno(), 2)
        sys.stdout = sys.stderr = silent
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
        limit = int(memory_gb * 2**30) + pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            row = work(name)
        except BaseException as error:
            row = {"model": name, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        with os.fdopen(write, "wb") as out:
            out.write(json.dumps(row).encode())
        status = 0
    finally:
        os._exit(status)


def _poll(pid: int, job: _Job, seconds: float) -> Row | None:
    """The row of a process that has ended (or was ended for its time), else None."""
    taken = time.monotonic() - job.begin
    if taken > seconds:
        os.kill(pid, signal.SIGKILL)
    try:
        while chunk := os.read(job.pipe, 1 << 16):
            job.data += chunk
    except BlockingIOError:
        if taken <= seconds:
            return None  # the pipe is open: the process lives
    os.close(job.pipe)
    _, status = os.waitpid(pid, 0)
    try:
        row: Row = json.loads(job.data)
    except json.JSONDecodeError:
        why = f"more than {seconds:.0f} s" if taken > seconds else f"the process ended with status {status}"
        row = {"model": job.name, "error": why}
    return {**row, "seconds": round(taken, 1)}
