"""Bayer demosaicking (Gharbi et al. 2016): how near is the picture to the one that was mosaicked?

    G R      of every pixel one colour is known; the others are 0
    B G

`psnr`: mean over the held-out crops, in dB, of 10 log10(1 / mse), the output clipped to 0..1. The network pads nothing,
so the truth is cut to the middle. A module, not a script.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.real.packages import load_module, photographs, root, set_weights
from benchmarks.real.subjects import Outputs, Subject, mean_psnr

__all__ = ["bayer", "mosaic"]

HELD = 64


def bayer() -> Subject:
    """Twenty convs from image to image, mosaics of 128 px."""
    return Subject(
        name="demosaicking",
        what="Bayer mosaics of 128 px: PSNR to the picture",
        model=_model,
        images=lambda kind, count, size: mosaic(_pictures(kind, count, size)),
        judge=judge,
        figure="psnr",
        size=128,
        pinned=("conv15", "residual_predictor", "upsampler", "output"),
        calibration=64,
        recovery=256,
        held=HELD,
        unit="dB",
    )


def mosaic(pictures: Tensor) -> Tensor:
    """Pictures `(n, 3, h, w)` with but one colour a pixel."""
    kept = torch.zeros_like(pictures[:1])
    kept[:, 0, 0::2, 1::2] = 1
    kept[:, 1, 0::2, 0::2] = kept[:, 1, 1::2, 1::2] = 1
    kept[:, 2, 1::2, 0::2] = 1
    return pictures * kept


def judge(outputs: Outputs, original: Outputs) -> dict[str, float]:
    """PSNR to the pictures, and to what the original makes of the same mosaics."""
    made, size = outputs[0], outputs[0].shape[-1]
    pictures = _pictures("held", len(made), 128).numpy()
    edge = (pictures.shape[-1] - size) // 2
    truth = pictures[..., edge : edge + size, edge : edge + size]
    return {"psnr": mean_psnr(made, truth), "psnr to the original": mean_psnr(made, original[0].clip(0, 1))}


def _pictures(kind: str, count: int, size: int) -> Tensor:
    return photographs(kind, count, 288)[:, :, 80 : 80 + size, 80 : 80 + size] / 255


def _model() -> nn.Module:
    # The package finds its data by a function of setuptools that is no longer there, and loads weights as it is made.
    found = {"resource_filename": lambda _, file: str(root() / "site/demosaicnet" / file)}
    package = load_module("demosaicnet.modules", pkg_resources=found)
    return set_weights(package.BayerDemosaick(pretrained=False), "demosaicnet/data/bayer.pth")
