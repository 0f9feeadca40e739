"""Networks and data that nobody here made: what is left of each at a measured latency, by lmfx and by the alternatives.

    REAL=... python benchmarks/real/real.py [--networks mtcnn-onet ...] [--variants lmfx ...] [--budgets 0.85 0.7]
    python benchmarks/real/real.py --stage make       compress, prune, scale; the files
    python benchmarks/real/real.py --stage measure    all files of a network beside its original
    python benchmarks/real/real.py --stage judge      what the files say of inputs that calibration never saw
    python benchmarks/real/real.py --stage report     table and picture of all that is there

What is finished stays: lines of `rows.jsonl` and ONNX files in `--out`. Rows of lmfx name the commit that last changed
it, and only they are made anew when it is another; `--again` makes all that are asked for anew. A network whose package
is not there is left out by name. `--variants lmfx+recover` (and so on) trains `--recover` minutes without labels.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lmfx
from benchmarks.real import (
    classifiers,
    drawn,
    enlargements,
    faces,
    mosaics,
    pitches,
    real_report,
    text_boxes,
    text_lines,
)
from benchmarks.real.exported import export, latencies, outputs
from benchmarks.real.packages import Absent
from benchmarks.real.pruned import Missed
from benchmarks.real.rows import Key, Rows
from benchmarks.real.subjects import Subject
from benchmarks.real.variants import RECOVERED, VARIANTS, Made, Work, make, uses_planning

NETWORKS: dict[str, Callable[[], Subject]] = {
    "mtcnn-rnet": faces.rnet,
    "mtcnn-onet": faces.onet,
    "drawn-resnet": lambda: drawn.drawn("resnet"),
    "drawn-mobilenet": lambda: drawn.drawn("mobilenet"),
    "drawn-resnet-1": lambda: drawn.drawn("resnet", 1),
    "drawn-resnet-2": lambda: drawn.drawn("resnet", 2),
    "drawn-mobilenet-1": lambda: drawn.drawn("mobilenet", 1),
    "drawn-mobilenet-2": lambda: drawn.drawn("mobilenet", 2),
    "crepe-tiny": pitches.crepe,
    "demosaicking": mosaics.bayer,
    "waifu2x-upresnet10": enlargements.upresnet10,
    "waifu2x-upconv7": enlargements.upconv7,
    "crnn-english": text_lines.crnn,
    "craft": text_boxes.craft,
    "efficientnet-lite0": classifiers.efficientnet,
    "efficientnet-lite1": lambda: classifiers.efficientnet(1),
}
BUDGETS = (0.85, 0.7, 0.55, 0.4)
ORIGINAL = "original"


def version() -> str:
    """The commit that last changed the compiler, with a + if it has changes that are in none."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        told = subprocess.run(["git", *words, "--", "lmfx", "passes"], cwd=root, capture_output=True, text=True)
        return told.stdout.strip()

    return (git("log", "-1", "--format=%h") or lmfx.__version__) + ("+" if git("status", "--porcelain") else "")


def subjects(names: list[str]) -> dict[str, Subject]:
    """Those whose packages are there; of the others it says why not."""
    found = {}
    for name in names:
        try:
            subject = NETWORKS[name]()
            subject.model()
            subject.images("cal", 1, subject.size)
        except Absent as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
        else:
            found[name] = subject
    return found


# --- the stages -------------------------------------------------------------------------------------------------------


def make_all(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    """The original's file, and one a variant and budget."""
    settings = {} if args.latency is None else {"latency": args.latency}
    work = Work(subject, args.out / subject.name, args.recover, args.steps, settings)
    original = Key(subject.name, ORIGINAL, 1.0)
    if not exists(original, rows, args):
        keep(original, Made(work.model, subject.example), 0.0, rows, args)
    for budget in args.budgets:
        for variant in args.variants:  # X+recover goes on from X, if that comes before it
            if variant.startswith("smaller") and not subject.smaller:
                continue
            key = Key(subject.name, variant, budget)
            found = rows.find(key, "made")
            gone = found is None or ("digest" in found and not exists(key, rows, args))
            stale = gone or args.again or (uses_planning(variant) and (found or {})["version"] != args.version)
            if stale:
                one(work, key, rows, args)


def one(work: Work, key: Key, rows: Rows, args: argparse.Namespace) -> None:
    """A variant at a budget, or the line that says why there is none."""
    start = time.process_time()
    try:
        made = make(work, key.variant, key.budget)
    except Missed as error:
        rows.add(key, "made", version=args.version, missed=error.least)
    except lmfx.InfeasibleBudget as error:
        rows.add(key, "made", version=args.version, missed=error.latency / error.original)
    else:
        keep(key, made, time.process_time() - start, rows, args)
    say(key, rows.find(key, "made"))


def keep(key: Key, made: Made, seconds: float, rows: Rows, args: argparse.Namespace) -> None:
    """Exports what was made, and notes it."""
    file = export(made.net, made.example, args.out / key.file)
    values = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    told = {"version": args.version, "digest": values, "seconds": round(seconds, 1), "peak_gb": round(gb, 2)}
    rows.add(key, "made", **told, **made.facts)


def unfinished(subject: Subject, stage: str, rows: Rows, args: argparse.Namespace) -> list[Key]:
    """The variants of a network whose files have not been through a stage."""
    own = [key for key in rows.variants() if key.network == subject.name and exists(key, rows, args)]
    return [key for key in own if rows.find(key, stage) is None]


def measure_all(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    """All files that have no latency yet, in the same rounds."""
    due = [
        k
        for k in rows.variants()
        if k.network == subject.name and exists(k, rows, args) and rows.find(k, "measured") is None
    ]
    found = latencies(args.out / Key(subject.name, ORIGINAL, 1.0).file, [args.out / k.file for k in due], args.rounds)
    for key, taken in zip(due, found, strict=True):
        rows.add(key, "measured", digest=digest(key, rows), **vars(taken))
        say(key, rows.find(key, "measured"))


def judge_all(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    """All files that are not judged yet."""
    due = [
        k
        for k in rows.variants()
        if k.network == subject.name and exists(k, rows, args) and rows.find(k, "judged") is None
    ]
    if not due:
        return
    original = outputs(args.out / Key(subject.name, ORIGINAL, 1.0).file, held(subject, subject.size))
    for key in due:
        size = (rows.find(key, "made") or {}).get("size", subject.size)
        given = original if key.variant == ORIGINAL else outputs(args.out / key.file, held(subject, size))
        figures = {name: round(float(v), 6) for name, v in subject.judge(given, original).items()}
        rows.add(key, "judged", digest=digest(key, rows), figure=subject.figure, unit=subject.unit, **figures)
        say(key, rows.find(key, "judged"))


def held(subject: Subject, size: int) -> torch.Tensor:
    """The inputs that judge."""
    return subject.images("held", subject.held, size)


def exists(key: Key, rows: Rows, args: argparse.Namespace) -> bool:
    """Whether it was made, not missed, and its file is still there."""
    return digest(key, rows) is not None and (args.out / key.file).exists()


def digest(key: Key, rows: Rows) -> Any:
    """Of the file that a line is about."""
    return (rows.find(key, "made") or {}).get("digest")


def say(key: Key, row: dict[str, Any] | None) -> None:
    """Progress, on stderr."""
    told = {k: v for k, v in (row or {}).items() if k not in ("network", "variant", "budget", "digest")}
    print(f"{key.network} {key.variant} {key.budget:g}: {told}", file=sys.stderr, flush=True)


STAGES = {"make": make_all, "measure": measure_all, "judge": judge_all}


# --- the command line -------------------------------------------------------------------------------------------------


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*VARIANTS, *(v + RECOVERED for v in VARIANTS)]
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, "report", "all"], default=["all"])
    parser.add_argument(
        "--networks", nargs="+", choices=list(NETWORKS), default=[n for n in NETWORKS if not n.endswith(("-1", "-2"))]
    )
    parser.add_argument("--variants", nargs="+", choices=every, default=list(VARIANTS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--recover", type=float, default=3.0, metavar="MINUTES", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="of recovery, in place of minutes")
    parser.add_argument("--latency", help="what lmfx.compress measures with (default: its own default)")
    parser.add_argument("--rounds", type=int, default=15, help="of measuring (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="make what is asked for anew")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/real"), help="what is there is kept")
    parser.add_argument("--rows", type=Path, help="rows.jsonl in --out by default")
    parser.add_argument("--png", type=Path, help="the picture; real.png in --out by default")
    args = parser.parse_args(arguments)
    args.version = version()
    return args


def main(arguments: list[str] | None = None) -> None:
    """Do what is missing, print the table, draw the picture."""
    args = options(arguments)
    torch.set_num_threads(args.threads)
    rows = Rows(args.rows or args.out / "rows.jsonl")
    if args.stage != ["report"]:
        for subject in subjects(args.networks).values():
            for name, stage in STAGES.items():
                if name in args.stage or "all" in args.stage:
                    stage(subject, rows, args)
    if "report" in args.stage or "all" in args.stage:
        print(real_report.table(rows))
        real_report.picture(rows, args.png or args.out / "real.png")


if __name__ == "__main__":
    main()
