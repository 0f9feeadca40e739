"""What quantizing a network did, layer by layer: `Quantized`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Int8Facts", "Quantized", "QuantizedLayer"]

BAD = 0.05  # of a layer's output: what its weights on the grid may be off by before it is named
SHOWN = 8


@dataclass(frozen=True)
class QuantizedLayer:
    """One convolution or Linear. `error` is how far its output is off because of the grid of its weights, relative to
    its own size; `nearest_error` the same with every weight rounded to the nearest. NaN where there is no Gram."""

    name: str
    op: str
    error: float = math.nan
    nearest_error: float = math.nan


@dataclass(frozen=True)
class Quantized:
    """A Q/DQ file and how it came about.

    `layers` are in 8 bits, `float_layers` stayed float and why. `warnings` name dead layers and channels, outliers and
    weights that their grid does badly. `divergence` is the mean squared error of the outputs over their variance, on
    `images` calibration images that were held out (all of them, if there are fewer than four).
    """

    path: Path | None
    runtime: str
    layers: tuple[QuantizedLayer, ...]
    float_layers: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    divergence: float = math.nan
    images: int = 0
    per_channel: bool = True
    ranges: str = "minmax"

    def __str__(self) -> str:
        which = "a scale a channel" if self.per_channel else "a scale a layer"
        lines = [
            f"{len(self.layers)} convolutions and Linears in 8 bits for {self.runtime} ({which}, ranges by "
            f"{self.ranges}); outputs diverge by {self.divergence:.3g} on {self.images} images"
        ]
        known = [x for x in self.layers if math.isfinite(x.error)]
        if known:
            worst = max(known, key=lambda x: x.error)
            lines.append(
                f"weights by their Gram: the worst layer is {worst.name}, {worst.error:.2%} off "
                f"({worst.nearest_error:.2%} by nearest rounding)"
            )
        if self.float_layers:
            lines.append(f"{len(self.float_layers)} stay float:")
            lines += [f"  {name}: {why}" for name, why in self.float_layers[:SHOWN]]
            lines += _more(len(self.float_layers))
        if self.warnings:
            lines.append(f"{len(self.warnings)} warnings:")
            lines += [f"  {w}" for w in self.warnings[:SHOWN]]
            lines += _more(len(self.warnings))
        return "\n".join(lines)


def _more(count: int) -> list[str]:
    return [f"  ... and {count - SHOWN} more"] if count > SHOWN else []


@dataclass(frozen=True)
class Int8Facts:
    """What `compress` found of the 8-bit form of its network. `ms`: whole networks, "original float32", "original
    int8", "float32" and "int8". `rows`: each layer's times and the form that was chosen. Where it does not pay,
    `quantized` is None and the network stays float."""

    pays: bool
    ms: dict[str, float]
    quantized: Quantized | None
    rows: tuple[str, ...] = ()

    def __str__(self) -> str:
        times = ", ".join(f"{name} {value:.4g} ms" for name, value in self.ms.items())
        if self.quantized is None:
            return "\n".join([f"int8 does not pay here, the network stays float ({times}):", *self.rows[:SHOWN]])
        return f"{self.quantized}\n{times}" if times else str(self.quantized)
