"""Where a worker's environment gives freed memory back at once, a job keeps it, and leaves all as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmfx.importance import memory

ROOT = Path(__file__).resolve().parents[3]
FAULTS = """
import ctypes, json, resource, runpy
import numpy as np
kept = runpy.run_path("lmfx/importance/memory.py")["memory_kept"]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        np.empty(1 << 20, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
with kept():
    inside = faults()
print(json.dumps([first, inside, faults()]))
"""


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def mallopt(self, parameter: int, value: int) -> None:
        self.calls.append((parameter, value))

    def malloc_trim(self, pad: int) -> None:
        self.calls.append((pad,))


@pytest.mark.parametrize("value", [None, "", "a"])
def test_nothing_is_done_where_the_environment_says_nothing(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(memory.VARIABLE, value)
    libc: Any = Recorder()
    monkeypatch.setattr(memory, "_glibc", lambda: libc)
    with memory.memory_kept():
        pass
    assert not libc.calls


def test_thresholds_are_set_back_and_memory_is_given_back_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.VARIABLE, "65536")
    libc: Any = Recorder()
    monkeypatch.setattr(memory, "_glibc", lambda: libc)
    with pytest.raises(ValueError), memory.memory_kept():
        assert libc.calls == [(-3, 32 << 20), (-1, 1 << 30)]
        raise ValueError
    assert libc.calls[2:] == [(-3, 128 << 10), (-1, 65536), (0,)]


@pytest.mark.skipif(memory._glibc() is None, reason="another C library than glibc")
def test_a_job_touches_its_memory_once_instead_of_each_time() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        cwd=ROOT,
        env={**os.environ, memory.VARIABLE: "65536"},
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    before, inside, after = json.loads(done.stdout)
    assert before > 50 * 200 and after > 50 * 200, "256 pages of 4 KB each time"
    assert inside < 50 * 20
