"""Measures what a network still does of what another one did, on images that no fit saw.

In: a traced network and calibration images. Out: a `Judge`, which gives the `Quality` of any network with the same
inputs and outputs: divergence of every output, agreement of the arg-max and KL of scores, PSNR of maps.
"""

from .judge import Choosing, Judge, compare
from .measures import OutputQuality, Quality, QualityName, QualityWarning

__all__ = ["Choosing", "Judge", "OutputQuality", "Quality", "QualityName", "QualityWarning", "compare"]
