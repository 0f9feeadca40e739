"""Calibration images, and what is computed from them inside a network.

In: images from whatever the caller has (`images`), a model that was checked (`model_checks`). Out: values at nodes
(`recording`), fitted convolutions (`fitting`) and affine surrogates of removed activations (`surrogates`).
"""

from lmfx.calibration.images import Calibration, as_calibration

__all__ = ["Calibration", "as_calibration"]
