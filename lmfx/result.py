"""What `compress` did, as it travels with the network: `result_of(net)`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from lmfx.budget import Budget
from lmfx.environment.caller_state import entry
from lmfx.environment.effort import Effort
from lmfx.int8.report import Int8Facts
from lmfx.latency import CalibrationLine
from lmfx.made_of import made_of
from lmfx.passes.errors import InputError
from lmfx.passes.html_text import html_facts, plain_facts
from lmfx.passes.ir import MergePlan, Refusal
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.planning.frontier import Frontier
from lmfx.quality.measures import Alternative, Quality

__all__ = ["Alternative", "Evidence", "Result", "ShapeTime", "result_of"]


@dataclass(frozen=True)
class Evidence:
    """What a page shows of how a result came about; it travels with the network in memory, and no file holds it.

    `errors` are those at the end of each span of the plan, on images that no fit saw (`lmfx.quality.span_errors`), None
    where none was measured. `measured` are (predicted, measured) ms of the networks that the search for the budget
    built. `model` is the name of the model's class, `parameters` those of the original and of the result.
    """

    spans: SpanSet
    model: str
    parameters: tuple[int, int]
    errors: tuple[float | None, ...] = ()
    measured: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class ShapeTime:
    """The latencies in ms at one of several shapes, of the original and of the network, measured side by side."""

    shape: str
    weight: float
    original: float
    measured: float
    ratio: float


@dataclass(frozen=True)
class Result:
    """One compression. Latencies are of whole networks on `backend`, in ms; `ratio` is measured over the original's,
    taken side by side. With a table that was measured elsewhere `measured` and `ratio` are None, and `predicted` and
    `original` come from that table. `names` are the module names of the plan's spans, in the plan's order (a drop has
    none)."""

    plan: MergePlan
    budget: Budget | None  # None: what `keep` allows, or only what loses nothing (`simplify`)
    merged: bool  # the deploy form, or the trainable one
    backend: dict[str, Any]
    names: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    kept: tuple[str, ...] = ()  # qualified names of the convs that stay as they are
    candidates: int = 0
    images: int | None = None  # calibration images that the scores and fits saw
    predicted: float | None = None
    measured: float | None = None
    original: float | None = None
    ratio: float | None = None
    line: CalibrationLine | None = None
    inputs: dict[str, Any] = field(default_factory=dict)  # positional and keyword specs of the example
    # How a network from `simplify` was compared with its model.
    checked: str = field(default="", metadata={"optional": True})
    # What the network keeps of the original, on calibration images that were held out.
    quality: Quality | None = field(default=None, metadata={"optional": True})
    keep: float | None = field(default=None, metadata={"optional": True})  # the share that had to be kept
    # With input_sizes=: (height, width) that this network is for, and what else was made and judged.
    input_size: tuple[int, ...] = field(default=(), metadata={"optional": True})
    alternatives: tuple[Alternative, ...] = field(default=(), metadata={"optional": True})
    # With example_input=[...], a list of shapes: the latency at each of them.
    shapes: tuple[ShapeTime, ...] = field(default=(), metadata={"optional": True})
    # Not saved with the network:
    int8: Int8Facts | None = field(default=None, compare=False, repr=False)  # of a network in 8 bits
    effort: Effort | None = field(default=None, compare=False, repr=False)
    evidence: Evidence | None = field(default=None, compare=False, repr=False)
    frontier: Frontier | None = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without the frontier and the evidence, which hold the whole traced network."""
        values = [getattr(self, name) for name in self.__dataclass_fields__]
        return type(self), (*values[:-2], None, None)

    def __str__(self) -> str:
        return plain_facts("lmfx: a compressed network", self._facts())

    def _repr_html_(self) -> str:
        return html_facts("lmfx: a compressed network", self._facts())

    def _facts(self) -> list[tuple[str, object]]:
        facts: list[tuple[str, object]] = [("budget", "none" if self.budget is None else self.budget)]
        if self.ratio and self.measured is not None and self.original is not None:
            latency = f"{self.original:.4g} ms before, {self.measured:.4g} ms after"
            facts.append(("latency", f"{latency} ({self.ratio:.1%}, {1 / self.ratio:.2f}x as fast)"))
        elif self.predicted is not None and self.original:
            facts.append(("latency", f"{self.original:.4g} ms before, {self.predicted:.4g} ms after, as predicted"))
        if self.quality is not None:
            facts.append(("quality", f"{self.quality}, on {self.quality.images} images"))
        facts.append(("changed", ", ".join(f"{n} {way}" for way, n in self.plan.ways.items() if n) or "nothing"))
        return [*facts, ("kept", f"{len(self.kept)} convs"), ("refused", f"{len(self.refusals)} times")]


@entry
def result_of(net: fx.GraphModule) -> Result:
    """The result that travels with a network from `compress` or `load`; `InputError` for any other module."""
    made = made_of(net)
    if made is None or made.result is None:
        raise InputError(
            f"this {type(net).__name__} carries no result of lmfx: pass what lmfx.compress or lmfx.load returned"
        )
    return made.result
