"""`kill -9` at random moments of profiling, then the same command again: the same table, and no finished row twice.

    python benchmarks/promises/kill_resume.py --kills 10

The store logs every row that is put. At the end every row must be there once in the log, a further run must add
nothing, and the table is compared with one that was measured without interruption.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn

from lmfx.latency import Store, Workload, get_backend
from lmfx.latency.backend import KIND
from lmfx.latency.sampling import Sampling


def workloads(count: int) -> list[Workload]:
    """`count` different conv + ReLU workloads."""
    made = []
    for i in range(count):
        channels, size, kernel = 16 + 8 * (i % 12), (14, 28)[i // 12 % 2], 1 + 2 * (i // 24)
        net = nn.Sequential(nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.ReLU())
        made.append(Workload.of(fx.symbolic_trace(net), ((1, channels, size, size), torch.float32)))
    return made


def profile(cache_dir: str, rows: int) -> None:
    """What is killed: one profiling run on the store."""
    todo = workloads(rows)
    backend = get_backend("onnxruntime", sampling=Sampling(batch_rows=8))
    with Store.open(cache_dir) as store:
        print("ready", flush=True)
        backend.measure(todo, store=store)
        print("done", flush=True)


def start(cache_dir: Path, rows: int) -> subprocess.Popen[str]:
    """Starts `profile` in its own process and waits until it measures."""
    command = [sys.executable, __file__, "--child", str(cache_dir), "--rows", str(rows)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"the profiling process did not start (exit code {process.wait()})")
    return process


def finish(cache_dir: Path, rows: int) -> float:
    """Runs `profile` to its end and returns the seconds it took after its start."""
    process = start(cache_dir, rows)
    begin = time.perf_counter()
    process.communicate()
    if process.returncode:
        raise SystemExit(f"the profiling process failed (exit code {process.returncode})")
    return time.perf_counter() - begin


def table(cache_dir: Path) -> tuple[dict[str, float], dict[str, int]]:
    """ms of every row, and how often each row was measured."""
    with Store.open(cache_dir) as store:
        identity = get_backend("onnxruntime").identity()
        rows = {k: v["ms"] for k, v in store.get_many(KIND, identity).items()}
        return rows, store.times_put(KIND, identity)


def main() -> None:
    """Kills, resumes, checks, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", metavar="CACHE_DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return profile(args.child, args.rows)
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="lmfx-kill-") as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        seconds = finish(whole, args.rows)
        print(f"uninterrupted: {args.rows} rows in {seconds:.2f} s")
        for kill in range(1, args.kills + 1):
            process = start(killed, args.rows)
            # the whole run takes `seconds`; each life gets about a share of it, so that kills hit every part
            life = moments.uniform(0, 1.8 * seconds / (args.kills + 1))
            time.sleep(life)
            process.kill()
            process.communicate()
            rows, counts = table(killed)
            most = max(counts.values(), default=0)
            print(f"kill {kill:2d} after {life:.2f} s: {len(rows):4d} rows, the one measured most often {most} times")
        finish(killed, args.rows)
        rows, counts = table(killed)
        again = finish(killed, args.rows)
        _, counts_again = table(killed)
        expected, _ = table(whole)
        ratio = np.array([rows[k] / expected[k] for k in expected if k in rows])
        checks = {
            "the table has the rows of the uninterrupted one": set(rows) == set(expected) and len(rows) == args.rows,
            "no finished row was measured twice": set(counts.values()) == {1},
            "one more run measures nothing": counts_again == counts,
        }
        print(f"one more run: {again:.2f} s")
        print(f"latency, interrupted / uninterrupted: median {np.median(ratio):.3f}, ", end="")
        print(f"90 % within {np.percentile(np.abs(ratio - 1), 90):.1%}")
        for text, good in checks.items():
            print(f"{'ok  ' if good else 'FAIL'} {text}")
        if not all(checks.values()):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
