"""Sets layers of a student together, so that its outputs come near to the original's: Gauss-Newton steps.

What a layer gives need not be what the original has there, as long as what the network gives is. With z' the student's
outputs, z the original's, J the derivative of z' by the columns C_l of all layers (bias included), one step is

    min over all D_l of  |J D - (z - z')|^2  +  lambda sum over l of <D_l, G_l D_l>        G_l = X_l'X_l / samples

G_l (`passes.fit.feature_rows`) measures the change of a layer by what it does to the values there: it is the damping,
and the preconditioner of the conjugate gradients that solve this, of which so few are enough. J D is a difference of
two outputs, J'u one backward pass. The step is taken as far as it makes the judged loss smaller; what does not, is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.divergence import Divergence
from lmfx.calibration.lockstep import Lockstep
from lmfx.calibration.places import Site
from lmfx.passes.fit import feature_rows

__all__ = ["JointFit", "metric_of"]

AT_ONCE = 64  # images of a chunk
ITERATIONS = 5
DAMPING, MORE_DAMPING = 0.03, 4.0
RIDGE = 1e-3  # of the mean variance, so that G has an inverse
SHIFT = 1e-2  # of the outputs, by which the derivative is taken
PASSES = 4 * ITERATIONS + 5  # through the network in one step: a difference, then forward and backward, which is three
FRACTIONS = (1.0, 0.5, 0.25)
Columns = list[Tensor]  # of each layer (blocks, features + 1, out / blocks), the bias last


def metric_of(x: Tensor) -> Tensor:
    """The Cholesky factor of G, of rows (blocks, samples, features + 1)."""
    gram = torch.zeros(len(x), x.shape[2], x.shape[2], dtype=torch.float64, device=x.device)
    for part in x.split(4096, 1):
        gram += part.transpose(1, 2) @ part
    gram /= x.shape[1]
    scale = gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE * scale + 1e-30)
    return torch.linalg.cholesky(gram)


@dataclass(frozen=True)
class _Layer:
    site: Site
    factor: Tensor
    weight: Tensor  # before the step
    bias: Tensor

    def set(self, columns: Tensor) -> None:
        """The layer with a change."""
        layer = self.site.layer
        layer.weight.data.copy_(self.weight.double() + feature_rows.weight_of(layer, columns[:, :-1]))
        layer.bias.data.copy_(self.bias.double() + columns[:, -1].flatten())

    def columns(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Gradients as columns."""
        found = feature_rows.columns_of(self.site.layer, weight)
        return torch.cat([found, bias.double().reshape(len(found), 1, -1)], 1)


class JointFit:
    """Steps of a student, which is changed, towards the outputs that `target` has; `run` is held where it is cheap to
    compute the outputs again, before all of the layers."""

    def __init__(
        self, student: fx.GraphModule, run: Lockstep, target: Divergence, metrics: Sequence[tuple[Site, Tensor]]
    ) -> None:
        self.student, self.run, self.target = student, run, target
        self.metrics = list(metrics)
        self.damping = DAMPING
        self.shift = SHIFT
        self.lent = [s for s, _ in self.metrics if s.layer.bias is None]
        for site in self.lent:
            site.layer.bias = nn.Parameter(site.layer.weight.new_zeros(len(site.scale)), requires_grad=False)

    def close(self) -> None:
        """Leave biases that layers did not have to the norms after them."""
        for site in self.lent:
            if site.norm is not None:
                norm: Any = site.norm
                norm.running_mean.sub_(site.layer.bias.detach())
                site.layer.bias = None
            else:
                site.layer.bias.requires_grad_(site.layer.weight.requires_grad)

    def step(self, best: float, judged: Any) -> float:
        """One step, taken as far as `judged()` falls below `best`; what that is then."""
        layers = [
            _Layer(site, factor, site.layer.weight.detach().clone(), site.layer.bias.detach().clone())
            for site, factor in self.metrics
        ]
        change = self._solve(layers)
        taken = 0.0
        for fraction in FRACTIONS if all(bool(c.isfinite().all()) for c in change) else ():
            _set(layers, change, fraction)
            loss = judged()
            if loss < best:
                best, taken = loss, fraction
            elif taken:
                break
        _set(layers, change, taken)
        if taken < 1:
            self.damping *= MORE_DAMPING
        return best

    def _solve(self, layers: list[_Layer]) -> Columns:
        """The change by conjugate gradients from nothing."""
        now = self._outputs()
        residual = self._pull(layers, [w - z for w, z in zip(self.target.wanted, now, strict=True)])
        found = [torch.zeros_like(r) for r in residual]
        direction = [torch.cholesky_solve(r, layer.factor) for layer, r in zip(layers, residual, strict=True)]
        power = _dot(residual, direction)
        lam: float | None = None
        for _ in range(ITERATIONS):
            if not power > 0:
                break
            seen = self._push(layers, direction, now)
            metric = [layer.factor @ (layer.factor.mT @ d) for layer, d in zip(layers, direction, strict=True)]
            stiff = _dot(direction, metric)
            curvature = sum(float(u.double().square().sum()) for u in seen)
            if lam is None:
                lam = self.damping * curvature / stiff
            length = power / (curvature + lam * stiff) if curvature + lam * stiff > 0 else 0.0
            image = self._pull(layers, seen)
            found = [x + length * d for x, d in zip(found, direction, strict=True)]
            residual = [r - length * (i + lam * m) for r, i, m in zip(residual, image, metric, strict=True)]
            scaled = [torch.cholesky_solve(r, layer.factor) for layer, r in zip(layers, residual, strict=True)]
            before, power = power, _dot(residual, scaled)
            direction = [z + power / before * d for z, d in zip(scaled, direction, strict=True)]
        return found

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        return [self.target.flat(o, n) for o, n in zip(self.run.outputs(), self.run.images, strict=True)]

    def _push(self, layers: list[_Layer], change: Columns, now: list[Tensor]) -> list[Tensor]:
        """J of a change, by a difference that moves the outputs by about `SHIFT` of what they are."""
        size = sum(float(z.double().square().sum()) for z in now) ** 0.5 or 1.0
        unit = sum(float((ly.factor.mT @ c).square().sum()) for ly, c in zip(layers, change, strict=True)) ** 0.5
        for _ in range(2):  # the second time with what the first has told of the size
            small = self.shift / unit
            _set(layers, change, small)
            moved = [(z - n) / small for z, n in zip(self._outputs(), now, strict=True)]
            _set(layers, change, 0.0)
            share = small * sum(float(u.double().square().sum()) for u in moved) ** 0.5 / size
            if 0.1 * SHIFT < share < 10 * SHIFT or not 0 < share < float("inf"):
                break
            self.shift *= SHIFT / share
        return moved

    def _pull(self, layers: list[_Layer], seen: list[Tensor]) -> Columns:
        """J'u as columns."""
        params = [p for ly in layers for p in (ly.site.layer.weight, ly.site.layer.bias)]
        flags = [p.requires_grad for p in params]
        total = [torch.zeros_like(p) for p in params]
        output = self.run.nodes[-1]
        try:
            for p in params:
                p.requires_grad_(True)
            for chunk, u in enumerate(seen):
                with torch.enable_grad():
                    z = self.target.flat(self.run.values(chunk, [output])[output], self.run.images[chunk])
                    grads = torch.autograd.grad(z, params, u, allow_unused=True)
                for t, g in zip(total, grads, strict=True):
                    if g is not None:
                        t += g
        finally:
            for p, flag in zip(params, flags, strict=True):
                p.requires_grad_(flag)
        return [ly.columns(w, b) for ly, w, b in zip(layers, total[::2], total[1::2], strict=True)]


def _set(layers: list[_Layer], change: Columns, fraction: float) -> None:
    for layer, columns in zip(layers, change, strict=True):
        layer.set(fraction * columns)


def _dot(a: Columns, b: Columns) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
