"""The long run of the fuzzer: chunks of random networks until the log holds so many, in as many processes as one likes.

    make fuzz N=20000 ARGS="--jobs 2"
    python benchmarks/promises/fuzz.py --replay out/fuzz/failures.jsonl

Chunk k draws its networks from the seed k. One line of JSON a chunk goes to out/fuzz/log.jsonl (commit, seed, networks,
merges, failures), so a run that is stopped goes on with the next chunk. Each new kind of failure is cut down, printed
as source code, and appended to out/fuzz/failures.jsonl. The exit status is 1 if there were any.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from lmfx.environment.progress import progress
from tests.fuzz.chunk import run_chunk, signature
from tests.fuzz.compare import Wrong
from tests.fuzz.program import Program
from tests.fuzz.properties import Shares, check

CHUNK = 200


def commit() -> str:
    """The commit that is fuzzed, with a + if the working tree differs from it."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return found.stdout.strip()

    changed = git("status", "--porcelain", "--", "passes", "lmfx", "tests/fuzz")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def read(log: Path) -> list[dict[str, Any]]:
    """The chunks that were run; a last line that was cut off by a kill is no chunk."""
    rows = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(path: Path, line: str) -> None:
    """One line more, with a newline before it if the last one was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")


def run(total: int, jobs: int, log: Path, size: int) -> list[dict[str, Any]]:
    """Run chunks until the log holds `total` networks; returns all its rows."""
    rows, version = read(log), commit()
    done = sum(r["networks"] for r in rows)
    following = max((r["chunk"] for r in rows), default=-1) + 1
    context = multiprocessing.get_context("spawn")
    pending: dict[Future[dict[str, Any]], int] = {}
    with (
        progress(max(0, total - done), "fuzzing") as bar,
        ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=5) as pool,
    ):
        while done + size * len(pending) < total or pending:
            while len(pending) < jobs and done + size * len(pending) < total:
                pending[pool.submit(run_chunk, following, size)] = following
                following += 1
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                number = pending.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise SystemExit(
                        f"chunk {number}: a process died ({error}); run it alone: --chunk {number}"
                    ) from error
                row = keep(result, version, log)
                rows.append(row)
                done += row["networks"]
                bar.update(row["networks"])
    return rows


def keep(result: dict[str, Any], version: str, log: Path) -> dict[str, Any]:
    """Write one chunk's result: failures first, then the row that says that the chunk is done."""
    failures = result.pop("failures")
    for record in failures:
        append(log.with_name("failures.jsonl"), record)
        found = json.loads(record)
        print(f"\nchunk {result['chunk']}: {found['error']}\n{found['source']}", file=sys.stderr)
    row = {"commit": version, **result, "kinds": [json.loads(r)["signature"] for r in failures]}
    append(log, json.dumps(row))
    return row


def replay(path: Path) -> int:
    """Check every record again; returns how many still fail."""
    failing = 0
    for line in path.read_text().splitlines():
        record = json.loads(line)
        everything = Shares(100, 100, 100, 100 if "export" in record["signature"] else 0, simplify=100)
        try:
            check(Program.loads(line), record["plan"], everything)
            print(f"holds   {record['signature']}")
        except Wrong as error:
            failing += 1
            print(f"FAILS   {signature(error)}\n{record['source']}")
    return failing


def report(rows: list[dict[str, Any]]) -> bool:
    """Print what was run, by commit; whether nothing failed."""
    events: Counter[str] = Counter()
    print(f"{'commit':12}{'networks':>10}{'merged':>10}{'failed':>8}{'CPU s':>9}")
    for version in dict.fromkeys(r["commit"] for r in rows):
        mine = [r for r in rows if r["commit"] == version]
        merged = sum(r["events"].get("networks with a merged span", 0) for r in mine)
        sums = [sum(r[k] for r in mine) for k in ("networks", "failed", "seconds")]
        print(f"{version:12}{sums[0]:10,}{merged:10,}{sums[1]:8,}{sums[2]:9,.0f}")
    for row in rows:
        events.update(row["events"])
    networks = sum(r["networks"] for r in rows)
    failed = sum(r["failed"] for r in rows)
    print(f"{'all':12}{networks:10,}{events['networks with a merged span']:10,}{failed:8,}")
    for name, count in events.most_common():
        print(f"  {name:40}{count:8,}")
    for kind, count in Counter(k for r in rows for k in r["kinds"]).most_common():
        print(f"  failed: {kind} ({count} chunks)")
    return failed == 0


def main() -> None:
    """Run, or replay, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=1000, help="networks in all, those in the log included")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--size", type=int, default=CHUNK, help="networks of a chunk")
    parser.add_argument("--log", type=Path, default=Path("out/fuzz/log.jsonl"))
    parser.add_argument("--chunk", type=int, help="only this chunk, in this process")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="check the records of a failures.jsonl again")
    args = parser.parse_args()
    if args.replay:
        raise SystemExit(1 if replay(args.replay) else 0)
    if args.chunk is not None:
        rows = [keep(run_chunk(args.chunk, args.size), commit(), args.log)]
    else:
        rows = run(args.n, args.jobs, args.log, args.size)
    raise SystemExit(0 if report(rows) else 1)


if __name__ == "__main__":
    main()
