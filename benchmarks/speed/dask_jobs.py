"""Importance jobs on a process pool and on Dask against one process, and a worker killed with SIGKILL half-way.

    python benchmarks/speed/dask_jobs.py                    60 jobs of half a second, 2 workers
    python benchmarks/speed/dask_jobs.py --jobs 16 --steps 48

A job trains the digits network for a moment with one candidate (`Finetune`). The tables must be equal bit for bit, and
every row must have been stored exactly once; the script fails if not. `speed-up` is wall time in one process over that
on the workers, once they have started and loaded the data; it cannot pass the number of processors that are free, and
the process that prepares the jobs (with Dask its scheduler, too) needs a share of them. `a job` is the median.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import lmfx
from benchmarks.shared.short_training import ShortTraining, data_of
from lmfx.calibration.images import as_calibration
from lmfx.importance import Finetune
from lmfx.latency import Store
from lmfx.stages import worth_scoring


@dataclass(frozen=True)
class Run:
    """A table, how often each row was stored, the wall time of all and the median one of a job in seconds."""

    table: dict[str, float]
    counts: dict[str, int]
    seconds: float
    job: float

    def once(self, rows: int) -> bool:
        """Whether there are as many rows, each stored once."""
        return len(self.counts) == rows and set(self.counts.values()) == {1}


def main() -> None:
    """Print one table; exit code 1 if a table differs or a row was lost or made twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="a module like examples/digits.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=60, help="one is the original's evaluation")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1, help="of the original's training")
    parser.add_argument("--steps", type=int, default=6, help="of each candidate's training")
    args = parser.parse_args()
    task = ShortTraining(args.data, args.seed, args.steps)
    model, images = task.model(args.width, args.epochs), task.images(64)
    graph = lmfx.trace(model, images[:1])
    spans = lmfx.spans(graph)
    latency = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    every = [c for c in worth_scoring(spans, latency) if c.realization != "keep"]
    chosen = every[:: max(len(every) // (args.jobs - 1), 1)][: args.jobs - 1]
    finetune = Finetune(task.train, task.accuracy, key=task.key)
    data = as_calibration(images, images[:1])

    def score(folder: Path, executor: Any = None) -> Run:
        start = time.perf_counter()
        with Store.open(folder) as store:
            table = replace(finetune, ahead=2 * args.workers).score(spans, chosen, data, store, True, executor)
            wall = time.perf_counter() - start
            job = median(row.value["seconds"] for row in store.rows() if row.kind == "importance")
            return Run(dict(table), store.times_put("importance"), wall, job)

    with tempfile.TemporaryDirectory(prefix="lmfx-jobs-") as name:
        here = Path(name)
        alone = score(here / "alone")
        print(f"{len(alone.counts)} jobs in one process: {alone.seconds:.1f} s, a job {alone.job:.2f} s", flush=True)
        checks = {"one process stores each row once": alone.once(len(chosen) + 1)}
        for label, executor, kill in (
            ("a process pool", pool, False),
            ("Dask", dask, False),
            ("Dask", dask, True),
        ):
            with executor(args) as (opened, pids):
                run, said = killed(score, here / f"{label} {kill}", opened, pids, args, kill)
            said = f"{args.workers} workers of {label}{said}"
            print(
                f"{len(run.counts)} jobs on {said}: {run.seconds:.1f} s, a job {run.job:.2f} s, "
                f"speed-up {alone.seconds / run.seconds:.2f}",
                flush=True,
            )
            checks |= {
                f"the same table bit for bit on {said}": run.table == alone.table,
                f"nothing lost, each row stored once on {said}": run.once(len(alone.table) + 1),
            }
    for text, good in checks.items():
        print(f"{'ok  ' if good else 'FAIL'} {text}")
    if not all(checks.values()):
        raise SystemExit(1)


@contextmanager
def pool(args: Any) -> Iterator[tuple[Any, list[int]]]:
    """A process pool whose workers have the data."""
    with ProcessPoolExecutor(args.workers, get_context("spawn"), data_of, (args.data, args.seed)) as executor:
        for _ in [executor.submit(time.sleep, 0.5) for _ in range(2 * args.workers)]:
            _.result()
        yield executor, []


@contextmanager
def dask(args: Any) -> Iterator[tuple[Any, list[int]]]:
    """A local cluster whose workers have the data, and their process ids."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            args.workers, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster,
        Client(cluster) as client,
    ):
        client.run(data_of, args.data, args.seed)
        pids = list(client.run(os.getpid).values())
        assert len(set(pids)) == args.workers and os.getpid() not in pids
        yield client.get_executor(), pids


def killed(score: Any, folder: Path, executor: Any, pids: list[int], args: Any, kill: bool) -> tuple[Run, str]:
    """What `score` gave, and what happened meanwhile: with `kill` one worker dies after a third of the jobs."""
    if not kill:
        return score(folder, executor), ""
    done_then: list[int] = []

    def killer() -> None:
        while not done_then and not stop.wait(0.1):
            with Store.open(folder) as store:
                done = store.count("importance")
            if done >= args.jobs // 3:
                os.kill(pids[0], signal.SIGKILL)
                done_then.append(done)

    stop, thread = threading.Event(), threading.Thread(target=killer)
    thread.start()
    try:
        run = score(folder, executor)
    finally:
        stop.set()
        thread.join()
    if not done_then:
        raise SystemExit("all jobs were done before a worker could be killed: use more --steps")
    return run, f", one killed after {done_then[0]} rows"


if __name__ == "__main__":
    main()
