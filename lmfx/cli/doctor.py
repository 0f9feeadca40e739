"""`lmfx doctor`: which runtimes, devices and extras work on this machine, and what to install for those that do not.

Everything is tried in a process of its own (`lmfx.cli.checkups`): what crashes it or hangs is reported as broken, and
the rest is tried in the next process. Exit code 0 where all that is needed and all that is installed works, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lmfx
from lmfx._version import __version__
from lmfx.cli.checkups import CHECKS, RUNTIME, row
from lmfx.environment.bounded_reading import in_one_line
from lmfx.environment.host import cpu_name

__all__ = ["doctor_command", "examined"]

TIMEOUT = 180.0  # seconds for one thing; a first import from a cold disk takes its time
T = TypeVar("T")
MARKS = {"ok": "ok", "missing": "missing", "absent": "-", "broken": "BROKEN"}


def doctor_command(args: argparse.Namespace) -> int:
    """`lmfx doctor`: prints what works, and returns the exit code."""
    names = tuple(CHECKS)
    if not args.json:
        print(_machine_text(), flush=True)
    found = []
    group = ""
    for result in examined(names):
        found.append(result)
        if not args.json:
            if result["group"] != group:
                group = result["group"]
                print(f"\n{group}")
            print(_line(result), flush=True)
    good = healthy(found)
    if args.json:
        print(json.dumps({"lmfx": __version__, "ok": good, "machine": _machine(), "checks": found}, indent=1))
    else:
        print(f"\n{_verdict(found, good)}")
    return 0 if good else 1


def healthy(results: Sequence[dict[str, Any]]) -> bool:
    """Whether all that is needed works, a network can be timed, and nothing that is installed is broken."""
    needed = all(r["state"] == "ok" for r in results if r["needed"])
    timed = any(r["state"] == "ok" for r in results if r["group"] == RUNTIME)
    return needed and timed and all(r["state"] != "broken" for r in results)


def examined(
    names: Sequence[str], timeout: float = TIMEOUT, module: str = "lmfx.cli.checkups"
) -> Generator[dict[str, Any], None, None]:
    """The result of each check, as soon as it is there; a process that ends or hangs costs only the check it was at."""
    left = list(names)
    while left:
        worker = _Worker(left, timeout, module)
        with contextlib.closing(worker.lines()) as lines:
            for line in lines:
                if "begun" not in line:
                    left.remove(line["name"])
                    yield line
        if left:  # they are tried in this order, so it ended at the first of them
            yield row(CHECKS[left.pop(0)], "broken", worker.end)


class _Worker:
    """A process that runs checks; `end` says how it ended, once there are no more lines."""

    def __init__(self, names: Sequence[str], timeout: float, module: str) -> None:
        root = str(Path(lmfx.__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.timeout = timeout
        self.hung = False
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            text=True,
            encoding="utf-8",
        )

    def lines(self) -> Generator[dict[str, Any], None, None]:
        """What it writes. It is killed when that takes longer than `timeout`, or nobody reads on."""
        assert self.process.stdout is not None
        try:
            while text := self._within(self.process.stdout.readline):
                yield json.loads(text)
            self._within(self.process.wait)
        finally:
            self.process.kill()  # nothing, where it has ended
            self.process.wait()
            self.process.stdout.close()

    @property
    def end(self) -> str:
        return f"no answer within {self.timeout:g} s" if self.hung else _exit(self.process.wait())

    def _within(self, work: Callable[[], T]) -> T:
        timer = threading.Timer(self.timeout, self._give_up)
        timer.start()
        try:
            return work()
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        self.hung = True
        self.process.kill()


def _exit(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}"
    try:
        return f"the process crashed ({signal.Signals(-code).name})"
    except ValueError:
        return f"the process crashed (signal {-code})"


# --- in words ---------------------------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "lmfx": str(Path(lmfx.__file__).parent),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory": _memory(),
    }


def _memory() -> int | None:
    """Bytes of RAM; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _machine_text() -> str:
    m = _machine()
    memory = "" if m["memory"] is None else f", {m['memory'] / 1e9:.0f} GB of memory"
    return (
        f"lmfx {__version__} in {m['lmfx']}\nPython {m['python']} ({m['executable']}) on {m['system']} {m['machine']}\n"
        f"{in_one_line(m['cpu'])}, {m['cores']} cores{memory}"
    )


def _line(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    detail = result["detail"] + (f" ({versions})" if versions and result["state"] in ("ok", "broken") else "")
    fix = f"\n  {'':8} {'':21} -> {result['fix']}" if result["fix"] else ""
    return f"  {MARKS[result['state']]:8} {result['name']:21} {detail}{fix}"


def _verdict(results: Sequence[dict[str, Any]], good: bool) -> str:
    broken = [r["name"] for r in results if r["state"] == "broken"]
    if broken:
        mend = "The lines with -> mend that; " if any(r["fix"] for r in results if r["state"] == "broken") else ""
        return f"broken: {', '.join(broken)}. {mend}lmfx works without what you do not use"
    if not good:
        return 'no network can be timed here: pip install "lmfx[cli]"'
    states = {r["name"]: r["state"] for r in results}
    if all(states.get(name) == "ok" for name in ("onnxruntime", "torchvision", "pictures")):
        return "ready. Next: lmfx compress torchvision:resnet18 --images FOLDER --budget 0.6"
    return 'ready, without some extras; pip install "lmfx[cli]" has all of the command line'
