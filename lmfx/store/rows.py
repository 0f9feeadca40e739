"""The on-disk store: one sqlite file (WAL) with every latency and importance that was ever measured here.

A row is `(kind, hash of identity, key) -> JSON`. The identity says on what the value depends (backend, version, device,
threads; or estimator, weights, data), so rows of two machines or two models never mix. Each `put` is one committed
transaction, which is what makes a killed run resumable; a log of every `put` shows that nothing is measured twice, and
claims (`lmfx.store.claims`) that several processes do not either.

A foreign file is never written to. A damaged one is never used: it is moved aside with a warning, and a new one begun
with those of its rows whose checksums hold (`lmfx.store.store_file`).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from lmfx.environment.bounded_reading import parse_json
from lmfx.passes.errors import StoreError
from lmfx.store.claims import Heart, Owner, claim_rows
from lmfx.store.schema import APPLICATION_ID, Damaged, Identity, checksum, dumps, identity_hash, whole
from lmfx.store.store_file import explain, file_id, folder_lock, is_damage, move_aside, open_file, rescue

__all__ = ["APPLICATION_ID", "Store", "default_cache_dir", "identity_hash", "where"]

FILE_NAME = "lmfx.sqlite"
BUSY_SECONDS = 30.0
T = TypeVar("T")
_INHERITED: list[sqlite3.Connection] = []  # a forked process must not even close what its parent has open


def default_cache_dir() -> Path:
    """`$LMFX_CACHE_DIR`, or the platform's cache folder for lmfx (`~/.cache/lmfx` on Linux)."""
    if chosen := os.environ.get("LMFX_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lmfx"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "lmfx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmfx"


class Store:
    """A key-value store of JSON values on one sqlite file, safe for several processes and for `kill -9`.

    A damaged file is moved aside with a `RuntimeWarning` that names both paths. Raises `StoreError` if the file is
    foreign or of a newer lmfx (it is left as it is), cannot be written, or is locked for longer than 30 s.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.private = False  # for one run alone, which knows of what its rows are
        self._lock = threading.RLock()
        self._known: set[str] = set()
        self._owner = Owner()
        self._heart: Heart | None = None
        self._file: tuple[int, int] | None = None
        self._connection: sqlite3.Connection | None = None
        try:
            self._connection = self._connect()
        except RuntimeWarning:
            self.close()
            raise

    @classmethod
    def open(cls, cache_dir: str | os.PathLike[str] | None = None) -> Store:
        """The store `lmfx.sqlite` in `cache_dir` (default: `default_cache_dir()`), made if it is not there."""
        return cls((Path(cache_dir) if cache_dir is not None else default_cache_dir()) / FILE_NAME)

    # --- rows -------------------------------------------------------------------------------------------------------

    def get(self, kind: str, identity: Identity, key: str) -> Any:
        """The value, or None."""
        return self.get_many(kind, identity, [key]).get(key)

    def get_many(self, kind: str, identity: Identity, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """The values of those `keys` that are there (None: of all keys of this kind and identity)."""
        hashed = identity_hash(identity)
        wanted = None if keys is None else list(dict.fromkeys(keys))

        def read(db: sqlite3.Connection) -> dict[str, Any]:
            query, result = "SELECT * FROM rows WHERE kind = ? AND identity = ?", {}
            chunks = [None] if wanted is None else [wanted[i : i + 500] for i in range(0, len(wanted), 500)]
            for chunk in chunks:
                some = "" if chunk is None else f" AND key IN ({','.join('?' * len(chunk))})"
                for row in db.execute(query + some, (kind, hashed, *(chunk or ()))):
                    result[row[2]] = value_of(row)
            return result

        found = self.run(read)
        return found if wanted is None else {key: found[key] for key in wanted if key in found}

    def put(self, kind: str, identity: Identity, key: str, value: Any) -> None:
        """Stores one JSON value (replacing an older one), logs it and ends its claim, in one committed transaction."""
        hashed, text, now = identity_hash(identity), dumps(value), time.time()

        def write(db: sqlite3.Connection) -> None:
            if hashed not in self._known and not isinstance(identity, str):
                db.execute("INSERT OR IGNORE INTO identities VALUES (?, ?)", (hashed, dumps(identity)))
            row = (kind, hashed, key, text, now, checksum(kind, hashed, key, text, now))
            db.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?)", row)
            db.execute(
                "INSERT INTO log (kind, identity, key, pid, time) VALUES (?, ?, ?, ?, ?)",
                (kind, hashed, key, os.getpid(), now),
            )
            db.execute("DELETE FROM claims WHERE kind = ? AND identity = ? AND key = ?", (kind, hashed, key))

        self.run(write, writes=True)
        self._known.add(hashed)

    def count(self, kind: str | None = None, identity: Identity | None = None) -> int:
        """The number of rows, of one kind or identity if given."""
        condition, values = where(kind=kind, identity=None if identity is None else identity_hash(identity))
        return self.run(lambda db: int(db.execute(f"SELECT COUNT(*) FROM rows{condition}", values).fetchone()[0]))

    def times_put(self, kind: str | None = None, identity: Identity | None = None) -> dict[str, int]:
        """How often each key was put: 1 means that it was measured once."""
        condition, values = where(kind=kind, identity=None if identity is None else identity_hash(identity))
        return self.run(lambda db: dict(db.execute(f"SELECT key, COUNT(*) FROM log{condition} GROUP BY key", values)))

    # --- claims -----------------------------------------------------------------------------------------------------

    def claim(self, kind: str, identity: Identity, keys: Iterable[str], most: int | None = None) -> list[str]:
        """Claims the first `most` of `keys` that no living process has, and returns them; see `lmfx.store.claims`."""
        hashed, asked = identity_hash(identity), list(keys)
        taken = self.run(lambda db: claim_rows(db, self._owner, kind, hashed, asked, most), writes=True)
        if taken and self._heart is None:
            self._heart = Heart(weakref.WeakMethod(self.renew))
        return taken

    def release(
        self, kind: str | None = None, identity: Identity | None = None, keys: Iterable[str] | None = None
    ) -> None:
        """Ends claims of this store object: those of a kind and identity, or of some of their keys."""
        hashed = None if identity is None else identity_hash(identity)
        chosen = [None] if keys is None else list(keys)

        def write(db: sqlite3.Connection) -> None:
            for key in chosen:
                condition, values = where(owner=self._owner.token, kind=kind, identity=hashed, key=key)
                db.execute(f"DELETE FROM claims{condition}", values)

        if chosen:
            self.run(write, writes=True)

    def renew(self) -> None:
        """Says that this store object still works on what it has claimed."""
        beat = "UPDATE claims SET beat = ? WHERE owner = ?"
        self.run(lambda db: db.execute(beat, (time.time(), self._owner.token)), writes=True)

    # --- the file ---------------------------------------------------------------------------------------------------

    def run(self, work: Callable[[sqlite3.Connection], T], writes: bool = False) -> T:
        """The result of `work(connection)`, in one transaction if it writes.

        A damaged file is moved aside, and the work done again on the new one; so it is if another process did that
        meanwhile. `work` must therefore be one that can be repeated.
        """
        with self._lock:
            for _ in range(3):
                db = self._live()
                try:
                    if writes:
                        db.execute("BEGIN IMMEDIATE")
                    result = work(db)
                    if writes:
                        db.execute("COMMIT")
                    if file_id(self.path) == self._file:
                        return result
                except Damaged as damage:
                    self._replace(str(damage))
                except (sqlite3.Error, UnicodeDecodeError) as error:
                    if not is_damage(error):
                        raise explain(self.path, error, BUSY_SECONDS) from error
                    self._replace(str(error))
                finally:
                    with contextlib.suppress(sqlite3.Error):
                        if db.in_transaction:
                            db.execute("ROLLBACK")
        raise StoreError(f"the store {self.path} is damaged or moved again and again; choose another cache_dir")

    def close(self) -> None:
        """Closes the file, ends all claims; later calls raise `StoreError`."""
        with self._lock:
            if self._connection is None:
                return
            if self._owner.pid == os.getpid():
                if self._heart is not None:
                    self._heart.stop()
                    with contextlib.suppress(StoreError):
                        self.release()
                self._connection.close()
            self._connection = None

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return type(self), (str(self.path),)  # another process opens the file for itself

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def _live(self) -> sqlite3.Connection:
        """The connection to the file that is at the path now."""
        db = self._connection
        if db is None:
            raise StoreError(f"the store {self.path} is closed; open it again with Store({str(self.path)!r})")
        if self._owner.pid != os.getpid():  # forked: sqlite forbids sharing
            _INHERITED.append(db)
            self._owner, self._heart = Owner(), None
        elif file_id(self.path) == self._file:
            return db
        else:  # moved aside by another process, or deleted
            with contextlib.suppress(sqlite3.Error):
                db.close()
        self._connection = self._connect()
        return self._connection

    def _replace(self, reason: str) -> None:
        """Moves the file aside in which damage was met, unless another process already did."""
        assert self._connection is not None
        met = self._file
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        self._connection = self._connect(met, reason)

    def _connect(self, damaged: tuple[int, int] | None = None, reason: str = "") -> sqlite3.Connection:
        """Opens the file, or a new one in place of a damaged one; `damaged` is known to be that for `reason`."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make the folder {self.path.parent}: {error}; choose another cache_dir") from error
        aside, rescued = None, 0
        with folder_lock(self.path.parent, BUSY_SECONDS):
            try:
                if damaged is not None and file_id(self.path) == damaged:
                    raise Damaged(reason)
                db = open_file(self.path, BUSY_SECONDS)
            except Damaged as damage:
                reason, aside = str(damage), move_aside(self.path)
                db = open_file(self.path, BUSY_SECONDS)
                rescued = rescue(aside, db)
            self._file = file_id(self.path)
            self._known.clear()
        if aside is not None:
            self._connection = db  # a warning may be an error, and the store must work then too
            warnings.warn(
                f"the store {self.path} is damaged ({reason}); it was moved to {aside} and a new one was begun, with "
                f"the {rescued} rows of it that are certainly whole",
                RuntimeWarning,
                stacklevel=2,
            )
        return db


def value_of(row: tuple[Any, ...]) -> Any:
    """The value of a row of the table `rows`. Raises `Damaged` if the row is not what was written."""
    if not whole(row):
        raise Damaged(f"the row {str(row[2])[:60]!r} does not have its checksum")
    try:
        return parse_json(row[3])
    except ValueError as error:  # its checksum holds, so it was written like this, and not by lmfx
        raise StoreError(f"the row {str(row[2])[:60]!r} of the store is not what lmfx writes ({error})") from error


def where(**wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """A WHERE clause for the columns that are not None, and its values."""
    used = {name: value for name, value in wanted.items() if value is not None}
    return (" WHERE " + " AND ".join(f"{n} = ?" for n in used) if used else ""), tuple(used.values())
