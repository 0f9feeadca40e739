"""Claims rows for one process, so that several processes fill one store and no row is made twice.

    claims    row -> owner, place, pid, started, beat       how they are taken and waited for: `lmfx.store.shared_rows`

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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lmfx.passes.errors import StoreError

__all__ = ["Heart", "Owner", "claim_rows", "is_live"]

BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
HUNG_SECONDS = 900.0


@functools.cache
def this_place() -> str:
    """Host, boot and pid namespace, within which a pid means something; empty where a process cannot be looked up."""
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


class Heart:
    """Renews the claims of a store from a thread, as long as the store is there."""

    def __init__(self, renew: weakref.WeakMethod[Callable[[], None]]) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=_beat, args=(renew, self._stop), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more renewals."""
        self._stop.set()


def _beat(renew: weakref.WeakMethod[Callable[[], None]], stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        found = renew()
        if found is None:
            return
        with contextlib.suppress(StoreError):
            found()
        del found
