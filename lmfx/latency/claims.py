"""Claims: several processes fill one store, and no row is made twice.

    take      a few rows that nobody has, in one transaction             claims: row -> owner, place, pid, started, beat
    put       the row, and the end of its claim, in one transaction
    wait      what is left belongs to others: until they are ready, or gone

A claim ends with its process. On the same machine (one boot, one set of pids) a process is gone when its pid is, or
belongs to one that started at another time. Elsewhere, and where /proc does not tell, it is gone when it has not
renewed its claims for `STALE_SECONDS`; one that is there but does nothing is waited for `HUNG_SECONDS`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lmfx.latency.store_schema import Identity, identity_hash
from lmfx.passes.errors import StoreError

if TYPE_CHECKING:
    from lmfx.latency.store import Store

__all__ = ["Owner", "Share", "alone", "claim_rows", "is_live"]

BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
HUNG_SECONDS = 900.0
POLL_SECONDS = 0.2


@functools.cache
def this_place() -> str:
    """Host, boot and pid namespace, within which a pid means something; empty where a process can not be looked up."""
    if not Path("/proc/self/stat").exists():
        return ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def start_of(pid: int) -> str:
    """When a process of this place started (clock ticks since boot); empty if there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if len(fields) < 20 or fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Owner:
    """Who claims: one store object of one process."""

    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    place: str = field(default_factory=this_place)
    pid: int = field(default_factory=os.getpid)
    started: str = field(default_factory=lambda: start_of(os.getpid()))


def is_live(owner: Owner, beat: float, now: float) -> bool:
    """Whether the maker of a claim that was renewed at `beat` still works on it."""
    idle = now - beat
    if owner.place and owner.place == this_place():
        return start_of(owner.pid) == owner.started != "" and idle < HUNG_SECONDS
    return idle < STALE_SECONDS


def claim_rows(
    db: sqlite3.Connection, me: Owner, kind: str, identity: str, keys: Iterable[str], most: int | None
) -> list[str]:
    """The first `most` of `keys` that nobody has, which are `me`'s from now on. Inside a transaction that writes."""
    now = time.time()
    query = "SELECT key, owner, place, pid, started, beat FROM claims WHERE kind = ? AND identity = ?"
    alive: dict[tuple[str, float], bool] = {}
    taken: set[str] = set()
    for key, token, place, pid, started, beat in db.execute(query, (kind, identity)):
        if (token, beat) not in alive:
            alive[token, beat] = token == me.token or is_live(Owner(token, place, pid, started), beat, now)
        if alive[token, beat]:
            taken.add(key)
    free = [k for k in dict.fromkeys(keys) if k not in taken][:most]
    db.executemany(
        "INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [(kind, identity, k, me.token, me.place, me.pid, me.started, now) for k in free],
    )
    return free


class Share:
    """This process's part of the rows of one kind and identity. Without a store everything is its own.

    Use it with `with`: what is still claimed at the end is given back.
    """

    def __init__(self, store: Store | None, kind: str, identity: Identity) -> None:
        self.store, self.kind, self.identity = store, kind, identity_hash(identity)

    def take(self, keys: Iterable[str], most: int | None = None) -> list[str]:
        """Claims the first `most` of `keys` (all, if None) that no other process works on, and returns them.

        A row may have been finished in the moment before: look for it in the store after this, not before.
        """
        if self.store is None:
            return list(dict.fromkeys(keys))[:most]
        return self.store.claim(self.kind, self.identity, keys, most)

    def give_back(self, keys: Iterable[str]) -> None:
        """Ends claims on rows that were not put."""
        if self.store is not None:
            self.store.release(self.kind, self.identity, keys)

    def wait(self) -> None:
        """A moment in which others may finish."""
        time.sleep(POLL_SECONDS)

    def __enter__(self) -> Share:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.store is not None:
            with contextlib.suppress(StoreError):  # closed or gone; then its claims die with the process
                self.store.release(self.kind, self.identity)


@contextlib.contextmanager
def alone(store: Store | None, kind: str, identity: Identity) -> Iterator[None]:
    """Waits until no other process is inside for the same kind and identity: for rows that are made all together."""
    with Share(store, kind, identity) as share:
        while not share.take(["*"]):
            share.wait()
        yield


class Heart:
    """Renews the claims of a store from a thread, as long as the store is there."""

    def __init__(self, store: Store) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=_beat, args=(weakref.ref(store), self._stop), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more renewals."""
        self._stop.set()


def _beat(store: weakref.ref[Store], stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        found = store()
        if found is None:
            return
        with contextlib.suppress(StoreError):
            found.renew()
        del found
