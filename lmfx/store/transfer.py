"""Lists what a store holds, carries it to other machines as JSON, and prunes it.

    entries      one line a kind and identity: rows, bytes, oldest and newest
    export       {"format": "lmfx-cache", "version": 1, "identities": {...}, "rows": [...], "digest": ...}
    import       rows that are not there yet; what is there already stays
    prune        rows by age, backend, version, device or kind, and the space that they took

An exported file says of every row under which identity it was made, so rows of another machine are found only by that
machine. Its digest covers all of it: a damaged file is refused as a whole. The sentinel's reference, to which latencies
are relative, goes with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmfx._version import __version__
from lmfx.environment.atomic_files import atomic_write
from lmfx.environment.bounded_reading import parse_json, read_bounded
from lmfx.passes.errors import OptionError, StoreError, TableError
from lmfx.store.row_values import check_value
from lmfx.store.rows import Store, value_of
from lmfx.store.schema import Damaged, checksum, dumps, identity_hash, named

__all__ = ["EVERYTHING", "Entry", "Imported", "Selection", "entries", "export_rows", "import_rows", "prune"]

FORMAT, VERSION = "lmfx-cache", 1
SENTINEL = "sentinel"
DAY = 86400.0


@dataclass(frozen=True)
class Selection:
    """Selects rows: all that agree with every field that is not None.

    `backend` is that of a latency or the name of an estimator, `version` its version; `device` may be a part of the
    name, in any case of letters; `kind` is "latency" (of rows and of whole networks) or "importance"; `older_than` is
    in days.
    """

    backend: str | None = None
    device: str | None = None
    version: str | None = None
    kind: str | None = None
    older_than: float | None = None

    def __post_init__(self) -> None:
        days = self.older_than
        if days is not None and not (isinstance(days, (int, float)) and math.isfinite(days) and days >= 0):
            raise OptionError(f"older_than={days!r}: give a number of days from 0")

    def takes(self, kind: str, identity: dict[str, Any], made: float, now: float) -> bool:
        """Whether a row of this kind and identity that was made at `made` is meant."""
        seen = str(identity.get("backend", identity.get("estimator", "")))
        return (
            (self.backend is None or self.backend == seen)
            and (self.device is None or self.device.lower() in str(identity.get("device", "")).lower())
            and (self.version is None or self.version == str(identity.get("version", "")))
            and (self.kind is None or self.kind == ("latency" if kind == "whole" else kind))
            and (self.older_than is None or now - made >= self.older_than * DAY)
        )


EVERYTHING = Selection()


@dataclass(frozen=True)
class Entry:
    """The rows of one kind and identity. `bytes` is the length of keys and values; times are seconds since 1970."""

    kind: str
    identity: dict[str, Any]  # empty if the rows were put under a bare hash
    hash: str
    rows: int
    bytes: int
    oldest: float
    newest: float


@dataclass(frozen=True)
class Imported:
    """What became of an exported file's rows: `new` were added; of the others `different` have another value here,
    which stays."""

    new: int
    known: int
    different: int


def entries(store: Store, selection: Selection = EVERYTHING) -> list[Entry]:
    """What a store holds, by kind and identity, newest first. The sentinel's references are not listed."""
    found: dict[tuple[str, str], list[Any]] = {}
    identities, rows = _read(store, selection)
    for kind, hashed, key, value, made, _ in rows:
        if kind != SENTINEL:
            seen = found.setdefault((kind, hashed), [0, 0, made, made])
            seen[:] = [seen[0] + 1, seen[1] + len(key) + len(value), min(seen[2], made), max(seen[3], made)]
    listed = [Entry(kind, identities.get(hashed, {}), hashed, *seen) for (kind, hashed), seen in found.items()]
    return sorted(listed, key=lambda e: -e.newest)


def export_rows(store: Store, path: str | os.PathLike[str], selection: Selection = EVERYTHING) -> int:
    """Writes rows as JSON and returns how many; the file is complete or not there.

    Raises `StoreError` if there are none, or if the file cannot be written.
    """
    identities, rows = _read(store, selection)
    if not any(row[0] != SENTINEL for row in rows):
        raise StoreError(f"the store {store.path} has no such rows, so nothing was written; see lmfx cache list")
    names = ("kind", "identity", "key", "value", "time")
    body = {
        "format": FORMAT,
        "version": VERSION,
        "lmfx": __version__,
        "identities": {h: v for h, v in identities.items() if any(row[1] == h for row in rows)},
        "rows": [dict(zip(names, (*row[:3], value_of(row), row[4]), strict=True)) for row in rows],
    }
    body["digest"] = _digest(body)
    try:
        atomic_write(path, json.dumps(body, indent=1, sort_keys=True).encode())
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}; give a file in a folder that exists") from error
    return len(rows)


def import_rows(store: Store, path: str | os.PathLike[str]) -> Imported:
    """Adds the rows of an exported file that the store does not have, all of them or, if something is wrong, none.

    Raises `StoreError` for a file that is missing, damaged, of a newer lmfx or no export of a store.
    """
    identities, rows = _parse(path)

    def write(db: sqlite3.Connection) -> Imported:
        new = known = different = 0
        db.executemany("INSERT OR IGNORE INTO identities VALUES (?, ?)", [(h, dumps(v)) for h, v in identities.items()])
        for kind, hashed, key, value, made in rows:
            query = "SELECT value FROM rows WHERE kind = ? AND identity = ? AND key = ?"
            there = db.execute(query, (kind, hashed, key)).fetchone()
            if there is None:
                row = (kind, hashed, key, value, made, checksum(kind, hashed, key, value, made))
                db.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", row)
                new += 1
            else:
                known += 1
                different += there[0] != value
        return Imported(new, known, different)

    return store.run(write, writes=True)


def prune(store: Store, selection: Selection, dry_run: bool = False) -> tuple[int, int]:
    """Deletes rows, and gives their space back; how many rows, and by how many bytes the file is smaller now.

    A sentinel's reference goes when nothing is left that is relative to it. With `dry_run` nothing is deleted.
    """
    _, rows = _read(store, selection)
    chosen = [row[:3] for row in rows if row[0] != SENTINEL]
    if dry_run or not chosen:
        return len(chosen), 0
    before = _size(store.path)
    left = "SELECT identity FROM rows WHERE kind = 'latency'"
    orphans = f"kind = ? AND identity NOT IN ({left}) AND NOT EXISTS (SELECT 1 FROM rows WHERE kind = 'whole')"

    def write(db: sqlite3.Connection) -> None:
        for table in ("rows", "log"):
            db.executemany(f"DELETE FROM {table} WHERE kind = ? AND identity = ? AND key = ?", chosen)
            db.execute(f"DELETE FROM {table} WHERE {orphans}", (SENTINEL,))
        db.execute("DELETE FROM identities WHERE hash NOT IN (SELECT identity FROM rows)")

    def shrink(db: sqlite3.Connection) -> None:
        db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    store.run(write, writes=True)
    with contextlib.suppress(StoreError):  # another process is at it; the rows are gone, their space is used again
        store.run(shrink)
    return len(chosen), max(0, before - _size(store.path))


def _read(store: Store, selection: Selection) -> tuple[dict[str, dict[str, Any]], list[tuple[Any, ...]]]:
    """(identities, rows) of a selection; with latencies the sentinel's references of their identities."""
    now = time.time()

    def read(db: sqlite3.Connection) -> tuple[dict[str, dict[str, Any]], list[tuple[Any, ...]]]:
        identities: dict[str, dict[str, Any]] = {}
        for hashed, text in db.execute("SELECT hash, value FROM identities"):
            if not named(hashed, text):
                raise Damaged(f"the identity {hashed} does not have its hash")
            identities[hashed] = parse_json(text)
        rows, references = [], []
        for row in db.execute("SELECT * FROM rows ORDER BY kind, identity, key"):
            value_of(row)  # which checks it
            if row[0] == SENTINEL:
                references.append(row)
            elif selection.takes(row[0], identities.get(row[1], {}), row[4], now):
                rows.append(row)
        timed = {row[1] for row in rows if row[0] == "latency"}
        return identities, [*rows, *(row for row in references if row[1] in timed)]

    return store.run(read)


def _parse(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[tuple[str, str, str, str, float]]]:
    """(identities, rows) of an exported file."""
    try:
        body = parse_json(read_bounded(path))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}; give a file that lmfx cache export wrote") from error
    except ValueError as error:
        raise StoreError(f"{path} is damaged or no JSON ({error}); export it again") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        table = " (it is a latency table: use it with --table)" if _is_table(body) else ""
        raise StoreError(f"{path} is not an export of a store{table}; give a file that lmfx cache export wrote")
    if body.get("version") != VERSION:
        raise StoreError(f"{path} has version {body.get('version')!r}, and this lmfx reads {VERSION}; update lmfx")
    if body.get("digest") != _digest(body):
        raise StoreError(f"{path} is damaged: it does not have its digest; export it again")
    try:
        identities = {str(h): dict(v) for h, v in body["identities"].items()}
        if wrong := [h for h, v in identities.items() if identity_hash(v) != h]:
            raise ValueError(f"the identity {wrong[0]} does not have its hash")
        rows = [_row(r) for r in body["rows"]]
        if lost := [r[2] for r in rows if r[1] not in identities and r[0] != SENTINEL]:
            raise ValueError(f"{lost[0]!r} has no identity")
    except (KeyError, TypeError, ValueError, AttributeError, TableError) as error:
        raise StoreError(f"{path} is damaged ({error}); export it again") from error
    return identities, rows


def _row(row: dict[str, Any]) -> tuple[str, str, str, str, float]:
    """One row, each of its words a text, its value what rows of its kind hold."""
    kind, hashed, key, made = (row[name] for name in ("kind", "identity", "key", "time"))
    if not all(isinstance(word, str) for word in (kind, hashed, key)):
        raise ValueError(f"a row is named {kind!r}, {hashed!r}, {key!r}")
    if isinstance(made, bool) or not isinstance(made, (int, float)) or not math.isfinite(made):
        raise ValueError(f"{key!r} was made at {made!r}")
    return kind, hashed, key, dumps(check_value(kind, key, row["value"])), float(made)


def _digest(body: dict[str, Any]) -> str:
    """Of everything in an export but the digest."""
    try:
        return hashlib.sha256(dumps({k: v for k, v in body.items() if k != "digest"}).encode()).hexdigest()
    except ValueError:
        return "none: it has a number that is not finite"


def _is_table(body: Any) -> bool:
    return isinstance(body, dict) and body.get("format") == "lmfx-latency-table"


def _size(path: Path) -> int:
    """Bytes of a store with what is not written into its file yet."""
    files = [path.with_name(path.name + end) for end in ("", "-wal")]
    return sum(file.stat().st_size for file in files if file.exists())
