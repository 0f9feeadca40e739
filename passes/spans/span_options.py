"""Says which spans and realizations are enumerated, and refuses options that contradict each other.

`method` narrows this down to what the published baselines consider, with the same tables and the same solver:

layermerge   all of the above                                              (Kim et al., ICML 2024)
depth        activations are removed, every conv of a span is composed     (Kim et al., ICML 2023)
layeronly    convs are removed one by one, nothing is merged: the drops of single layers, whose activation stays
exact        nothing is removed: the composed convs that are the same function as their span (`exact`)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import OptionError
from ..graph.ops import activation_of
from ..ir import Realization

__all__ = ["Method", "Norm", "SpanOptions"]

Method = Literal["layermerge", "depth", "layeronly", "exact"]
Norm = Literal["affine", "post"]
# What each method may realize, and which realizations of a caller's say that the method was misunderstood.
_METHODS: dict[str, frozenset[str]] = {
    "layermerge": frozenset(get_args(Realization)),
    "depth": frozenset({"compose"}),
    "layeronly": frozenset({"drop"}),
    "exact": frozenset({"compose"}),
}


@dataclass(frozen=True)
class SpanOptions:
    """What may be enumerated."""

    realize: tuple[Realization, ...] = ("compose", "fit")
    max_kernel_size: int | None = 7  # None: unbounded for compose, 7 for fit
    max_span_convs: int | None = None  # a span may hold at most this many convs of the main path
    max_fit_convs: int | None = 12  # the same for spans that are fitted
    max_fit_unknowns: int | None = 5000  # input channels times taps of a fit; more ask for more data than is usual
    include: tuple[str, ...] = ()  # module name globs (`globs`); empty means everything
    exclude: tuple[str, ...] = ()
    method: Method = "layermerge"
    norm: Norm = "affine"  # what becomes of a norm inside a composed span whose statistics come from the map
    activation_after: str | None = None  # after a merged conv whose span ended without an activation

    def __post_init__(self) -> None:
        unknown = set(self.realize) - set(get_args(Realization))
        if unknown:
            known = ", ".join(map(repr, get_args(Realization)[1:]))
            raise OptionError(f"realize={self.realize!r} has {sorted(unknown)}; use some of {known}")
        for name, values in (("method", tuple(_METHODS)), ("norm", ("affine", "post"))):
            if getattr(self, name) not in values:
                raise OptionError(f"{name}={getattr(self, name)!r}: use one of {', '.join(map(repr, values))}")
        self._check_method()
        if self.activation_after is not None:
            activation_of(self.activation_after)
        if self.max_kernel_size is not None and (
            not isinstance(self.max_kernel_size, int)
            or isinstance(self.max_kernel_size, bool)
            or self.max_kernel_size < 1
        ):
            raise OptionError(f"max_kernel_size={self.max_kernel_size!r}: use a whole number from 1, or None")
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise OptionError(f"{name}={getattr(self, name)!r}: pass a tuple of globs, like ({name!r},)")

    def _check_method(self) -> None:
        if self.method in ("depth", "exact") and "compose" not in self.realize:
            raise OptionError(
                f"method={self.method!r} composes all convs of a span, and realize={self.realize!r} has no 'compose': "
                "leave realize out, or use method='layermerge'"
            )
        if self.method == "layeronly" and not {"compose", "drop"} & set(self.realize):
            raise OptionError(
                f"method='layeronly' removes convs and merges nothing, and realize={self.realize!r} asks for something "
                "else: leave realize out, or use method='layermerge'"
            )
        if self.method == "layeronly" and (self.norm != "affine" or self.activation_after is not None):
            raise OptionError(
                "method='layeronly' merges nothing, so norm= and activation_after= say nothing: leave them out"
            )

    @property
    def allowed(self) -> frozenset[str]:
        """The realizations that are enumerated: what `realize` asks for, as far as the method has it."""
        if self.method == "layermerge":
            drop = {"drop"} if {"fit", "compose"} & set(self.realize) else set()
            return frozenset(self.realize) | drop
        return _METHODS[self.method]
