"""Measures the whole networks of random plans, and calibrates the sums of a table's rows on them.

    random importances -> the solver's plans at random latencies -> their networks, measured in turn
    whole = a + b * sum

Sums of rows miss what happens between rows. The plans come from the solver, because what it picks are the candidates
that look fast, some of them by an error of measurement; a line fitted to networks that were drawn any other way would
promise too much. Every third network is held out: it says how far a prediction is off, and moves the line by nothing.

All networks are timed beside the original, round by round, because what slows one down slows the others down as much;
and the original beside the sentinel, so that they are in the milliseconds of the rows. Short ones are run once before
they are timed, because a deployed network finds its weights where its last run left them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil, prod
from statistics import median

import numpy as np
from torch import fx

from lmfx.environment.progress import progress as progress_bar
from lmfx.importance import ImportanceTable
from lmfx.latency import Backend, LatencyTable, Store, Whole, calibrate
from lmfx.latency.backend import REFERENCE, SENTINEL
from lmfx.latency.whole_times import time_wholes
from lmfx.latency.workload import sentinel_workload
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.identity.fingerprint import identify
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.trace.tracing import example_arguments
from lmfx.planning.frontier import solve_spans
from lmfx.store.shared_rows import alone

__all__ = ["calibrate_table", "measure_wholes", "random_plans", "share_taken", "timing_form"]

PLANS = 12
HELD_OUT = 3  # every third
LEAST_ROUNDS, MOST_ROUNDS, MS_A_NETWORK = 7, 21, 500.0
LEAST = 0.2
BYTES_AT_ONCE = 2**30
KIND, ORIGINAL = "whole", "original"


def calibrate_table(
    spans: SpanSet,
    table: LatencyTable,
    backend: Backend,
    store: Store | None = None,
    progress: bool = False,
    plans: int = PLANS,
    seed: int = 0,
) -> LatencyTable:
    """The table with a `calibration` from the original network and `plans` random ones, of which every third is held
    out. Networks that the store has are not measured again. A table that nothing can be chosen from stays as it is."""
    drawn = random_plans(spans, table, plans, seed)
    if not drawn:
        return table
    chosen = [MergePlan(), *drawn]
    wholes = measure_wholes(spans, table, chosen, backend, store, progress)
    pairs = [(table.total(p), w) for p, w in zip(chosen, wholes, strict=True)]
    if min(s for s, _ in pairs) <= 0:
        return table
    fitted = [p for i, p in enumerate(pairs) if i == 0 or i % HELD_OUT]
    held = [p for i, p in enumerate(pairs) if i and not i % HELD_OUT]
    return replace(table, calibration=calibrate([s for s, _ in fitted], [w for _, w in fitted], held))


def random_plans(spans: SpanSet, table: LatencyTable, count: int, seed: int = 0) -> list[MergePlan]:
    """Plans that are best for random importances, spread evenly from the fastest (but no less than `LEAST` of the
    original's sum: nobody asks for less) to the original."""
    changing = [c for c in spans if c.realization != "keep" and c.key in table]
    if not changing:
        return []
    rng = np.random.default_rng(seed)
    targets = rng.permutation((np.arange(count) + rng.random(count)) / count)
    result = []
    for target in targets:
        cost = np.array([share_taken(c) for c in changing]) * np.exp(rng.normal(size=len(changing)))
        scores = ImportanceTable({c.key: -float(v) for c, v in zip(changing, cost, strict=True)}, {})
        frontier = solve_spans(spans, table, scores)
        sums = frontier.raw.latency
        least = max(float(sums[0]), LEAST * frontier.original_sum)
        index = int(np.abs(sums - (least + target * (frontier.original_sum - least))).argmin())
        result.append(frontier.plan(index))
    return result


def share_taken(c: Candidate) -> float:
    """Roughly how much of a network a candidate takes away."""
    share = 1 - prod(cut.width / cut.of for cut in c.cuts) if c.cuts else 1.0
    return (len(c.all_convs) + 0.5) * share


def timing_form(graph: fx.GraphModule | Analysis, plan: MergePlan) -> fx.GraphModule:
    """The merged network of a plan with arbitrary values in its new convs: all that a timing needs."""
    plain = tuple(
        replace(c, realization="fit") if c.realization == "compose" and c.conv is not None and not c.conv.upscale else c
        for c in plan.candidates
    )
    return merge(rewrite(graph, replace(plan, candidates=plain), share_tensors=True), share_tensors=True)


def measure_wholes(
    spans: SpanSet,
    table: LatencyTable,
    plans: Sequence[MergePlan],
    backend: Backend,
    store: Store | None = None,
    progress: bool = False,
) -> list[float]:
    """The latency of each plan's whole network in ms (an empty plan: the original), in the milliseconds of the rows.

    Networks that the store has are not measured again. Those of a graph that cannot be told from all others are not
    stored.
    """
    store = store if identify(spans.network.gm).certain else None
    with alone(store, KIND, table.identity):  # a process that begins at the same time waits, and finds them measured
        return _measure(spans, table, plans, backend, store, progress)


def _measure(
    spans: SpanSet,
    table: LatencyTable,
    plans: Sequence[MergePlan],
    backend: Backend,
    store: Store | None,
    progress: bool,
) -> list[float]:
    graph, identity = spans.network.gm, dict(table.identity)
    analysis = Analysis.of(spans.network)
    keys = [_key(p) for p in plans]
    known = {} if store is None else store.get_many(KIND, identity, [*keys, ORIGINAL])
    todo = [i for i, k in enumerate(keys) if k not in known and k != ORIGINAL and k not in keys[:i]]
    example = example_arguments(noted(graph).example)
    reference = None if store is None else store.get(SENTINEL, backend.identity(), REFERENCE)
    sentinel = sentinel_workload()
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, ceil(MS_A_NETWORK / max(table.total(), 1e-3))))

    def keep(key: str, ms: float) -> None:
        known[key] = ms
        if store is not None:
            store.put(KIND, identity, key, ms)

    with progress_bar(len(todo), f"whole networks ({backend.name})", progress) as bar:
        for group in _groups(todo, [_bytes(spans, p) for p in plans]) or ([] if ORIGINAL in known else [[]]):
            nets = [timing_form(analysis, plans[i]) for i in group]
            networks: list[Whole] = [sentinel, *(bare(n, example) for n in (graph, *nets))]
            slow, originals, *times = time_wholes(backend, networks, rounds)
            if ORIGINAL not in known:
                scale = [s / reference if reference else 1.0 for s in slow]
                keep(ORIGINAL, median(t / s for t, s in zip(originals, scale, strict=True)))
            for i, taken in zip(group, times, strict=True):
                ratio = median(t / o for t, o in zip(taken, originals, strict=True))
                keep(keys[i], ratio * known[ORIGINAL])
                bar.update(1)
    return [float(known[k]) for k in keys]


def _key(plan: MergePlan) -> str:
    """Names a plan's network among those of one graph: by all that changes what is built, but not by names."""
    if not plan.candidates:
        return ORIGINAL
    lines = [f"{plan.activation_after}", *(_choice(c) for c in plan.candidates)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]


def _choice(c: Candidate) -> str:
    places = [i for i, name in enumerate(c.all_convs) if name in c.kept]
    return f"{c.key} {c.conv} {places} of {len(c.all_convs)}"


def _bytes(spans: SpanSet, plan: MergePlan) -> int:
    """Roughly what a plan's network holds."""
    convs = [c.conv for c in plan.candidates if c.conv is not None]
    new = sum(c.conv_channels * (c.in_channels // c.groups) * prod(c.kernel_size) for c in convs)
    return 4 * new + sum(p.numel() * p.element_size() for p in spans.network.gm.parameters())


def _groups(items: Iterable[int], sizes: Sequence[int]) -> list[list[int]]:
    """Runs of items that are held at the same time."""
    groups: list[list[int]] = []
    held = 0
    for i in items:
        if not groups or held + sizes[i] > BYTES_AT_ONCE:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += sizes[i]
    return groups
