"""`profile`: a latency for every candidate that could pay, on one backend.

    1  the kept layers                    what every candidate is compared with
    2  merged spans that may be faster    not those that would be slower even at the best throughput seen in 1

A candidate that is not faster than keeping its span can never be chosen, so it gets no row, and is never scored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import fx

from lmfx.latency import LatencyTable, Measurement, Store, Workload
from lmfx.latency.backend import Backend
from lmfx.latency.candidate_workloads import Workloads
from lmfx.passes.graph.node_facts import dtype_of, shape_of, tensor_shape
from lmfx.passes.identity.fingerprint import identify
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanSet

__all__ = ["digest", "network_facts", "profile_spans", "table_identity"]

MARGIN = 1.5  # a merged conv may reach this much more throughput than the best kept layer
SLACK = 1.1  # a quick timing may be wrong by this much


@dataclass(frozen=True)
class _Row:
    candidate: Candidate
    workloads: tuple[Workload, ...]  # one a call, or one a layer of a narrowed span, without those that cost nothing

    def of(self, measured: dict[str, Measurement], nothing: Measurement) -> Measurement:
        """The row of all its workloads together."""
        found = [measured[w.signature] for w in self.workloads]
        if len(found) < 2:
            return found[0] if found else nothing
        worst = max(found, key=lambda m: m.spread)
        return replace(worst, ms=sum(m.ms for m in found), spread=sum(m.spread for m in found))


def profile_spans(
    spans: SpanSet, backend: Backend, store: Store | None = None, progress: bool = False, rounds: int | None = None
) -> LatencyTable:
    """Measure the kept layers and every candidate that may be faster than keeping its span; ms a row.

    Rows that the store has are not measured again; each new one is committed as it is made.
    """
    make = Workloads(spans.network, spans.options.activation_after)
    keeps = [_row(make, c) for c in spans if c.realization == "keep"]
    measured = backend.measure([w for r in keeps for w in r.workloads], store, progress, rounds)
    nothing = Measurement(0.0, device=_device(backend), backend=backend.name, quality="analytic")
    rows = {r.candidate.key: r.of(measured, nothing) for r in keeps}
    identity = table_identity(spans, backend)
    kept_rows = LatencyTable(dict(rows), identity)
    best = _throughput(spans, keeps, measured)
    merged: list[_Row] = []
    limits: dict[str, float] = {}
    for candidate in spans:
        if candidate.realization == "keep":
            continue
        kept = kept_rows.kept(candidate)
        if candidate.conv is not None and _macs(spans, candidate) / (MARGIN * best) >= kept:
            continue
        merged.append(_row(make, candidate))
        for workload in merged[-1].workloads:
            limits[workload.signature] = max(limits.get(workload.signature, 0.0), kept)
    unique = {w.signature: w for r in merged for w in r.workloads}
    times = backend.measure(
        list(unique.values()), store, progress, rounds, prune=lambda key, ms: ms > SLACK * limits.get(key, float("inf"))
    )
    for row in merged:
        measurement = row.of(times, nothing)
        if measurement.ms < kept_rows.kept(row.candidate):
            rows[row.candidate.key] = measurement
    return LatencyTable(rows, identity)


def _row(make: Workloads, candidate: Candidate) -> _Row:
    return _Row(candidate, tuple(make.each(candidate)))


def table_identity(spans: SpanSet, backend: Backend) -> dict[str, Any]:
    """What the rows of a table hold for: the backend's identity, and dtype and batch of the network."""
    return {**backend.identity(), **network_facts(spans)}


def network_facts(spans: SpanSet) -> dict[str, Any]:
    """What a table holds for besides the backend: dtype, batch, the graph's digest, and the activation that a plan
    adds after merged convs, which their rows have."""
    entry = next((n for n in spans.network.nodes.values() if n.op == "placeholder" and shape_of(n)), None)
    shape = tensor_shape(entry) if entry is not None else ()
    dtype = str(dtype_of(entry)).removeprefix("torch.") if entry is not None else ""
    facts = {"dtype": dtype, "batch": shape[0] if shape else 0, "graph": digest(spans.network.gm)}
    return {**facts, "activation_after": spans.options.activation_after}


def digest(graph: fx.GraphModule) -> str:
    """A short digest of a traced graph and of its inputs' shapes: keys of another graph mean something else."""
    return identify(graph).digest


def _device(backend: Backend) -> str:
    return str(backend.identity().get("device", ""))


def _macs(spans: SpanSet, candidate: Candidate) -> float:
    config = candidate.conv
    assert config is not None
    sizes = [spans.network.shape(span.output) for span in candidate.spans]
    per_pixel = config.out_channels * (config.in_channels // config.groups) * config.taps
    return float(per_pixel * sum(prod(size[2:]) * size[0] for size in sizes))


def _throughput(spans: SpanSet, keeps: list[_Row], measured: dict[str, Measurement]) -> float:
    """The best multiply-accumulates a ms that a kept conv layer reaches (infinite if there is none)."""
    found = [
        _macs(spans, r.candidate) / measured[w.signature].ms
        for r in keeps
        for w in r.workloads
        if r.candidate.conv is not None and measured[w.signature].ms > 0
    ]
    return max(found, default=float("inf"))
