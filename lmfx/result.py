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
from lmfx.passes.ir import MergePlan, Refusal
from lmfx.planning.frontier import Frontier
from lmfx.quality.measures import Quality

__all__ = ["Alternative", "Result", "result_of"]


@dataclass(frozen=True)
class Alternative:
    """Another way to be as fast: what it is, its share of the original's latency, and what it keeps."""

    what: str
    ratio: float
    quality: Quality


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
    # Not saved with the network:
    int8: Int8Facts | None = field(default=None, compare=False, repr=False)  # of a network in 8 bits
    effort: Effort | None = field(default=None, compare=False, repr=False)
    frontier: Frontier | None = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without the frontier, which holds the whole traced network."""
        values = [getattr(self, name) for name in self.__dataclass_fields__]
        return type(self), (*values[:-1], None)


@entry
def result_of(net: fx.GraphModule) -> Result:
    """The result that travels with a network from `compress` or `load`; `InputError` for any other module."""
    made = made_of(net)
    if made is None or made.result is None:
        raise InputError(
            f"this {type(net).__name__} carries no result of lmfx: pass what lmfx.compress or lmfx.load returned"
        )
    return made.result
