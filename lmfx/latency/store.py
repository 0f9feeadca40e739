"""The on-disk store: one sqlite file (WAL) with every latency and importance that was ever measured here.

A row is `(kind, hash of identity, key) -> JSON`. The identity says on what the value depends (backend, version, device,
threads; or estimator, weights, data), so rows of two machines or two models never mix. Each `put` is one committed
transaction, which is what makes a killed run resumable; a log of every `put` shows that nothing is measured twice.

A file that is not ours, or is damaged, is never written to: it is checked before sqlite may touch it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lmfx.passes.errors import StoreError

__all__ = ["Store", "default_cache_dir", "identity_hash"]

APPLICATION_ID = 0x6C6D6678  # "lmfx"
SCHEMA_VERSION = 1
FILE_NAME = "lmfx.sqlite"
BUSY_SECONDS = 30.0
_SCHEMA = """
CREATE TABLE identities (hash TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE rows (kind TEXT NOT NULL, identity TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
                   PRIMARY KEY (kind, identity, key)) WITHOUT ROWID;
CREATE TABLE log (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, identity TEXT NOT NULL, key TEXT NOT NULL,
                  pid INTEGER NOT NULL, time REAL NOT NULL);
"""
_MAGIC = b"SQLite format 3\0"
_ADVICE = "delete the file, or choose another cache_dir"

Identity = Mapping[str, Any] | str


def default_cache_dir() -> Path:
    """`$LMFX_CACHE_DIR`, or the platform's cache folder for lmfx (`~/.cache/lmfx` on Linux)."""
    if chosen := os.environ.get("LMFX_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lmfx"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "lmfx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmfx"


def identity_hash(identity: Identity) -> str:
    """A short stable hash of a JSON-like mapping; a string is taken for a hash and returned as it is."""
    if isinstance(identity, str):
        return identity
    return hashlib.sha256(_dumps(identity).encode()).hexdigest()[:24]


class Store:
    """A key-value store of JSON values on one sqlite file, safe for several processes and for `kill -9`.

    Raises `StoreError` if the file is foreign, damaged, of a newer lmfx, or locked for longer than 30 s; such a file is
    left as it is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._known: set[str] = set()
        self._pid = os.getpid()
        self._connection: sqlite3.Connection | None = self._connect()

    @classmethod
    def open(cls, cache_dir: str | os.PathLike[str] | None = None) -> Store:
        """The store `lmfx.sqlite` in `cache_dir` (default: `default_cache_dir()`), made if it is not there."""
        return cls((Path(cache_dir) if cache_dir is not None else default_cache_dir()) / FILE_NAME)

    def get(self, kind: str, identity: Identity, key: str) -> Any:
        """The value, or None."""
        return self.get_many(kind, identity, [key]).get(key)

    def get_many(self, kind: str, identity: Identity, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """The values of those `keys` that are there (None: of all keys of this kind and identity)."""
        hashed = identity_hash(identity)
        with self._errors() as db:
            if keys is None:
                found = db.execute("SELECT key, value FROM rows WHERE kind = ? AND identity = ?", (kind, hashed))
                return {key: json.loads(value) for key, value in found}
            result: dict[str, Any] = {}
            wanted = list(dict.fromkeys(keys))
            for i in range(0, len(wanted), 500):
                chunk = wanted[i : i + 500]
                marks = ",".join("?" * len(chunk))
                found = db.execute(
                    f"SELECT key, value FROM rows WHERE kind = ? AND identity = ? AND key IN ({marks})",
                    (kind, hashed, *chunk),
                )
                result |= {key: json.loads(value) for key, value in found}
        return {key: result[key] for key in wanted if key in result}

    def put(self, kind: str, identity: Identity, key: str, value: Any) -> None:
        """Stores one JSON value (replacing an older one) and logs it, in one committed transaction."""
        hashed, text = identity_hash(identity), _dumps(value)
        with self._errors() as db:
            db.execute("BEGIN IMMEDIATE")
            if hashed not in self._known and not isinstance(identity, str):
                db.execute("INSERT OR IGNORE INTO identities VALUES (?, ?)", (hashed, _dumps(identity)))
            db.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", (kind, hashed, key, text))
            db.execute(
                "INSERT INTO log (kind, identity, key, pid, time) VALUES (?, ?, ?, ?, ?)",
                (kind, hashed, key, os.getpid(), time.time()),
            )
            db.execute("COMMIT")
            self._known.add(hashed)

    def count(self, kind: str | None = None, identity: Identity | None = None) -> int:
        """The number of rows, of one kind or identity if given."""
        where, values = self._where(kind, identity)
        with self._errors() as db:
            return int(db.execute(f"SELECT COUNT(*) FROM rows{where}", values).fetchone()[0])

    def times_put(self, kind: str | None = None, identity: Identity | None = None) -> dict[str, int]:
        """How often each key was put: 1 means that it was measured once."""
        where, values = self._where(kind, identity)
        with self._errors() as db:
            return dict(db.execute(f"SELECT key, COUNT(*) FROM log{where} GROUP BY key", values))

    def close(self) -> None:
        """Closes the file; later calls raise `StoreError`."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
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

    @staticmethod
    def _where(kind: str | None, identity: Identity | None) -> tuple[str, tuple[str, ...]]:
        given = {"kind": kind, "identity": None if identity is None else identity_hash(identity)}
        used = {name: value for name, value in given.items() if value is not None}
        return (" WHERE " + " AND ".join(f"{n} = ?" for n in used) if used else ""), tuple(used.values())

    @contextlib.contextmanager
    def _errors(self) -> Iterator[sqlite3.Connection]:
        """The connection, with sqlite's errors as `StoreError` and an open transaction rolled back."""
        with self._lock:
            if self._connection is not None and self._pid != os.getpid():  # forked: sqlite forbids sharing
                self._connection, self._pid = self._connect(), os.getpid()
            db = self._connection
            if db is None:
                raise StoreError(f"the store {self.path} is closed; open it again with Store({str(self.path)!r})")
            try:
                yield db
            except (sqlite3.Error, json.JSONDecodeError) as error:
                raise self._explain(error) from error
            finally:
                if db.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        db.execute("ROLLBACK")

    def _explain(self, error: Exception) -> StoreError:
        text = str(error)
        if "locked" in text or "busy" in text:
            return StoreError(
                f"the store {self.path} stayed locked by another process for {BUSY_SECONDS:.0f} s; wait for it, or "
                "choose another cache_dir"
            )
        if "readonly" in text or "unable to open" in text or "disk" in text:
            return StoreError(f"the store {self.path} can not be written ({text}); choose another cache_dir")
        return StoreError(f"the store {self.path} is damaged ({text}); {_ADVICE}")

    def _connect(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"can not make the folder {self.path.parent}: {error}; choose another cache_dir"
            ) from error
        if self.path.is_dir():
            raise StoreError(f"{self.path} is a folder, not a store; choose another cache_dir")
        new = self._check_header()
        try:
            db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._explain(error) from error
        try:
            if new:
                self._create(db)
            self._check_content(db)
            # Only now is the file known to be ours. WAL: readers never wait, and a killed writer loses at most the
            # transaction it was in.
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
        except BaseException as error:
            db.close()
            if isinstance(error, sqlite3.Error):
                raise self._explain(error) from error
            raise
        return db

    def _check_header(self) -> bool:
        """Reads the first bytes without sqlite. True if there is no store yet."""
        try:
            with open(self.path, "rb") as file:
                header = file.read(100)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return True
        except OSError as error:
            raise StoreError(f"the store {self.path} can not be read ({error}); choose another cache_dir") from error
        if size == 0:
            return True  # sqlite makes the file before it writes to it
        if header[:16] != _MAGIC[: len(header[:16])]:
            raise StoreError(f"{self.path} is not an lmfx store (it is not an sqlite file); {_ADVICE}")
        if self._sidecar("-journal"):
            return False  # it is being made, or its maker was killed; sqlite knows how to go on
        if len(header) < 100:
            raise StoreError(f"the store {self.path} is truncated ({size} bytes); {_ADVICE}")
        self._check_id(struct.unpack(">I", header[68:72])[0], struct.unpack(">I", header[60:64])[0])
        page = int(struct.unpack(">H", header[16:18])[0])
        pages = int(struct.unpack(">I", header[28:32])[0])
        if size < page * pages and not self._sidecar("-wal"):  # a killed checkpoint is finished from the -wal file
            raise StoreError(f"the store {self.path} is truncated ({size} bytes of {page * pages}); {_ADVICE}")
        return False

    def _sidecar(self, end: str) -> bool:
        return self.path.with_name(self.path.name + end).exists()

    def _check_id(self, application: int, version: int) -> None:
        if application != APPLICATION_ID:
            raise StoreError(
                f"{self.path} is an sqlite file of another program (application id {application:#x}); {_ADVICE}"
            )
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"the store {self.path} has version {version}, and this lmfx reads version {SCHEMA_VERSION}; {_ADVICE}"
            )

    def _create(self, db: sqlite3.Connection) -> None:
        """Schema and ids in one transaction of the rollback journal, so that the file is either nothing or a store."""
        db.execute("BEGIN IMMEDIATE")
        if db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0:  # else another process was faster
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")

    def _check_content(self, db: sqlite3.Connection) -> None:
        ids = [int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("application_id", "user_version")]
        tables = int(db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0])
        if ids == [0, 0] and tables == 0:
            self._create(db)  # its maker was killed, and sqlite rolled everything back
        else:
            self._check_id(*ids)
        found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise StoreError(f"the store {self.path} is damaged ({found}); {_ADVICE}")


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, set, frozenset)):
        return sorted(value) if not isinstance(value, tuple) else list(value)
    if hasattr(value, "item"):
        return value.item()
    return str(value)
