"""One convolution fitted in closed form to what a part of a network computes.

In: values at the part's input and output on calibration images. Out: weight, bias and the error that is left (`Fit`).
Words: the *Gram* holds the sums over features from which every smaller kernel and every target is fitted; *damping* is
lambda relative to the mean variance of a feature.
"""

from .closed_form import Fit, solve
from .gram import Gram

__all__ = ["Fit", "Gram", "solve"]
