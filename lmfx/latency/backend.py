"""The backend protocol: workloads -> measurements, each operator configuration once, and resumable.

A backend only says how to prepare one workload as a `Runner`; `TimedBackend.measure` does the rest:

    in the store already          not measured (only what is lasting is looked for there, and kept)
    lower bound                   from FLOPs; `prune(signature, ms)` may say that the row cannot be useful at that
                                  latency, and then the workload is not even made ready
    quick pass                    two runs, and `prune` is asked again
    interleaved rounds            `lmfx.latency.sampling`, in batches that share a sentinel
    each finished row             committed to the store at once

Several processes may measure into one store: each claims a few rows before it makes them ready
(`lmfx.store.shared_rows`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from lmfx.environment.caller_state import entry
from lmfx.environment.progress import progress as progress_bar
from lmfx.latency.sampling import Runner, Sampling, Session, Taken, summary
from lmfx.latency.workload import Workload
from lmfx.passes.errors import OptionError, StoreError
from lmfx.store.row_values import check_value
from lmfx.store.rows import Store
from lmfx.store.shared_rows import Share

__all__ = ["Backend", "Measurement", "Prune", "TimedBackend", "Whole"]

Prune = Callable[[str, float], bool]
"""(signature, quick latency in ms) -> True if no plan can use the row at that latency."""
Whole = Workload | tuple[nn.Module, Sequence[Any]]
"""A workload, or a module with its example inputs (tensors or (shape, dtype) pairs)."""
RowQuality = Literal["full", "noisy", "busy", "quick", "bound", "analytic"]
KIND = "latency"
SENTINEL, REFERENCE = "sentinel", "reference"
CLAIM_ROWS = 8  # at a time: two processes that begin together then share the rows evenly
WARM_MS = 30.0  # longer networks hold more weights than caches do


@dataclass(frozen=True)
class Measurement:
    """A latency in ms: the median of `n` samples, and their interquartile range.

    `quality` is "full", "noisy" (the spread stayed large), "busy" (the machine was never quiet while it was timed),
    "quick" (two runs of a row that was pruned), "bound" (pruned by a lower bound, not run) or "analytic". `conditions`
    are what else was seen while it was measured, such as the clock of a GPU (`lmfx.latency.backends.gpu_state`); JSON
    values.
    """

    ms: float
    spread: float = 0.0
    n: int = 1
    device: str = ""
    backend: str = ""
    quality: RowQuality = "full"
    conditions: dict[str, Any] = field(default_factory=dict, hash=False)


@runtime_checkable
class Backend(Protocol):
    """The interface of a latency backend: all that the rest of lmfx uses of one."""

    @property
    def name(self) -> str:
        """The name that `get_backend` knows."""

    def identity(self) -> dict[str, Any]:
        """All that a latency depends on besides the workload: backend, version, device, threads... JSON values."""

    def measure(
        self,
        workloads: Iterable[Workload],
        store: Store | None = None,
        progress: bool = False,
        rounds: int | None = None,
        prune: Prune | None = None,
    ) -> dict[str, Measurement]:
        """A measurement for every signature. Rows that the store has are not measured again; those of workloads that
        are not lasting are neither looked for nor put there."""

    def measure_interleaved(self, modules: Sequence[Whole], repeats: int = 5) -> list[list[float]]:
        """ms of whole networks: one list a network, with `repeats` entries; entry i of all was taken in round i."""


class TimedBackend:
    """Base of the backends that run the workload."""

    name = ""

    def __init__(self, sampling: Sampling | None = None) -> None:
        self.sampling = sampling or Sampling()

    def identity(self) -> dict[str, Any]:
        raise NotImplementedError

    def for_network(self, nbytes: int) -> TimedBackend:
        """This backend, with the caches of its rows as a network that touches so many bytes finds them (`Sampling`);
        as it is where its identity does not follow the sampling in that, as those of GPUs do not."""
        sampling = self.sampling.for_network(nbytes)
        if sampling == self.sampling or self.identity().get("caches") != self.sampling.state:
            return self
        other = copy.copy(self)
        other.sampling = sampling
        return other

    def prepare(self, workload: Workload) -> Runner:
        """Makes a workload ready to run."""
        raise NotImplementedError

    def prepare_whole(self, workload: Workload) -> Runner:
        """The same for a whole network."""
        return self.prepare(workload)

    def lower_bound(self, module: nn.Module, workload: Workload, session: Session) -> float:
        """ms that the workload cannot be faster than; 0 if nothing is known."""
        return 0.0

    def session(self) -> Session:
        """The sentinel of this backend, and what an empty call takes."""
        raise NotImplementedError

    @entry
    def measure(
        self,
        workloads: Iterable[Workload],
        store: Store | None = None,
        progress: bool = False,
        rounds: int | None = None,
        prune: Prune | None = None,
    ) -> dict[str, Measurement]:
        """See `Backend.measure`. Memory is bounded by the `batch_bytes` of the sampling."""
        identity = self.identity()
        unique = {w.signature: w for w in workloads}
        lasting = [k for k, w in unique.items() if w.lasting]
        done = {k: m for k, m in stored_rows(store, identity, lasting).items() if is_finished(k, m, prune)}
        waiting = {k: w for k, w in unique.items() if k not in done}
        if not waiting:
            return {k: done[k] for k in unique}
        sampling = self.sampling
        if rounds is not None:
            sampling = replace(sampling, rounds=check_rounds(rounds), visits=rounds)
        session = self.session()
        session.sampling = sampling
        rows: dict[str, Runner] = {}
        quick: dict[str, float] = {}

        def commit(signature: str, measurement: Measurement) -> None:
            done[signature] = measurement
            if store is not None and unique[signature].lasting:
                store.put(KIND, identity, signature, asdict(measurement))
            bar.update(1)

        def collect(signatures: Sequence[str]) -> None:
            """Takes what other processes have finished."""
            for signature, measurement in stored_rows(store, identity, signatures).items():
                if is_finished(signature, measurement, prune):
                    done[signature] = measurement
                    del waiting[signature]
                    bar.update(1)

        def start(workload: Workload) -> None:
            """Gets a row as far as a bound or a quick timing, or ready for the rounds."""
            if prune is not None:
                module = workload.build()
                ms = self.lower_bound(module, workload, session)
                if ms > 0 and prune(workload.signature, ms):
                    commit(workload.signature, self._row(ms, 0.0, 0, "bound"))
                    return
                workload = replace(workload, build=functools.partial(_same, module))
            runner = self.prepare(workload)
            ms = session.quick(runner)
            if prune is not None and prune(workload.signature, ms):
                runner.close()
                commit(workload.signature, self._row(ms, 0.0, 2, "quick"))
                return
            rows[workload.signature], quick[workload.signature] = runner, ms
            if len(rows) >= sampling.batch_rows or sum(r.nbytes for r in rows.values()) >= sampling.batch_bytes:
                flush()

        def flush() -> None:
            for signature, taken in session.time(rows, quick).items():
                commit(signature, self._full(taken, sampling, conditions_of(rows[signature])))
            for runner in rows.values():
                runner.close()
            rows.clear()

        with (
            progress_bar(len(waiting), f"measuring ({self.name})", progress) as bar,
            Share(store, KIND, identity) as share,
        ):
            try:
                session.reference = shared_reference(store, identity, session)
                while waiting or rows:
                    taken = share.take(waiting, CLAIM_ROWS)
                    collect(taken or list(waiting))
                    share.give_back([k for k in taken if k not in waiting])
                    for signature in taken:
                        if signature in waiting:
                            start(waiting.pop(signature))
                    if not taken and rows:  # the rest is claimed by others: get ready what they may be waiting for
                        flush()
                    elif not taken and waiting:
                        bar.set_postfix_str(f"{len(waiting)} rows are with another process")
                        share.wait()
            finally:
                for runner in rows.values():
                    runner.close()
                session.close()
        return {k: done[k] for k in unique}

    @entry
    def measure_interleaved(self, modules: Sequence[Whole], repeats: int = 5) -> list[list[float]]:
        """See `Backend.measure_interleaved`. Every round runs the networks in turn, in alternating order.

        Short networks are run once before each sample: the others have thrown their weights out of the caches, where a
        network that is run again and again finds them.
        """
        check_rounds(repeats)
        runners: list[Runner] = []
        try:
            for item in modules:
                whole = item if isinstance(item, Workload) else Workload.of(item[0], *item[1])
                runners.append(self.prepare_whole(whole))
            once = [min(r.time(1) for _ in range(2)) for r in runners]
            counts = [max(1, round(self.sampling.min_ms / max(ms, 1e-6))) for ms in once]
            result: list[list[float]] = [[] for _ in runners]
            for turn in range(repeats):
                order = range(len(runners)) if turn % 2 == 0 else reversed(range(len(runners)))
                for i in order:
                    if once[i] <= WARM_MS:
                        runners[i].time(1)
                    result[i].append(runners[i].time(counts[i]) / counts[i])
            return result
        finally:
            for runner in runners:
                runner.close()

    def _full(self, taken: Taken, sampling: Sampling, conditions: dict[str, Any]) -> Measurement:
        ms, spread = summary(taken.samples)
        noisy = spread > 2 * sampling.max_spread * ms
        quality: RowQuality = "busy" if taken.busy else "noisy" if noisy else "full"
        return replace(self._row(ms, spread, len(taken.samples), quality), conditions=conditions)

    def _row(self, ms: float, spread: float, n: int, quality: RowQuality) -> Measurement:
        return Measurement(ms, spread, n, str(self.identity().get("device", "")), self.name, quality)


def conditions_of(runner: Runner) -> dict[str, Any]:
    """The conditions that a runner saw while it was timed (clocks, say); most see none."""
    return dict(getattr(runner, "conditions", {}))


def _same(module: nn.Module) -> nn.Module:
    return module


def check_rounds(rounds: int) -> int:
    """Raises `OptionError` unless it is a positive number."""
    if not isinstance(rounds, int) or rounds < 1:
        raise OptionError(f"the number of rounds must be a positive integer, not {rounds!r}")
    return rounds


def is_finished(signature: str, row: Measurement, prune: Prune | None) -> bool:
    """Whether a stored row can be used: one that was pruned only by a caller who would prune it as well."""
    return row.quality not in ("quick", "bound") or (prune is not None and prune(signature, row.ms))


def stored_rows(store: Store | None, identity: dict[str, Any], signatures: Sequence[str]) -> dict[str, Measurement]:
    """The rows that the store has. Raises `StoreError` if one cannot be read."""
    if store is None:
        return {}
    try:
        found = store.get_many(KIND, identity, signatures).items()
        return {k: Measurement(**check_value(KIND, k, v)) for k, v in found}
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"a latency in {store.folder(KIND, identity)} is not one ({error}); delete the file"
        ) from error


def shared_reference(store: Store | None, identity: dict[str, Any], session: Session) -> float | None:
    """The sentinel's time when the store's first rows were made: taken now, by one process, if there is none."""
    if store is None:
        return None
    with Share(store, SENTINEL, identity) as share:
        while True:
            mine = share.take([REFERENCE])
            value = store.get(SENTINEL, identity, REFERENCE)
            if value is not None:
                return float(value)
            if mine:
                store.put(SENTINEL, identity, REFERENCE, reference := session.start())
                return reference
            share.wait()
