"""Fits one convolution in closed form to the input and output of a span.

    min over W, b of   sum_o |y_o - (W x_o + b)|^2  +  lambda |W - W0|^2

``x_o`` is the patch of the span's input under output pixel ``o``, ``y_o`` the value that is wanted there, ``W0`` a
prior (the composed kernel, or 0). The bias is not damped, so it can be eliminated: with centred sums
``G = X'X - n x x'`` and ``R = X'Y - n x y' - G W0`` (x, y: means)

    (G + lambda I) D = R        W = W0 + D        b = y - W x        lambda = damping * mean(diag G)

and the residual needs no data either: ``|Y|^2 - 2 W.X'Y + W.G W`` in centred sums, with ``G D = R - lambda D``.

One accumulation (`gram`) serves many fits: all kernels inside the largest, all targets (span stops) of one start, dense
and depthwise. One factorisation serves all targets of a kernel.

**Damping.** With 64 images there can be fewer pixels than unknowns, and then the error on them measures nothing. With
``damping="auto"`` we fit without the held-out images and walk over half powers of ten to the smallest error on them,
all on one sketch (32 random combinations) of the output channels, so that it costs a few factorisations and little
else. Then the fit is made on everything. Generalised cross-validation takes samples for independent and would damp too
little. Where a search is too dear, ``0.4 unknowns / samples`` (at most 1) is used: lambda as a ratio of variances does
not depend on the number of samples, and 0.4 is, within a factor of 3, what the search finds on the residual blocks of
a small residual classifier.

**Vectors from the side** (`side_vectors`) are more features, a row ``v`` an image: ``|y_o - (W x_o + V v + b)|^2``.
There are only as many of them as images, so V is damped at least as ``0.4 channels / images`` asks for.

Where the sums would not fit in memory, `fit_cg` solves the same system by conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.linear import LinearOp, densify
from ..errors import OptionError
from .conjugate_gradients import fit_cg
from .gram import Gram, Part, sample_positions
from .normal_equations import Fit, System, usual_damping

__all__ = [
    "Fit",
    "Gram",
    "evaluate",
    "fit_cg",
    "fit_system",
    "sample_positions",
    "search_damping",
    "solve",
]

AUTO_UNKNOWNS = 2500  # above it a factorisation takes seconds, and damping is not searched
GRID = tuple(10.0 ** (e / 2) for e in range(-14, 5))
SKETCH = 32


def solve(
    gram: Gram,
    target: str,
    kernel_size: Sequence[int],
    depthwise: bool = False,
    prior: tuple[Tensor, Tensor] | None = None,
    damping: float | Literal["auto"] = "auto",
    *,
    before: Sequence[int] | None = None,
    heldout: bool = True,
) -> Fit:
    """The best convolution of this kernel size to a target.

    `prior` is (weight, bias) of that kernel (its bias is not used: the best bias for the weight is). `damping` is
    relative to the mean variance of a feature; "auto" picks it on held-out images where that is cheap. `before` places
    the kernel (`Gram.sub`). With `heldout`, a second fit without the held-out images estimates the error on new ones.
    """
    depthwise = depthwise or gram.depthwise
    _known(gram, target)
    if depthwise and gram.targets[target] != gram.in_channels:
        raise OptionError(
            f"a depthwise kernel keeps the {gram.in_channels} channels, target {target!r} has {gram.targets[target]}"
        )
    if before is None:
        before = tuple(lo for lo, _ in gram.padding_of(kernel_size))
    taps = gram.sub(kernel_size, before)
    shape = (gram.targets[target], 1 if depthwise else gram.in_channels, *kernel_size)
    start = None if prior is None else _pack(prior[0].detach(), shape, depthwise, gram.sides)
    total = gram.system("total", taps, depthwise)
    if damping == "auto":
        cheap = total.matrix.shape[1] <= AUTO_UNKNOWNS and gram.can_hold_out()
        damping = (
            search_damping(gram.system("rest", taps, depthwise), gram.system("held", taps, depthwise), target, start)
            if cheap
            else usual_damping(total.matrix.shape[1], total.sums.n)
        )
    elif isinstance(damping, str) or not 0 <= damping < float("inf"):
        raise OptionError(f"damping {damping!r}; give 'auto' or a number of at least 0")
    weight, bias, residual = fit_system(total, target, start, damping)
    unseen = None
    if heldout and gram.can_hold_out():
        w, b, _ = fit_system(gram.system("rest", taps, depthwise), target, start, damping)
        unseen = gram.system("held", taps, depthwise).error(target, w, b)
    own = weight.shape[1] - gram.sides
    side = weight[:, own:].permute(0, 2, 1).reshape(shape[0], -1) if gram.sides else None
    return Fit(_unpack(weight[:, :own], shape), bias, residual, damping, tuple(before), unseen, side)


def evaluate(
    gram: Gram,
    target: str,
    weight: Tensor,
    bias: Tensor,
    *,
    before: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    part: Part = "total",
) -> Tensor:
    """Mean squared error (out,) of any convolution whose taps lie in the Gram's window, on one part of the images.

    It takes no vectors, whether the sums have some or not.
    `weight` is (out, in / groups, kernel...); groups are seen from its shape.
    """
    _known(gram, target)
    out, channels = gram.targets[target], gram.in_channels
    kernel = tuple(weight.shape[2:])
    if len(weight) != out or not weight.shape[1] or channels % weight.shape[1] or bias.shape != (out,):
        raise OptionError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not map {channels} channels to {out}"
        )
    taps = gram.sub(kernel, before, dilation)
    depthwise = weight.shape[1] == 1 and out == channels
    if gram.depthwise and not depthwise:
        raise OptionError(f"sums of a depthwise fit cannot judge a weight {tuple(weight.shape)}")
    if not depthwise and weight.shape[1] != channels:
        ndim = len(kernel)
        grouped = LinearOp(
            weight, bias, (1,) * ndim, ((0, 0),) * ndim, (1,) * ndim, channels // weight.shape[1]
        )  # fmt: skip
        weight = densify(grouped).weight
    packed = _pack(weight.detach(), tuple(weight.shape), depthwise, gram.sides)
    return gram.system(part, taps, depthwise).error(target, packed, bias.detach().double())


def fit_system(system: System, target: str, start: Tensor | None, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weight, bias (out,) and mean squared error (out,) on the same samples."""
    xy, yy, mean = system.target(target)
    right = xy if start is None else xy - system.matrix @ start
    delta, lam = system.solve(damping, right)
    squares = yy - (delta * (right + lam * delta)).sum(1).flatten()
    weight = delta
    if start is not None:
        squares = squares - (start * (xy + right)).sum(1).flatten()
        weight = start + delta
    bias = (mean - system.mean[:, None] @ weight).flatten()
    return weight, bias, (squares / system.sums.n).clamp_min(0.0)


def search_damping(
    rest: System, held: System, target: str, start: Tensor | None, grid: Sequence[float] = GRID
) -> float:
    """The damping of a grid with which a fit to the rest has the smallest error on what is held out, walking downhill
    from the usual one."""
    (xy, _, mean), (xy_held, _, mean_held) = rest.target(target), held.target(target)
    sketch = None
    if xy.shape[2] > SKETCH:
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(xy.shape[2], SKETCH, dtype=torch.float64, generator=generator).to(xy.device)
        xy, xy_held, mean, mean_held = (t @ sketch for t in (xy, xy_held, mean, mean_held))
    # the bias comes from the other images, so held-out sums are taken about their means
    shift = (held.mean - rest.mean)[:, :, None]

    def about(weight: Tensor) -> Tensor:
        return held.matrix @ weight + held.sums.n * shift * (shift.transpose(1, 2) @ weight)

    right, right_held = xy, xy_held + held.sums.n * shift * (mean_held - mean)
    if start is not None:
        begin = start if sketch is None else start @ sketch
        right, right_held = right - rest.matrix @ begin, right_held - about(begin)
    seen: dict[int, float] = {}

    def error(i: int) -> float:  # but for a constant
        if i not in seen:
            delta, _ = rest.solve(grid[i], right)
            seen[i] = float((delta * (about(delta) - 2 * right_held)).sum())
        return seen[i]

    usual = usual_damping(rest.matrix.shape[1], rest.sums.n)
    best = min(range(len(grid)), key=lambda i: abs(log(grid[i] / usual)))
    for step in (2, 1):
        at = -1
        while at != best:
            at = best
            best = min((i for i in (at, at - step, at + step) if 0 <= i < len(grid)), key=error)
    return grid[best]


def _known(gram: Gram, target: str) -> None:
    if target not in gram.targets:
        raise OptionError(f"no target {target!r}; the sums have {sorted(gram.targets)}")


def _pack(weight: Tensor, shape: tuple[int, ...], depthwise: bool, sides: int = 0) -> Tensor:
    """(out, in, kernel...) as (1, taps x in, out), or (channels, 1, kernel...) as (channels, taps, 1).

    After the taps come as many rows of zeros as there are channels of vectors.
    """
    if tuple(weight.shape) != shape:
        raise OptionError(f"weight {tuple(weight.shape)}, expected {shape}")
    flat = weight.double().flatten(2)
    packed = flat.transpose(1, 2) if depthwise else flat.permute(2, 1, 0).reshape(1, -1, shape[0])
    return F.pad(packed, (0, 0, 0, sides))


def _unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(packed) > 1 or shape[1] == 1:
        return packed.reshape(packed.shape[0], packed.shape[1], -1).permute(0, 2, 1).reshape(shape)
    return packed.reshape(-1, shape[1], shape[0]).permute(2, 1, 0).reshape(shape)
