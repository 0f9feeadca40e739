"""How a network is made faster: by lmfx, and by what else one would do at the same measured latency.

    lmfx             `lmfx.compress(model, example, budget, calibration=...)`, its defaults
    smaller input    the original on smaller images, where it takes them: the largest size within the budget
    torch-pruning    channels pruned by the best of three importances (`pruned`)
    uniform          whole layers dropped, as few as possible, each counting the same; nothing is merged or fitted

Each is followed, on request, by the same recovery without labels (`X+recover`): `lmfx.recover` for so many minutes of
wall clock (on a busy machine give steps) on the calibration images and more of their kind. For a smaller input the
student scales the images itself, and its teacher sees them whole. A module, not a script.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

import lmfx
from benchmarks.real.exported import draft, latencies
from benchmarks.real.pruned import Missed, best_pruned
from benchmarks.real.subjects import Subject
from lmfx.importance import ImportanceTable
from lmfx.latency.profiling import digest
from lmfx.passes.ir import Realization

__all__ = ["RECOVERED", "VARIANTS", "Made", "Work", "make", "uses_planning"]

RECOVERED = "+recover"
EVERY: tuple[Realization, ...] = ("compose", "fit", "narrow", "factor")


@dataclass(frozen=True)
class Made:
    """A network that is ready to be exported; `trainable` is what recovery trains, `facts` go into the row."""

    net: nn.Module
    example: Tensor
    facts: dict[str, Any] = field(default_factory=dict)
    trainable: nn.Module | None = None


@dataclass
class Work:
    """One network, and what its variants share."""

    subject: Subject
    folder: Path
    minutes: float = 3.0
    steps: int = 0  # of recovery, in place of minutes
    options: dict[str, Any] = field(default_factory=dict)  # of lmfx.compress
    widths: dict[tuple[int, ...], float] = field(default_factory=dict)  # measured ratios of pruned networks
    last: tuple[str, float, Made] | None = None  # what was made last without recovery: recovery goes on from it

    @cached_property
    def model(self) -> nn.Module:
        return self.subject.model()

    @cached_property
    def calibration(self) -> Tensor:
        return self.subject.images("cal", self.subject.calibration, self.subject.size)

    @cached_property
    def ratios(self) -> dict[int, float]:
        """Measured ratio of every smaller size."""
        sizes = self.subject.smaller
        whole = draft(self.model, self.subject.example)
        files = [draft(self.model, self.subject.images("cal", 1, size)) for size in sizes]
        return {s: t.ratio for s, t in zip(sizes, latencies(whole, files, 7), strict=True)}


class _Scaled(nn.Module):
    """The network on images that are made smaller first: what recovery trains."""

    def __init__(self, net: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.net, self.shape = net, tuple(shape)

    def forward(self, x: Tensor) -> Any:
        return self.net(nn.functional.interpolate(x, size=self.shape, mode="bilinear", antialias=True))


def lmfx_itself(work: Work, budget: float, realize: tuple[Realization, ...] = EVERY) -> Made:
    """What `lmfx.compress` gives with some realizations; by default all, as is its own."""
    student = _compressed(work, budget, calibration=work.calibration, realize=realize)
    found = lmfx.result_of(student)
    assert found.quality is not None
    facts = {"reported": found.ratio, "spans": len(found.plan.candidates), "kept": found.quality.kept}
    return Made(lmfx.merge(student), work.subject.example, facts, student)


def lmfx_sizes(work: Work, budget: float) -> Made:
    """The same with smaller inputs as well, those that suit the network.

    Raises `Missed` where the network takes no others.
    """
    if not work.subject.smaller:
        raise Missed(1.0)
    student = _compressed(work, budget, calibration=work.calibration, input_sizes="auto")
    found = lmfx.result_of(student)
    example = work.subject.images("cal", 1, found.input_size[0])
    assert found.quality is not None
    facts = {"reported": found.ratio, "size": found.input_size[0], "kept": found.quality.kept}
    return Made(lmfx.merge(student), example, facts, _Scaled(student, example.shape[2:]))


def _compressed(work: Work, budget: float, **options: Any) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmfx.QualityWarning)  # the table says what is left
        return lmfx.compress(
            work.model,
            work.subject.example,
            budget,
            cache_dir=work.folder / "cache",
            merge=False,
            progress=False,
            **options,
            **work.options,
        )


def smaller_input(work: Work, budget: float) -> Made:
    """The original at the largest size whose ratio is within the budget. Raises `Missed` where there is none."""
    if not work.subject.smaller:
        raise Missed(1.0)
    fitting = [size for size, ratio in work.ratios.items() if ratio <= budget]
    if not fitting:
        raise Missed(min(work.ratios.values()))
    size = max(fitting)
    example = work.subject.images("cal", 1, size)
    return Made(work.model, example, {"size": size}, _Scaled(work.subject.model(), example.shape[2:]))


def torch_pruning(work: Work, budget: float) -> Made:
    """See `pruned.best_pruned`."""
    net, facts = best_pruned(work.subject, work.model, budget, work.widths)
    return Made(net, work.subject.example, facts, net)


@dataclass(frozen=True)
class _Equal:
    """An importance that counts layers: minus how many convs a candidate drops."""

    name: str = "equal"

    def score(self, spans: Any, candidates: Sequence[Any], *_: Any, **__: Any) -> ImportanceTable:
        rows = {c.key: -float(len(set(c.all_convs) - set(c.kept))) for c in candidates}
        rows |= {c.key: 0.0 for c in candidates if c.realization == "keep"}
        return ImportanceTable(rows, {"estimator": self.name, "graph": digest(spans.network.gm)})


def uniform(work: Work, budget: float) -> Made:
    """As few layers dropped as the budget allows. Raises `Missed` where too few may go."""
    try:
        student = _compressed(
            work,
            budget,
            calibration=work.calibration[:16],
            importance=_Equal(),
            method="layeronly",
            realize=("compose",),
            surrogate="identity",
            quality=None,
            refit=False,
        )
    except lmfx.InfeasibleBudget as error:
        raise Missed(error.latency / error.original) from error
    facts = {"reported": lmfx.result_of(student).ratio}
    return Made(lmfx.merge(student), work.subject.example, facts, student)


VARIANTS: dict[str, Callable[[Work, float], Made]] = {
    "lmfx": lmfx_itself,
    "lmfx depth": partial(lmfx_itself, realize=("compose", "fit")),
    "lmfx sizes": lmfx_sizes,
    "lmfx no factors": partial(lmfx_itself, realize=("compose", "fit", "narrow")),
    "lmfx factors": partial(lmfx_itself, realize=("factor",)),
    "lmfx width": partial(lmfx_itself, realize=("narrow",)),
    "smaller input": smaller_input,
    "torch-pruning": torch_pruning,
    "uniform": uniform,
}


def uses_planning(variant: str) -> bool:
    """Whether a newer lmfx makes another network of it; the other rows stay."""
    return variant.startswith("lmfx")


def make(work: Work, variant: str, budget: float) -> Made:
    """A variant, recovered if its name says so. Raises `Missed`, or an `LmfxError`."""
    plain = variant.removesuffix(RECOVERED)
    if work.last is None or work.last[:2] != (plain, budget) or plain == variant:
        work.last = plain, budget, VARIANTS[plain](work, budget)
    made = work.last[2]
    if plain == variant:
        return made
    work.last = None  # it is trained in place
    subject = work.subject
    images = subject.images("cal", subject.recovery, subject.size)
    assert made.trainable is not None
    student = (
        made.trainable if isinstance(made.trainable, fx.GraphModule) else lmfx.trace(made.trainable.eval(), images[:1])
    )
    spent: dict[str, Any] = {"steps": work.steps} if work.steps else {"minutes": work.minutes}
    start = time.process_time()
    trained = lmfx.recover(student, work.model, images, progress=False, **spent)
    facts = {**made.facts, **spent, "recovery_seconds": round(time.process_time() - start, 1)}
    if not isinstance(made.trainable, _Scaled):
        return replace(made, net=lmfx.merge(trained), facts=facts)
    net = made.trainable.net  # what is exported takes the small images
    net.load_state_dict({k.removeprefix("net."): v for k, v in trained.state_dict().items()})
    return replace(made, net=net.eval(), facts=facts)
