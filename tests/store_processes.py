"""Other processes that use a store, and waiting for them. They import it without torch, which takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmfx.store.claims import Owner
from lmfx.store.row_files import file_name
from lmfx.store.rows import Store

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


def claims(store: Store, keys: Any = ()) -> list[str]:
    """The rows that are claimed; by their names if they are among `keys`."""
    names = {Path(file_name(key)).stem: key for key in keys}
    return sorted(names.get(path.stem, path.stem) for path in store.files(name="*.claim"))


def claimed_by(store: Store, kind: str, identity: Any, key: str, owner: Owner, idle: float = 0.0) -> None:
    """Another owner's claim on a row, last renewed `idle` seconds ago."""
    path = (store.folder(kind, identity) / file_name(key)).with_suffix(".claim")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - idle,) * 2)
