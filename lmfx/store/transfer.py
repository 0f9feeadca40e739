"""Lists what a store holds, carries it to other machines as JSON, and prunes it.

    entries      one line a kind and identity: rows, bytes, oldest and newest
    export       {"format": "lmfx-cache", "version": 1, "identities": {...}, "rows": [...], "digest": ...}
    import       rows that are not there yet; what is there already stays
    prune        rows by age, backend, version, device or kind

An exported file says of every row under which identity it was made, so rows of another machine are found only by that
machine. Its digest covers all of it: a damaged file is refused as a whole. The sentinel's reference, to which latencies
are relative, goes with them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from typing import Any

from lmfx._version import __version__
from lmfx.environment.atomic_files import atomic_write
from lmfx.environment.bounded_reading import parse_json, read_bounded
from lmfx.passes.errors import OptionError, StoreError, TableError
from lmfx.store.row_files import Row, dumps, identity_hash
from lmfx.store.row_values import check_value
from lmfx.store.rows import SENTINEL, Store

__all__ = ["EVERYTHING", "Imported", "Listed", "Selection", "entries", "export_rows", "import_rows", "prune"]

FORMAT, VERSION = "lmfx-cache", 1
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
class Listed:
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


def entries(store: Store, selection: Selection = EVERYTHING) -> list[Listed]:
    """What a store holds, by kind and identity, newest first. The sentinel's references are not listed."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in _chosen(store.rows(), selection):
        found.setdefault((row.kind, row.identity), []).append(row)
    return sorted((_entry(rows) for rows in found.values()), key=lambda e: -e.newest)


def _entry(rows: list[Row]) -> Listed:
    size = sum(len(row.key) + len(dumps(row.value)) for row in rows)
    made = [row.made for row in rows]
    return Listed(rows[0].kind, rows[0].about, rows[0].identity, len(rows), size, min(made), max(made))


def export_rows(store: Store, path: str | os.PathLike[str], selection: Selection = EVERYTHING) -> int:
    """Writes rows as JSON and returns how many; the file is complete or not there.

    Raises `StoreError` if there are none, or if the file cannot be written.
    """
    there = store.rows()
    chosen = _chosen(there, selection)
    if not chosen:
        raise StoreError(f"the store {store.path} has no such rows, so nothing was written; see lmfx cache list")
    timed = {row.identity for row in chosen if row.kind == "latency"}
    rows = [*chosen, *(row for row in there if row.kind == SENTINEL and row.identity in timed)]
    body = {
        "format": FORMAT,
        "version": VERSION,
        "lmfx": __version__,
        "identities": {row.identity: row.about for row in rows if row.about},
        "rows": [
            {"kind": r.kind, "identity": r.identity, "key": r.key, "value": r.value, "time": r.made} for r in rows
        ],
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
    there = {(row.kind, row.identity, row.key): row.value for row in store.rows()}
    rows = _parse(path)
    new = [row for row in rows if (row.kind, row.identity, row.key) not in there]
    for row in new:
        store.add(row)
    different = sum(there.get((row.kind, row.identity, row.key), row.value) != row.value for row in rows)
    return Imported(len(new), len(rows) - len(new), different)


def prune(store: Store, selection: Selection, dry_run: bool = False) -> tuple[int, int]:
    """Deletes rows; how many, and how many bytes their files had. With `dry_run` nothing is deleted.

    A sentinel's reference goes when nothing is left that is relative to it.
    """
    chosen = _chosen(store.rows(), selection)
    if dry_run:
        return len(chosen), 0
    freed = sum(store.remove(row) for row in chosen)
    if not store.count("whole"):
        for row in store.rows():
            if row.kind == SENTINEL and not store.count("latency", row.identity):
                freed += store.remove(row)
    return len(chosen), freed


def _chosen(rows: list[Row], selection: Selection) -> list[Row]:
    now = time.time()
    return [row for row in rows if row.kind != SENTINEL and selection.takes(row.kind, row.about, row.made, now)]


def _parse(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of an exported file."""
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
        rows = [_row(r, identities) for r in body["rows"]]
        if lost := [r.key for r in rows if not r.about and r.kind != SENTINEL]:
            raise ValueError(f"{lost[0]!r} has no identity")
    except (KeyError, TypeError, ValueError, AttributeError, TableError) as error:
        raise StoreError(f"{path} is damaged ({error}); export it again") from error
    return rows


def _row(row: dict[str, Any], identities: dict[str, Any]) -> Row:
    """One row, each of its words a text, its value what rows of its kind hold."""
    kind, hashed, key, made = (row[name] for name in ("kind", "identity", "key", "time"))
    if not all(isinstance(word, str) for word in (kind, hashed, key)):
        raise ValueError(f"a row is named {kind!r}, {hashed!r}, {key!r}")
    if isinstance(made, bool) or not isinstance(made, (int, float)) or not math.isfinite(made):
        raise ValueError(f"{key!r} was made at {made!r}")
    return Row(kind, hashed, key, check_value(kind, key, row["value"]), float(made), identities.get(hashed, {}))


def _digest(body: dict[str, Any]) -> str:
    """Of everything in an export but the digest."""
    try:
        return hashlib.sha256(dumps({k: v for k, v in body.items() if k != "digest"}).encode()).hexdigest()
    except ValueError:
        return "none: it has a number that is not finite"


def _is_table(body: Any) -> bool:
    return isinstance(body, dict) and body.get("format") == "lmfx-latency-table"
