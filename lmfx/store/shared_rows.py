"""Gives a process its share of the rows that several processes make for one store (`lmfx.store.claims`).

take      a few rows that nobody has
put       the row, and then the end of its claim (`Store.put`)
wait      what is left belongs to others: until they are ready, or gone
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from types import TracebackType

from lmfx.passes.errors import StoreError
from lmfx.store.row_files import RowIdentity, identity_hash
from lmfx.store.rows import Store

__all__ = ["Share", "alone"]

POLL_SECONDS = 0.2


class Share:
    """This process's part of the rows of one kind and identity. Without a store everything is its own.

    Use it with `with`: what is still claimed at the end is given back.
    """

    def __init__(self, store: Store | None, kind: str, identity: RowIdentity) -> None:
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
def alone(store: Store | None, kind: str, identity: RowIdentity) -> Iterator[None]:
    """Waits until no other process is inside for the same kind and identity: for rows that are made all together."""
    with Share(store, kind, identity) as share:
        while not share.take(["*"]):
            share.wait()
        yield
