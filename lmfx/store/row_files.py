"""Writes and reads one row as one file, which is either complete or not there, and shows by itself that it is whole.

    lmfx-row 3 6b1f...               the form's version, and a checksum of the version and of all that follows
    {"key": ..., "value": ..., ...}  what the row is of, its value, and when it was made

A row that is not what was written raises `Damaged`. One whose checksum holds and whose version is another was written
so by another lmfx: that is a `StoreError`, and the file stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmfx.environment.atomic_files import atomic_write
from lmfx.environment.bounded_reading import parse_json, read_bounded
from lmfx.passes.errors import StoreError

__all__ = ["Damaged", "Row", "RowIdentity", "dumps", "file_name", "identity_hash", "put_aside", "read_row", "write_row"]

WORD, VERSION = "lmfx-row", 3
LONGEST_ROW = 2**26  # bytes

RowIdentity = Mapping[str, Any] | str


class Damaged(Exception):
    """The file is a row's and cannot be trusted; the text says why. Never leaves `lmfx.store`."""


@dataclass(frozen=True)
class Row:
    """A stored value: what it is of, and when it was made (seconds since 1970)."""

    kind: str
    identity: str  # the hash of `about`
    key: str
    value: Any
    made: float
    about: dict[str, Any]  # the identity itself; empty if the row was put under a bare hash


def dumps(value: Any) -> str:
    """The one JSON text of a value. Raises `ValueError` for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)


def identity_hash(identity: RowIdentity) -> str:
    """A short stable hash of a JSON-like mapping; a string is taken for a hash and returned as it is."""
    if isinstance(identity, str):
        return identity
    return hashlib.sha256(dumps(identity).encode()).hexdigest()[:24]


def write_row(path: Path, row: Row) -> None:
    """Writes the file. Raises `OSError`, and `ValueError` for a value that is no JSON; nothing is left over then."""
    body = dumps(asdict(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, f"{WORD} {VERSION} {_seal(VERSION, body)}\n{body}".encode())


def read_row(path: Path) -> Row:
    """The row of the kind, identity and key that the path says.

    Raises `OSError`, `Damaged`, and `StoreError` for a row of another version.
    """
    try:
        head, _, body = read_bounded(path, LONGEST_ROW).partition("\n")
        word, version, seal = head.split(" ")
        if word != WORD or seal != _seal(int(version), body):
            raise Damaged("it does not have its checksum")
        if int(version) != VERSION:
            raise StoreError(
                f"the row {path} has version {version}, and this lmfx reads version {VERSION}; use an lmfx that reads "
                "it, or choose another cache_dir"
            )
        row = Row(**parse_json(body))
        if (row.kind, row.identity, file_name(row.key)) != (*path.parts[-3:-1], path.name):
            raise Damaged("it is another row's")
    except (TypeError, ValueError) as error:
        raise Damaged(str(error)) from error
    return row


def file_name(key: str) -> str:
    """The name of the file of the row with this key."""
    return hashlib.sha256(key.encode()).hexdigest()[:32] + ".json"


def put_aside(path: Path) -> Path | None:
    """Renames what is damaged to a name that is free, and returns that; None if another process did so meanwhile."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    aside = path.with_name(f"{path.stem}.corrupt-{stamp}-{uuid.uuid4().hex[:8]}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(
            f"{path} is damaged and cannot be moved aside ({error}); delete it, or choose another cache_dir"
        ) from error
    return aside


def _seal(version: int, body: str) -> str:
    return hashlib.blake2b(f"{version}\n{body}".encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, set, frozenset)):
        return sorted(value) if not isinstance(value, tuple) else list(value)
    if hasattr(value, "item"):
        return value.item()
    return str(value)
