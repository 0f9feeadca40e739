"""The closed-form fit against exact convolutions, lstsq and the error that is really made."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmfx.passes.algebra.linear import LinearOp
from lmfx.passes.errors import InputError, LmfxError, OptionError
from lmfx.passes.fit import closed_form as fit
from lmfx.passes.fit import conjugate_gradients as cg
from lmfx.passes.fit import gram
from lmfx.passes.fit import normal_equations as systems
from lmfx.passes.fit.closed_form import Gram, evaluate, fit_cg, sample_positions, solve
from lmfx.passes.ir import ConvConfig

F64 = torch.float64
Pads = tuple[tuple[int, int], ...]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def conv(weight: Tensor, bias: Tensor, stride: tuple[int, ...], pads: Pads, groups: int = 1) -> LinearOp:
    return LinearOp(weight, bias, stride, pads, (1,) * len(stride), groups)


def noisy(out: int = 5, images: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An input and a 3 x 3 convolution of it with noise, (images, 4, 9, 8) and (images, out, 9, 8)."""
    x = randn(images, 4, 9, 8, seed=seed) + 1.0
    op = conv(randn(out, 4, 3, 3, seed=seed + 1), randn(out, seed=seed + 2), (1, 1), ((1, 1), (1, 1)))
    return x, op(x) + randn(images, out, 9, 8, seed=seed + 3)


def summed(x: Tensor, y: Tensor, kernel: tuple[int, ...], pads: Pads, **options: bool) -> Gram:
    sums = Gram(x.shape[1], kernel, (1,) * len(kernel), pads, {"y": y.shape[1]}, **options)
    sums.update(x, {"y": y})
    return sums


def error(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, pads: Pads, groups: int = 1) -> Tensor:
    op = conv(weight, bias, (1,) * len(pads), pads, groups)
    return (op(x) - y).square().transpose(0, 1).flatten(1).mean(1)


ONES = ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("kernel", "stride", "pads", "size"),
    [
        ((3,), (2,), ((1, 0),), (17,)),
        ((3, 3), (1, 1), ONES, (8, 9)),
        ((3, 2), (2, 1), ((2, 0), (0, 1)), (9, 8)),
        ((5, 4), (2, 3), ((2, 2), (1, 3)), (13, 12)),
        ((2, 1, 3), (1, 1, 2), ((0, 1), (0, 0), (1, 1)), (5, 4, 7)),
    ],
)
def test_an_exact_convolution_is_recovered(
    kernel: tuple[int, ...], stride: tuple[int, ...], pads: Pads, size: tuple[int, ...]
) -> None:
    op = conv(randn(6, 3, *kernel), randn(6, seed=1), stride, pads)
    x = randn(8, 3, *size, seed=2) + 0.5
    y = op(x)
    sums = Gram(3, kernel, stride, pads, {"y": 6})
    sums.update(x, {"y": y})
    found = solve(sums, "y", kernel, damping=0.0)
    assert torch.allclose(found.weight, op.weight, rtol=0, atol=1e-8)
    assert torch.allclose(found.bias, op.bias, rtol=0, atol=1e-8)
    assert found.residual.max() < 1e-12 and found.heldout is not None and found.heldout.max() < 1e-12
    assert solve(sums, "y", kernel).residual.max() < 1e-8


def test_an_exact_convolution_is_recovered_from_a_few_sampled_pixels_of_float32_features() -> None:
    op = conv(randn(6, 3, 3, 3), randn(6, seed=1), (2, 2), ONES)
    x = randn(32, 3, 16, 16, seed=2).float()
    y = op(x).float()
    sums = Gram(3, (3, 3), (2, 2), ONES, {"y": 6})
    positions = sample_positions((8, 8), 32, 9, torch.Generator().manual_seed(0))
    sums.update(x, {"y": y}, positions)
    assert sums.samples == 32 * 9
    assert torch.allclose(solve(sums, "y", (3, 3), damping=0.0).weight, op.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 2), (4, 4), (5, 1), (1, 3)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_a_smaller_kernel_out_of_the_largest_equals_its_own_sums(kernel: tuple[int, int], depthwise: bool) -> None:
    x, y = noisy(out=4)
    big = summed(x, y, (5, 5), ((2, 2), (2, 2)))
    pads = big.padding_of(kernel)
    own = summed(x, y, kernel, pads, depthwise=depthwise)
    a, b = solve(big, "y", kernel, depthwise, damping=1e-3), solve(own, "y", kernel, damping=1e-3, depthwise=depthwise)
    for name in ("weight", "bias", "residual", "heldout"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-10), name
    assert torch.allclose(a.residual, error(x, y, a.weight, a.bias, pads, 4 if depthwise else 1), atol=1e-10)


def test_even_kernels_lie_where_their_padding_says() -> None:
    x, y = noisy()
    big = summed(x, y, (3, 3), ONES)
    for before in ((0, 0), (1, 0), (1, 1)):
        pads = tuple((b, 1 - b) for b in before)
        found = solve(big, "y", (2, 2), damping=0.0, before=before)
        assert torch.allclose(found.residual, error(x, y, found.weight, found.bias, pads), atol=1e-10)


def test_a_depthwise_fit_equals_lstsq_on_every_channel() -> None:
    x, y = noisy(out=4)
    for sums in (summed(x, y, (3, 3), ONES), summed(x, y, (3, 3), ONES, depthwise=True)):
        found = solve(sums, "y", (3, 3), depthwise=True, damping=0.0)
        patches = F.unfold(x, 3, padding=1).unflatten(1, (4, 9)).permute(1, 0, 3, 2).flatten(1, 2)
        rows = F.pad(patches, (0, 1), value=1.0)
        wanted = torch.linalg.lstsq(rows, y.transpose(0, 1).flatten(1)[:, :, None]).solution[:, :, 0]
        assert torch.allclose(found.weight.flatten(1), wanted[:, :-1], atol=1e-10)
        assert torch.allclose(found.bias, wanted[:, -1], atol=1e-10)


@pytest.mark.parametrize("damping", [0.0, 1e-2, 10.0, "auto"])
@pytest.mark.parametrize("with_prior", [False, True])
def test_the_residual_is_the_error_that_is_really_made(damping: float, with_prior: bool) -> None:
    x, y = noisy()
    prior = (randn(5, 4, 3, 3, seed=9), randn(5, seed=8)) if with_prior else None
    sums = summed(x, y, (3, 3), ONES)
    found = solve(sums, "y", (3, 3), prior=prior, damping=damping)
    actual = error(x, y, found.weight, found.bias, ONES)
    assert torch.allclose(found.residual, actual, rtol=1e-10)
    assert torch.allclose(evaluate(sums, "y", found.weight, found.bias), actual, rtol=1e-10)


def test_the_heldout_error_is_that_of_a_fit_without_the_held_out_images() -> None:
    x, y = noisy(images=8)
    held = torch.tensor([3, 7])
    rest = torch.tensor([0, 1, 2, 4, 5, 6])
    found = solve(summed(x, y, (3, 3), ONES), "y", (3, 3), damping=1e-2)
    other = solve(summed(x[rest], y[rest], (3, 3), ONES, holdout=False), "y", (3, 3), damping=1e-2)
    assert other.heldout is None and found.heldout is not None
    assert torch.allclose(found.heldout, error(x[held], y[held], other.weight, other.bias, ONES))


def test_any_convolution_is_judged_from_the_sums_alone() -> None:
    x, y = noisy(out=4)
    sums = summed(x, y, (5, 5), ((2, 2), (2, 2)))
    for shape, groups in (((4, 4, 3, 3), 1), ((4, 2, 3, 3), 2), ((4, 1, 3, 3), 4)):
        weight, bias = randn(*shape, seed=5), randn(4, seed=6)
        assert torch.allclose(evaluate(sums, "y", weight, bias), error(x, y, weight, bias, ONES, groups))
    weight, bias = randn(4, 4, 3, 3, seed=5), randn(4, seed=6)
    wide = LinearOp(weight, bias, (1, 1), ((2, 2), (2, 2)), (2, 2))
    seen = evaluate(sums, "y", weight, bias, before=(2, 2), dilation=(2, 2))
    assert torch.allclose(seen, (wide(x) - y).square().mean((0, 2, 3)))


@pytest.mark.parametrize(("kernel", "pads", "before"), [(5, (4, 4), 2), (4, (3, 4), 3), (5, (1, 7), 1)])
def test_dilated_sums_hold_smaller_kernels_of_their_dilation(kernel: int, pads: tuple[int, int], before: int) -> None:
    x, weight, bias = randn(6, 3, 30), randn(4, 3, 3, seed=1), randn(4, seed=2)
    inner = ((before, sum(pads) - 2 * (kernel - 3) - before),)
    y = LinearOp(weight, bias, (1,), inner, (2,))(x)
    sums = Gram(3, (kernel,), (1,), (pads,), {"y": 4}, dilation=(2,))
    sums.update(x, {"y": y})
    assert sums.padding_of((3,)) == inner
    found = solve(sums, "y", (3,), damping=0.0)
    torch.testing.assert_close(found.weight, weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("before", "dilation"), [(3, 2), (4, 1), (2, 3)])
def test_a_kernel_with_taps_between_those_of_dilated_sums_is_refused(before: int, dilation: int) -> None:
    x, y = randn(6, 3, 30), randn(6, 4, 30, seed=1)
    sums = Gram(3, (5,), (1,), ((4, 4),), {"y": 4}, dilation=(2,))
    sums.update(x, {"y": y})
    with pytest.raises(OptionError, match="between its taps"):
        sums.sub((2,), (before,), (dilation,))


def test_damping_pulls_the_weight_to_the_prior_and_leaves_the_bias_free() -> None:
    x, y = noisy()
    sums = summed(x, y, (3, 3), ONES)
    w0, b0 = randn(5, 4, 3, 3, seed=9), torch.full((5,), 1e6, dtype=F64)
    fits = [solve(sums, "y", (3, 3), prior=(w0, b0), damping=d) for d in (0.0, 1e-2, 1.0, 1e2, 1e8)]
    away = [float((f.weight - w0).norm()) for f in fits]
    errors = [float(f.residual.sum()) for f in fits]
    assert away == sorted(away, reverse=True) and away[-1] < 1e-6 and errors == sorted(errors)
    best = (y - conv(w0, torch.zeros(5, dtype=F64), (1, 1), ONES)(x)).mean((0, 2, 3))
    assert torch.allclose(fits[-1].bias, best, atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, "auto"])
def test_fewer_samples_than_unknowns_give_a_finite_fit(damping: float) -> None:
    x, y = randn(8, 16, 3, 3), randn(8, 4, 3, 3, seed=1)
    sums = summed(x, y, (3, 3), ONES)  # 72 samples, 144 unknowns
    found = solve(sums, "y", (3, 3), damping=damping)
    assert all(t.isfinite().all() for t in (found.weight, found.bias, found.residual))
    assert found.residual.sum() <= y.var((0, 2, 3)).sum()


def test_damping_is_chosen_by_what_helps_on_images_that_were_held_out() -> None:
    clean = randn(4, 16, 3, 3, seed=7) / 12
    x = randn(16, 16, 3, 3, seed=8)
    y = F.conv2d(x, clean, padding=1) + randn(16, 4, 3, 3, seed=9)  # 144 samples, 144 unknowns, half of it noise
    new = randn(64, 16, 3, 3, seed=10)
    wanted = F.conv2d(new, clean, padding=1)
    sums = summed(x, y, (3, 3), ONES)
    errors = {d: solve(sums, "y", (3, 3), damping=d) for d in (1e-7, "auto", 100.0)}
    auto = errors["auto"]
    by_damping = {d: float(error(new, wanted, f.weight, f.bias, ONES).sum()) for d, f in errors.items()}
    assert by_damping["auto"] == min(by_damping.values()) and 1e-7 < auto.damping < 100.0
    assert auto.residual.sum() < 0.9 * auto.heldout.sum()  # only the second tells of new images


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("with_prior", [False, True])
def test_the_chosen_damping_is_the_best_of_the_grid_on_the_held_out_images(depthwise: bool, with_prior: bool) -> None:
    x, y = noisy(out=4, images=6)
    y = y + torch.arange(6.0)[:, None, None, None]  # images with other means than the held-out one
    positions = sample_positions((9, 8), 6, 10, torch.Generator().manual_seed(0))
    sums = Gram(4, (3, 3), (1, 1), ONES, {"y": 4})
    sums.update(x, {"y": y}, positions)
    prior = (randn(4, 1 if depthwise else 4, 3, 3, seed=9), randn(4, seed=8)) if with_prior else None
    heldout = {d: solve(sums, "y", (3, 3), depthwise, prior, d).heldout for d in fit.GRID}
    best = min(fit.GRID, key=lambda d: float(heldout[d].sum()))
    assert fit.GRID[0] < best < fit.GRID[-1]
    assert solve(sums, "y", (3, 3), depthwise, prior).damping == best


def test_dead_and_repeated_channels_are_no_trouble() -> None:
    x, y = noisy(out=4)
    x[:, 1] = 0.0
    x[:, 2] = x[:, 3]
    sums = summed(x, y, (3, 3), ONES)
    for depthwise in (False, True):
        for damping in (0.0, 1e-6, "auto"):
            found = solve(sums, "y", (3, 3), depthwise, damping=damping)
            assert found.weight.isfinite().all() and found.weight.abs().max() < 1e3
            actual = error(x, y, found.weight, found.bias, ONES, 4 if depthwise else 1)
            assert torch.allclose(found.residual, actual, rtol=1e-6)
    flat = summed(torch.zeros_like(x), y, (3, 3), ONES)
    assert torch.allclose(solve(flat, "y", (3, 3)).residual, y.var((0, 2, 3), correction=0))


def test_many_updates_are_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = noisy(out=4, images=9)
    for depthwise in (False, True):
        whole = summed(x, y, (3, 3), ONES, depthwise=depthwise)
        with monkeypatch.context() as patch:
            patch.setattr(gram, "CHUNK_BYTES", 1)
            patch.setattr(systems, "BLOCK", 7)
            parts = Gram(4, (3, 3), (1, 1), ONES, {"y": 4}, depthwise=depthwise)
            for i in (0, 2, 3):
                j = {0: 2, 2: 3, 3: 9}[i]
                parts.update(x[i:j], {"y": y[i:j]})
        a, b = solve(whole, "y", (3, 3)), solve(parts, "y", (3, 3))
        assert whole.samples == parts.samples == 9 * 72
        for name in ("weight", "bias", "residual", "heldout"):
            assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-10), name


def test_an_update_after_a_solve_is_seen() -> None:
    x, y = noisy()
    sums = summed(x[:4], y[:4], (3, 3), ONES)
    solve(sums, "y", (3, 3))
    sums.update(x[4:], {"y": y[4:]})
    assert torch.allclose(solve(sums, "y", (3, 3)).weight, solve(summed(x, y, (3, 3), ONES), "y", (3, 3)).weight)


def test_weights_count_a_sample_as_often_as_they_say() -> None:
    x, y = noisy(images=4)
    positions = torch.arange(72).expand(4, -1)
    twice = Gram(4, (3, 3), (1, 1), ONES, {"y": 5})
    twice.update(x, {"y": y}, torch.cat([positions, positions[:, :10]], 1))
    weighted = Gram(4, (3, 3), (1, 1), ONES, {"y": 5})
    weights = torch.ones(4, 72)
    weights[:, :10] = 2
    weighted.update(x, {"y": y}, positions, weights)
    a, b = (solve(s, "y", (3, 3), damping=1e-2) for s in (twice, weighted))
    assert twice.samples == weighted.samples
    assert torch.allclose(a.weight, b.weight) and torch.allclose(a.residual, b.residual)


def test_several_targets_share_one_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = noisy()
    sums = Gram(4, (3, 3), (1, 1), ONES, {"a": 5, "b": 2})
    sums.update(x, {"a": y, "b": y[:, :2].square(), "unused": y})
    calls = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: calls.append(1) or cholesky(a))
    solve(sums, "a", (3, 3), damping=1e-2, heldout=False)
    second = solve(sums, "b", (3, 3), damping=1e-2, heldout=False)
    assert len(calls) == 1
    assert torch.allclose(
        second.weight, solve(summed(x, y[:, :2].square(), (3, 3), ONES), "y", (3, 3), damping=1e-2).weight
    )


def test_above_the_size_where_it_is_cheap_damping_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = summed(*noisy(), (3, 3), ONES)
    monkeypatch.setattr(fit, "AUTO_UNKNOWNS", 10)
    assert solve(sums, "y", (3, 3)).damping == systems.usual_damping(36, 8 * 72)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("with_prior", [False, True])
def test_conjugate_gradients_agree_with_the_factorisation(groups: int, with_prior: bool) -> None:
    x, y = noisy(out=4)
    config = ConvConfig(4, 4, (3, 2), (2, 1), ((1, 1), (1, 0)), (1, 1), groups)
    y = y[:, :, ::2]
    prior = (randn(4, 4 // groups, 3, 2, seed=9), randn(4, seed=8)) if with_prior else None
    found = fit_cg(x.split(3), y.split(3), config, prior, damping=1e-2, iterations=200, tolerance=1e-12)
    if groups == 2:
        halves = [(x[:, i : i + 2], y[:, i : i + 2], slice(i, i + 2)) for i in (0, 2)]
    else:
        halves = [(x, y, slice(None))]
    for xs, ys, part in halves:
        sums = Gram(xs.shape[1], (3, 2), (2, 1), config.padding, {"y": ys.shape[1]})
        sums.update(xs, {"y": ys})
        own = None if prior is None else (prior[0][part], prior[1][part])
        wanted = solve(sums, "y", (3, 2), depthwise=groups == 4, prior=own, damping=1e-2)
        assert torch.allclose(found.weight[part], wanted.weight, atol=1e-8)
        assert torch.allclose(found.bias[part], wanted.bias, atol=1e-8)
        assert torch.allclose(found.residual[part], wanted.residual, rtol=1e-8)


def test_conjugate_gradients_improve_on_the_prior_from_the_first_iteration() -> None:
    x, y = noisy()
    config = ConvConfig(4, 5, (3, 3), (1, 1), ONES, (1, 1))
    prior = (randn(5, 4, 3, 3, seed=9), randn(5, seed=8))
    errors = [float(fit_cg([x], [y], config, prior, 1e-2, n).residual.sum()) for n in (0, 1, 3, 30)]
    assert errors == sorted(errors, reverse=True)


def test_sampled_positions_differ_within_an_image_and_cover_all_when_there_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    some = sample_positions((7, 6), 5, 10, generator)
    assert some.shape == (5, 10) and all(len(row.unique()) == 10 for row in some) and int(some.max()) < 42
    assert torch.equal(some, sample_positions((7, 6), 5, 10, torch.Generator().manual_seed(0)))
    assert torch.equal(sample_positions((2, 2), 3, 100), torch.arange(4).expand(3, -1))


def fed() -> Gram:
    return summed(*noisy(), (3, 3), ONES)


def bad_update(**changes: Tensor) -> None:
    x, y = noisy()
    values = {"x": x, "targets": {"y": y}, "positions": torch.zeros(8, 4, dtype=torch.long), **changes}
    Gram(4, (3, 3), (1, 1), ONES, {"y": 5}).update(**values)  # type: ignore[arg-type]


X, Y = noisy()
CONFIG = ConvConfig(4, 5, (3, 3), (1, 1), ONES, (1, 1))


@pytest.mark.parametrize(
    ("kind", "words", "make"),
    [
        (InputError, "x is", lambda: bad_update(x=X[:, :3])),
        (InputError, "x is", lambda: bad_update(x=X[0])),
        (InputError, "target 'y' is", lambda: bad_update(targets={"y": Y[:, :, 1:]})),
        (InputError, "no value for target", lambda: bad_update(targets={"z": Y})),
        (InputError, "positions", lambda: bad_update(positions=torch.full((8, 4), 72))),
        (InputError, "positions", lambda: bad_update(positions=torch.zeros(4, dtype=torch.long))),
        (InputError, "weights", lambda: bad_update(weights=torch.ones(8, 3))),
        (InputError, "weights", lambda: bad_update(weights=-torch.ones(8, 4))),
        (InputError, "NaN", lambda: bad_update(x=X * float("nan"))),
        (InputError, "NaN", lambda: bad_update(targets={"y": Y * float("inf")})),
        (OptionError, "nothing to fit", lambda: solve(Gram(4, (3,), (1,), ((1, 1),), {"y": 2}), "y", (3,))),
        (OptionError, "no target", lambda: solve(fed(), "z", (3, 3))),
        (OptionError, "reaches outside", lambda: solve(fed(), "y", (3, 3), before=(0, 0))),
        (OptionError, "reaches outside", lambda: solve(fed(), "y", (5, 5))),
        (OptionError, "other dimensions", lambda: fed().sub((3,))),
        (OptionError, "depthwise", lambda: solve(fed(), "y", (3, 3), depthwise=True)),
        (OptionError, "damping", lambda: solve(fed(), "y", (3, 3), damping=-1.0)),
        (OptionError, "damping", lambda: solve(fed(), "y", (3, 3), damping=float("nan"))),
        (OptionError, "weight", lambda: solve(fed(), "y", (3, 3), prior=(randn(5, 4, 1, 1), randn(5)))),
        (OptionError, "do not map", lambda: evaluate(fed(), "y", randn(5, 3, 3, 3), randn(5))),
        (OptionError, "crops", lambda: Gram(4, (3,), (1,), ((0, 0),), {"y": 2}).padding_of((1,))),
        (OptionError, "one entry a", lambda: Gram(4, (3, 3), (1,), ((0, 0),), {"y": 2})),
        (OptionError, "no convolution", lambda: Gram(4, (3,), (1,), ((-1, 0),), {"y": 2})),
        (OptionError, "keeps the 4 channels", lambda: Gram(4, (3,), (1,), ((1, 1),), {"y": 2}, depthwise=True)),
        (OptionError, "use fit_cg", lambda: Gram(4096, (3,), (1,), ((1, 1),), {"y": 2})),
        (OptionError, "no pixels", lambda: sample_positions((0, 3), 2, 1)),
        (InputError, "at least 1", lambda: fit_cg([], [], CONFIG)),
        (InputError, "do not fit", lambda: fit_cg([X], [Y[:, :3]], CONFIG)),
        (InputError, "NaN", lambda: fit_cg([X * float("nan")], [Y], CONFIG)),
        (OptionError, "prior", lambda: fit_cg([X], [Y], CONFIG, prior=(randn(5, 4, 1, 1), randn(5)))),
        (OptionError, "damping", lambda: fit_cg([X], [Y], CONFIG, damping=float("nan"))),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_seen(kind: type[LmfxError], words: str, make: object) -> None:
    with pytest.raises(kind, match=words):
        make()  # type: ignore[operator]


def test_the_names_of_the_fit_are_in_one_place() -> None:
    assert fit.fit_cg is cg.fit_cg and fit.Gram is gram.Gram
