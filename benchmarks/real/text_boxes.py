"""A text detector (CRAFT, Baek et al. 2019; a VGG16 with norms and a U-shaped decoder): does it mark the same pixels?

Drawn lines are put on photographs. `marked`: of the pixels that the exported file or the original takes for text
(score above 0.4, as the package does), the share that both do; `psnr` is that of the score maps to the original's. A
module, not a script.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.real import text_lines
from benchmarks.real.packages import load_module, photographs, set_weights
from benchmarks.real.subjects import Outputs, Subject

__all__ = ["craft", "judge", "put_lines"]

TEXT = 0.4  # the score above which a pixel is text
LINES = 3  # on each photograph
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def craft() -> Subject:
    """Twenty-seven convs of up to 1,024 channels, photographs of 160 px with lines on them."""
    return Subject(
        name="craft",
        what="photographs of 160 px with lines of text: the same pixels are text",
        model=_model,
        images=_images,
        judge=judge,
        figure="marked",
        size=160,
        pinned=("conv_cls.8", "upconv4.conv.3"),
        calibration=64,
        recovery=256,
        held=64,
    )


def put_lines(pictures: Tensor, lines: Tensor) -> Tensor:
    """Pictures `(n, 3, h, w)` from 0 to 1 with lines `(m, 1, ...)` from -1 to 1 over them, every second one through
    which the picture shines."""
    height, width = pictures.shape[2] // 6, pictures.shape[3] * 19 // 20
    lines = nn.functional.interpolate(lines, size=(height, width), mode="bilinear", antialias=True) / 2 + 0.5
    made, left = pictures.clone(), (pictures.shape[3] - width) // 2
    for i in range(len(made)):
        for j in range(LINES):
            top = height // 3 + j * 2 * height
            place = made[i, :, top : top + height, left : left + width]
            line = lines[(LINES * i + j) % len(lines)]
            place.copy_(line.expand_as(place) if (i + j) % 2 else (place + line) / 2)
    return made


def judge(outputs: Outputs, original: Outputs) -> dict[str, float]:
    """How much of the text is marked alike, and the PSNR of the score maps."""
    a, b = outputs[0][..., 0], original[0][..., 0]
    either = ((a > TEXT) | (b > TEXT)).sum()
    error = float(((outputs[0] - original[0]) ** 2).mean())
    return {
        "marked": float(((a > TEXT) & (b > TEXT)).sum() / max(either, 1)),
        "psnr": -10 * float(np.log10(max(error, 1e-10))),
    }


def _images(kind: str, count: int, size: int) -> Tensor:
    pictures = put_lines(photographs(kind, count, size) / 255, text_lines.draw(kind, LINES * count)[0])
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    return (pictures - mean) / deviation


def _model() -> nn.Module:
    network = load_module("easyocr.craft").CRAFT(pretrained=False)
    return set_weights(network, "easyocr_en_models/models/craft_mlt_25k.pth").eval()
