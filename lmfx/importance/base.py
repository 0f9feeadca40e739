"""The estimator protocol: candidates -> importances, higher is better, 0 for keeping everything as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import fx

from lmfx.calibration.images import Calibration
from lmfx.importance.pool import ExecutorLike
from lmfx.latency.profiling import digest
from lmfx.passes.errors import StoreError, TableError
from lmfx.passes.html_text import html_table
from lmfx.passes.identity.fingerprint import Identity, identify
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.store.row_values import check_value, score_of
from lmfx.store.rows import Store

__all__ = [
    "Estimator",
    "ImportanceTable",
    "Scored",
    "check_made_for",
    "stored_scores",
    "weights_identity",
]

SHOWN = 12  # rows in a notebook


@dataclass(frozen=True)
class ImportanceTable(Mapping[str, float]):
    """Candidate key -> importance. `identity` says what the values hold for: estimator, weights, calibration.

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

    def _repr_html_(self) -> str:
        dearest = sorted(self.rows.items(), key=lambda item: item[1])[:SHOWN]
        rows = [(key, f"{value:.4g}") for key, value in dearest]
        caption = (
            f"the {len(rows)} that cost most of {len(self)} candidates, by {self.identity.get('estimator', 'a table')}"
        )
        return html_table(("candidate", "importance"), rows, (1,), caption)


@runtime_checkable
class Estimator(Protocol):
    """The interface of an importance estimator: how much each candidate costs in output quality."""

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
    """An estimator that has a table already, like that of `score_on_demand`; candidates without a row stay without."""

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
        check_made_for(self.table.identity, spans)
        return self.table


def weights_identity(gm: fx.GraphModule) -> Identity:
    """What a graph is with all its values. Rows of a graph that is not certain are not stored."""
    return identify(gm, "values")


def stored_scores(store: Store | None, identity: Mapping[str, Any], keys: Sequence[str]) -> dict[str, float]:
    """The scores that a store has, of any estimator. Raises `StoreError` for a row that is none."""
    if store is None:
        return {}
    try:
        found = store.get_many("importance", identity, keys).items()
        return {key: score_of(check_value("importance", key, value)) for key, value in found}
    except ValueError as error:
        folder = store.folder("importance", identity)
        raise StoreError(f"an importance in {folder} is not one ({error}); delete the file") from error


def check_made_for(identity: Mapping[str, Any], spans: SpanSet) -> None:
    """Raises `TableError` if a table with this identity was made for another graph, or for plans of another kind."""
    facts = {"graph": digest(spans.network.gm), "activation_after": spans.options.activation_after}
    for name, what in (("graph", "for another graph"), ("activation_after", "with another activation_after")):
        theirs = identity.get(name, facts[name])
        if theirs != facts[name]:
            raise TableError(
                f"the ImportanceTable was made {what} ({theirs}, this one is {facts[name]}): score this one"
            )
