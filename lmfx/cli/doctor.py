"""`lmfx doctor`: which runtimes, devices and extras work on this machine, and what to install for those that do not.

Everything is tried in a process of its own (`lmfx.cli.checkups`): what crashes it or hangs is reported as broken, and
the rest is tried in the next process. Exit code 0 where all that is needed and all that is installed works, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lmfx
from lmfx._version import __version__
from lmfx.cli.checkups import CHECKS, RUNTIME
from lmfx.environment.bounded_reading import in_one_line
from lmfx.environment.host import cpu_name

__all__ = ["doctor_command", "examined"]

TIMEOUT = 180.0  # seconds for one thing; a first import from a cold disk takes its time
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
) -> Iterator[dict[str, Any]]:
    """The result of each check, as soon as it is there; a process that ends or hangs costs only the check it was at."""
    left = list(names)
    while left:
        begun: str | None = None
        for line in _lines(left, timeout, module):
            if "begun" in line:
                begun = line["begun"]
                continue
            left.remove(line["name"])
            begun = None
            yield line
            if line.get("last"):
                break
        if left:  # the process ended within a check, or before the first
            name = begun or left[0]
            left.remove(name)
            yield _ended(name, _lines.last_end)  # type: ignore[attr-defined]


def _lines(names: Sequence[str], timeout: float, module: str) -> Iterator[dict[str, Any]]:
    """The lines of a process that runs the checks; how it ended is in `_lines.last_end`."""
    root = str(Path(lmfx.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
        encoding="utf-8",
    )
    hung = False

    def give_up() -> None:
        nonlocal hung
        hung = True
        process.kill()

    assert process.stdout is not None
    timer = threading.Timer(timeout, give_up)
    timer.start()
    try:
        for text in process.stdout:
            timer.cancel()
            yield json.loads(text)
            timer = threading.Timer(timeout, give_up)
            timer.start()
    finally:
        timer.cancel()
        if process.poll() is None and not hung:
            process.wait(timeout)
        process.stdout.close()
        code = process.wait()
        _lines.last_end = f"no answer within {timeout:g} s" if hung else _exit(code)  # type: ignore[attr-defined]


def _exit(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}"
    try:
        return f"the process crashed ({signal.Signals(-code).name})"
    except ValueError:
        return f"the process crashed (signal {-code})"


def _ended(name: str, how: str) -> dict[str, Any]:
    check = CHECKS[name]
    fix = f'pip install --upgrade --force-reinstall "lmfx[{check.extra}]"' if check.extra else None
    return {
        "name": name,
        "group": check.group,
        "state": "broken",
        "needed": check.needed,
        "versions": {},
        "detail": how,
        "fix": fix,
        "seconds": None,
    }


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
        return f"broken: {', '.join(broken)}. The lines with -> mend that; lmfx works without what you do not use"
    if not good:
        return 'no network can be timed here: pip install "lmfx[cli]"'
    states = {r["name"]: r["state"] for r in results}
    if all(states.get(name) == "ok" for name in ("onnxruntime", "torchvision", "pictures")):
        return "ready. Next: lmfx compress torchvision:resnet18 --images FOLDER --budget 0.6"
    return 'ready, without some extras; pip install "lmfx[cli]" has all of the command line'
