"""Importance jobs on Dask: worker processes against one process, and a worker killed with SIGKILL half-way.

    python benchmarks/dask_jobs.py                    60 jobs, 2 workers
    python benchmarks/dask_jobs.py --jobs 20 --steps 2

A job trains the digits network for a moment with one candidate (`Finetune`). The tables must be equal bit for bit, and
every row must have been stored exactly once; the script fails if not. `speed-up` is wall time in one process over that
on the workers, once they have started and loaded the data; it can not pass the number of processors that are free.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmfx
from benchmarks.short_training import ShortTraining, data_of
from lmfx.calibration import as_calibration
from lmfx.importance import Finetune
from lmfx.latency import Store
from lmfx.stages import worth_scoring


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

    def score(folder: Path, executor: Any = None) -> tuple[dict[str, float], dict[str, int], float]:
        start = time.perf_counter()
        with Store.open(folder) as store:
            table = replace(finetune, ahead=2 * args.workers).score(spans, chosen, data, store, True, executor)
            return dict(table), store.times_put("importance"), time.perf_counter() - start

    with tempfile.TemporaryDirectory(prefix="lmfx-dask-") as name:
        here = Path(name)
        alone, counts, seconds = score(here / "alone")
        print(f"{len(counts)} jobs in one process: {seconds:.1f} s")
        checks = {"one process stores each row once": set(counts.values()) == {1} and len(counts) == len(chosen) + 1}
        for kill in (False, True):
            table, counts, wall, said = on_dask(score, here / f"dask{kill:d}", args, kill)
            print(f"{len(counts)} jobs on {args.workers} workers{said}: {wall:.1f} s, speed-up {seconds / wall:.2f}")
            checks |= {
                f"the same table bit for bit{said}": table == alone,
                f"nothing lost, each row stored once{said}": set(counts.values()) == {1}
                and len(counts) == len(alone) + 1,
            }
    for text, good in checks.items():
        print(f"{'ok  ' if good else 'FAIL'} {text}")
    if not all(checks.values()):
        raise SystemExit(1)


def on_dask(score: Any, folder: Path, args: Any, kill: bool) -> tuple[dict[str, float], dict[str, int], float, str]:
    """The table, how often each row was stored, the seconds, and what happened, from a cluster of its own."""
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
        killed: list[int] = []

        def killer() -> None:
            while not killed and not stop.wait(0.1):
                with Store.open(folder) as store:
                    done = store.count("importance")
                if done >= args.jobs // 3:
                    os.kill(pids[0], signal.SIGKILL)
                    killed.append(done)

        stop, thread = threading.Event(), threading.Thread(target=killer)
        if kill:
            thread.start()
        try:
            table, counts, wall = score(folder, client.get_executor())
        finally:
            stop.set()
            if kill:
                thread.join()
        if kill and not killed:
            raise SystemExit("all jobs were done before a worker could be killed: use more --steps")
        left = set(client.run(os.getpid).values())
        assert not kill or pids[0] not in left
        return table, counts, wall, f", one killed after {killed[0]} rows" if killed else ""


if __name__ == "__main__":
    main()
