"""Mutation sampling: does a test fail when one small thing in the code is changed?

    python -m venv /tmp/mutation && /tmp/mutation/bin/pip install mutmut
    echo $PWD/.venv/lib/python3*/site-packages > $(echo /tmp/mutation/lib/python3*/site-packages)/main.pth
    /tmp/mutation/bin/python benchmarks/promises/mutation.py --sample 150 --seed 0 --results mutation.jsonl

Mutants are those of mutmut (`+` for `-`, `<=` for `<`, another number, an argument left out, ...), drawn evenly over
all that there are in the files of `TESTS`. Words for a person (a text with a blank) are left out: no behaviour hangs on
them. Each is written into a copy of the tree, and the test files that `TESTS` names for the changed file run there
with `-x`, quick ones first. A mutant is `killed` by a failing test or by a time-out, and has `survived` otherwise. One
line of JSON a mutant is appended to the results, so a run that was stopped goes on; a mutant is known by file, text and
place in the file's list, so results stay good while the file is as it was. docs/testing.md names the survivors and why.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GENERAL = "test_spans test_rewrite test_fuzz_regressions test_random_networks"
TESTS = {  # source file or folder -> the test files that are to notice a change, quick ones first
    "lmfx/planning/search.py": "test_search test_small_changes test_budget test_compress",
    "lmfx/latency/whole_networks.py": "test_wholes test_small_changes test_search",
    "lmfx/calibration/fitting.py": "test_fitting test_side_fits test_save_load test_compress",
    "lmfx/stages.py": "test_bad_input test_fitting test_on_demand test_compress",
    "lmfx/importance/finetune.py": "test_finetune test_importance test_small_changes",
    "lmfx/importance/jobs.py": "test_finetune",
    "lmfx/importance/pool.py": "test_finetune test_importance test_shared_scores",
    "lmfx/importance": "test_importance test_small_changes test_memory test_shared_scores test_finetune test_post_norm",
    "passes/canonical/cats.py": "test_cats " + GENERAL,
    "passes/fit/conjugate_gradients.py": "test_solve test_fit test_fitting",
    "passes/trace/exported.py": "test_exported test_trace",
    "passes/fit/closed_form.py": "test_fit test_fitting test_side_fits",
    "passes/canonical/constants.py": "test_fold test_trace",
    "passes/spans/globs.py": "test_globs test_bad_input",
    "passes/fit/gram.py": "test_fit test_memory test_fitting test_side_fits test_importance",
    "passes/canonical/inplace.py": "test_inplace test_trace",
    "passes/model/interface.py": "test_interface test_multi_input test_trace test_compress",
    "passes/canonical/layouts.py": "test_layouts test_trace",
    "passes/algebra/linear.py": "test_linear test_padding_modes test_spans test_random_networks",
    "passes/algebra/linear_op.py": "test_linear test_padding_modes test_transposed test_spans",
    "passes/algebra/linear_span.py": "test_rewrite test_trainable test_sides test_spans test_random_networks",
    "passes/spans/moved_norms.py": "test_norms test_post_norm",
    "passes/graph/map_shapes.py": "test_fuzz_regressions test_spans test_layouts test_vectors",
    "passes/solve/pareto.py": "test_solve test_search",
    "passes/graph/reduction.py": "test_regions test_meshes test_spans",
    "passes/spans/regions.py": "test_regions test_meshes test_spans",
    "passes/rewrite/trainable.py": (
        "test_rewrite test_small_changes test_trainable test_sides test_spans test_post_norm"
    ),
    "passes/canonical/selections.py": "test_selections test_cats test_spans",
    "passes/trace/shape_tracer.py": "test_shape_tracer test_trace",
    "passes/graph/shapes.py": "test_linear test_small_changes test_spans test_random_networks",
    "passes/rewrite/siblings.py": "test_siblings",
    "passes/algebra/side_vectors.py": "test_sides test_side_fits test_vectors",
    "passes/solve/dynamic_program.py": "test_solve test_on_demand test_search",
    "passes/spans/enumeration.py": (
        "test_spans test_small_changes test_globs test_pruning test_methods test_random_networks"
    ),
    "passes/spans/pruning.py": "test_spans test_methods test_norms test_random_networks",
    "passes/fit/normal_equations.py": "test_fit test_fitting test_side_fits",
    "passes/trace/tracing.py": "test_trace test_exported test_inplace test_fuzz_regressions",
    "passes/trace/tracers.py": "test_trace test_exported test_shape_tracer test_zoo",
    "passes/canonical/transposed.py": "test_transposed",
    "passes": "test_trace test_pads_and_pools test_plain_networks test_vectors " + GENERAL,
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str
    index: int  # in the list of the file's mutants
    digest: str  # of the file
    diff: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.index}:{self.digest}"


def sources(root: Path = ROOT) -> list[str]:
    """The files that are mutated."""
    found: set[str] = set()
    for name in TESTS:
        path = root / name
        found |= {str(p.relative_to(root)) for p in (path.glob("*.py") if path.is_dir() else [path]) if p.is_file()}
    return sorted(n for n in found if not n.endswith("__init__.py"))


def changes_of(file: str, root: Path = ROOT) -> tuple[str, Any, list[Any]]:
    """(text, its tree, mutmut's changes of the tree)."""
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
    return None if _prose(diff) else (Mutant(file, index, digest, "\n".join(diff)), new)


def _prose(diff: list[str]) -> bool:
    """Whether only a text with a blank in it, or a list of public names, was changed."""
    if any("__all__" in line for line in diff):
        return True
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


def tests_of(file: str) -> list[str]:
    """The test files for a source file, by the longest name in `TESTS` that it begins with."""
    name = max((n for n in TESTS if file == n or file.startswith(n + "/")), key=len)
    return list(
        dict.fromkeys(str(p.relative_to(ROOT)) for t in TESTS[name].split() for p in (ROOT / "tests").rglob(f"{t}.py"))
    )


def judge(copy: Path, mutant: Mutant, text: str, limit: float, python: str) -> tuple[str, str]:
    """("killed" or "survived", by what)."""
    target = copy / mutant.file
    original = target.read_text()
    target.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    there = [t for t in tests_of(mutant.file) if (copy / t).exists()]
    command = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *there]
    process = subprocess.Popen(
        command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "killed", f"time-out after {limit:.0f} s"
    finally:
        target.write_text(original)
    if process.returncode == 0:
        return "survived", ""
    failed = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "killed", (failed or out.splitlines() or [""])[-1][:200]


def main() -> None:
    """Goes on with a run, and prints its survivors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("mutation.jsonl"))
    parser.add_argument("--limit", type=float, default=400.0, help="seconds for the tests of one mutant")
    parser.add_argument("--python", default=sys.executable, help="which has torch and pytest")
    parser.add_argument("--only", default="", help="mutants of files with this in their name")
    parser.add_argument("--again", action="store_true", help="judge survivors again, after new tests")
    args = parser.parse_args()
    known = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {k["key"]: k for k in known if not (args.again and k["verdict"] == "survived")}
    drawn = [(m, t) for m, t in sample(args.sample, args.seed) if args.only in m.file]
    with tempfile.TemporaryDirectory(prefix="lmfx-mutation-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(
            ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "*.png", "__pycache__")
        )
        for i, (mutant, text) in enumerate(drawn):
            if mutant.key not in done:
                began = time.monotonic()
                verdict, by = judge(copy, mutant, text, args.limit, args.python)
                row = {"key": mutant.key, "verdict": verdict, "by": by, **asdict(mutant)}
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
