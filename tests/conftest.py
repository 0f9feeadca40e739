"""What every test starts from: a seed, two threads (or OMP_NUM_THREADS), and a cache of its own."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# The examples of a property test depend on the test alone, so a run can be repeated. A busy machine has no deadline.
settings.register_profile("lmfx", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)  # pytest --hypothesis-profile=explore
settings.load_profile("lmfx")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 2))


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests (and the processes they start) never read or write the tables in the user's cache."""
    folder = tmp_path_factory.mktemp("lmfx-cache")
    before = os.environ.get("LMFX_CACHE_DIR")
    os.environ["LMFX_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["LMFX_CACHE_DIR"]
    else:
        os.environ["LMFX_CACHE_DIR"] = before


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, alone or after others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
