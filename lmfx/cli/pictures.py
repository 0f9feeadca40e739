"""Reads a folder of pictures as calibration images: each turned upright, in the model's colours, prepared as for it.

Folders below are read as well (a folder a class, as for training). Of more pictures than are wanted, those are taken
that are spread evenly over the sorted names, so that every class has its share. What cannot be read is left out and
named.
Only decoders of plain raster formats are tried, whatever a file is called.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmfx.cli.preprocessing import Preprocessing
from lmfx.environment.bounded_reading import in_one_line
from lmfx.environment.progress import progress as progress_bar
from lmfx.passes.errors import InputError, LmfxError, MissingExtra

__all__ = ["find_pictures", "read_pictures", "require_pillow"]

# No EPS, PDF or WMF: those decoders start other programs.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
}
ENDINGS = frozenset(ending for endings in FORMATS.values() for ending in endings)
NAMED = 3  # of the pictures that cannot be read
BYTES_OF_16_BITS = 257  # 65,535 to 255


def require_pillow() -> None:
    """Raises `MissingExtra` without Pillow."""
    try:
        importlib.import_module("PIL.Image")
    except ImportError as error:
        raise MissingExtra(f'--images needs Pillow ({error}): pip install "lmfx[vision]"') from error


def find_pictures(folder: Path) -> list[Path]:
    """All pictures in a folder and those below it, by name. Raises `InputError` where there are none."""
    if not folder.exists():
        raise InputError(f"--images {folder}: there is no such folder (looked in {Path.cwd()})")
    if not folder.is_dir():
        hint = (
            "arrays go with --calibration" if folder.suffix in (".npy", ".npz") else "give the folder that it lies in"
        )
        raise InputError(f"--images {folder} is a file: {hint}")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    found = [path for path in files if path.suffix.lower() in ENDINGS]
    if not found:
        kinds = Counter(path.suffix.lower() or "no ending" for path in files)
        seen = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(4)) or "it is empty"
        raise InputError(
            f"--images {folder}: no pictures there ({seen}); read are {' '.join(sorted(ENDINGS))}. "
            "Arrays go with --calibration FILE.npy"
        )
    return found


def read_pictures(folder: Path, prepare: Preprocessing, most: int, progress: bool = True) -> tuple[Tensor, str]:
    """(images (N, channels, height, width), how many there are of what, for a person). Names on stderr what cannot be
    read. Raises `InputError` where that is all of them."""
    require_pillow()
    found = find_pictures(folder)
    chosen = [found[i * len(found) // min(most, len(found))] for i in range(min(most, len(found)))]
    images, broken, small = [], [], 0
    with progress_bar(chosen, "reading pictures", progress) as paths:
        for path in paths:
            try:
                picture = _upright(path, prepare.mode)
                images.append(prepare(picture))
            except LmfxError:  # of the preprocessing: no picture would do better
                raise
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
                broken.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}")
                continue
            small += min(picture.size) < min(prepare.shape[1:])
    if broken:
        shown = "; ".join(in_one_line(text) for text in broken[:NAMED])
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        text = f"{len(broken)} of {len(chosen)} pictures in {folder} cannot be read ({shown}{more})"
        if not images:
            raise InputError(f"--images: {text}; convert them to JPEG or PNG")
        print(f"{text}, and are left out", file=sys.stderr)
    if small:
        size = f"{prepare.shape[1]} x {prepare.shape[2]}"
        print(f"{small} of {len(images)} pictures are smaller than {size} and were enlarged", file=sys.stderr)
    total = f" of the {len(found)}" if len(found) > len(chosen) else ""
    return torch.stack(images), f"{len(images)}{total} pictures of {folder}, {prepare.what}"


def _upright(path: Path, mode: str) -> Any:
    """The picture as its camera was held, in the colours of `mode`."""
    from PIL import Image, ImageOps

    Image.init()  # what this build can decode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large pictures, odd palettes and metadata: read all the same
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode in ("I;16", "I;16B", "I;16L", "I"):  # convert() would cut all above 255 off
                values = np.asarray(picture).astype(np.int64) // BYTES_OF_16_BITS
                picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            return picture.convert(mode)
