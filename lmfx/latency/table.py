"""`LatencyTable`: the measurement of each candidate, for one backend on one machine; calibrated on whole networks."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmfx.environment.atomic_files import atomic_write
from lmfx.environment.bounded_reading import parse_json, read_bounded
from lmfx.environment.caller_state import entry
from lmfx.latency.backend import Measurement
from lmfx.passes.errors import TableError
from lmfx.passes.html_text import html_facts, html_table
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.store.row_values import check_value

__all__ = ["CalibrationLine", "LatencyTable", "calibrate", "kendall_tau"]

FORMAT = "lmfx-latency-table"
VERSION = 1
LEAST_TO_LEAVE_ONE_OUT = 6
SHOWN = 12  # rows in a notebook


@dataclass(frozen=True)
class CalibrationLine:
    """whole = a + b * sum, in ms, and how far it was off on `plans` measured networks, as fractions.

    `mape` is the mean absolute error on the networks that the line was fitted to. `held_out` is that on networks which
    were not used for it, and `worst` the largest of those errors; `kendall_tau` compares the orders of sums and wholes
    of the held-out networks. Without any, each network in turn is predicted from the others
    (NaN below six, which promise nothing).
    """

    a: float
    b: float
    mape: float
    kendall_tau: float
    held_out: float
    worst: float = math.nan
    plans: int = 0

    def __call__(self, total: float) -> float:
        """The predicted whole for a sum of rows, in ms."""
        return self.a + self.b * total


def calibrate(
    sums: Sequence[float], wholes: Sequence[float], held_out: Sequence[tuple[float, float]] = ()
) -> CalibrationLine:
    """Fits whole = a + b * sum to a handful of measured networks; b is positive. `held_out` are (sum, whole) pairs.

    One point gives b = 1. Of two or more, the line through two of them that has the least mean relative error on all,
    which one bad measurement in four does not move. Raises `TableError` without points or with one that is no latency.
    """
    x, y = np.asarray(sums, dtype=float), np.asarray(wholes, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise TableError(f"calibration needs as many sums as wholes and at least one; got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise TableError(f"calibration needs positive latencies; got sums {x.tolist()} and wholes {y.tolist()}")
    a, b = _line(x, y)
    errors = np.zeros(0)
    tau = kendall_tau(x, y)
    if len(held_out):
        p, q = np.asarray(held_out, dtype=float).T
        errors = np.abs(a + b * p - q) / q
        tau = kendall_tau(p, q)
    elif x.size >= LEAST_TO_LEAVE_ONE_OUT:
        keep = ~np.eye(x.size, dtype=bool)
        lines = [_line(x[k], y[k]) for k in keep]
        errors = np.array([abs(p + q * xi - yi) / yi for (p, q), xi, yi in zip(lines, x, y, strict=True)])
    return CalibrationLine(
        a,
        b,
        float(np.mean(np.abs(a + b * x - y) / y)),
        tau,
        float(errors.mean()) if errors.size else math.nan,
        float(errors.max()) if errors.size else math.nan,
        x.size + len(held_out),
    )


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least relative deviations: such a line passes through two of the points (and b = 1 through one is tried, too)."""
    i, j = np.triu_indices(x.size, 1)
    apart = np.abs(x[i] - x[j]) > 1e-3 * x.max()
    i, j = i[apart], j[apart]
    slopes = (y[j] - y[i]) / (x[j] - x[i])
    i, slopes = i[slopes > 0], slopes[slopes > 0]
    if slopes.size:
        offsets = y[i] - slopes * x[i]
        offsets[np.abs(offsets) <= 1e-12 * y[i]] = 0.0  # only rounded
    else:  # equal sums, or noise turned the order round: an offset, or a scale only
        slopes = np.array([1.0] if not apart.any() else [float(np.median(y / x))])
        offsets = np.array([float(np.median(y - slopes[0] * x))])
    errors = np.abs(offsets[:, None] + slopes[:, None] * x - y) / y
    best = int(errors.sum(1).argmin())
    return float(offsets[best]), float(slopes[best])


@dataclass(frozen=True)
class LatencyTable(Mapping[str, Measurement]):
    """Candidate key -> `Measurement` (ms), and the identity it holds for: backend, version, device, threads, dtype,
    batch. A missing row is a `TableError`, never a guess.

    `calibration` relates sums of rows to whole networks, where some were measured (`lmfx.profile`).
    """

    rows: Mapping[str, Measurement]
    identity: Mapping[str, Any]
    calibration: CalibrationLine | None = None

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

    @entry
    def total(self, plan: MergePlan | None = None) -> float:
        """The sum of the rows of a plan's network in ms; without a plan that of the original network."""
        total = sum(m.ms for key, m in self.rows.items() if _is_keep(key))
        for candidate in plan.candidates if plan is not None else ():
            total += self.ms(candidate.key) - self.kept(candidate)
        return total

    def kept(self, candidate: Candidate) -> float:
        """The sum of the rows of a candidate's spans (one a call) if every layer in them is kept as it is, in ms."""
        return sum(self._layer(span.series, i) for span in candidate.spans for i in range(span.start, span.stop))

    @entry
    def predict(self, plan: MergePlan | None = None) -> float:
        """The latency of a plan's whole network in ms, by the calibration; without a plan that of the original network.

        Raises `TableError` if the table was not calibrated, or has no row for one of the plan's candidates.
        """
        if self.calibration is None:
            raise TableError(
                "this latency table was not calibrated on whole networks, so it predicts sums only (`total`); profile "
                "with calibrate=True"
            )
        return self.calibration(self.total(plan))

    def _layer(self, series: str, index: int) -> float:
        return self.ms(f"{series}:{index}-{index + 1}:keep") + self._inside.get((series, index), 0.0)

    @functools.cached_property
    def _inside(self) -> dict[tuple[str, int], float]:
        """(series, layer) -> the rows of all layers in the branches of that layer."""
        found: dict[tuple[str, int], float] = {}
        for key, m in self.rows.items():
            series = key.split(":")[0]
            while _is_keep(key) and "/" in series:
                series, _, rest = series.rpartition("/")
                place = series, int(rest.split(".")[0])
                found[place] = found.get(place, 0.0) + m.ms
        return found

    @entry
    def check(self, other: LatencyTable | Mapping[str, Any]) -> None:
        """Raises `TableError` if the other table (or identity) is of another backend, version, device, threads..."""
        theirs = other.identity if isinstance(other, LatencyTable) else other
        different = [k for k in {**self.identity, **theirs} if self.identity.get(k) != theirs.get(k)]
        if different:
            seen = "; ".join(f"{k}: {self.identity.get(k)!r} and {theirs.get(k)!r}" for k in different)
            raise TableError(f"latencies of different identities cannot be used together ({seen}); profile again")

    @entry
    def merge(self, other: LatencyTable) -> LatencyTable:
        """Both tables' rows; where both have one, the other's. Raises `TableError` if they do not go together."""
        self.check(other)
        return LatencyTable({**self.rows, **other.rows}, self.identity, other.calibration or self.calibration)

    @entry
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes JSON; the file is complete or not there."""
        target = Path(path)
        body = {
            "format": FORMAT,
            "version": VERSION,
            "identity": dict(self.identity),
            "rows": {k: asdict(m) for k, m in self.rows.items()},
            "calibration": None if self.calibration is None else _finite(asdict(self.calibration)),
        }
        try:
            return atomic_write(target, json.dumps(body, indent=1).encode())
        except OSError as error:
            raise TableError(f"cannot write the latency table {target}: {error}; give another file") from error

    @classmethod
    @entry
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Reads what `save` wrote. Raises `TableError` for a missing, damaged or foreign file."""
        try:
            body = parse_json(read_bounded(path))
        except OSError as error:
            raise TableError(
                f"cannot read the latency table {path}: {error}; give what LatencyTable.save wrote"
            ) from error
        except ValueError as error:
            raise TableError(f"the latency table {path} is damaged ({error}); profile again") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise TableError(f"{path} is not a latency table of lmfx; give a file that LatencyTable.save wrote")
        if body.get("version") != VERSION:
            raise TableError(f"{path} has version {body.get('version')!r}, this lmfx reads {VERSION}; profile again")
        try:
            rows = {k: Measurement(**_latency(k, v)) for k, v in body["rows"].items()}
            line = body.get("calibration")
            calibration = None if line is None else CalibrationLine(**{k: _number(v) for k, v in line.items()})
            return cls(rows, dict(body["identity"]), calibration)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TableError(f"the latency table {path} is damaged ({error}); profile again") from error

    def _repr_html_(self) -> str:
        slowest = sorted(self.rows.items(), key=lambda item: -item[1].ms)[:SHOWN]
        facts = [(k, self.identity[k]) for k in ("backend", "version", "device", "threads") if k in self.identity]
        rows = [(key, f"{m.ms:.4g}", f"{m.spread:.3g}") for key, m in slowest]
        caption = f"the slowest of {len(self)} rows"
        return html_facts("lmfx: latencies", facts) + html_table(("candidate", "ms", "spread"), rows, (1, 2), caption)

    def _where(self) -> str:
        return " on ".join(str(self.identity[k]) for k in ("backend", "device") if self.identity.get(k))


def _is_keep(key: str) -> bool:
    return key.endswith(":keep")


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """NaN, which JSON does not have, as None."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _latency(key: str, value: Any) -> dict[str, Any]:
    try:
        return dict(check_value("latency", key, value))
    except ValueError as error:
        raise ValueError(f"row {key!r} is not a latency: {error}") from error


def _number(value: Any) -> Any:
    if value is not None and not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    return math.nan if value is None else value


def kendall_tau(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Kendall's tau-b: 1 for the same order, -1 for the opposite one; NaN if one side is constant."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    i, j = np.triu_indices(a.size, 1)
    da, db = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    weight = math.sqrt(float((da != 0).sum()) * float((db != 0).sum()))
    return float((da * db).sum()) / weight if weight else math.nan
