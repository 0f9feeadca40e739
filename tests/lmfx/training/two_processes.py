"""Runs a program in two processes that train together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

__all__ = ["weights_of_both"]


def weights_of_both(program: str, folder: Path, port: int) -> list[dict[str, Tensor]]:
    """The weights that each process of a program wrote to `RANK.safetensors` in `folder`, its first argument."""
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    (folder / "two.py").write_text(program)
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)),
            *(str(folder / "two.py"), str(folder)),
        ],
        cwd=root,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]
