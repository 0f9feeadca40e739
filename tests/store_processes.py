"""Other processes that use a store, and waiting for them. They import it without torch, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BARE = """
import sys, types
sys.modules["lmfx"] = types.ModuleType("lmfx")
sys.modules["lmfx"].__path__ = [sys.argv[1] + "/lmfx"]
del sys.argv[1]
from lmfx.store.shared_rows import Share
from lmfx.store.rows import Store
assert "torch" not in sys.modules
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `code` with `Store`, `Share` and `sys.argv[1:]`, its stdin and stdout open."""
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", BARE + code, root, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(*processes: subprocess.Popen[str]) -> None:
    """Lets processes that have said "ready" and wait for a line begin, all at once."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Comes back as soon as the condition holds, or after `seconds`, which a busy machine may need."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
