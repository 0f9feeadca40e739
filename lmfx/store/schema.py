"""The tables of a store file: what they hold, and how a row proves that it is whole.

    identities   hash -> the identity as JSON; the hash is that of the JSON, so a damaged identity shows itself
    rows         (kind, identity, key) -> value as JSON, when it was made, and a checksum of all five
    log          one entry a `put`: what was made twice was made for nothing
    claims       rows that a process is making now (see `lmfx.store.claims`)

A file has these tables and the version of this lmfx, or it is refused as it is.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from typing import Any

__all__ = [
    "APPLICATION_ID",
    "MARK",
    "TABLES",
    "VERSION",
    "Damaged",
    "Identity",
    "checksum",
    "create",
    "dumps",
    "identity_hash",
    "named",
    "tables_of",
    "whole",
]

APPLICATION_ID = 0x6C6D6678  # "lmfx"
VERSION = 2

Identity = Mapping[str, Any] | str

_KEY = "kind TEXT NOT NULL, identity TEXT NOT NULL, key TEXT NOT NULL"
_IDENTITIES = "CREATE TABLE identities (hash TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
_LOG = f"CREATE TABLE log (id INTEGER PRIMARY KEY, {_KEY}, pid INTEGER NOT NULL, time REAL NOT NULL)"
_PRIMARY = "PRIMARY KEY (kind, identity, key)) WITHOUT ROWID"
_ROWS = f"CREATE TABLE rows ({_KEY}, value TEXT NOT NULL, time REAL NOT NULL, checksum TEXT NOT NULL, {_PRIMARY}"
_CLAIMS = (
    f"CREATE TABLE claims ({_KEY}, owner TEXT NOT NULL, place TEXT NOT NULL, pid INTEGER NOT NULL, "
    f"started TEXT NOT NULL, beat REAL NOT NULL, {_PRIMARY}"
)
TABLES = (_IDENTITIES, _LOG, _ROWS, _CLAIMS)
MARK = _IDENTITIES.encode()
"""It stands as text on the first page of every store, which is how one is known whose header is damaged."""


class Damaged(Exception):
    """The file is a store and cannot be trusted; the text says why. Never leaves `lmfx.store`."""


def dumps(value: Any) -> str:
    """The one JSON text of a value. Raises `ValueError` for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)


def identity_hash(identity: Identity) -> str:
    """A short stable hash of a JSON-like mapping; a string is taken for a hash and returned as it is."""
    if isinstance(identity, str):
        return identity
    return hashlib.sha256(dumps(identity).encode()).hexdigest()[:24]


def named(hashed: str, text: str) -> bool:
    """Whether this is the text of the identity with this hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:24] == hashed


def checksum(kind: str, identity: str, key: str, value: str, made: float) -> str:
    """128 bits over a whole row, so that no value is ever read under another row's name."""
    text = "\0".join((kind, identity, key, value, made.hex()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def whole(row: tuple[Any, ...]) -> bool:
    """Whether (kind, identity, key, value, time, checksum) is what was written."""
    kind, identity, key, value, made, found = row
    if not (all(isinstance(word, str) for word in (kind, identity, key, value)) and isinstance(made, float)):
        return False
    return bool(found == checksum(kind, identity, key, value, made))


def create(db: sqlite3.Connection) -> None:
    """Schema and ids in one transaction of the rollback journal, so that the file is either nothing or a store."""
    db.execute("BEGIN IMMEDIATE")
    if db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0:  # else another process was faster
        for statement in TABLES:
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {VERSION}")
    db.execute("COMMIT")


def tables_of(db: sqlite3.Connection) -> set[str]:
    """The text of all that a file has, tables and else, with single spaces; a store has `TABLES` and nothing else."""
    found = db.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL")
    return {" ".join(str(text).split()) for (text,) in found}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, set, frozenset)):
        return sorted(value) if not isinstance(value, tuple) else list(value)
    if hasattr(value, "item"):
        return value.item()
    return str(value)
