"""`finetune`, the importance of the paper: apply one candidate, train for a moment, see what the performance became.

    I(c) = exp( performance(train(network with c)) - performance(network) )       how it adds up: `objective`

The user gives `train(model)`, which trains a module in place (or returns another), and `evaluate(model) -> float`. Both
get an ordinary module: the trainable form of a plan with one candidate, composed spans with their kept convs, fitted
ones with a conv fitted on the calibration images.

Rows are independent jobs (`jobs`, `pool`) with the same random numbers in each: candidates are compared on the same
batches. A row depends on the network, the calibration images and the options, not on the executor or on which others
are scored, so tables are equal bit for bit however they are made. Rows are stored as they come, if `key` names the two
functions: code cannot be hashed, so without a name nothing is kept, rather than something wrong.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from lmfx.calibration.images import Calibration
from lmfx.calibration.students import Students
from lmfx.environment.caller_state import entry
from lmfx.environment.progress import progress as progress_bar
from lmfx.importance.base import ImportanceTable, stored_scores, weights_identity
from lmfx.importance.jobs import Evaluate, Job, Outcome, PackedNetwork, Train, isolated, run_job
from lmfx.importance.objective import Metric, Objective, ObjectiveName, importances
from lmfx.importance.pool import ExecutorLike, run_jobs
from lmfx.latency.profiling import digest
from lmfx.passes.errors import InputError, OptionError
from lmfx.passes.ir import Candidate, Layer, MergePlan, Surrogate
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.spans.layers import Network
from lmfx.store.rows import Store

__all__ = ["Finetune"]

VERSION = 2
ORIGINAL, TRAINED = "original", "original, trained"


@dataclass(frozen=True)
class Measured:
    """Performances by row, what they are compared with, those of kept layers by convolution, and what they hold for."""

    performances: Mapping[str, float]
    baseline: float
    layers: Mapping[str, float]
    identity: dict[str, Any]


@dataclass(frozen=True)
class Finetune:
    """Performance after `train(model)` with only one candidate applied, against that of the original.

    Args:
        train: trains a module in place; it comes in train mode with gradients everywhere. May return another module.
        evaluate: gives one number for a module in eval mode.
        metric: "accuracy" (more is better) or "loss" (less is better, compared by its relative difference).
        objective: "change" adds up changes of the performance, 0 is the network as it is; "paper" is the paper's sum
            of exponentials over all spans.
        keep: what a single layer that is kept counts: "unchanged", or "retrained" as in the published code.
        baseline: what a performance is compared with: "original" (the paper), or "trained", the original after the same
            training. Where `train` itself moves the performance, the first counts that for every candidate.
        scale: what differences of accuracies are divided by; 100 if they are in percent.
        key: a name for `train`, `evaluate` and their data, to be changed with them. Rows are stored under it, and only
            with it.
        surrogate: what composed spans start with in place of removed activations: "affine" or "identity" (the paper).
        seed: of every job.
        threads: of torch in every job; results depend on it.
        ahead: jobs handed to an executor at once, each with a network in memory; at least the number of workers.
        retries: how often a job is handed in again because its worker died.

    For an executor in other processes `train` and `evaluate` must be importable there (or be pickled by value, as Dask
    does), and draw their random numbers from the global generators, which are seeded, or from their own.
    """

    train: Train
    evaluate: Evaluate
    metric: Metric = "accuracy"
    objective: ObjectiveName = "change"
    keep: Literal["unchanged", "retrained"] = "unchanged"
    baseline: Literal["original", "trained"] = "original"
    scale: float = 1.0
    key: str | None = None
    surrogate: Surrogate = "affine"
    seed: int = 0
    threads: int = 1
    ahead: int = 16
    retries: int = 3
    name: str = field(default="finetune", init=False)

    def __post_init__(self) -> None:
        for function in ("train", "evaluate"):
            if not callable(getattr(self, function)):
                raise OptionError(
                    f"{function}={getattr(self, function)!r}: importance='finetune' needs functions train(model) and "
                    "evaluate(model) -> float"
                )
        for option, least in (("seed", 0), ("threads", 1), ("ahead", 1), ("retries", 0)):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(f"{option}={value!r}: use a whole number from {least}")
        if self.keep not in ("unchanged", "retrained"):
            raise OptionError(f"keep={self.keep!r}: use 'unchanged' or 'retrained'")
        if self.baseline not in ("original", "trained"):
            raise OptionError(f"baseline={self.baseline!r}: use 'original' or 'trained'")
        if self.surrogate not in ("affine", "identity"):
            raise OptionError(f"surrogate={self.surrogate!r}: use 'affine' or 'identity'")
        if self.key is not None and (not isinstance(self.key, str) or not self.key):
            raise OptionError(f"key={self.key!r}: use a name for train and evaluate, like 'sgd-1-epoch-v1'")
        Objective(self.metric, self.objective, self.scale)

    @entry
    def score(
        self,
        spans: SpanSet,
        candidates: Sequence[Candidate],
        calibration: Calibration | None,
        store: Store | None = None,
        progress: bool = False,
        executor: ExecutorLike = None,
    ) -> ImportanceTable:
        """See `Estimator.score`. `executor` may be a function that makes one, so that a broken pool can be replaced.

        Candidates whose performance is NaN or infinite are worse than all others: they get no row, so they cannot be
        chosen, and are named in a warning and in the table's `unusable`.
        """
        measured = self.measure(spans, candidates, calibration, store, progress, executor)
        rows = importances(
            Objective(self.metric, self.objective, self.scale),
            candidates,
            measured.performances,
            measured.baseline,
            measured.layers,
        )
        unusable = tuple(c.key for c in candidates if c.key not in rows)
        if unusable:
            warnings.warn(
                f"{len(unusable)} of {len(candidates)} candidates ended with a performance that is no finite number, "
                f"and cannot be chosen: {', '.join(unusable[:5])}{', ...' if len(unusable) > 5 else ''}. A lower "
                "learning rate in train(model) may help",
                stacklevel=2,
            )
        options = {name: getattr(self, name) for name in ("metric", "objective", "keep", "baseline", "scale")}
        whole = {**measured.identity, **options, "original": measured.performances[ORIGINAL]}
        return ImportanceTable(rows, {**whole, "graph": digest(spans.network.gm)}, unusable)

    def no_change(
        self,
        spans: SpanSet,
        candidates: Sequence[Candidate],
        calibration: Calibration | None,
        store: Store | None = None,
        executor: ExecutorLike = None,
    ) -> list[float]:
        """The importance of each candidate if it did as well as the original does after the same training.

        Costs that training, and those of the layers with keep="retrained".
        """
        kept = [replace(c, realization="keep") for c in candidates]  # nothing of their own is trained
        trained = replace(self, baseline="trained")
        measured = trained.measure(spans, kept, calibration, store, False, executor)
        baseline = measured.performances[TRAINED if self.baseline == "trained" else ORIGINAL]
        performances = {c.key: measured.performances[TRAINED] for c in candidates}
        objective = Objective(self.metric, self.objective, self.scale)
        rows = importances(objective, candidates, performances, baseline, measured.layers)
        return [rows[c.key] for c in candidates]

    def measure(
        self,
        spans: SpanSet,
        candidates: Sequence[Candidate],
        calibration: Calibration | None,
        store: Store | None,
        progress: bool,
        executor: ExecutorLike,
    ) -> Measured:
        """The performances for a table: of the original, of the candidates, and of kept layers if they count."""
        if calibration is None:
            raise InputError("importance='finetune' needs calibration images to start from: pass calibration=")
        network = spans.network
        wanted = {c.key: c for c in candidates if c.realization != "keep" and not c.exact}
        layers = kept_layers(network, candidates) if self.keep == "retrained" else {}
        whole = weights_identity(network.gm)
        identity = {
            "estimator": self.name,
            "version": VERSION,
            "key": self.key,
            "seed": self.seed,
            "threads": self.threads,
            "surrogate": self.surrogate,
            "activation_after": spans.options.activation_after,
            "prunes": spans.options.method not in ("depth", "exact"),  # else all convs of a span are composed
            "weights": whole.digest,
            "calibration": calibration.digest(),
        }
        certain = whole.certain and calibration.certain()
        kept = store if store is not None and (store.private or (self.key is not None and certain)) else None
        originals = [ORIGINAL, TRAINED] if self.baseline == "trained" else [ORIGINAL]
        keys = [*originals, *(row for row, _ in layers.values()), *wanted]
        found = stored_scores(kept, identity, keys)
        todo = [k for k in keys if k not in found]
        jobs = self.jobs(spans, todo, wanted, {row: layer for row, layer in layers.values()}, calibration)
        told = "no key=" if self.key is None else "nothing kept: the network cannot be told from all others"
        label = f"scoring ({self.name})" if kept is not None or store is None else f"scoring ({self.name}, {told})"
        with progress_bar(len(todo), label, progress and bool(todo)) as bar:
            for outcome in run_jobs(run_job, jobs, executor, name=_name, ahead=self.ahead, retries=self.retries):
                found[outcome.key] = outcome.performance
                if kept is not None:
                    kept.put("importance", identity, outcome.key, _row(outcome))
                bar.update(1)
        for row in originals:
            if not math.isfinite(found[row]):
                trained = " after train(model)" if row == TRAINED else ""
                raise InputError(
                    f"evaluate(model) gives {found[row]} for the original network{trained}: check it and its data"
                )
        return Measured(found, found[originals[-1]], {name: found[row] for name, (row, _) in layers.items()}, identity)

    def jobs(
        self,
        spans: SpanSet,
        todo: Sequence[str],
        candidates: Mapping[str, Candidate],
        layers: Mapping[str, Layer],
        calibration: Calibration,
    ) -> Iterator[Job]:
        """The jobs of the rows `todo`, each made when it is asked for."""
        network = spans.network
        students = Students(Analysis.of(network), calibration)
        for key in todo:
            with isolated(self.seed, self.threads):  # a conv that nothing sets yet draws its values
                if key in (ORIGINAL, TRAINED):
                    net = network.gm
                elif key in layers:
                    net = reset_layer(network, layers[key])
                else:
                    added = spans.options.activation_after
                    plan = MergePlan((candidates[key],), surrogate=self.surrogate, activation_after=added)
                    net = students.student(plan, share_tensors=False)
            train = None if key == ORIGINAL else self.train
            yield Job(key, PackedNetwork.of(net), train, self.evaluate, self.seed, self.threads)


def kept_layers(network: Network, candidates: Any) -> dict[str, tuple[str, Layer]]:
    """Convolution -> (key of its row, its layer), for all on the main paths of the candidates that are layers."""
    names = {name for c in candidates for name in c.convs}
    found = {}
    for series in network.series.values():
        for i, layer in enumerate(series.layers):
            if layer.conv is not None and network.path(layer.conv) in names:
                found[network.path(layer.conv)] = (f"{series.name}:{i}-{i + 1}:keep", layer)
    return found


def reset_layer(network: Network, layer: Layer) -> fx.GraphModule:
    """A copy of the network in which one layer's convolution and norms are initialised anew, as torch does it."""
    gm = copy.deepcopy(network.gm)
    for name in layer.nodes:
        node = network.nodes[name]
        module: nn.Module | None = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            with torch.no_grad():
                reset()
    return gm


def _name(job: Job) -> str:
    return job.key


def _row(outcome: Outcome) -> dict[str, Any]:
    # JSON has no NaN and no infinity.
    performance = outcome.performance if math.isfinite(outcome.performance) else str(outcome.performance)
    return {"performance": performance, "seconds": outcome.seconds}
