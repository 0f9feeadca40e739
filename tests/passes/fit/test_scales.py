"""Nothing knows how large activations are, and nothing waits for ever for numbers to become better."""

from __future__ import annotations

import math
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from lmfx.calibration.fitting import _Vectors
from lmfx.calibration.images import as_calibration
from lmfx.calibration.surrogates import affine_surrogates
from lmfx.importance.pool import run_jobs
from lmfx.passes.errors import InputError
from lmfx.passes.fit import normal_equations as systems
from lmfx.passes.fit.closed_form import GRID, Gram, fit_cg, solve
from lmfx.passes.fit.normal_equations import power_of_two
from lmfx.passes.ir import ConvConfig
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import _difference
from lmfx.training.losses import normalised_error

F64 = torch.float64
ONES = ((1, 1), (1, 1))
SCALES = [1e-30, 1e-8, 1e8, 1e30]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sums(x: Tensor, y: Tensor, v: Tensor | None = None, **options: Any) -> Gram:
    gram = Gram(x.shape[1], (3, 3), (1, 1), ONES, {"y": y.shape[1]}, sides=0 if v is None else v.shape[1], **options)
    gram.update(x, {"y": y}, vectors=v)
    return gram


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- systems end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [1.0, 1e-8, 1e8, 0.3])
def test_constant_images_beside_a_vector_that_varies_are_fitted(
    depthwise: bool, dtype: torch.dtype, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: calls.append(1) or cholesky(a))
    for seed in range(4):
        # Within a frame the patches are all alike; no zeros of a padding are seen.
        x = (size * randn(1, 4, 1, 1, seed=seed)).to(torch.float32).expand(24, 4, 9, 9)
        v = randn(24, 1, seed=seed + 1)
        y = (3.0 + v[:, :, None, None] * randn(1, 4, 1, 1, seed=seed + 2)).expand(24, 4, 7, 7)
        gram = Gram(4, (3, 3), (1, 1), ((0, 0), (0, 0)), {"y": 4}, depthwise=depthwise, dtype=dtype, sides=1)
        gram.update(x, {"y": y}, vectors=v)
        for damping in (0.0, 0.02, "auto"):
            calls.clear()
            found = solve(gram, "y", (3, 3), depthwise, damping=damping)  # type: ignore[arg-type]
            assert len(calls) <= len(systems.MORE) * (2 + len(GRID))
            # What never varies explains nothing, and what varies is seen as well as without it.
            given = found.weight * (x[0, :, 0, 0] if not depthwise else x[0, :, :1, 0])[..., None, None]
            assert float(given.abs().max()) < (0.1 if dtype == F64 else 3.0)
            assert found.side is not None
            assert float(found.residual.sum()) < 0.5 * float(y.var((0, 2, 3)).sum())


@pytest.mark.parametrize("off", [1e-9, 1e-5, 1e-3])
@pytest.mark.parametrize("damping", [0.0, 1e-4, "auto"])
def test_rounding_that_makes_pixels_singular_damps_no_vector(off: float, damping: Any) -> None:
    """Sums of constant pixels that are off by a share of themselves, as on a machine that adds up in another order."""
    x, v = randn(1, 4, 1, 1).expand(24, 4, 9, 9), randn(24, 1, seed=1)
    y = (3.0 + v[:, :, None, None] * randn(1, 4, 1, 1, seed=2)).expand(24, 4, 7, 7)
    gram = Gram(4, (3, 3), (1, 1), ((0, 0), (0, 0)), {"y": 4}, dtype=torch.float32, sides=1)
    gram.update(x, {"y": y}, vectors=v)
    for seed, part in enumerate(gram._sums.values()):
        part.xx[:, :36, :36] += off * part.n * float(x.square().mean()) * randn(1, 36, 36, seed=seed + 3)
    found = solve(gram, "y", (3, 3), damping=damping)
    assert found.side is not None and relative(found.side[:, 0], randn(4, seed=2)) < 0.1
    assert float(found.residual.sum()) < 0.01 * float(y.var((0, 2, 3)).sum())


def test_a_factorisation_that_is_never_sound_is_an_error_after_a_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = sums(randn(8, 2, 5, 5), randn(8, 2, 5, 5, seed=1))
    calls = []

    def singular(a: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return torch.full_like(a, float("nan")), torch.zeros(len(a), dtype=torch.int32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", singular)
    with pytest.raises(InputError, match="cannot be factorised"):
        solve(gram, "y", (3, 3), damping=0.1)
    assert len(calls) == len(systems.MORE) < 20


def test_sums_that_overflow_float64_are_refused_by_that_name() -> None:
    x, y = randn(8, 2, 5, 5), randn(8, 2, 5, 5, seed=1)
    with pytest.raises(InputError, match="not finite even in float64"):
        solve(sums(1e200 * x, y), "y", (3, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_and_large_ones_are_not(bad: float) -> None:
    x, y = randn(8, 2, 5, 5, dtype=torch.float32), randn(8, 2, 5, 5, seed=1, dtype=torch.float32)
    gram = sums(1e37 * x.abs(), y, dtype=torch.float32)  # their sum is over what float32 can hold
    assert solve(gram, "y", (3, 3)).weight.isfinite().all()
    x[3, 1, 2, 2] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        sums(x, y)


# --- one network in other units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("depthwise", [False, True])
def test_a_fit_in_other_units_is_the_fit(scale: float, dtype: torch.dtype, depthwise: bool) -> None:
    x = randn(8, 3, 9, 8, dtype=torch.float32) + 1
    y, v = randn(8, 3, 9, 8, seed=1, dtype=torch.float32) + x.roll(1, 2), randn(8, 2, seed=2)
    options: dict[str, Any] = {"dtype": dtype, "depthwise": depthwise}
    found = [
        solve(sums(a * x, b * y, c * v, **options), "y", (3, 3), damping=1e-2)
        for a, b, c in ((1.0, 1.0, 1.0), (scale, 1.0, 1.0), (1.0, scale, 1.0), (1.0, 1.0, scale), (scale, 1e3, 1e-3))
    ]
    first = found[0]
    assert first.side is not None
    for fit, (a, b, c) in zip(
        found[1:], ((scale, 1.0, 1.0), (1.0, scale, 1.0), (1.0, 1.0, scale), (scale, 1e3, 1e-3)), strict=True
    ):
        assert fit.side is not None
        assert relative(fit.weight * (a / b), first.weight) < 1e-4
        assert relative(fit.bias / b, first.bias) < 1e-4
        assert relative(fit.side * (c / b), first.side) < 1e-4
        assert relative(fit.residual / b**2, first.residual) < 1e-4


def test_channels_of_very_different_sizes_lose_nothing_in_float32_sums() -> None:
    x = randn(16, 2, 9, 8, dtype=torch.float32)
    x[:, 0] *= 1e-18
    x[:, 1] *= 1e-25  # of which squares vanish in float32
    gram = Gram(2, (1, 1), (1, 1), ((0, 0), (0, 0)), {"y": 2}, depthwise=True, dtype=torch.float32)
    y = torch.stack([2e25 * x[:, 0], 3e25 * x[:, 1]], 1)
    gram.update(x, {"y": y})
    weight = solve(gram, "y", (1, 1), damping=0.0).weight.flatten()
    assert torch.allclose(weight, torch.tensor([2e25, 3e25], dtype=F64), rtol=1e-4)


@pytest.mark.parametrize("scale", SCALES)
def test_conjugate_gradients_in_other_units_are_the_same(scale: float) -> None:
    config = ConvConfig(4, 3, (3, 3), (1, 1), ONES, (1, 1))
    x, y = randn(8, 4, 9, 8, dtype=torch.float32) + 1, randn(8, 3, 9, 8, seed=1, dtype=torch.float32)
    prior = (randn(3, 4, 3, 3, seed=2), randn(3))
    first = fit_cg([x], [y], config, prior)
    assert relative(first.weight, prior[0]) > 0.5
    for a, b in ((scale, 1.0), (1.0, scale), (scale, scale)):
        found = fit_cg([(a * x)], [(b * y)], config, (prior[0] * (b / a), prior[1]))
        assert relative(found.weight * (a / b), first.weight) < 1e-3
        assert relative(found.bias / b, first.bias) < 1e-3
        assert relative(found.residual / b**2, first.residual) < 1e-3


@pytest.mark.parametrize("iterative", [False, True])
def test_a_channel_that_a_gate_has_closed_gets_no_weight(iterative: bool) -> None:
    """Variations of 1e-38 beside those of 1 tell nothing, and a weight of 1e38 would overflow in the network."""
    x, y = torch.rand(4, 3, 6, 6), torch.rand(4, 3, 6, 6)
    y[:, 1:] = x[:, 1:]
    x[:, 0] *= 1e-38
    if iterative:
        found = fit_cg([x], [y], ConvConfig(3, 3, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), groups=3), damping=1e-6)
    else:
        gram = Gram(3, (1, 1), (1, 1), ((0, 0), (0, 0)), {"y": 3}, depthwise=True, rounding=1e-6)
        gram.update(x, {"y": y})
        found = solve(gram, "y", (1, 1), True, damping=1e-6)
    assert found.weight.flatten()[0].abs() < 1
    torch.testing.assert_close(found.weight.flatten()[1:], torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.bias[0], y[:, 0].double().mean(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e12])
def test_conjugate_gradients_on_constant_images_give_the_mean(dtype: torch.dtype, value: float) -> None:
    config = ConvConfig(4, 3, (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1))
    x, y = torch.full((8, 4, 9, 8), value, dtype=dtype), randn(8, 3, 7, 6, seed=1, dtype=dtype) + 5
    found = fit_cg([x], [y], config)
    given = F.conv2d(x.double(), found.weight, found.bias)
    assert torch.allclose(given.mean((0, 2, 3)), y.double().mean((0, 2, 3)), rtol=1e-3)
    assert float(found.weight.abs().max()) * max(value, 1.0) < 1.0


class Two(nn.Module):
    """conv, ReLU, conv, ReLU, conv, whose inner activations are `scale` times as large; one and the same function."""

    def __init__(self, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (8, 4)))
        with torch.no_grad():
            self.a.bias += shift
            self.b.bias -= F.conv2d(torch.full((1, 8, 3, 3), shift), self.b.weight)[0, :, 0, 0]
            self.a.weight *= scale
            self.a.bias *= scale
            self.b.weight /= scale

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x))))).mean((2, 3))


IMAGES = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def scores(model: nn.Module, **options: Any) -> dict[str, float]:
    graph = lmfx.trace(model.eval(), IMAGES[:1])
    return {k: v for k, v in lmfx.score(graph, calibration=IMAGES, progress=False, **options).items() if "fit" in k}


@pytest.mark.parametrize("scale", [2.0**-66, 2.0**-27, 2.0**27, 2.0**66])
@pytest.mark.parametrize("exact", [False, True])
def test_a_network_with_small_or_large_activations_gets_the_same_scores(
    scale: float, exact: bool, tmp_path: Any
) -> None:
    first = scores(Two(), exact=exact, cache_dir=tmp_path)
    found = scores(Two(scale), exact=exact, cache_dir=tmp_path)
    assert found.keys() == first.keys() and len(first) > 10
    assert list(found.values()) == pytest.approx(list(first.values()), rel=1e-2)


def test_a_network_with_activations_far_from_their_variations_has_finite_scores(tmp_path: Any) -> None:
    found = scores(Two(1.0, 1e6), exact=True, cache_dir=tmp_path)
    assert len(found) > 10 and all(v <= 0 and math.isfinite(v) for v in found.values())


def surrogate(model: nn.Module, images: Tensor = IMAGES) -> dict[str, tuple[Tensor, Tensor]]:
    graph = lmfx.trace(model.eval(), images[:1])
    return affine_surrogates(Network(graph), as_calibration(images, images[:1]))


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-27, 2.0**27, 2.0**100])
def test_affine_surrogates_scale_with_the_activations(scale: float) -> None:
    first, found = surrogate(Two()), surrogate(Two(scale))
    name = next(iter(first))
    assert first[name][0].abs().min() > 0.05
    assert torch.allclose(found[name][0], first[name][0], rtol=1e-4)
    assert torch.allclose(found[name][1] / scale, first[name][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-12, 1e12])
def test_a_channel_that_never_varies_keeps_its_mean(value: float) -> None:
    model = Two()
    with torch.no_grad():
        model.a.weight[2] = 0.0
        model.a.bias[2] = value
    scale, bias = next(iter(surrogate(model).values()))
    assert scale[2] == 0 and bias[2] == torch.tensor(value)
    assert (scale[[0, 1, 3]] != 0).all()


def test_a_channel_far_from_zero_keeps_the_slope_of_its_activation() -> None:
    """A thousand standard deviations away a ReLU is the identity."""
    scale, bias = next(iter(surrogate(Two(1.0, 1e3).double(), IMAGES.double()).values()))
    assert torch.allclose(scale, torch.ones_like(scale), rtol=0, atol=1e-9)
    assert torch.allclose(bias, torch.zeros_like(bias), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_distances_to_the_teacher_are_relative(scale: float) -> None:
    got, wanted = randn(4, 9, dtype=torch.float32), randn(4, 9, seed=1, dtype=torch.float32)
    expected = float((got - wanted).square().mean() / wanted.var())
    assert float(normalised_error(scale * got, scale * wanted)) == pytest.approx(expected, rel=1e-4)


def test_distances_to_what_does_not_vary_are_finite() -> None:
    for value in (0.0, 1.0, 1e-20):
        found = normalised_error(torch.full((4, 9), value), torch.full((4, 9), value))
        assert float(found) == 0.0
        assert normalised_error(torch.ones(4, 9), torch.full((4, 9), value)).isfinite()


@pytest.mark.parametrize("scale", [1e-38, 1e-35, 1.0, 1e30])
def test_small_outputs_that_differ_differ(scale: float) -> None:
    a = torch.linspace(1, 2, 9)
    assert _difference(scale * a, scale * a) is None
    assert "relative error" in str(_difference(scale * a, scale * a * 1.1))
    assert "relative error" in str(_difference(torch.zeros(9), scale * a))


# --- vectors from the side --------------------------------------------------------------------------------------------


def test_a_small_vector_beside_a_large_one_is_seen() -> None:
    large, small = 2.0**27 * randn(48, 20), randn(48, 2, seed=1)
    found = _Vectors.of([large, small], torch.zeros(48, 1, 1, 1))
    rebuilt = torch.linalg.lstsq(found.values, small - small.mean(0)).solution
    alone = _Vectors.of([2.0**-27 * large, small], torch.zeros(48, 1, 1, 1))
    again = torch.linalg.lstsq(alone.values, small - small.mean(0)).solution
    errors = [relative(f.values @ w, small - small.mean(0)) for f, w in ((found, rebuilt), (alone, again))]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize("value", [0.1, 1e-20, 3e7])
def test_a_vector_that_no_image_changes_has_no_components(value: float) -> None:
    constant = torch.full((48, 5), value, dtype=torch.float32) * torch.linspace(1, 2, 5)
    assert _Vectors.of([constant], torch.zeros(48, 1, 1, 1)).values.shape == (48, 0)
    beside = _Vectors.of([constant, randn(48, 3)], torch.zeros(48, 1, 1, 1))
    assert beside.values.shape == (48, 3)
    assert beside.basis[:5].abs().max() == 0


def test_vectors_that_are_not_finite_are_refused() -> None:
    v = randn(48, 3)
    v[2, 1] = float("inf")
    with pytest.raises(InputError, match="vectors from the side"):
        _Vectors.of([v], torch.zeros(48, 1, 1, 1))


# --- other loops ------------------------------------------------------------------------------------------------------


def test_powers_of_two_are_at_most_their_number() -> None:
    sizes = torch.tensor([1.0, 1.5, 2.0, 3.9, 1e-40, 1e38, 0.0, float("inf"), float("nan")])
    found = power_of_two(sizes)
    assert found[:4].tolist() == [1.0, 1.0, 2.0, 2.0]
    ratio = sizes[:6].double() / found[:6]
    assert bool(((ratio >= 1) & (ratio < 2)).all())
    assert found[6:].tolist() == [1.0, 1.0, 1.0]


class Broken(ThreadPoolExecutor):
    def submit(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise BrokenProcessPool("broken from the start")


def test_pools_that_are_all_broken_from_the_start_are_an_error() -> None:
    made: list[Executor] = []

    def factory() -> Executor:
        made.append(Broken(1))
        return made[-1]

    with pytest.raises(InputError, match="broken before they took a job"):
        list(run_jobs(str, [1, 2, 3], factory))
    assert 1 < len(made) < 10
    one = Broken(1)
    with pytest.raises(InputError, match="broken before they took a job"):
        list(run_jobs(str, [1, 2, 3], lambda: one))
