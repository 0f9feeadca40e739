"""One chunk of the fuzzer: so many networks from one seed, each failure cut down to a record that can be replayed."""

from __future__ import annotations

import gc
import re
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.compare import Wrong
from tests.fuzz.networks import programs
from tests.fuzz.program import Program
from tests.fuzz.properties import Shares, check
from tests.fuzz.reduce import reduce, same_failure

__all__ = ["run_chunk", "signature"]

LONGEST = 300  # seconds for one network


def run_chunk(number: int, examples: int = 200, shares: Shares | None = None, cut: bool = True) -> dict[str, Any]:
    """Counts, events and failures of the networks that Hypothesis draws from the seed `number`."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # lmfx collects what it times; without this each time would look at all of torch
    events: Counter[str] = Counter()
    failures: dict[str, str] = {}
    start = time.process_time()

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(programs(), st.integers(0, 10**9))
    def explore(program: Program, plan: int) -> None:
        events["networks"] += 1
        try:
            with _limit(LONGEST):
                outcome = check(program, plan, shares)
        except Wrong as error:
            events["failed"] += 1
            name = signature(error)
            if name not in failures:
                smaller = reduce(program, same_failure(error, plan)) if cut else program
                failures[name] = smaller.dumps(error=str(error)[:1000], signature=name, plan=plan, chunk=number)
            return
        events.update(set(outcome.events))
        events["merged spans"] += outcome.merges
        events["networks with a merged span"] += bool(outcome.merges)

    explore()
    return {
        "chunk": number,
        "networks": events.pop("networks"),
        "failed": events.pop("failed", 0),
        "seconds": round(time.process_time() - start, 1),
        "events": dict(events),
        "failures": list(failures.values()),
    }


def signature(error: Wrong) -> str:
    """What makes two failures the same: the property, the kind of error, and the line of lmfx that it came from."""
    cause = error.__cause__ or error
    frames = [
        f for f in traceback.extract_tb(cause.__traceback__) if "/passes/" in f.filename or "/lmfx/" in f.filename
    ]
    where = f" in {frames[-1].filename.rpartition('/')[2]}:{frames[-1].name}" if frames else ""
    text = re.sub(r"[\d.]+", "#", str(cause).partition("\n")[0])[:60]
    return f"{error.kind}{where} ({type(cause).__name__}: {text})"


class _TooLong(Exception):
    pass


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Interrupt a network that takes too long."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    except _TooLong as error:
        raise Wrong("time", str(error)) from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
