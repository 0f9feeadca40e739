"""What a network was made of, and what `compress` did, as it travels with the network in `net.meta`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from lmfx.budget import Budget
from lmfx.environment.caller_state import entry
from lmfx.latency import Calibration
from lmfx.passes.errors import InputError
from lmfx.passes.identity.fingerprint import Origin
from lmfx.passes.ir import MergePlan, Refusal
from lmfx.planning.frontier import Frontier
from lmfx.quality.measures import Quality

__all__ = ["MadeOf", "Result", "made_of", "result_of", "set_made_of"]

_KEY = "lmfx_made"


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
    line: Calibration | None = None
    inputs: dict[str, Any] = field(default_factory=dict)  # positional and keyword specs of the example
    # How a network from `simplify` was compared with its model.
    checked: str = field(default="", metadata={"optional": True})
    # What the network keeps of the original, on images that neither a fit nor the choice of the plan saw.
    quality: Quality | None = field(default=None, metadata={"optional": True})
    keep: float | None = field(default=None, metadata={"optional": True})  # the share that had to be kept
    # Not saved with the network:
    frontier: Frontier | None = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without the frontier, which holds the whole traced network."""
        values = [getattr(self, name) for name in self.__dataclass_fields__]
        return type(self), (*values[:-1], None)


@dataclass(frozen=True)
class MadeOf:
    """What a network was made of: a plan and the graph that it was made for; by `compress`, with a result."""

    plan: MergePlan
    origin: Origin | None  # None of a network that an older lmfx saved
    result: Result | None = None


def made_of(net: Any) -> MadeOf | None:
    """What a network was made of; None of one that no plan made."""
    found = getattr(net, "meta", {}).get(_KEY) if isinstance(net, nn.Module) else None
    return found if isinstance(found, MadeOf) else None


def set_made_of(net: fx.GraphModule, made: MadeOf | None) -> None:
    """Says what a network was made of, or that no plan made it."""
    if made is None:
        net.meta.pop(_KEY, None)
    else:
        net.meta[_KEY] = made


@entry
def result_of(net: fx.GraphModule) -> Result:
    """The result that travels with a network from `compress` or `load`; `InputError` for any other module."""
    made = made_of(net)
    if made is None or made.result is None:
        raise InputError(
            f"this {type(net).__name__} carries no result of lmfx: pass what lmfx.compress or lmfx.load returned"
        )
    return made.result
