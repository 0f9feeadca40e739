"""Counts what a long call costs: CPU seconds of each of its stages, and the most memory that the process ever had."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from lmfx.environment.progress import step

__all__ = ["Effort", "StageClock"]


@dataclass(frozen=True)
class Effort:
    """What a call cost: (stage, CPU seconds) in their order, and bytes of the process at its largest, if known."""

    stages: tuple[tuple[str, float], ...]
    peak: int | None = None

    @property
    def seconds(self) -> float:
        """CPU seconds of all stages, over all threads of this process."""
        return sum(s for _, s in self.stages)


@dataclass
class StageClock:
    """Adds up CPU seconds by stage, and with `say` tells which one has begun. Stages do not nest."""

    spent: dict[str, float] = field(default_factory=dict)
    say: bool = False

    @contextlib.contextmanager
    def stage(self, name: str, text: str | None = None) -> Iterator[None]:
        """What runs inside counts for this stage, also where it fails. `text` says it to a person, who is not told of a
        stage that is short by nature."""
        start = time.process_time()
        try:
            with step(text or name, self.say and text is not None):
                yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - start

    def effort(self) -> Effort:
        """What was spent so far."""
        return Effort(tuple(self.spent.items()), _peak())


def _peak() -> int | None:
    """The largest resident size that the process had, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # no such module on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
