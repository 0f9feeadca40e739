"""MTCNN's second and third network (Zhang et al. 2016): is a face still found, and its box where it was?

Inputs are crops of 24 or 48 px, (x - 127.5) / 128. Faces are the hundred of scikit-image's subset of LFW, half of them
for calibration, shifted, scaled, mirrored and lit anew; the rest are pieces of photographs. `found`: of the crops that
the original calls a face (probability over 0.7), how many are still called one; `same class` over all crops; `box`:
relative error of the box of those faces. A module, not a script.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.real.packages import load_module, needs, photographs, set_weights
from benchmarks.real.subjects import Outputs, Subject

__all__ = ["onet", "rnet"]

FACES = "site/skimage/data/lfw_subset.npy"
THRESHOLD = 0.7


def onet() -> Subject:
    """Four convs and a dense layer; box, landmarks, probabilities."""
    return _subject("ONet", 48, scores=2, last="conv4")


def rnet() -> Subject:
    """Three convs and a dense layer; box, probabilities."""
    return _subject("RNet", 24, scores=1, last="conv3")


def _subject(name: str, size: int, scores: int, last: str) -> Subject:
    def judge(outputs: Outputs, original: Outputs) -> dict[str, float]:
        is_face = original[scores][:, 1] > THRESHOLD
        called = outputs[scores][:, 1] > THRESHOLD
        box, true = outputs[0][is_face], original[0][is_face]
        error = np.sqrt(((box - true) ** 2).sum() / (true**2).sum())
        return {"found": float(called[is_face].mean()), "same class": float((called == is_face).mean()), "box": error}

    return Subject(
        name=f"mtcnn-{name.lower()}",
        what=f"MTCNN's {name}, crops of {size} px: faces found that the original finds",
        model=lambda: _model(name),
        images=lambda kind, count, size: (crops(kind, count, size) - 127.5) / 128,
        judge=judge,
        figure="found",
        size=size,
        # Torch-Pruning takes a flattened map for channels first, and here they are last.
        pinned=(last, "dense5_1", "dense5_2", "dense6_1", "dense6_2", "dense6_3"),
        calibration=256,
    )


def crops(kind: str, count: int, size: int) -> Tensor:
    """Faces and pieces of photographs in turn, float32 `(n, 3, size, size)` from 0 to 255."""
    (file,) = needs(FACES)
    faces = torch.from_numpy(np.load(file)[:100]).float()[:, None] * 255
    faces = faces[:50] if kind == "cal" else faces[50:]
    random = torch.Generator().manual_seed({"cal": 1, "held": 2}[kind])
    pieces = photographs(kind, 512, 288)
    made = []
    for i in range(count):
        if i % 2:
            at = torch.randint(len(pieces), (1,), generator=random).item()
            made.append(_piece(pieces[int(at)][None], size, random, low=0.1, high=1.0))
        else:
            made.append(_lit(_piece(faces[i // 2 % 50][None], size, random, low=0.85, high=1.0), random))
    return torch.cat(made)


def _piece(image: Tensor, size: int, random: torch.Generator, low: float, high: float) -> Tensor:
    """A random square of the image, `low` to `high` of its side, mirrored every other time."""
    side = max(8, round(image.shape[-1] * _uniform(low, high, random)))
    y, x = (int(torch.randint(image.shape[-1] - side + 1, (1,), generator=random)) for _ in range(2))
    piece = image[..., y : y + side, x : x + side]
    if torch.rand(1, generator=random) < 0.5:
        piece = piece.flip(-1)
    scaled = nn.functional.interpolate(piece, size=(size, size), mode="bilinear", antialias=True)
    return scaled.expand(-1, 3, -1, -1).clamp(0, 255)


def _lit(face: Tensor, random: torch.Generator) -> Tensor:
    """Another contrast, brightness and tint."""
    tint = 1 + 0.1 * torch.randn(1, 3, 1, 1, generator=random)
    return ((face - 128) * _uniform(0.7, 1.2, random) * tint + 128 + _uniform(-20, 20, random)).clamp(0, 255)


def _uniform(low: float, high: float, random: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand(1, generator=random))


def _model(name: str) -> nn.Module:
    package = load_module("facenet_pytorch.models.mtcnn")
    return set_weights(getattr(package, name)(pretrained=False), f"facenet_pytorch/data/{name.lower()}.pt")
