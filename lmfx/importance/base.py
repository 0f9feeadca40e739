"""The estimator protocol: candidates -> importances, higher is better, 0 for keeping everything as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx

from lmfx.calibration import Calibration
from lmfx.importance.pool import ExecutorLike
from lmfx.latency.store import Store
from lmfx.passes.errors import TableError
from lmfx.passes.ir import Candidate
from lmfx.passes.spans import SpanSet
from lmfx.passes.trace import fingerprint
from lmfx.profiling import digest

__all__ = ["Estimator", "ImportanceTable", "Scored", "weights_digest"]


@dataclass(frozen=True)
class ImportanceTable(Mapping[str, float]):
    """Candidate key -> importance. `identity` says what the values are good for: estimator, weights, calibration.

    `unusable` are candidates that were scored and have no row, because their score was no finite number.
    """

    rows: Mapping[str, float]
    identity: Mapping[str, Any]
    unusable: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> float:
        try:
            return self.rows[key]
        except KeyError:
            raise TableError(
                f"the importance table ({len(self.rows)} rows) has no row {key!r}; score the same graph with the "
                "latency table that is to be solved"
            ) from None

    def __contains__(self, key: object) -> bool:
        return key in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@runtime_checkable
class Estimator(Protocol):
    """How much each candidate costs in output quality."""

    @property
    def name(self) -> str:
        """The name that `get_estimator` knows."""

    def score(
        self,
        spans: SpanSet,
        candidates: Sequence[Candidate],
        calibration: Calibration | None,
        store: Store | None = None,
        progress: bool = False,
        executor: ExecutorLike = None,
    ) -> ImportanceTable:
        """An importance for each candidate (those that are `keep` need none: it is 0)."""


@dataclass(frozen=True)
class Scored:
    """The estimator that has a table already, like that of `score_on_demand`; candidates without a row stay without."""

    table: ImportanceTable
    name: str = "scored"

    def score(
        self,
        spans: SpanSet,
        candidates: Sequence[Candidate],
        calibration: Calibration | None,
        store: Store | None = None,
        progress: bool = False,
        executor: ExecutorLike = None,
    ) -> ImportanceTable:
        """The table. Raises `TableError` if it was made for another graph."""
        here = digest(spans.network.gm)
        made_for = self.table.identity.get("graph", here)
        if made_for != here:
            raise TableError(
                f"the ImportanceTable was made for another graph ({made_for}, this one is {here}): score this one"
            )
        return self.table


def weights_digest(gm: fx.GraphModule) -> str:
    """A short digest of a graph's structure and of all its values."""
    state = hashlib.sha256(fingerprint(gm).encode())
    for name, tensor in gm.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()[:16]
