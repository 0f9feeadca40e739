"""Claims rows for one process, so that several processes fill one store and no row is made twice.

    KEY.claim    who makes the row beside which it lies; it was renewed when the file was last modified

How claims are taken and waited for: `lmfx.store.shared_rows`. A claim ends with its process. On the same machine (one
boot, one set of pids) a process is gone when its pid is, or belongs to one that started at another time. Elsewhere, and
where /proc does not tell, it is gone when it has not renewed its claims for `STALE_SECONDS`; one that is there but does
nothing is waited for `HUNG_SECONDS`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from lmfx.passes.errors import StoreError

__all__ = ["Claims", "Owner", "is_live"]

BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
HUNG_SECONDS = 900.0
BUSY_SECONDS = 30.0


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


class Claims:
    """The claims of one store object. As long as it has any, a thread renews them."""

    def __init__(self) -> None:
        self._owner, self._held = Owner(), set[Path]()
        self._stop: threading.Event | None = None

    def take(self, folder: Path, names: Iterable[str], most: int | None) -> list[str]:
        """The first `most` of the rows of these file names that nobody has, which are this object's from now on."""
        self._after_a_fork()
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            claimed = {path.stem for path in folder.glob("*.claim") if path in self._held or _is_held(path)}
            free = [name for name in names if Path(name).stem not in claimed][:most]
            for name in free:
                path = (folder / name).with_suffix(".claim")
                path.write_text(json.dumps(asdict(self._owner)))
                self._held.add(path)
        if free and self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=_beat, args=(weakref.WeakMethod(self.renew), self._stop), daemon=True).start()
        return free

    def end(self, row: Path) -> None:
        """Ends the claim on a row that is there now."""
        self._drop([row.with_suffix(".claim")])

    def release(self, folder: Path, names: Iterable[str] | None) -> None:
        """Ends this object's claims in a folder, or those of them on some rows."""
        self._after_a_fork()
        stems = None if names is None else {Path(name).stem for name in names}
        held = [path for path in tuple(self._held) if path.parent == folder]
        self._drop(path for path in held if stems is None or path.stem in stems)

    def renew(self) -> None:
        """Says that this object still works on what it has claimed."""
        for path in tuple(self._held):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)

    def close(self) -> None:
        """Ends all claims of this object."""
        self._after_a_fork()
        if self._stop is not None:
            self._stop.set()
        self._drop(tuple(self._held))

    def _drop(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self._held.discard(path)
            with contextlib.suppress(OSError):  # else the claim ends with this process
                path.unlink()

    def _after_a_fork(self) -> None:
        if self._owner.pid != os.getpid():  # what is held is the parent's
            self._owner, self._held, self._stop = Owner(), set(), None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time is inside. The kernel opens the lock when a process dies."""
    try:
        with FileLock(folder / "claims.lock", timeout=BUSY_SECONDS):
            yield
    except Timeout:
        raise StoreError(
            f"the folder {folder} stayed locked by another process for {BUSY_SECONDS:.0f} s; wait for it, or choose "
            "another cache_dir"
        ) from None


def _is_held(claim: Path) -> bool:
    """Whether a claim's owner works on it. What makes no sense is nobody's claim."""
    try:
        return is_live(Owner(**json.loads(claim.read_text())), claim.stat().st_mtime, time.time())
    except (OSError, TypeError, ValueError):
        return False


def _beat(renew: weakref.WeakMethod[Callable[[], None]], stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        found = renew()
        if found is None:
            return
        with contextlib.suppress(OSError):
            found()
        del found
