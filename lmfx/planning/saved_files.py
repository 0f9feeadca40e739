"""Writes and reads the two files of a saved network, and never believes what they say without a check.

    out/plan.json           the plan and the result: what was done, for which graph, with which latency
    out/model.safetensors   every weight in its own dtype, and in the header a copy of plan.json

Two files cannot be replaced in one step; because the weights carry their own copy of the plan, replacing them is the
step that counts, and a save that is killed at any moment leaves the older save or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lmfx.environment.bounded_reading import parse_json
from lmfx.passes.errors import LmfxError, PlanError
from lmfx.passes.identity.fingerprint import Origin
from lmfx.passes.ir import MergePlan
from lmfx.planning.plan_file import damaged, decode, document_text, parse_document, read_json
from lmfx.result import Result

__all__ = [
    "PLAN",
    "WEIGHTS",
    "SavedNetwork",
    "describe_inputs",
    "digest_of",
    "example_of",
    "parse_saved",
    "read_folder",
    "tensors_of",
    "write_folder",
]

PLAN, WEIGHTS = "plan.json", "model.safetensors"
MOST_VALUES, MOST_DIMENSIONS = 2**28, 16  # of the example that a folder asks for
# By name and not by getattr: what a file says is never looked up in a module.
DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


@dataclasses.dataclass(frozen=True)
class SavedNetwork:
    """What plan.json of a folder holds besides the plan."""

    merged: bool
    inputs: dict[str, Any]  # positional and keyword specs of the example
    digest: str  # of the weights
    shared: dict[str, str]  # weights that are another one's memory, and which
    result: Result | None
    model: str | None  # the command line's MODEL, if it made this
    origin: Origin | None = dataclasses.field(default=None, metadata={"optional": True})  # of what model it was made


def write_folder(target: Path, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files, replacing an older save as a whole or not at all. Raises `PlanError` if it cannot be done."""
    text = document_text(document)
    try:
        if target.exists() and not target.is_dir():
            raise PlanError(f"cannot save to {target}: it is a file; give a folder")
        where = target if target.is_dir() else target.absolute().parent
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".lmfx-", dir=where) as temporary:
            new = Path(temporary) / "save"
            new.mkdir()
            (new / PLAN).write_text(text, encoding="utf-8")
            safetensors.torch.save_file(tensors, new / WEIGHTS, {"format": "pt", "lmfx": json.dumps(document)})
            (new / WEIGHTS).chmod((new / PLAN).stat().st_mode)  # safetensors lets nobody else read it
            if target.is_dir():
                os.replace(new / WEIGHTS, target / WEIGHTS)
                os.replace(new / PLAN, target / PLAN)
            else:
                os.rename(new, target)
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, LmfxError):
            raise
        raise PlanError(f"cannot save to {target}: {error}; give another folder") from error


def read_folder(folder: Path) -> tuple[MergePlan, SavedNetwork, dict[str, Tensor]]:
    """The plan and the weights of one and the same save."""
    if not folder.is_dir():
        raise PlanError(
            f"{folder} is not a folder that lmfx.save wrote: "
            + ("it is a file" if folder.exists() else "it does not exist")
        )
    plan, saved = parse_saved(read_json(folder / PLAN), str(folder / PLAN))
    path = folder / WEIGHTS
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("lmfx")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except FileNotFoundError as error:
        raise PlanError(f"{path} does not exist: restore it from a copy, or compress again") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise damaged(str(path), error) from error
    if text is None:
        raise PlanError(f"{path} is not of lmfx, its header has no plan: give what lmfx.save wrote")
    digest = digest_of(tensors)
    if digest != saved.digest:
        # A save that was killed between its two files: the plan in the weights' header is the one that goes with them.
        with contextlib.suppress(ValueError):
            plan, saved = parse_saved(parse_json(text), str(path))
        if digest != saved.digest:
            raise damaged(str(path), f"its weights have the digest {digest[:12]}, {saved.digest[:12]} was saved")
    return plan, saved, tensors


def parse_saved(document: Any, source: str) -> tuple[MergePlan, SavedNetwork]:
    """What a document says. Raises `PlanError` for one that is damaged, or is a plan alone."""
    plan, save = parse_document(document, source)
    if save is None:
        raise PlanError(f"{source} is a plan alone: load it with lmfx.load_plan, or give a folder that lmfx.save wrote")
    try:
        saved = decode(SavedNetwork, save, "save")
    except ValueError as error:
        raise damaged(source, error) from error
    if saved.result is not None and saved.result.plan != plan:
        raise damaged(source, "its result has another plan")
    return plan, saved


def tensors_of(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the weights, each on the CPU in memory of its own; names whose weight is another name's)."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    memory: set[int] = set()
    for name, value in net.state_dict().items():
        if not isinstance(value, Tensor):
            raise PlanError(
                f"{name} is a {type(value).__name__}, not a tensor, and cannot be saved without a pickle: save the "
                "network before it is quantized, or keep what the module needs in buffers"
            )
        if value.is_meta:
            raise PlanError(f"{name} is on the meta device and has no values: load the weights first")
        same = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and same in first:
            shared[name] = first[same]
            continue
        first[same] = name
        own = value.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in memory or storage.nbytes() != own.nbytes:
            own = own.clone()  # a view of memory that another weight lies in
        memory.add(own.untyped_storage().data_ptr())
        tensors[name] = own
    return tensors, shared


def digest_of(tensors: dict[str, Tensor]) -> str:
    """A SHA-256 of names, dtypes, shapes and values."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        state.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        state.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def example_of(inputs: dict[str, Any], device: torch.device | None = None) -> tuple[list[Any], dict[str, Any]]:
    """(positional, keyword) values with saved specs: standard normal, or zeros for integers. Raises `ValueError`."""
    generator, left = torch.Generator().manual_seed(0), [MOST_VALUES]

    def value(spec: Any) -> Any:
        if isinstance(spec, dict) and set(spec) == {"dict"} and isinstance(spec["dict"], dict):
            return {k: value(v) for k, v in spec["dict"].items()}
        for kind in (tuple, list):
            if isinstance(spec, dict) and set(spec) == {kind.__name__} and isinstance(spec[kind.__name__], list):
                return kind(value(v) for v in spec[kind.__name__])
        if not (isinstance(spec, dict) and set(spec) == {"shape", "dtype"}):
            return spec
        dtype, shape = DTYPES.get(str(spec["dtype"])), spec["shape"]
        sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if dtype is None or not sizes:
            raise ValueError(f"the input {spec} is no tensor")
        left[0] -= prod(shape)
        if left[0] < 0 or len(shape) > MOST_DIMENSIONS:
            raise ValueError(f"the inputs have more than {MOST_VALUES} values: {str(shape)[:60]}")
        floating = dtype.is_floating_point or dtype.is_complex
        made = torch.randn(shape, generator=generator) if floating else torch.zeros(shape)
        return made.to(device, dtype)

    if not isinstance(inputs.get("positional"), list) or not isinstance(inputs.get("keyword"), dict):
        raise ValueError("save.inputs needs positional and keyword")
    return [value(s) for s in inputs["positional"]], {k: value(s) for k, s in inputs["keyword"].items()}


def describe_inputs(inputs: dict[str, Any]) -> str:
    """The shapes of saved inputs, and the constants among them."""
    specs = [*inputs["positional"], *inputs["keyword"].values()]
    return ", ".join(str(s["shape"]) if isinstance(s, dict) and "shape" in s else repr(s) for s in specs)
