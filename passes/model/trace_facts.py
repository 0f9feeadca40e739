"""Keeps what tracing knows of a graph with it: `noted(graph)`, one frozen record in `graph.meta`.

A network that is made of a graph keeps what is still so of it (`of_result`): by which tracer it came, what is opaque in
it and at which sizes it is right. What the example was, only a compiler needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

__all__ = ["SizeKind", "SizeState", "TraceFacts", "note", "noted"]

_KEY = "lmfx"
SizeKind = Literal["batch", "size"]  # the number of images, and their size
# Right at others than the example's; only there, and refused elsewhere; the model itself takes no others; it has none.
SizeState = Literal["any", "fixed", "refused", "none"]


@dataclass(frozen=True)
class TraceFacts:
    """What tracing knows. The defaults are those of a graph that no tracer of ours made.

    Attributes:
        tracer: the name of the tracer.
        opaque: module path -> why the tracer could not follow it.
        volatile: paths of attributes that change while the network runs.
        positional, keyword: what the example's arguments are: shape and dtype of tensors, constants as they are.
        sizes: of "batch" and "size", at which others than the example's the graph is right.
        example: the example itself, where a stage of lmfx asked for the trace.
    """

    tracer: str = "symbolic"
    opaque: Mapping[str, str] = field(default_factory=dict)
    volatile: tuple[str, ...] = ()
    positional: Sequence[Any] = ()
    keyword: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[SizeKind, SizeState] = field(default_factory=dict)
    example: Any = None

    @property
    def inputs(self) -> dict[str, Any]:
        """What the example's arguments are, as results and saved networks have it."""
        return {"positional": list(self.positional), "keyword": dict(self.keyword)}

    @property
    def specs(self) -> list[Any]:
        """What the example's arguments are, positional ones first."""
        return [*self.positional, *self.keyword.values()]

    @property
    def any_batch(self) -> bool:
        """Whether nothing is known that keeps the graph from other batch sizes."""
        return self.sizes.get("batch", "any") in ("any", "none")

    def fixes(self, *kinds: SizeKind) -> bool:
        """Whether the graph is right only at the example's batch or image size."""
        return any(self.sizes.get(kind) == "fixed" for kind in kinds)

    def __getitem__(self, name: str) -> Any:
        """A fact by its name: `graph.meta["lmfx"]["tracer"]` of programs from when the facts were a dict."""
        if name.startswith("_") or not hasattr(self, name):
            raise KeyError(f"{name}: a graph's facts have no such name; of results, ask lmfx.result_of(net)")
        return getattr(self, name)

    def of_result(self) -> TraceFacts:
        """What is still so of a network that was made of the graph."""
        return TraceFacts(tracer=self.tracer, opaque=self.opaque, sizes=self.sizes)

    def __deepcopy__(self, memo: dict[int, Any]) -> TraceFacts:
        return self  # nothing of it is ever changed


def noted(gm: fx.GraphModule) -> TraceFacts:
    """What tracing noted of a graph, or that nothing is known."""
    found = gm.meta.get(_KEY)
    return found if isinstance(found, TraceFacts) else TraceFacts()


def note(gm: fx.GraphModule, facts: TraceFacts | None) -> None:
    """Keeps these facts with a graph, or None."""
    if facts is None:
        gm.meta.pop(_KEY, None)
    else:
        gm.meta[_KEY] = facts
