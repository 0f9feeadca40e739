"""Importance: how much each candidate costs in output quality."""

from __future__ import annotations

from typing import Any

from lmfx.importance.base import Estimator, ImportanceTable, Scored
from lmfx.importance.finetune import Finetune
from lmfx.importance.magnitude import Magnitude
from lmfx.importance.reconstruction import Reconstruction
from lmfx.passes.errors import OptionError

__all__ = ["ESTIMATORS", "Estimator", "Finetune", "ImportanceTable", "Magnitude", "Reconstruction", "get_estimator"]

ESTIMATORS: dict[str, type[Any]] = {
    "reconstruction": Reconstruction,
    "magnitude": Magnitude,
    "finetune": Finetune,
}


def get_estimator(estimator: str | Estimator | ImportanceTable = "reconstruction", **options: Any) -> Estimator:
    """An estimator by its name with its options; an estimator object is returned as it is, a table gives its own rows.

    Raises `OptionError` for a name or an option that is not known.
    """
    if isinstance(estimator, type):
        raise OptionError(f"the estimator is the class {estimator.__name__}: pass an object, {estimator.__name__}()")
    if isinstance(estimator, ImportanceTable):
        return Scored(estimator)
    if not isinstance(estimator, str):
        if not isinstance(estimator, Estimator):
            raise OptionError(
                f"an importance estimator is one of {', '.join(ESTIMATORS)} or an object with name and score; "
                f"a {type(estimator).__name__} is not"
            )
        return estimator
    if estimator not in ESTIMATORS:
        raise OptionError(f"unknown importance estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    try:
        made: Estimator = ESTIMATORS[estimator](**options)
    except TypeError as error:
        raise OptionError(f"importance={estimator!r}: {error}") from error
    return made
