"""Writes and reads checkpoints of a training: one safetensors file, never pickle, written whole or not at all.

    training.safetensors    student.NAME      the state dict
                            average.NAME      of a moving average, best.NAME of the best so far, where there are
                            optimizer.I.NAME  tensors of the optimizer's state
                            metadata          JSON: epoch, the run it belongs to (`run_identity`), all that is no tensor

No random numbers are in it: each epoch starts from a seed of its own, so a resumed run draws what the other would have.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lmfx.environment.bounded_reading import parse_json
from lmfx.passes.errors import StoreError
from lmfx.training.run_identity import is_close

__all__ = ["CHECKPOINT", "load_training", "make_folder", "save_training"]

CHECKPOINT = "training.safetensors"
VERSION = 2


def make_folder(folder: Path) -> None:
    """Makes the folder of a training before anything is trained. Raises `StoreError` if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = "it is a file" if folder.is_file() else str(error)
        raise StoreError(f"cannot write checkpoints to {folder}: {what}; give another folder") from error


def save_training(
    folder: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    epoch: int,
    run: dict[str, Any],
    start: dict[str, float],
    extra: Any = None,
    average: nn.Module | None = None,
    best: nn.Module | None = None,
) -> None:
    """Writes a checkpoint after `epoch` whole epochs; an older one is replaced at once: a kill leaves one of both."""
    state = optimizer.state_dict()
    tensors = {f"student.{name}": value for name, value in student.state_dict().items()}
    for part, net in (("average", average), ("best", best)):
        if net is not None:
            tensors |= {f"{part}.{name}": value for name, value in net.state_dict().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    about = {
        "version": VERSION,
        "epoch": epoch,
        "run": run,
        "start": start,
        "scalars": scalars,
        "groups": state["param_groups"],
        "extra": extra,
    }
    partial = folder / f"{CHECKPOINT}.{os.getpid()}.partial"
    # Copies, because tied weights share memory, which the format does not have.
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(own, partial, {"lmfx": json.dumps(about)})
    os.replace(partial, folder / CHECKPOINT)


def load_training(
    folder: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: dict[str, Any],
    start: dict[str, float],
    average: nn.Module | None = None,
    best: nn.Module | None = None,
) -> tuple[int, Any]:
    """Loads the checkpoint in `folder` into all, and gives (epochs that are done, extra); (0, None) if there is none.

    Raises `StoreError` if the file is damaged or belongs to another run.
    """
    file = folder / CHECKPOINT
    if not file.exists():
        return 0, None
    try:
        with safe_open(file, "pt") as opened:
            about = parse_json((opened.metadata() or {})["lmfx"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StoreError(
            f"{file} cannot be read ({str(error).splitlines()[0]}): delete it to start the training anew"
        ) from error
    if about.get("version") != VERSION or about["run"] != run:
        theirs = about.get("run", {})
        other = sorted(k for k in {*theirs, *run} if theirs.get(k) != run.get(k))
        told = "; ".join(f"{k} was {theirs.get(k)!r} and is {run.get(k)!r}" for k in other) or "it has another version"
        raise StoreError(f"{file} belongs to another training ({told}): use another folder, or delete it")
    if not is_close(about.get("start"), start):
        raise StoreError(
            f"{file} belongs to another training (the student began with other weights): use another folder, or delete "
            "it"
        )
    weights, averages, bests = (
        {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        for part in ("student.", "average.", "best.")
    )
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in about["scalars"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    try:
        student.load_state_dict(weights)
        if average is not None:
            average.load_state_dict(averages)
        if best is not None:
            best.load_state_dict(bests)
        optimizer.load_state_dict({"state": state, "param_groups": about["groups"]})
    except (RuntimeError, ValueError, KeyError) as error:
        raise StoreError(
            f"{file} does not fit this student ({str(error).splitlines()[0]}): use another folder, or delete it"
        ) from error
    return int(about["epoch"]), about["extra"]
