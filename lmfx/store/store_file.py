"""Opens the file of a store: whose it is, whether it is whole, and how a damaged one is put aside.

    foreign     another program's, or no sqlite file        never touched, `StoreError`
    newer       of a later lmfx                             never touched, `StoreError`
    damaged     ours, and not what was written              moved to NAME.corrupt-TIME with its -wal and -shm
    ours        checked by sqlite (`quick_check`), and every row by its checksum when the file is opened and when
                the row is read

Opening and moving are done under a lock on the folder, so nobody opens a file that is being moved, and of two processes
that find the same damage one moves it and the other opens what the first began. A process that has the moved file open
sees that the path has another inode, and opens the path again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lmfx.passes.errors import StoreError
from lmfx.store.schema import (
    APPLICATION_ID,
    MARK,
    TABLES,
    VERSION,
    Damaged,
    create,
    named,
    tables_of,
    whole,
)

__all__ = ["ADVICE", "explain", "file_id", "folder_lock", "is_damage", "move_aside", "open_file", "rescue"]

ADVICE = "delete the file, or choose another cache_dir"
_MAGIC = b"SQLite format 3\0"
_FIXED = {0: _MAGIC, 21: b"\x40\x20\x20", 56: struct.pack(">I", 1)}  # what is the same in every header
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
LONGEST_VALUE = 2**26  # bytes
_SIDECARS = ("-wal", "-shm", "-journal")


def file_id(path: Path) -> tuple[int, int] | None:
    """Which file the path leads to now; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def folder_lock(folder: Path, seconds: float) -> Iterator[None]:
    """Only one process at a time is inside. The kernel gives it back when a process dies; no file is left over.

    Raises `StoreError` after `seconds`. Where folders cannot be locked (Windows) there is no lock: an open file
    cannot be moved there.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise StoreError(
                        f"the folder {folder} stayed locked by another process that opens its store for {seconds:.0f} "
                        "s; wait for it, or choose another cache_dir"
                    ) from None
                time.sleep(0.01)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)


def is_damage(error: Exception) -> bool:
    """Whether sqlite met what nobody wrote, and not a lock, a full disk or missing rights."""
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(error, UnicodeDecodeError):  # in the text of sqlite's own message
        return True
    if "decode to UTF-8" in str(error):
        return True
    return code is not None and code & 0xFF in _DAMAGE


def explain(path: Path, error: Exception, seconds: float) -> StoreError:
    """sqlite's error as one that says what to do."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return StoreError(
            f"the store {path} stayed locked by another process for {seconds:.0f} s; wait for it, or choose another "
            "cache_dir"
        )
    if any(word in text for word in ("readonly", "unable to open", "disk")):
        return StoreError(f"the store {path} cannot be written ({text}); choose another cache_dir")
    return StoreError(f"the store {path} does not work ({text}); {ADVICE}")


def open_file(path: Path, seconds: float) -> sqlite3.Connection:
    """A connection to a store that is whole, made if there is none.

    Raises `StoreError` for a foreign file and another version, which stay as they are, and `Damaged`.
    """
    if path.is_dir():
        raise StoreError(f"{path} is a folder, not a store; choose another cache_dir")
    new = _check_header(path)
    db: sqlite3.Connection | None = None
    try:
        db = sqlite3.connect(path, timeout=seconds, isolation_level=None, check_same_thread=False)
        distrust(db)
        if new:
            create(db)
        _check_content(path, db)
        # Only now is the file known to be ours. WAL: readers never wait, and a killed writer loses at most the
        # transaction it was in.
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        return db
    except BaseException as error:
        if db is not None:
            db.close()
        if not isinstance(error, (sqlite3.Error, UnicodeDecodeError)):
            raise
        if is_damage(error):
            raise Damaged(str(error)) from error
        raise explain(path, error, seconds) from error


def distrust(db: sqlite3.Connection) -> None:
    """Lets no functions of the schema's own run, and no value be longer than a row of lmfx ever is."""
    db.execute("PRAGMA trusted_schema = OFF")
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)


def _check_header(path: Path) -> bool:
    """Reads the first page without sqlite. True if there is no store yet."""
    try:
        with open(path, "rb") as file:
            page = file.read(4096)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise StoreError(f"the store {path} cannot be read ({error}); choose another cache_dir") from error
    if not page:
        return True  # sqlite makes the file before it writes to it
    alike = sum(a == b for a, b in zip(page, _MAGIC, strict=False))
    if alike < min(12, len(page)):  # at most a few bits of a store's magic are damaged
        raise StoreError(f"{path} is not an lmfx store (it is not an sqlite file); {ADVICE}")
    if path.with_name(path.name + "-journal").exists():
        return False  # it is being made, or its maker was killed; sqlite knows how to go on
    if len(page) < 512:
        raise Damaged(f"it is truncated to {len(page)} bytes")
    application, version = (struct.unpack(">I", page[i : i + 4])[0] for i in (68, 60))
    if application != APPLICATION_ID and MARK not in page:
        if alike < len(_MAGIC):
            raise StoreError(f"{path} is not an lmfx store (it is not an sqlite file); {ADVICE}")
        if application == version == 0 and page[103:105] == b"\0\0":
            return False  # without any table: its maker was killed
        raise StoreError(f"{path} is an sqlite file of another program (application id {application:#x}); {ADVICE}")
    ours = all(text.encode() in page for text in TABLES)  # then a lower version than ours is a damaged one
    if application == APPLICATION_ID and (version > VERSION or (version < VERSION and not ours)):
        raise StoreError(
            f"the store {path} has version {version}, and this lmfx reads version {VERSION}; use an lmfx that reads "
            "it, or choose another cache_dir"
        )
    fixed = all(page[at : at + len(known)] == known for at, known in _FIXED.items())
    if not fixed or {*page[18:20]} - {1, 2} or application != APPLICATION_ID or version < 1:
        raise Damaged("its header is not what lmfx writes")
    return False


def _check_content(path: Path, db: sqlite3.Connection) -> None:
    application, version = (int(db.execute(f"PRAGMA {n}").fetchone()[0]) for n in ("application_id", "user_version"))
    if application == version == 0 and db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0:
        create(db)  # its maker was killed, and sqlite rolled everything back
        return
    if application != APPLICATION_ID:
        raise StoreError(f"{path} is an sqlite file of another program (application id {application:#x}); {ADVICE}")
    try:
        # Before anything else runs on the tables: a file may come with views, triggers and constraints of its own.
        if version != VERSION or tables_of(db) != {*TABLES}:
            raise Damaged("its tables are not those of its version")
        found = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError as error:  # what it says of a table that it cannot make sense of
        if is_damage(error) or error.sqlite_errorcode == sqlite3.SQLITE_ERROR:
            raise Damaged(str(error)) from error
        raise
    if found != "ok":
        raise Damaged(found)
    if any(not whole(row) for row in db.execute("SELECT * FROM rows")):
        raise Damaged("a row does not have its checksum")
    if not all(named(*row) for row in db.execute("SELECT hash, value FROM identities")):
        raise Damaged("an identity does not have its hash")


def move_aside(path: Path) -> Path:
    """Renames a damaged file, with its -wal and -shm, to a name that is free, and returns that.

    To be called under the folder's lock. Raises `StoreError` if the file cannot be moved.
    """
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    name = f"{path.name}.corrupt-{stamp}"
    count = 1
    while (aside := path.with_name(name)).exists():
        count += 1
        name = f"{path.name}.corrupt-{stamp}-{count}"
    try:
        for end in _SIDECARS:
            with contextlib.suppress(FileNotFoundError):
                os.rename(path.with_name(path.name + end), aside.with_name(aside.name + end))
        os.rename(path, aside)
    except OSError as error:
        raise StoreError(f"the store {path} is damaged and cannot be moved aside ({error}); {ADVICE}") from error
    return aside


def rescue(aside: Path, db: sqlite3.Connection) -> int:
    """Copies the rows of a damaged file whose checksums hold into a new store, and returns how many.

    Latencies only together with the sentinel's reference of their identity: without it the next ones would be on
    another scale; whole networks, which are soon measured again, not at all.
    """
    rows: dict[tuple[str, ...], tuple[object, ...]] = {}
    identities: dict[tuple[str, ...], tuple[object, ...]] = {}
    with tempfile.TemporaryDirectory(prefix=".lmfx-", dir=aside.parent) as folder:
        copied = Path(folder) / "copy"  # sqlite may write to what it opens
        for end in ("", *_SIDECARS):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(aside.with_name(aside.name + end), copied.with_name(copied.name + end))
        with open(copied, "r+b") as file:
            for at, known in _FIXED.items():
                file.seek(at)
                file.write(known)
        for direction in ("ASC", "DESC"):  # reading stops at a broken page, so it is done from both ends
            _read(copied, f"SELECT * FROM rows ORDER BY kind {direction}, identity {direction}, key {direction}", rows)
            _read(copied, f"SELECT hash, value FROM identities ORDER BY hash {direction}", identities)
    certain = [row for row in rows.values() if whole(row)]
    comparable = {row[1] for row in certain if row[0] == "sentinel"}
    kept = [row for row in certain if row[0] not in ("latency", "whole") or row[1] in comparable]
    db.execute("BEGIN IMMEDIATE")
    db.executemany(
        "INSERT OR REPLACE INTO identities VALUES (?, ?)", [r for r in identities.values() if named(*map(str, r))]
    )
    db.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?)", kept)
    db.execute("COMMIT")
    return len(kept)


def _read(path: Path, query: str, found: dict[tuple[str, ...], tuple[object, ...]]) -> None:
    """What of a query's rows can be read before sqlite stops at a broken page."""
    with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
        source = sqlite3.connect(path)
        try:
            distrust(source)
            source.text_factory = lambda raw: raw.decode("utf-8", "replace")
            source.execute("PRAGMA writable_schema = ON")  # read what is left of a truncated file
            if not tables_of(source) <= {*TABLES}:
                return  # a view may say anything, and for ever
            for row in source.execute(query):
                found[tuple(map(str, row[:3]))] = row
        finally:
            source.close()
