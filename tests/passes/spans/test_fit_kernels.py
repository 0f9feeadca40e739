"""Which kernels are tried for a fit, and where they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.calibration.fitting import fit_groups
from lmfx.passes.ir import Candidate, ConvConfig
from lmfx.passes.spans.fit_kernels import centred, fit_kernels


def conv(kernel: tuple[int, ...], dilation: int = 1) -> ConvConfig:
    pads = tuple((dilation * (k - 1) // 2, dilation * k // 2) for k in kernel)
    ones = (1,) * len(kernel)
    return ConvConfig(4, 4, kernel, ones, pads, (dilation,) * len(kernel))


def test_a_small_window_gets_odd_sizes_up_to_seven() -> None:
    ones = (1, 1)
    for window in (conv((1, 1)), conv((3, 3)), conv((7, 7))):
        assert fit_kernels(window, window, None) == [((k, k), ones) for k in (1, 3, 5, 7)]
    assert fit_kernels(conv((3, 3)), conv((3, 3)), 3) == [((k, k), ones) for k in (1, 3)]


def test_a_large_kernel_gets_sizes_between_and_its_reach_with_fewer_taps() -> None:
    found = fit_kernels(conv((31, 31)), conv((31, 31)), None)
    dense = [kernel[0] for kernel, dilation in found if dilation == (1, 1)]
    assert all(kernel[0] == kernel[1] for kernel, _ in found)
    assert dense == sorted(set(dense)) and dense[:4] == [1, 3, 5, 7] and max(dense) < 31
    assert all(b / a < 1.7 for a, b in zip(dense[3:], [*dense[4:], 31], strict=True))
    dilated = {dilation[0]: kernel[0] for kernel, dilation in found if dilation != (1, 1)}
    assert dilated == {2: 16, 3: 11, 4: 8}  # 1 + 30 / d


def test_each_dimension_has_its_own_reach() -> None:
    found = fit_kernels(conv((64, 1)), conv((64, 1)), None)
    assert all(kernel[1] == 1 and dilation[1] == 1 for kernel, dilation in found)
    assert max(kernel[0] for kernel, _ in found) > 32
    assert all(kernel[0] <= 1 and kernel[1] <= 5 for kernel, _ in fit_kernels(conv((1, 5)), conv((1, 5)), None))


@pytest.mark.parametrize(
    ("only", "most"), [(None, None), (conv((31,)), 5)], ids=["several convolutions", "smaller kernels were asked for"]
)
def test_there_are_no_large_kernels_for(only: ConvConfig | None, most: int | None) -> None:
    assert max(kernel[0] for kernel, _ in fit_kernels(conv((31,)), only, most)) <= 7


def test_a_conv_that_a_pool_follows_may_keep_its_own_reach_and_no_more() -> None:
    with_pool = replace(conv((32,)), kernel_size=(33,))
    assert max(d[0] * (k[0] - 1) + 1 for k, d in fit_kernels(with_pool, conv((32,)), None)) <= 32


def test_no_kernel_is_larger_than_what_the_span_sees_though_its_conv_is() -> None:
    for window in ((9, 1), (1, 1), (12, 5)):
        found = fit_kernels(conv(window), conv((31, 31)), None)
        for kernel, dilation in found if window != (1, 1) else found[4:]:
            assert all(d * (k - 1) < w for k, d, w in zip(kernel, dilation, window, strict=True))


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("window", [9, 12, 64])
def test_every_kernel_that_is_tried_fits_into_the_window_and_follows_its_size_rule(window: int, dilation: int) -> None:
    geometry = ConvConfig(4, 6, (window,), (2,), (((window - 1) // 2, window // 2),), (1,))
    for kernel, steps in fit_kernels(geometry, geometry, None):
        found = centred(geometry, kernel, steps, 4, 6)
        assert found is not None
        assert all(found.output_size((n,)) == geometry.output_size((n,)) for n in range(window, window + 9))
        first, last = -found.padding[0][0], -found.padding[0][0] + steps[0] * (kernel[0] - 1)
        assert -geometry.padding[0][0] <= first <= last <= window - 1 - geometry.padding[0][0]


def test_a_kernel_that_would_crop_is_none_unless_half_a_pixel_before_the_centre_serves() -> None:
    even = ConvConfig(4, 4, (4,), (1,), ((1, 2),), (1,))
    assert centred(even, (1,), (1,), 4, 4) == ConvConfig(4, 4, (1,), (1,), ((0, 0),), (1,))
    assert centred(replace(even, padding=((0, 0),)), (1,), (1,), 4, 4) is None


class Sparse(nn.Module):
    """A convolution of 17 taps of which all but every second are zero, and a relu."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.conv = (nn.Conv1d if ndim == 1 else nn.Conv2d)(3, 5, (17, 1)[:ndim], padding=(8, 0)[:ndim])
        with torch.no_grad():
            self.conv.weight[:, :, 1::2] = 0
        self.act, self.last = nn.ReLU(), (nn.Conv1d if ndim == 1 else nn.Conv2d)(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.conv(x)))


@pytest.mark.parametrize("ndim", [1, 2])
def test_a_dilated_fit_finds_a_dilated_convolution_again(ndim: int) -> None:
    torch.manual_seed(0)
    model = Sparse(ndim).double().eval()
    images = torch.randn(24, 3, *(40, 5)[:ndim], dtype=torch.float64)
    graph = lmfx.trace(model, images[:1])
    spans = lmfx.spans(graph, realize=("fit",))
    (fit,) = (c for c in spans if c.conv and c.conv.dilation[0] == 2 and c.realization == "fit")
    assert fit.conv is not None and fit.conv.kernel_size[0] == 9
    (group,) = fit_groups(spans.network, [fit])
    target = model.conv(images).detach()
    op = group.fit(images, {fit.span.output: target})[fit.key]
    made = op.like(images)(images)
    torch.testing.assert_close(made, target, rtol=1e-5, atol=1e-5)
    other = _with(fit, dilation=3, kernel=6)
    (group,) = fit_groups(spans.network, [other])
    far = group.fit(images, {fit.span.output: target})[other.key].like(images)(images)
    assert float((far - target).square().mean()) > 0.1 * float(target.square().mean())


def test_kernels_of_other_dilations_are_fitted_from_sums_of_their_own() -> None:
    """9 taps by twos are 5, by threes 3: what they add to the size of the map less their taps is the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 5, 9, padding=4), nn.ReLU(), nn.Conv1d(5, 4, 1)).double().eval()
    images = torch.randn(32, 3, 40, dtype=torch.float64)
    spans = lmfx.spans(lmfx.trace(model, images[:1]), realize=("fit",))
    fits = [c for c in spans if c.conv and c.conv.dilation[0] in (2, 3) and c.conv.kernel_size[0] in (5, 3)]
    values = {c.span.output: model[:2](images).detach() for c in fits}
    groups = fit_groups(spans.network, fits)
    assert len(fits) == len(groups) == 2
    for group in groups:
        (c,) = group.candidates
        assert c.conv is not None
        op = group.fit(images, values)[c.key]
        config = c.conv
        patches = torch.nn.functional.pad(images, config.padding[0])
        reads = [config.dilation[0] * t for t in range(config.kernel_size[0])]
        x = torch.cat([patches[:, :, t : t + 40] for t in reads], 1).transpose(1, 2).flatten(0, 1)
        y = values[c.span.output].transpose(1, 2).flatten(0, 1)
        whole = torch.nn.functional.pad(x, (0, 1), value=1.0)
        best = float((whole @ torch.linalg.lstsq(whole, y).solution - y).square().mean())
        assert float((op.like(images)(images) - values[c.span.output]).square().mean()) < 1.1 * best


def _with(fit: Candidate, dilation: int, kernel: int) -> Candidate:
    assert fit.conv is not None
    rest = (1,) * (len(fit.conv.kernel_size) - 1)
    pads = ((8, 7), *fit.conv.padding[1:])
    config = replace(fit.conv, kernel_size=(kernel, *rest), dilation=(dilation, *rest), padding=pads)
    return replace(fit, conv=config)


def test_a_network_with_a_long_kernel_has_plans_at_many_latencies() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 16, 65, padding=32), nn.ReLU(), nn.Conv1d(16, 4, 1)).eval()
    images = torch.randn(32, 2, 200)
    spans = lmfx.spans(lmfx.trace(model, images[:1]), realize=("fit",))
    taps = {c.conv.kernel_size[0] for c in spans if c.conv and c.realization == "fit" and c.span.stop == 1}
    assert len([t for t in taps if 7 < t < 65]) >= 5
    for budget in (0.8, 0.6):
        net = lmfx.compress(
            model, images[:1], budget, calibration=images, realize=("fit",), latency="roofline", progress=False
        )
        kept = [m for m in net.modules() if isinstance(m, nn.Conv1d) and m.in_channels == 2]
        assert [m.kernel_size[0] for m in kept] > [7]
