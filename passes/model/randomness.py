"""Puts all random states back after a block, so that looking at a network does not change the caller's numbers.

torch on the CPU and on every GPU that is in use, Python's `random`, and NumPy's global generator.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["kept_random_state"]


@contextmanager
def kept_random_state() -> Iterator[None]:
    """All global random states are after the block what they were before it."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    own, python, numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(own)
        random.setstate(python)
        np.random.set_state(numbers)
        for device, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, device)
