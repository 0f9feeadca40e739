"""Writes files that are complete or not there."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["atomic_write"]


def atomic_write(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes to a temporary name in the same folder and renames it. Raises `OSError`; nothing is left over then."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError("it is a folder; give the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist; make it first")
    temporary = target.with_name(f".lmfx-{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
