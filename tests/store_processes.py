"""Other processes that use a store. They import it without torch, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
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
