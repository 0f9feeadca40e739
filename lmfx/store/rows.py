"""The on-disk store: a folder with one small file for every latency and importance that was ever measured here.

    rows/KIND/IDENTITY/KEY.json     a row (`lmfx.store.row_files`): the kind as it is, hashes of identity and key
    rows/KIND/IDENTITY/KEY.claim    a process makes this row now (`lmfx.store.claims`)
    rows/KIND/IDENTITY/log          a line for every `put`: what was made twice was made for nothing

The identity says on what the value depends (backend, version, device, threads; or estimator, weights, data), so rows of
two machines or two models never mix. A row is on disk when `put` returns, which is what makes a killed run resumable.
Between two calls nothing is open or locked, so a store may be used by any threads, processes and forks.

A damaged row is renamed with a warning, and is made again like one that never was. Latencies are relative to a time of
the same identity (kind `sentinel`); when that is damaged they are put aside with it, and so are all whole networks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from lmfx.passes.errors import StoreError
from lmfx.store.claims import Claims
from lmfx.store.row_files import (
    Damaged,
    Row,
    RowIdentity,
    dumps,
    file_name,
    identity_hash,
    put_aside,
    read_row,
    write_row,
)

__all__ = ["FOLDER_NAME", "SENTINEL", "Store", "default_cache_dir"]

FOLDER_NAME = "rows"
SENTINEL = "sentinel"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


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
    """A key-value store of JSON values in one folder, safe for several processes and for `kill -9`.

    A damaged row is moved aside with a `RuntimeWarning` that names both paths. Raises `StoreError` if the folder cannot
    be made, read or written, and for a row of another version of lmfx, which stays as it is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.private = False  # for one run alone, which knows of what its rows are
        self._closed = False
        self._claims = Claims()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make the folder {self.path}: {error}; choose another cache_dir") from error

    @classmethod
    def open(cls, cache_dir: str | os.PathLike[str] | None = None) -> Store:
        """The store in the folder `rows` of `cache_dir` (default: `default_cache_dir()`), made if it is not there."""
        return cls((Path(cache_dir) if cache_dir is not None else default_cache_dir()) / FOLDER_NAME)

    # --- rows -------------------------------------------------------------------------------------------------------

    def get(self, kind: str, identity: RowIdentity, key: str) -> Any:
        """The value, or None."""
        return self.get_many(kind, identity, [key]).get(key)

    def get_many(self, kind: str, identity: RowIdentity, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """The values of those `keys` that are there (None: of all keys of this kind and identity)."""
        if kind == "latency":
            self._read(self.folder(SENTINEL, identity).glob("*.json"))  # if that is damaged, the latencies go
        folder = self.folder(kind, identity)
        files = folder.glob("*.json") if keys is None else (folder / file_name(key) for key in dict.fromkeys(keys))
        return {row.key: row.value for row in self._read(files)}

    def rows(self) -> list[Row]:
        """Every row that there is, by kind and identity."""
        self._read(self.files(SENTINEL))
        return sorted(self._read(self.files()), key=lambda row: (row.kind, row.identity, row.key))

    def put(self, kind: str, identity: RowIdentity, key: str, value: Any) -> None:
        """Stores one JSON value (replacing an older one), logs it and ends its claim."""
        about = {} if isinstance(identity, str) else dict(identity)
        self.add(Row(kind, identity_hash(identity), key, value, time.time(), about))
        folder = self.folder(kind, identity)
        try:
            with open(folder / "log", "ab", buffering=0) as log:  # one write a line, so those of two never mix
                log.write(dumps([key, os.getpid()]).encode() + b"\n")
        except OSError as error:
            raise self._unusable(error) from error
        self._claims.end(folder / file_name(key))

    def add(self, row: Row) -> None:
        """Stores a row that was made before, perhaps elsewhere; the log says nothing of it."""
        try:
            write_row(self.folder(row.kind, row.identity) / file_name(row.key), row)
        except OSError as error:
            raise self._unusable(error) from error

    def remove(self, row: Row) -> int:
        """Deletes a row; how many bytes its file had."""
        path = self.folder(row.kind, row.identity) / file_name(row.key)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:  # another process was faster
            return 0
        except OSError as error:
            raise self._unusable(error) from error
        return size

    def count(self, kind: str | None = None, identity: RowIdentity | None = None) -> int:
        """The number of rows, of one kind or identity if given."""
        return len(self.files(kind, identity))

    def log(self, kind: str | None = None, identity: RowIdentity | None = None) -> list[tuple[str, int]]:
        """The key and the process of every `put`, of one kind or identity if given."""
        found = []
        for line in (line for log in self.files(kind, identity, "log") for line in log.read_bytes().splitlines()):
            with contextlib.suppress(TypeError, ValueError):  # the line of a process that was killed
                key, pid = json.loads(line)
                found.append((str(key), int(pid)))
        return found

    def times_put(self, kind: str | None = None, identity: RowIdentity | None = None) -> dict[str, int]:
        """How often each key was put: 1 means that it was measured once."""
        return dict(Counter(key for key, _ in self.log(kind, identity)))

    # --- claims -----------------------------------------------------------------------------------------------------

    def claim(self, kind: str, identity: RowIdentity, keys: Iterable[str], most: int | None = None) -> list[str]:
        """Claims the first `most` of `keys` that no living process has, and returns them; see `lmfx.store.claims`."""
        names = {file_name(key): key for key in keys}
        try:
            taken = self._claims.take(self.folder(kind, identity), names, most)
        except OSError as error:
            raise self._unusable(error) from error
        return [names[name] for name in taken]

    def release(self, kind: str, identity: RowIdentity, keys: Iterable[str] | None = None) -> None:
        """Ends claims of this store object: those of a kind and identity, or of some of their keys."""
        folder = self.folder(kind, identity)
        self._claims.release(folder, None if keys is None else [file_name(key) for key in keys])

    # --- the folder -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends all claims; later calls raise `StoreError`."""
        if not self._closed:
            self._claims.close()
        self._closed = True

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return type(self), (str(self.path),)  # a copy has claims of its own

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def folder(self, kind: str, identity: RowIdentity) -> Path:
        """Where the rows of a kind and identity are. Raises `StoreError` for what cannot be the name of a folder."""
        hashed = identity_hash(identity)
        if not (_NAME.fullmatch(kind) and _NAME.fullmatch(hashed)):
            raise StoreError(f"rows of {kind!r}, {hashed!r} cannot be stored; give a word, and a mapping or its hash")
        self._check_open()
        return self.path / kind / hashed

    def files(self, kind: str | None = None, identity: RowIdentity | None = None, name: str = "*.json") -> list[Path]:
        """The files of that name, of one kind or identity if given."""
        self._check_open()
        hashed = "*" if identity is None else identity_hash(identity)
        found = self.path.glob(f"{kind or '*'}/{hashed}/{name}")
        return [path for path in found if _NAME.fullmatch(path.parent.name) and _NAME.fullmatch(path.parents[1].name)]

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"the store {self.path} is closed; open it again with Store({str(self.path)!r})")

    def _read(self, files: Iterable[Path]) -> list[Row]:
        """The rows of those files that are there; what is damaged is put aside."""
        rows = []
        for path in files:
            try:
                rows.append(read_row(path))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._unusable(error) from error
            except Damaged as damage:
                self._put_aside(path, str(damage))
        return rows

    def _put_aside(self, path: Path, reason: str) -> None:
        """Renames a damaged row, and what cannot be believed without it; the warning comes last, it may be an error."""
        _, kind, identity = (path.parents[i].name for i in (2, 1, 0))
        relative = [self.path / "latency" / identity, self.path / "whole"] if kind == SENTINEL else []
        moved = [aside for found in (*relative, path) if (aside := put_aside(found)) is not None]
        if moved:
            further = f", and with it {moved[0]}, which is relative to it" if len(moved) > 1 else ""
            warnings.warn(
                f"the row {path} of the store is damaged ({reason}); it was moved to {moved[-1]}{further}, and is made "
                "again when it is needed",
                RuntimeWarning,
                stacklevel=4,
            )

    def _unusable(self, error: OSError) -> StoreError:
        return StoreError(f"the store {self.path} cannot be read and written ({error}); choose another cache_dir")
