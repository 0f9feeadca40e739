"""A test that hangs is ended and named, whatever it hangs in: the project's own settings, with short limits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HANGS = """
import threading

def test_a_loop_in_python():
    while True:
        pass

def test_a_lock_that_nobody_opens():
    threading.Event().wait()

def test_a_loop_in_python_that_swallows_exceptions():
    while True:
        try:
            threading.Event().wait(0.01)
        except Exception:
            pass

def test_a_loop_in_c():
    sum(range(10**14))

def test_nothing():
    pass
"""


def pytest_on(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on HANGS, with pyproject.toml but a second for each test, and three until the process ends."""
    (folder / "test_hangs.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    command += ["-o", "timeout=1", "-o", "faulthandler_timeout=3", "-p", "no:cacheprovider", *arguments]
    return subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=120, cwd=folder)


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_hanging_test_fails_by_its_name_and_the_others_go_on(tmp_path: Path, processes: str) -> None:
    done = pytest_on(tmp_path, "-k", "not loop_in_c", "-n", processes, "--dist", "worksteal")
    assert done.returncode == 1
    assert "3 failed, 1 passed" in done.stdout
    for name in ("loop_in_python", "lock_that_nobody_opens", "loop_in_python_that_swallows_exceptions"):
        assert f"FAILED test_hangs.py::test_a_{name} " in done.stdout
    assert done.stdout.count("Failed: Timeout (>1.0s)") >= 3


def test_where_python_never_sees_the_signal_the_process_ends_with_the_tests_stack(tmp_path: Path) -> None:
    done = pytest_on(tmp_path, "-k", "loop_in_c or nothing")
    assert done.returncode == 1
    assert "passed" not in done.stdout
    assert "in test_a_loop_in_c" in done.stderr


def test_a_worker_that_ends_so_is_named_with_its_test_and_another_goes_on(tmp_path: Path) -> None:
    done = pytest_on(tmp_path, "-k", "loop_in_c or nothing", "-n", "2", "--dist", "worksteal")
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert re.search(r"worker 'gw\d' crashed while running 'test_hangs.py::test_a_loop_in_c'", done.stdout)
    assert "in test_a_loop_in_c" in done.stderr


def test_the_limits_are_minutes() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert 60 <= settings["timeout"] < settings["faulthandler_timeout"] <= 600
    assert settings["faulthandler_exit_on_timeout"] is True


def test_what_the_continuous_integration_runs_has_these_limits() -> None:
    assert "make --no-print-directory test\n" in (ROOT / ".ci" / "run").read_text()
    (line,) = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "-m pytest" in line and "slow" not in line
    ]
    assert line.endswith("$(PY) -m pytest -n 2 --dist worksteal $(ARGS)")  # what ARGS says comes last, and counts


@pytest.mark.parametrize(("given", "threads"), [(None, "1"), ("", "1"), ("4", "4")])
def test_a_worker_has_one_thread_unless_the_caller_says_otherwise(given: str | None, threads: str) -> None:
    """The recipe of `make test` with a python that only shows its environment and arguments."""
    show = f"{sys.executable} -c 'import os,sys; print(os.environ[\"OMP_NUM_THREADS\"], *sys.argv[1:])'"
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MAKEFLAGS", "MAKELEVEL")}
    environment |= {} if given is None else {"OMP_NUM_THREADS": given}
    command = ["make", "-s", "--no-print-directory", "-o", "lint", "test", f"PY={show}", "ARGS=tests/x.py -n 0 -x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    assert done.stdout == f"{threads} -m pytest -n 2 --dist worksteal tests/x.py -n 0 -x\n", done.stderr
