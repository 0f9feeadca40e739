"""Mutation sampling: does a test fail when one small thing in the code is changed?

    python -m venv /tmp/mutation && /tmp/mutation/bin/pip install mutmut
    echo $PWD/.venv/lib/python3*/site-packages > $(echo /tmp/mutation/lib/python3*/site-packages)/main.pth
    /tmp/mutation/bin/python benchmarks/promises/mutation.py --map map.jsonl tests/passes tests/lmfx     # once
    /tmp/mutation/bin/python benchmarks/promises/mutation.py --map map.jsonl --sample 150 --results mutation.jsonl

Mutants are those of mutmut (`+` for `-`, `<=` for `<`, another number, an argument left out, ...), drawn evenly over
all that there are in `SOURCES`. Words for a person (a text with a blank) and `__all__` are left out: no behaviour hangs
on them. Each is written into a copy of the tree, and the tests that run the changed statement, as the map of an earlier
run says, run there with `-x`: those of the folder that mirrors the file first, quick ones before slow ones, for
`--budget` CPU seconds at most. A mutant is `killed` by a failing test or a time-out, and has `survived` otherwise. A
line of JSON each is appended to the results, so a run that was stopped goes on; a mutant is known by file, text and
place in the file's list, so results stay good while the file is as it was. docs/testing.md names the survivors and why.

The tests run in a fork of a process that has imported torch and not lmfx, so that a mutant costs no import of torch.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("passes", "lmfx/importance", "lmfx/stages.py", "lmfx/planning/search.py"),
    *("lmfx/latency/whole_networks.py", "lmfx/calibration/fitting.py"),
)


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str
    index: int  # in the list of the file's mutants
    digest: str  # of the file
    diff: str
    line: int  # the first one that is changed

    @property
    def key(self) -> str:
        return f"{self.file}:{self.index}:{self.digest}"


def sources(root: Path = ROOT) -> list[str]:
    """The files that are mutated."""
    found: set[str] = set()
    for name in SOURCES:
        path = root / name
        found |= {str(p.relative_to(root)) for p in (path.rglob("*.py") if path.is_dir() else [path]) if p.is_file()}
    return sorted(n for n in found if not n.endswith("__init__.py"))


def changes_of(file: str, root: Path = ROOT) -> tuple[str, Any, list[Any]]:
    """(text, its tree, mutmut's changes of the tree)."""
    settings: Any = importlib.import_module("mutmut.configuration")
    settings._guess_source_paths = lambda: ["passes"]  # it would look for a folder of the checkout's name
    create_mutations = importlib.import_module("mutmut.mutation.file_mutation").create_mutations  # has no types
    text = (root / file).read_text()
    module, changes, *_ = create_mutations(file, text)
    return text, module, list(changes)


def mutant_of(file: str, index: int, text: str, module: Any, change: Any) -> tuple[Mutant, str] | None:
    """The mutant and its text; None if only words are changed."""
    new = module.deep_replace(change.original_node, change.mutated_node).code
    lines = difflib.unified_diff(text.splitlines(), new.splitlines(), lineterm="", n=0)
    diff = [line for line in lines if line[:1] in "+-@" and not line.startswith(("+++", "---"))]
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    place = next((line.split()[1] for line in diff if line.startswith("@@")), "-1")  # @@ -12,2 +12,3 @@
    line = int(place[1:].partition(",")[0])
    return (
        None
        if _prose(diff) or not diff or line in _public_names(text)
        else (Mutant(file, index, digest, "\n".join(diff), line), new)
    )


@functools.cache
def _public_names(text: str) -> range:
    """The lines of a file's `__all__`, which nothing but a star import reads."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return range(0)


def _prose(diff: list[str]) -> bool:
    """Whether only a text with a blank in it was changed."""
    return any("XX" in line and " " in line.partition("XX")[2].partition("XX")[0] for line in diff) or any(
        line.startswith("+") and line[1:].strip().strip("frb\"'").isupper() and " " in line.strip() for line in diff
    )


def sample(count: int, seed: int, root: Path = ROOT) -> list[tuple[Mutant, str]]:
    """`count` mutants, drawn evenly from those of all files; the same for the same tree."""
    parts = {file: changes_of(file, root) for file in sources(root)}
    places = [(file, i) for file, (_, _, changes) in parts.items() for i in range(len(changes))]
    random.Random(seed).shuffle(places)
    drawn: list[tuple[Mutant, str]] = []
    for file, i in places:
        text, module, changes = parts[file]
        made = mutant_of(file, i, text, module, changes[i])
        drawn += [made] if made is not None else []
        if len(drawn) == count:
            break
    return drawn


# --- which tests run what ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Test:
    """One test, what it costs, and the lines of each file that it runs."""

    name: str
    seconds: float
    lines: dict[str, frozenset[int]]


class Mapper:
    """A plugin of pytest that writes down for each test what it runs."""

    def __init__(self, root: Path, out: Path) -> None:
        coverage = importlib.import_module("coverage")
        self.root, self.out, self.passed = root, out, True
        self.cov = coverage.Coverage(data_file=None, include=[f"{root}/passes/*", f"{root}/lmfx/*"], config_file=False)
        self.cov.set_option("run:disable_warnings", ["no-data-collected", "trace-changed", "module-not-measured"])
        self.cov.start()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed &= report.passed or report.skipped

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> Iterator[None]:
        self.cov.stop()
        self.cov.erase()
        self.cov.start()
        self.passed, began = True, time.process_time()
        result = yield
        seconds = time.process_time() - began
        self.cov.stop()
        data = self.cov.get_data()
        lines = {os.path.relpath(os.path.realpath(f), self.root): sorted(data.lines(f)) for f in data.measured_files()}
        row = {"test": item.nodeid, "cpu": round(seconds, 3), "ok": self.passed, "lines": lines}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.cov.start()
        return result


def make_map(out: Path, paths: list[str]) -> None:
    """Runs tests, and appends to the map what they run."""
    pytest = importlib.import_module("pytest")
    mapper = Mapper(ROOT, out)
    Mapper.pytest_runtest_protocol = pytest.hookimpl(wrapper=True)(Mapper.pytest_runtest_protocol)  # type: ignore[method-assign]
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    pytest.main(["-q", "-p", "no:cacheprovider", "-o", "timeout=0", *paths], plugins=[mapper])


def read_map(path: Path) -> list[Test]:
    """The tests that passed; of a test that was run twice the last row."""
    rows = {row["test"]: row for row in map(json.loads, path.read_text().splitlines())}
    return [
        Test(row["test"], row["cpu"], {f: frozenset(lines) for f, lines in row["lines"].items()})
        for row in rows.values()
        if row["ok"]
    ]


def statement_at(text: str, line: int) -> tuple[frozenset[int], frozenset[int]]:
    """(the lines of the innermost statement around a line, those of the function around it; empty outside of one)."""
    own: frozenset[int] = frozenset()
    function: frozenset[int] = frozenset()
    for node in ast.walk(ast.parse(text)):  # outer before inner
        if not isinstance(node, ast.stmt) or not node.lineno <= line <= (node.end_lineno or line):
            continue
        body = getattr(node, "body", None)
        last = body[0].lineno - 1 if body else node.end_lineno or node.lineno  # of one with a body: its head
        if isinstance(node, ast.FunctionDef):
            function = frozenset(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            own = frozenset() if line <= last else own  # a default: any test that calls it
        else:
            own = frozenset(range(node.lineno, max(last, node.lineno) + 1))
    return (own if function and own <= function else frozenset()), function


def tests_of(mutant: Mutant, text: str, tests: Iterable[Test], budget: float) -> list[str]:
    """The tests that run the mutant's statement, quick ones of its own folder first, for `budget` CPU seconds."""
    own, function = statement_at(text, mutant.line)
    ran = [t for t in tests if mutant.file in t.lines]
    wanted = own or function
    ran = [t for t in ran if wanted & t.lines[mutant.file]] if wanted else ran
    mirror = f"tests/{Path(mutant.file).parent}/test_{Path(mutant.file).stem}"
    folder = f"tests/{Path(mutant.file).parent}/"
    ran.sort(key=lambda t: (not t.name.startswith(mirror), not t.name.startswith(folder), t.seconds))
    chosen: list[str] = []
    for test in ran:
        if not chosen or test.seconds <= budget:
            chosen.append(test.name)
            budget -= test.seconds
    return chosen


# --- one mutant -------------------------------------------------------------------------------------------------------


def judge(copy: Path, mutant: Mutant, text: str, tests: list[str], limit: float) -> tuple[str, str]:
    """("killed" or "survived", by what). `limit` are CPU seconds."""
    if not tests:
        return "survived", "no test runs it"
    target, log = copy / mutant.file, copy / "mutant.log"
    original = target.read_text()
    target.write_text(text)
    try:
        child = os.fork()
        if not child:
            _run(copy, log, tests, limit)
        _, status = os.waitpid(child, 0)
    finally:
        target.write_text(original)
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 124:
        return "killed", f"time-out after {limit:.0f} s"
    if os.WEXITSTATUS(status) == 0:
        return "survived", ""
    lines = log.read_text(errors="replace").splitlines()
    if os.WEXITSTATUS(status) not in (1, 2, 4):  # a failing test, or a test file that cannot be imported
        raise SystemExit("\n".join(["pytest did not run:", *lines[-20:]]))
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "killed", (failed or lines or [""])[-1][:200]


def _run(copy: Path, log: Path, tests: list[str], limit: float) -> None:
    """The child: runs the tests in the copy, and ends."""
    code = 3
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        signal.signal(signal.SIGXCPU, lambda *_: os._exit(124))
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        sys.dont_write_bytecode = True
        os.environ["PYTHONPATH"] = str(copy)
        flags = ["-x", "-q", "-p", "no:cacheprovider", "-o", "timeout=0", "--tb=line"]
        code = int(importlib.import_module("pytest").main([*flags, *tests]))
    except BaseException:  # the child must end here, whatever happens
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Makes a map, or goes on with a run and prints its survivors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", help="tests to append to the map; without them mutants are judged")
    parser.add_argument("--map", type=Path, default=Path("map.jsonl"), help="which test runs which lines")
    parser.add_argument("--sample", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("mutation.jsonl"))
    parser.add_argument("--budget", type=float, default=30.0, help="CPU seconds of tests for one mutant")
    parser.add_argument("--only", default="", help="mutants of files with this in their name")
    parser.add_argument("--mapped", action="store_true", help="mutants of which the map has tests of their folder")
    parser.add_argument("--again", action="store_true", help="judge survivors again, after new tests")
    args = parser.parse_args()
    if args.paths:
        make_map(args.map.absolute(), args.paths)
        return
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    for name in ("torch", "numpy", "pytest", "safetensors.torch"):
        importlib.import_module(name)
    known = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {k["key"]: k for k in known}
    if args.again:
        done = {key: row for key, row in done.items() if row["verdict"] != "survived"}
    drawn = [(m, t) for m, t in sample(args.sample, args.seed) if args.only in m.file]
    tests = read_map(args.map)
    with tempfile.TemporaryDirectory(prefix="lmfx-mutation-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(
            ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "*.png", "__pycache__")
        )
        for i, (mutant, text) in enumerate(drawn):
            if args.mapped and not any(t.name.startswith(f"tests/{Path(mutant.file).parent}/") for t in tests):
                continue
            if mutant.key not in done:
                began = time.monotonic()
                chosen = tests_of(mutant, (ROOT / mutant.file).read_text(), tests, args.budget)
                verdict, by = judge(copy, mutant, text, chosen, 60 + 5 * args.budget)
                row = {"key": mutant.key, "verdict": verdict, "by": by, "tests": len(chosen), **asdict(mutant)}
                done[mutant.key] = row
                with args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{i + 1}/{len(drawn)} {verdict} {mutant.file} {time.monotonic() - began:.0f} s {by}", flush=True)
    rows = [done[m.key] for m, _ in drawn if m.key in done]
    survived = [r for r in rows if r["verdict"] == "survived"]
    print(f"\n{len(rows) - len(survived)} of {len(rows)} killed; survivors:\n")
    for row in survived:
        print(f"{row['file']} #{row['index']}\n{row['diff']}\n")


if __name__ == "__main__":
    main()
