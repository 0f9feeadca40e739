"""Runs independent jobs over any executor; a worker that dies costs time and no result.

    ProcessPoolExecutor   a dead worker breaks the pool and every future in it: what was in flight goes to a new pool,
                          which needs a factory, `lambda: ProcessPoolExecutor(2)`
    Dask                  the scheduler runs a dead worker's jobs elsewhere; a job that it gives up is handed in again
    threads, None         nothing can die alone

Jobs are made when there is room for them (`ahead` in flight), so a thousand networks need not be held at once. Results
come in the order in which they are ready.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from typing import Any, TypeVar

from lmfx.passes.errors import InputError, OptionError

__all__ = ["ExecutorLike", "opened", "run_jobs"]

J = TypeVar("J")
R = TypeVar("R")
ExecutorLike = Executor | Callable[[], Executor] | None


@contextlib.contextmanager
def opened(executor: ExecutorLike) -> Iterator[Executor | None]:
    """Gives an executor as it is, or one that a factory makes, which is shut down afterwards."""
    if executor is None or isinstance(executor, Executor) or hasattr(executor, "submit"):
        yield executor  # type: ignore[misc]
    else:
        with executor() as made:
            yield made


def run_jobs(
    function: Callable[[J], R],
    jobs: Iterable[J],
    executor: ExecutorLike = None,
    *,
    name: Callable[[J], Hashable] = id,
    ahead: int = 16,
    retries: int = 3,
) -> Iterator[R]:
    """`function(job)` for each job. An executor is left open, one that a factory made is shut down.

    A job that was lost `retries` times, or any if there is no factory to make another pool with, is an `InputError`
    that names it. An error of `function` itself is raised as it is, once.
    """
    if executor is None:
        yield from map(function, jobs)
        return
    if not hasattr(executor, "submit") and not callable(executor):
        raise OptionError(
            f"executor={executor!r} is a {type(executor).__name__}: pass a concurrent.futures.Executor or a function "
            "that makes one"
        )
    yield from _Runner(function, iter(jobs), executor, name, ahead, retries).run()


class _Runner:
    def __init__(
        self,
        function: Callable[[Any], Any],
        jobs: Iterator[Any],
        executor: Any,
        name: Callable[[Any], Hashable],
        ahead: int,
        retries: int,
    ) -> None:
        self.function, self.jobs, self.name = function, jobs, name
        self.factory = None if hasattr(executor, "submit") else executor
        self.pool: Any = executor if self.factory is None else executor()
        self.ahead, self.retries = ahead, retries
        self.again: deque[Any] = deque()
        self.losses: Counter[Hashable] = Counter()
        self.replaced = 0  # pools in a row that were broken from the start
        self.pending: dict[Future[Any], Any] = {}

    def run(self) -> Iterator[Any]:
        finished = False
        try:
            while self.fill():
                done, _ = wait(self.pending, return_when=FIRST_COMPLETED)
                broken: BaseException | None = None
                for future in done:
                    job = self.pending.pop(future)
                    error = CancelledError() if future.cancelled() else future.exception()
                    if error is None:
                        yield future.result()
                    elif not _lost(error):
                        raise error
                    else:
                        self.lose(job, error)
                        broken = error if isinstance(error, BrokenExecutor) else broken
                if broken is not None:
                    yield from self.renew(broken)
            finished = True
        finally:
            for future in self.pending:
                future.cancel()
            if self.factory is not None:
                self.pool.shutdown(wait=finished, cancel_futures=True)

    def fill(self) -> bool:
        """Hand in jobs while there is room; whether anything is in flight."""
        while len(self.pending) < self.ahead:
            job = self.again.popleft() if self.again else next(self.jobs, None)
            if job is None:
                break
            try:
                self.pending[self.pool.submit(self.function, job)] = job
                self.replaced = 0
            except BrokenExecutor:  # it broke since the last look, and the futures in flight will say so
                self.again.appendleft(job)
                if not self.pending:
                    self.replace()
                else:
                    break
        return bool(self.pending)

    def lose(self, job: Any, error: BaseException) -> None:
        """Note a lost job, to be handed in again."""
        name = self.name(job)
        self.losses[name] += 1
        if self.losses[name] > self.retries:
            raise InputError(
                f"the worker of {name} died {self.losses[name]} times ({type(error).__name__}): it may run out of "
                "memory. Use fewer workers, or try the job without an executor; rows that were finished are kept"
            ) from error
        self.again.append(job)

    def renew(self, error: BaseException) -> Iterator[Any]:
        """Another pool, with all that was in flight in the broken one; yields what was finished there."""
        if self.factory is None:
            raise InputError(
                f"a worker died and broke the {type(self.pool).__name__}, which cannot be used again: pass a function "
                "that makes one, executor=lambda: ProcessPoolExecutor(2). Rows that were finished are kept"
            ) from error
        wait(self.pending)
        for future, job in list(self.pending.items()):
            del self.pending[future]
            failed = CancelledError() if future.cancelled() else future.exception()
            if failed is None:
                yield future.result()
            elif _lost(failed):
                self.lose(job, failed)
            else:
                raise failed
        self.replace()

    def replace(self) -> None:
        if self.factory is None:
            raise InputError(
                f"the {type(self.pool).__name__} is broken, a worker of it died: pass a function that makes one, "
                "executor=lambda: ProcessPoolExecutor(2)"
            )
        self.replaced += 1
        if self.replaced > self.retries + 1:
            raise InputError(
                f"{self.replaced} pools in a row were broken before they took a job: executor= must be a function that "
                "makes a new pool each time. Rows that were finished are kept"
            )
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.pool = self.factory()


def _lost(error: BaseException) -> bool:
    """Whether a job was lost with its worker, and may do better elsewhere. Dask's errors are known by their names."""
    return isinstance(error, (BrokenExecutor, CancelledError)) or type(error).__name__ in (
        "KilledWorker",
        "CommClosedError",
    )
