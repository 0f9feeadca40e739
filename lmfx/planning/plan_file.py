"""Writes a MergePlan as JSON, and reads it strictly.

    {"format": "lmfx-plan", "version": 1, "lmfx": "0.1.0", "torch": "2.14.1",
     "plan": {"candidates": [...], "fingerprint": "...", ...},
     "save": {...}}                                           what a saved folder has besides (saved_files.py)

The dataclasses are the schema: every field must be there with its type, and no other field may be. JSON has no NaN, so
numbers that are not finite are written as "nan", "inf" and "-inf".
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any

import torch

from lmfx._version import __version__
from lmfx.environment.atomic_files import atomic_write
from lmfx.environment.bounded_reading import parse_json, read_bounded
from lmfx.environment.caller_state import entry
from lmfx.passes.errors import LmfxError, PlanError
from lmfx.passes.ir import Candidate, ConvConfig, Cut, MergePlan

__all__ = [
    "decode",
    "encode",
    "load_plan",
    "make_document",
    "parse_document",
    "plan_from_dict",
    "save_plan",
]

FORMAT = "lmfx-plan"
VERSION = 1
_NOT_FINITE = ("nan", "inf", "-inf")
_MOST_FILTERS = 64  # a channel
_LARGEST = 2**30  # of any size in a plan, and of the values of one conv (4 GB)
_RETIRED: dict[type[Any], frozenset[str]] = {MergePlan: frozenset({"notes"})}  # fields that older files have


class _Damage(ValueError):
    """Where a document is not what it should be."""


# --- dataclasses and plain values -------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """A value made of frozen dataclasses, tuples and plain types, as JSON has it. `PlanError` for anything else.

    Fields with `repr=False` are what only the running process needs; they are left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise PlanError(f"a {type(value).__name__} cannot be written to plan.json: use numbers, strings, lists and dicts")


def decode(hint: Any, value: Any, where: str) -> Any:
    """The value of type `hint` that `encode` wrote. Raises `ValueError` with the place for anything else."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        if value not in arguments:
            raise _Damage(f"{where} is {value!r}, not one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else decode(next(a for a in arguments if a is not types.NoneType), value, where)
    if origin is tuple:
        _expect(isinstance(value, list), "a list", value, where)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        _expect(len(kinds) == len(value), f"a list of {len(kinds)}", value, where)
        return tuple(decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, where)
        return {k: decode(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _decode_fields(typing.cast(type[Any], hint), value, where)
    if hint is float:
        if isinstance(value, str) and value in _NOT_FINITE:
            return float(value)
        _expect(isinstance(value, (int, float)) and not isinstance(value, bool), "a number", value, where)
        return float(value)
    _expect(type(value) is hint, f"of type {hint.__name__}", value, where)
    return value


def _decode_fields(kind: type[Any], value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, where)
    names = [f.name for f in dataclasses.fields(kind) if f.repr]
    late = {f.name for f in dataclasses.fields(kind) if f.metadata.get("optional")}  # older files do not have them
    names = [n for n in names if n in value or n not in late]
    if missing := [n for n in names if n not in value]:
        raise _Damage(f"{where} lacks {', '.join(missing)}")
    if unknown := [n for n in value if n not in names and n not in _RETIRED.get(kind, ())]:
        raise _Damage(f"{where} has the unknown {', '.join(unknown)}")
    hints = typing.get_type_hints(kind)
    fields = {n: decode(hints[n], value[n], f"{where}.{n}") for n in names}
    try:
        return kind(**fields)
    except LmfxError as error:
        raise _Damage(f"{where}: {error}") from error


def _expect(holds: bool, what: str, value: Any, where: str) -> None:
    if not holds:
        raise _Damage(f"{where} is not {what} but {str(value)[:60]!r}")


# --- plans ------------------------------------------------------------------------------------------------------------


def plan_from_dict(document: Any, source: str = "the plan") -> MergePlan:
    """The plan of a document. Raises `PlanError` that names `source`, what was seen and what to do."""
    return parse_document(document, source)[0]


def make_document(plan: MergePlan, save: dict[str, Any] | None = None) -> dict[str, Any]:
    """A document with a plan and, for a saved folder, what the folder holds besides."""
    document: dict[str, Any] = {"format": FORMAT, "version": VERSION, "lmfx": __version__, "torch": torch.__version__}
    document["plan"] = encode(plan)
    if save is not None:
        document["save"] = save
    return document


def parse_document(document: Any, source: str) -> tuple[MergePlan, dict[str, Any] | None]:
    """(plan, what a saved folder holds besides or None). Raises `PlanError`."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        seen = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise PlanError(f"{source} is not a plan of lmfx (format {seen!r}): give what lmfx.save wrote")
    version = document.get("version")
    if version != VERSION or isinstance(version, bool):
        raise PlanError(
            f"{source} has version {version!r} (written by lmfx {document.get('lmfx')!r}), this lmfx {__version__} "
            f"reads version {VERSION}: use the lmfx that wrote it, or compress again"
        )
    try:
        plan: MergePlan = decode(MergePlan, document.get("plan"), "plan")
        for i, candidate in enumerate(plan.candidates):
            _check_candidate(candidate, f"plan.candidates[{i}]")
        save = document.get("save")
        _expect(save is None or isinstance(save, dict), "an object", save, "save")
    except ValueError as error:
        raise damaged(source, error) from error
    return plan, save


def damaged(source: str, why: object) -> PlanError:
    """The error for a file that is an lmfx one, and is not whole."""
    return PlanError(f"{source} is damaged ({why}): restore it from a copy, or compress again")


def _check_candidate(candidate: Candidate, where: str) -> None:
    conv = candidate.conv
    for span in candidate.spans:
        if not 0 <= span.start < span.stop <= _LARGEST:
            raise _Damage(f"{where}.span runs from {span.start} to {span.stop}")
    if (candidate.realization == "narrow") != bool(candidate.cuts):
        raise _Damage(f"{where} is {candidate.realization!r} with {len(candidate.cuts)} cuts")
    for i, cut in enumerate(candidate.cuts):
        _check_cut(cut, f"{where}.cuts[{i}]")
    filters, rank = (conv.multiplier, conv.rank) if conv is not None else (0, 0)
    if (candidate.realization == "factor") != bool(filters or rank) or (filters and rank):
        told = f"{filters} depthwise filters for each channel and a rank of {rank}"
        raise _Damage(f"{where} is {candidate.realization!r} with {told}")
    if candidate.puts_conv and conv is None:
        raise _Damage(f"{where} is {candidate.realization!r} without a conv")
    if conv is not None:
        _check_conv(conv, f"{where}.conv")


def _check_cut(cut: Cut, where: str) -> None:
    if not 0 < cut.width <= cut.of <= _LARGEST:
        raise _Damage(f"{where} keeps {cut.width} of {cut.of} channels")
    ordered = list(cut.channels) == sorted(set(cut.channels))
    if cut.channels and (len(cut.channels) != cut.width or not ordered or not cut.channels[0] >= 0):
        raise _Damage(f"{where} does not name {cut.width} channels in order")
    if cut.channels and cut.channels[-1] >= cut.of:
        raise _Damage(f"{where} keeps channel {cut.channels[-1]} of {cut.of}")


def _check_conv(conv: ConvConfig, where: str) -> None:
    ndim = len(conv.kernel_size)
    if ndim > 3 or any(len(v) != ndim for v in (conv.stride, conv.padding, conv.dilation)):
        raise _Damage(f"{where} has a kernel of {ndim} dimensions, and other numbers of strides, pads or dilations")
    ways = (conv.upscale, conv.cut, conv.window)
    if any(len(v) not in (0, ndim) for v in ways) or bool(conv.upscale) != bool(conv.cut):
        raise _Damage(f"{where} enlarges its map in other dimensions than it has")
    if conv.window and not conv.upscale:
        raise _Damage(f"{where} is a transposed conv that does not enlarge its map")
    rows = (v for row in conv.window for v in (row[0], row[1], row[2] + 1))
    if min((*conv.upscale, *(c + 1 for c in conv.cut), *rows), default=1) < 1:
        raise _Damage(f"{where} enlarges its map by a size below 1")
    least = (conv.in_channels, conv.out_channels, conv.groups, *conv.kernel_size, *conv.stride, *conv.dilation)
    pads = [p for pair in conv.padding for p in pair]
    if min(least) < 1:
        raise _Damage(f"{where} has a size below 1")
    if not 0 <= conv.multiplier <= _MOST_FILTERS or (conv.multiplier and (conv.groups > 1 or conv.upscale)):
        raise _Damage(f"{where} has {conv.multiplier} depthwise filters for each of its channels")
    if not 0 <= conv.rank <= conv.out_channels or (conv.rank and (conv.groups > 1 or conv.upscale)):
        raise _Damage(f"{where} goes through {conv.rank} channels to {conv.out_channels}")
    if conv.padding_mode != "zeros" and min(pads, default=0) < 0:
        raise _Damage(f"{where} has a negative padding that is filled from the map ({conv.padding_mode})")
    values = conv.conv_channels * conv.in_channels // conv.groups * math.prod(conv.kernel_size)
    if max(*least, *map(abs, pads), *conv.upscale, *conv.cut, *map(max, conv.window), values) > _LARGEST:
        raise _Damage(
            f"{where} has {conv.out_channels} x {conv.in_channels} channels and a kernel of {conv.kernel_size}, "
            "more than any conv has"
        )
    if conv.in_channels % conv.groups or conv.conv_channels % conv.groups:
        raise _Damage(f"{where} has {conv.groups} groups for {conv.in_channels} and {conv.out_channels} channels")


# --- files ------------------------------------------------------------------------------------------------------------


@entry
def save_plan(plan: MergePlan, path: str | os.PathLike[str]) -> Path:
    """Write a plan as JSON; the file is complete or as it was before. Raises `PlanError` if it cannot be written."""
    try:
        return atomic_write(path, document_text(make_document(plan)).encode())
    except OSError as error:
        raise PlanError(f"cannot write the plan {path}: {error}; give another file") from error


@entry
def load_plan(path: str | os.PathLike[str]) -> MergePlan:
    """The plan that `save_plan` (or `lmfx.save`, in its plan.json) wrote. Raises `PlanError` for any other file."""
    return plan_from_dict(read_json(Path(path)), str(path))


def document_text(document: dict[str, Any]) -> str:
    """JSON for people: two spaces, and the last line ends."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """What a JSON file holds; `PlanError` if it is not there or not JSON."""
    try:
        return parse_json(read_bounded(path))
    except FileNotFoundError as error:
        raise PlanError(f"{path} does not exist: give what lmfx.save wrote") from error
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error}; give what lmfx.save wrote") from error
    except (ValueError, RecursionError) as error:
        raise damaged(str(path), error) from error
