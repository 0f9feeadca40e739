"""What latencies come from, by what the caller says: a backend by its name or as an object, or a table; and in which
precision. One door for "fp32", "fp16", "bf16" and "int8": the backend runs networks in it, and says so in its identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmfx.latency import Backend, LatencyTable, get_backend
from lmfx.passes.errors import OptionError

__all__ = ["PRECISIONS", "chosen_backend", "identity_of", "precision_of"]

PRECISIONS = ("fp32", "fp16", "bf16", "int8")


def chosen_backend(
    latency: str | Backend | LatencyTable | None, default: str, precision: str | None = None
) -> Backend | LatencyTable:
    """The backend or table that is asked for, at the precision; None takes what a backend object or table has.

    Raises `OptionError` where they do not go together.
    """
    if precision is not None and precision not in PRECISIONS:
        raise OptionError(f"precision={precision!r}: use one of {', '.join(map(repr, PRECISIONS))}")
    if latency is None or isinstance(latency, str):
        options: dict[str, Any] = {} if precision in (None, "fp32") else {"precision": precision}
        return get_backend(default if latency is None else latency, **options)
    source = latency if isinstance(latency, LatencyTable) else get_backend(latency)
    if precision is not None and precision_of(source) != precision:
        name = "table" if isinstance(source, LatencyTable) else f"backend {source.name!r}"
        raise OptionError(
            f"precision={precision!r}, and the {name} measures in {precision_of(source)}: leave one out, or make it "
            f"with get_backend(name, precision={precision!r})"
        )
    return source


def precision_of(source: Backend | LatencyTable) -> str:
    """The precision in which a backend or the one behind a table runs networks."""
    return str(identity_of(source).get("precision", "fp32"))


def identity_of(source: Backend | LatencyTable) -> Mapping[str, Any]:
    """What latencies of a backend or table hold for."""
    return source.identity if isinstance(source, LatencyTable) else source.identity()
