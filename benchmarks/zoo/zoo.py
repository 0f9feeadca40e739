"""The whole zoo of torchvision, timm and diffusers, network by network: traced? convs? exact? compressed? exported?

    python benchmarks/zoo/zoo.py                                  everything, two processes at a time; again: goes on
    python benchmarks/zoo/zoo.py --models 'timm/*net*' --fresh    some, whatever was found before
    python benchmarks/zoo/zoo.py --families regnet --stages compress
    python benchmarks/zoo/zoo.py --summary                        what the committed table says
    python benchmarks/zoo/zoo.py --write                        and replace these networks' lines in the committed table

Each network runs in a process of its own with a time and a memory limit (`zoo_runner`), through the stages of
`zoo_stages`. The result is compared with the committed table, benchmarks/results/zoo.csv: what got worse is printed and
makes the exit code 1. `out/zoo.jsonl` keeps every row with its times; only rows of the same sources are taken again.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: one thread a process

import torch

from benchmarks.zoo.models import TABLE, families
from benchmarks.zoo.runner import Row, read_rows, run_all
from benchmarks.zoo.stages import HEAVY, STAGES, examine
from benchmarks.zoo.table import cells, compare, read_table, summary, write_table
from lmfx.environment.progress import progress

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]


def sources() -> str:
    """A digest of all code that a row depends on."""
    files = [*ROOT.glob("passes/**/*.py"), *ROOT.glob("lmfx/**/*.py"), *ROOT.glob("benchmarks/zoo/[ms]*.py")]
    digest = hashlib.sha256()
    for file in sorted({f.resolve() for f in (*files, ROOT / "benchmarks" / "shared" / "random_plans.py")}):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def chosen(known: dict[str, str], models: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """The models that a glob of `models` and a glob of `kinds` (families) match."""
    return [
        name
        for name, family in known.items()
        if any(fnmatch.fnmatchcase(name, g) for g in models) and any(fnmatch.fnmatchcase(family, g) for g in kinds)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, compare, print; returns 1 if something got worse than the committed table has it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB", help="such as 'timm/*' (default: all)")
    parser.add_argument("--families", nargs="+", default=["*"], metavar="GLOB", help="second column of the table")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES, help="besides trace and regions")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--stage-seconds", type=int, default=90, help="limit of one stage, CPU time")
    parser.add_argument("--seconds", type=int, default=900, help="limit of one network, wall time")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="limit of one process")
    parser.add_argument("--rows", type=Path, default=ROOT / "out" / "zoo.jsonl", help="rows as they are finished")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to compare with")
    parser.add_argument("--fresh", action="store_true", help="take no finished row of an earlier run")
    parser.add_argument("--any-source", action="store_true", help="take finished rows of other sources too")
    parser.add_argument("--failed", action="store_true", help="run those finished rows again that have a failure")
    parser.add_argument("--summary", action="store_true", help="print what the table says, and run nothing")
    parser.add_argument("--write", action="store_true", help="put the new lines into the table")
    options = parser.parse_args(arguments)
    known = families()
    old = read_table(options.table)
    names = chosen(known, options.models, options.families)
    if not names:
        parser.error("no network matches")
    if options.summary:
        print(summary({n: line for n, line in old.items() if n in names}))
        return 0
    source = f"{sources()} {' '.join(sorted(options.stages))}"
    finished = {} if options.fresh else read_rows(options.rows, None if options.any_source else source)
    done = {n: r for n, r in finished.items() if n in names and not (options.failed and failures(r))}
    rows = done | run(names, done, old, options, source)
    new = {name: cells(rows[name], known[name]) for name in names}
    report({n: rows[n] for n in names}, new)
    others = sum(rows[n]["source"] != source for n in names)
    if others:
        print(f"\n{others} of the {len(names)} rows were made by other sources")
    worse = compare(old, new)
    if worse:
        print(f"\nworse than {options.table}:\n  " + "\n  ".join(worse))
    if options.write:
        with_names = {n: {"model": n, "family": f} for n, f in known.items()}
        for name, line in new.items():  # a stage that was left out keeps the cells that the table has
            new[name] = {**old.get(name, {}), **{c: v for c, v in line.items() if v}}
        write_table(options.table, {**with_names, **old, **new})
    return bool(worse)


def run(
    names: Sequence[str],
    done: dict[str, Row],
    old: dict[str, dict[str, str]],
    options: argparse.Namespace,
    source: str,
) -> dict[str, Row]:
    """The rows that are not done yet: one network of each family, another of each, ..., the large ones one by one."""
    preload()
    size = {n: float(old.get(n, {}).get("parameters_m") or 0) for n in names}
    todo = in_turns([n for n in names if n not in done], families())
    todo.sort(key=lambda n: size[n] * 1e6 > HEAVY / 2)
    with progress(len(names), "zoo") as bar:
        bar.update(len(done))

        def tick(row: Row) -> None:
            bar.set_postfix_str(row["model"])
            bar.update(1)

        return run_all(
            todo,
            lambda name: examine(name, tuple(options.stages), options.stage_seconds),
            options.rows,
            source,
            jobs=options.jobs,
            seconds=options.seconds,
            memory_gb=options.memory_gb,
            heavy=lambda name: size[name] * 1e6 > HEAVY / 2,
            tick=tick,
        )


def failures(row: Row) -> list[str]:
    """The cells of a row that are errors."""
    return [f"{k} {v}" for k, v in row.items() if k == "error" or (isinstance(v, str) and v.startswith("error"))]


def in_turns(names: Sequence[str], family: dict[str, str]) -> list[str]:
    """One name of each family, then another of each: what is wrong shows early."""
    seen: Counter[str] = Counter()
    turn: dict[str, int] = {}
    for name in names:
        turn[name] = seen[family[name]]
        seen[family[name]] += 1
    return sorted(names, key=turn.__getitem__)


def preload() -> None:
    """Import what every network needs, once, before the processes are forked."""
    torch.set_num_threads(1)
    import diffusers.models  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import timm  # noqa: F401
    import torchvision  # noqa: F401

    gc.freeze()  # the collector leaves the shared pages alone


def report(rows: dict[str, Row], new: dict[str, dict[str, str]]) -> None:
    """Print the summary, why convs are refused, and every failure."""
    print(summary(new))
    reasons: Counter[str] = Counter()
    for row in rows.values():
        reasons.update(row.get("reasons", {}))
    print("\nrefusals, all networks:")
    for text, count in reasons.most_common(25):
        print(f"  {count:7,} {text}")
    print("\nfailures:")
    for name, row in rows.items():
        for failure in failures(row):
            print(f"  {name}: {failure[:300]}")


if __name__ == "__main__":
    sys.exit(main())
