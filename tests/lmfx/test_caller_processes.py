"""lmfx works in processes that a caller forks or spawns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def results(kind: str, folder: Path) -> tuple[list[str], dict[str, object]]:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    ran = subprocess.run(
        [sys.executable, str(HERE / "caller_processes.py"), str(folder), kind],
        capture_output=True,
        text=True,
        timeout=250,
        env={**environment, "PYTHONPATH": str(HERE.parents[1])},
        check=True,
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    assert isinstance(found[kind], dict), found[kind]
    return found["here"]["chosen"], found[kind]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_the_same_and_several_threads_of_torch_are_refused_there(tmp_path: Path) -> None:
    here, child = results("fork", tmp_path)
    assert here and child["chosen"] == here and child["threads"]
    assert "forked process" in str(child.get("refused")) and "spawn" in str(child["refused"])


def test_a_spawned_process_does_the_same(tmp_path: Path) -> None:
    here, child = results("spawn", tmp_path)
    assert here and child["chosen"] == here and child["threads"]
