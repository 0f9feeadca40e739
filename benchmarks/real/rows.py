"""What is known of each variant of each network: one JSON line a stage, the newest counts.

    {"network": "crnn-english", "variant": "lmfx", "budget": 0.7, "stage": "made", "version": "c137cf3", "file": ...}
    {..., "stage": "measured", "ratio": 0.69, "ms": 20.1}
    {..., "stage": "judged", "lines": 0.93, "characters": 0.99}

A "measured" or "judged" line holds for the file whose digest it names, so a variant that is made anew is measured and
judged anew. A network's own row is variant "original" at budget 1. A module, not a script.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Key", "Rows"]

Row = dict[str, Any]


@dataclass(frozen=True, order=True)
class Key:
    """A variant of a network at a budget."""

    network: str
    variant: str
    budget: float

    @property
    def file(self) -> str:
        """Where the exported network lies, below the folder of the run."""
        return f"{self.network}/{self.variant.replace(' ', '-')}-{self.budget:g}.onnx"


@dataclass
class Rows:
    """All lines of one file."""

    path: Path
    lines: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.lines = [json.loads(line) for line in self.path.read_text().splitlines() if line]

    def add(self, key: Key, stage: str, **values: Any) -> None:
        """One more line, on disk before anything else happens."""
        row = {"network": key.network, "variant": key.variant, "budget": key.budget, "stage": stage, **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.lines.append(row)

    def find(self, key: Key, stage: str) -> Row | None:
        """The newest line of a stage, if it is about the file that is there now."""
        made = self._newest(key, "made")
        row = self._newest(key, stage)
        if row is None or made is None or row.get("digest") != made.get("digest"):
            return None
        return row

    def whole(self, key: Key) -> Row:
        """All that is known of a variant, the stages in one."""
        return {k: v for stage in ("made", "measured", "judged") for k, v in (self.find(key, stage) or {}).items()}

    def variants(self) -> Iterator[Key]:
        """Every variant that was made, in the order of its first line."""
        made = (r for r in self.lines if r["stage"] == "made")
        yield from dict.fromkeys(Key(r["network"], r["variant"], r["budget"]) for r in made)

    def _newest(self, key: Key, stage: str) -> Row | None:
        wanted = (key.network, key.variant, key.budget, stage)
        fitting = (r for r in reversed(self.lines) if (r["network"], r["variant"], r["budget"], r["stage"]) == wanted)
        return next(fitting, None)
