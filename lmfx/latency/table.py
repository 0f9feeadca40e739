"""LatencyTable: candidate -> Measurement, for one backend on one machine; and its calibration on whole networks."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmfx.export.atomic import atomic_write
from lmfx.latency.base import Measurement
from lmfx.passes.errors import TableError

__all__ = ["Calibration", "LatencyTable", "calibrate", "kendall_tau"]

FORMAT = "lmfx-latency-table"
VERSION = 1


@dataclass(frozen=True)
class LatencyTable(Mapping[str, Measurement]):
    """Candidate key -> `Measurement` (ms), and the identity it is good for: backend, version, device, threads, dtype,
    batch. A missing row is a `TableError`, never a guess."""

    rows: Mapping[str, Measurement]
    identity: Mapping[str, Any]

    def __getitem__(self, key: str) -> Measurement:
        try:
            return self.rows[key]
        except KeyError:
            raise TableError(
                f"the latency table ({self._where()}, {len(self.rows)} rows) has no row {key!r}; profile the same "
                "graph with the same options"
            ) from None

    def __contains__(self, key: object) -> bool:
        return key in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def ms(self, key: str) -> float:
        """The latency of one candidate."""
        return self[key].ms

    def check(self, other: LatencyTable | Mapping[str, Any]) -> None:
        """Raises `TableError` if the other table (or identity) is of another backend, version, device, threads..."""
        theirs = other.identity if isinstance(other, LatencyTable) else other
        different = [k for k in {**self.identity, **theirs} if self.identity.get(k) != theirs.get(k)]
        if different:
            seen = "; ".join(f"{k}: {self.identity.get(k)!r} and {theirs.get(k)!r}" for k in different)
            raise TableError(f"latencies of different identities can not be used together ({seen}); profile again")

    def merge(self, other: LatencyTable) -> LatencyTable:
        """Both tables' rows; where both have one, the other's. Raises `TableError` if they do not go together."""
        self.check(other)
        return LatencyTable({**self.rows, **other.rows}, self.identity)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes JSON; the file is complete or not there."""
        target = Path(path)
        body = {
            "format": FORMAT,
            "version": VERSION,
            "identity": dict(self.identity),
            "rows": {k: asdict(m) for k, m in self.rows.items()},
        }
        try:
            return atomic_write(target, json.dumps(body, indent=1).encode())
        except OSError as error:
            raise TableError(f"can not write the latency table {target}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Reads what `save` wrote. Raises `TableError` for a missing, damaged or foreign file."""
        try:
            body = json.loads(Path(path).read_text())
        except OSError as error:
            raise TableError(f"can not read the latency table {path}: {error}") from error
        except ValueError as error:
            raise TableError(f"the latency table {path} is damaged ({error}); profile again") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise TableError(f"{path} is not a latency table of lmfx; give a file that LatencyTable.save wrote")
        if body.get("version") != VERSION:
            raise TableError(f"{path} has version {body.get('version')!r}, this lmfx reads {VERSION}; profile again")
        try:
            rows = {str(k): Measurement(**v) for k, v in body["rows"].items()}
            bad = [k for k, m in rows.items() if not (isinstance(m.ms, (int, float)) and math.isfinite(m.ms))]
            if bad:
                raise ValueError(f"row {bad[0]!r} is not a latency")
            return cls(rows, dict(body["identity"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TableError(f"the latency table {path} is damaged ({error}); profile again") from error

    def _where(self) -> str:
        return " on ".join(str(self.identity[k]) for k in ("backend", "device") if self.identity.get(k))


@dataclass(frozen=True)
class Calibration:
    """whole = a + b * sum, in ms. `mape` is the mean absolute error (as a fraction) and `held_out` that of each point
    predicted from the others (NaN below three points); `kendall_tau` compares the orders of sums and wholes."""

    a: float
    b: float
    mape: float
    kendall_tau: float
    held_out: float

    def __call__(self, total: float) -> float:
        """The predicted whole for a sum of rows, in ms."""
        return self.a + self.b * total


def calibrate(sums: Sequence[float], wholes: Sequence[float]) -> Calibration:
    """Fits whole = a + b * sum to a handful of measured networks; b is positive.

    One point gives b = 1. Two or more give Theil-Sen (the median of the pairwise slopes, then the median of the rests),
    which one bad measurement in four does not move. Raises `TableError` without points or with one that is no latency.
    """
    x, y = np.asarray(sums, dtype=float), np.asarray(wholes, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise TableError(f"calibration needs as many sums as wholes and at least one; got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise TableError(f"calibration needs positive latencies; got sums {x.tolist()} and wholes {y.tolist()}")
    a, b = _line(x, y)
    held_out = math.nan
    if x.size >= 3:
        keep = ~np.eye(x.size, dtype=bool)
        lines = [_line(x[k], y[k]) for k in keep]
        held_out = float(np.mean([abs(p + q * xi - yi) / yi for (p, q), xi, yi in zip(lines, x, y, strict=True)]))
    return Calibration(a, b, float(np.mean(np.abs(a + b * x - y) / y)), kendall_tau(x, y), held_out)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    i, j = np.triu_indices(x.size, 1)
    apart = np.abs(x[i] - x[j]) > 1e-3 * x.max()
    slopes = (y[j] - y[i])[apart] / (x[j] - x[i])[apart]
    b = float(np.median(slopes)) if slopes.size else 1.0
    if not b > 0:
        b = float(np.median(y / x))  # noise turned the order round: scale only
    return float(np.median(y - b * x)), b


def kendall_tau(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Kendall's tau-b: 1 for the same order, -1 for the opposite one; NaN if one side is constant."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    i, j = np.triu_indices(a.size, 1)
    da, db = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    weight = math.sqrt(float((da != 0).sum()) * float((db != 0).sum()))
    return float((da * db).sum()) / weight if weight else math.nan
