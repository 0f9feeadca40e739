"""Transposed convs with a stride, and pixel shuffles: folded, composed, and exact only where they say so."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.latency.whole_networks import timing_form
from lmfx.passes.algebra import enlarged, linear
from lmfx.passes.algebra.linear_span import EnlargingSpan
from lmfx.passes.errors import OptionError, PlanError
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.span_modules import build_span
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanSet
from tests.helpers import check_rewrite, double, ops_of, run, spans_of

CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def composed(model: nn.Module, x: Tensor) -> SpanSet:
    return spans_of(model, x, realize=("compose",), max_kernel_size=None)


def distance(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    left, right = run(a, x), run(b, x)
    assert left.shape == right.shape
    return float((left - right).abs().max())


def check_all(model: nn.Module, shape: tuple[int, ...]) -> dict[tuple[str, ...], bool]:
    """Every candidate is rewritten and merged, and is the model's function exactly where it says so.

    Returns what each set of kept convs says of itself.
    """
    torch.manual_seed(1)
    model = double(model)
    x = torch.randn(shape, dtype=torch.float64)
    larger = torch.randn(shape[0] + 1, shape[1], *(n + 1 + i for i, n in enumerate(shape[2:])), dtype=torch.float64)
    spans, found = composed(model, x), {}
    for candidate in spans:
        if candidate.realization != "compose":
            continue
        net = check_rewrite(model, x, lambda s, c=candidate: [c], spans=spans, others=[larger], edits=1)
        error = max(distance(net, model, v) for v in (x, larger))
        assert (error < 1e-10) if candidate.exact else (error > 1e-6), f"{candidate.key}: {candidate.exact}, {error}"
        whole = set(candidate.kept) == set(candidate.all_convs)
        if whole:
            found[candidate.kept] = candidate.exact
    return found


# --- the algebra ------------------------------------------------------------------------------------------------------


def drawn(seed: int) -> tuple[Any, Tensor]:
    """A transposed conv of any rank, stride, padding, dilation, groups and output padding, and an input for it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        ndim = rng.choice((1, 2, 3))
        stride, kernel = ([rng.randint(1, 3 if i == 0 else 4) for _ in range(ndim)] for i in range(2))
        dilation = [rng.randint(1, 2) for _ in range(ndim)]
        extra = [rng.randint(0, max(u, d) - 1) for u, d in zip(stride, dilation, strict=True)]
        padding = [rng.randint(0, d * (k - 1) + 1) for d, k in zip(dilation, kernel, strict=True)]
        size = [rng.randint(3, 6) for _ in range(ndim)]
        sizes = [
            (n - 1) * u - 2 * p + d * (k - 1) + e + 1
            for n, u, p, d, k, e in zip(size, stride, padding, dilation, kernel, extra, strict=True)
        ]
        if min(sizes) < 1:
            continue
        groups, bias = rng.choice((1, 2, 4)), rng.random() < 0.5
        made = KINDS[ndim - 1](4, 8, kernel, stride, padding, extra, groups, bias, dilation)
        return made.double().eval(), torch.randn(2, 4, *size, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(40))
def test_a_transposed_conv_is_a_conv_whose_channels_become_pixels(seed: int) -> None:
    module, x = drawn(seed)
    op = linear.from_transposed(module)
    expected, found = run(module, x), op(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if op.upscale:
        (again,) = enlarged.to_modules(op, torch.float64)
        assert isinstance(again, type(module)) and again.weight.shape == module.weight.shape
        torch.testing.assert_close(again.weight, module.weight, rtol=0, atol=0)
        torch.testing.assert_close(run(again, x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_a_conv_of_the_large_map_is_one_of_the_small_map(seed: int) -> None:
    module, x = drawn(seed)
    op = linear.from_transposed(module)
    rng = random.Random(seed)
    ndim = op.ndim
    pads = [0 if op.cut and op.cut[i] else rng.randint(0, 2) for i in range(ndim)]
    options = {"stride": rng.choice((1, 1, 2, 3)), "padding": pads, "dilation": rng.randint(1, 2)}
    conv = CONVS[ndim - 1](8, 4, rng.randint(1, 3), groups=rng.choice((1, 2, 4)), **options).double().eval()
    large = run(module, x)
    if not op.upscale or any(
        n + 2 * p <= d * (k - 1)
        for n, p, d, k in zip(large.shape[2:], pads, conv.dilation, conv.kernel_size, strict=True)
    ):
        return
    second = linear.from_conv(conv)
    try:
        small = enlarged.lowered_op(second, op.upscale, op.cut)
    except OptionError:
        steps = [(u // math.gcd(u, s), s // math.gcd(u, s)) for u, s in zip(op.upscale, conv.stride, strict=True)]
        assert any(left > 1 and stride > 1 for left, stride in steps)
        return
    whole = linear.compose(op, second)
    assert whole.config == linear.compose_config(op.config, second.config)
    found = enlarged.raised(small, whole.config)(enlarged.small_op(op)(x))
    torch.testing.assert_close(found, run(conv, large), rtol=0, atol=1e-11)
    merged = nn.Sequential(*enlarged.to_modules(whole, torch.float64)) if whole.upscale else linear.to_conv(whole)
    torch.testing.assert_close(run(merged, x), whole(x), rtol=0, atol=1e-11)


def test_biases_that_differ_between_the_pixels_of_a_block_are_no_transposed_conv() -> None:
    op = linear.from_transposed(nn.ConvTranspose1d(2, 3, 2, 2))
    uneven = replace(op, bias=torch.arange(6, dtype=torch.float64))
    with pytest.raises(OptionError, match="biases of their own"):
        enlarged.to_modules(uneven)


def test_two_ops_that_enlarge_are_refused() -> None:
    op = linear.from_transposed(nn.ConvTranspose1d(3, 3, 2, 2))
    with pytest.raises(OptionError, match="two ops enlarge"):
        linear.compose_config(op.config, op.config)


# --- what is folded into a transposed conv ----------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 4, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 2, "stride": 3, "dilation": 2},
    ],
    ids=str,
)
def test_a_norm_after_a_transposed_conv_is_folded_exactly(
    ndim: int, groups: int, bias: bool, options: dict[str, Any]
) -> None:
    up = KINDS[ndim - 1](4, 8, groups=groups, bias=bias, **options)
    model = double(nn.Sequential(up, NORMS[ndim - 1](8), nn.ReLU()))
    x = torch.randn(2, 4, *(5, 4, 3)[:ndim], dtype=torch.float64)
    (candidate,) = [c for c in composed(model, x) if c.realization == "compose"]
    assert candidate.exact and candidate.conv is not None and candidate.conv.groups == groups
    kind = type(up).__name__
    net = check_rewrite(model, x, lambda s: [candidate], after=[kind, "ReLU"], edits=1)
    assert distance(net, model, x) < 1e-12
    merged: Any = next(m for m in net.modules() if type(m) is type(up))
    shape = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups")
    assert [getattr(merged, name) for name in shape] == [getattr(up, name) for name in shape]
    assert merged.weight.shape == up.weight.shape


def test_what_is_before_and_after_a_transposed_conv_is_exact_only_where_it_says_so() -> None:
    one, three = ("0", "1"), ("0", "1")
    assert check_all(
        nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ConvTranspose2d(4, 5, 3, 2, 1)), (1, 3, 4, 5)
    ) == {one: True}
    # A bias before it is seen by one tap at each pixel where the kernel is the stride, and is exact.
    assert check_all(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 5, 2, 2)), (1, 3, 4, 5)) == {one: True}
    # Here it meets the border: fewer taps than inside.
    assert check_all(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 5, 3, 2)), (1, 3, 4, 5)) == {one: False}
    # Padding of a conv after it reads zeros, where a crop or a bias would be seen.
    up = nn.ConvTranspose2d(4, 5, 2, 2, bias=False)
    assert check_all(nn.Sequential(up, nn.Conv2d(5, 3, 3, padding=1)), (1, 4, 4, 5)) == {three: True}
    up = nn.ConvTranspose2d(4, 5, 2, 2)
    assert check_all(nn.Sequential(up, nn.Conv2d(5, 3, 3, padding=1)), (1, 4, 4, 5)) == {three: False}
    up = nn.ConvTranspose2d(4, 5, 4, 2, 1, bias=False)
    assert check_all(nn.Sequential(up, nn.Conv2d(5, 3, 3, padding=1)), (1, 4, 4, 5)) == {three: False}
    assert check_all(nn.Sequential(up, nn.Conv2d(5, 3, 3)), (1, 4, 4, 5)) == {three: True}
    up = nn.ConvTranspose2d(4, 5, 4, 2, 1)
    assert check_all(nn.Sequential(up, nn.Conv2d(5, 3, 1)), (1, 4, 4, 5)) == {three: True}


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_stride_after_a_transposed_conv_divides_it_or_is_divided(stride: int, size: int) -> None:
    up = nn.ConvTranspose1d(3, 4, 5, 2, 1, output_padding=1)
    found = check_all(nn.Sequential(up, nn.Conv1d(4, 3, size, stride)), (1, 3, 6))
    assert found == ({} if stride == 3 else {("0", "1"): True})


def test_two_transposed_convs_and_a_stride_between_are_refused_with_a_reason() -> None:
    up = nn.ConvTranspose1d(3, 3, 2, 2)
    spans = composed(double(nn.Sequential(up, nn.ConvTranspose1d(3, 3, 2, 2))), torch.randn(1, 3, 6).double())
    assert any("two ops enlarge the map" in r.reason for r in spans.refusals)
    spans = composed(double(nn.Sequential(up, nn.Conv1d(3, 3, 3, 3))), torch.randn(1, 3, 6).double())
    assert any("one must divide the other" in r.reason for r in spans.refusals)
    mirrored = nn.Conv1d(3, 3, 3, padding=1, padding_mode="reflect")
    spans = spans_of(double(nn.Sequential(up, mirrored)), torch.randn(1, 3, 6).double(), method="exact")
    assert any("only zeros can be padded" in r.reason for r in spans.refusals)


def test_a_branch_that_enlarges_is_refused_with_a_reason() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.ConvTranspose2d(3, 4, 2, 2), nn.ConvTranspose2d(3, 4, 2, 2)
            self.conv = nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(self.a(x) + self.b(x))
            return y

    spans = composed(double(Two()), torch.randn(1, 3, 5, 4).double())
    assert any("a branch enlarges the map" in r.reason for r in spans.refusals)


def test_a_residual_block_after_a_transposed_conv_is_composed_with_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 2, 2, bias=False)
            self.a, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            z: Tensor = y + self.norm(self.a(y))
            return z

    found = check_all(Block(), (1, 3, 5, 4))
    assert found[("up", "a")] is True


def test_an_activation_that_goes_before_a_transposed_conv_may_leave_a_constant_there() -> None:
    layers = nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3, 2, 1)
    model = double(nn.Sequential(*layers))
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64)
    spans = composed(model, x)
    (both,) = [c for c in spans if c.kept == ("0", "2")]
    assert both.conv is not None and not both.conv.window and not both.exact
    act = next(n.name for n in spans.network.gm.graph.nodes if n.name.startswith("_1") or n.target == "1")
    surrogates = {act: (torch.full((4,), 0.5).double(), torch.arange(4.0).double())}
    trainable = rewrite(spans.network.gm, MergePlan((both,)), surrogates)
    merged = merge(trainable)
    assert ops_of(merged) == ["ConstantPad2d", "Conv2d", "PixelShuffle", "PixelSlice"]
    assert distance(trainable, merged, x) < 1e-12
    plain = nn.Sequential(layers[0], enlarged_affine(*surrogates[act]), layers[2])
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(run(merged, x)[inside], run(plain, x)[inside], rtol=0, atol=1e-12)


def enlarged_affine(scale: Tensor, bias: Tensor) -> nn.Module:
    from lmfx.passes.graph.modules import ChannelAffine

    return ChannelAffine(scale, bias)


# --- pixel shuffles ---------------------------------------------------------------------------------------------------


def test_what_is_around_a_pixel_shuffle_is_exact_only_where_it_says_so() -> None:
    shuffle = nn.PixelShuffle(2)
    found = check_all(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), shuffle, nn.BatchNorm2d(2), nn.ReLU()), (1, 3, 5, 4))
    assert found == {("0",): True}
    found = check_all(nn.Sequential(nn.Conv2d(3, 8, 3), shuffle, nn.Conv2d(2, 3, 3)), (1, 3, 6, 5))
    assert found == {("0", "2"): True}
    found = check_all(nn.Sequential(nn.Conv2d(3, 8, 1), shuffle, nn.Conv2d(2, 3, 3, padding=1)), (1, 3, 6, 5))
    assert found == {("0", "2"): False}
    found = check_all(
        nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), shuffle, nn.Conv2d(2, 3, 3, padding=1)), (1, 3, 6, 5)
    )
    assert found == {("0", "2"): True}
    found = check_all(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 18, 3), nn.PixelShuffle(3)), (1, 3, 6, 5))
    assert found == {("0", "1"): True}


def test_a_shuffle_and_back_is_a_plain_conv() -> None:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.Conv2d(8, 4, 1)
    model = double(nn.Sequential(*layers))
    x = torch.randn(1, 3, 6, 5, dtype=torch.float64)
    (candidate,) = [c for c in composed(model, x) if c.kept == ("0", "3")]
    assert candidate.exact
    net = check_rewrite(model, x, lambda s: [candidate], after=["Conv2d"])
    assert distance(net, model, x) < 1e-12


def test_a_plan_that_says_another_window_is_refused() -> None:
    model = double(nn.Sequential(nn.ConvTranspose2d(4, 5, 3, 2, 1), nn.BatchNorm2d(5)))
    spans = composed(model, torch.randn(1, 4, 5, 4, dtype=torch.float64))
    (candidate,) = [c for c in spans if c.realization == "compose"]
    assert candidate.conv is not None
    forged = replace(candidate, conv=replace(candidate.conv, window=((4, 1, 1), (3, 1, 1))))
    with pytest.raises(PlanError, match="is not what this graph gives"):
        rewrite(spans.network.gm, MergePlan((forged,)))


# --- the trainable form -----------------------------------------------------------------------------------------------


def test_the_trainable_form_trains_every_weight_and_its_merged_form_follows() -> None:
    model = double(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 5, 2, 2), nn.BatchNorm2d(5)))
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    spans = composed(model, x)
    (both,) = [c for c in spans if c.kept == ("0", "1")]
    span = build_span(spans.network, both)
    assert isinstance(span, EnlargingSpan)
    student = rewrite(spans.network.gm, MergePlan((both,)))
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    student(x).square().mean().backward()
    optimizer.step()
    changed = [k for k, _ in student.named_parameters() if not torch.equal(before[k], student.state_dict()[k])]
    assert len(changed) == 6  # weight and bias of both convs and of the norm
    assert distance(student, merge(student), x) < 1e-12
    assert distance(student, model, x) > 1e-6


# --- simplify ---------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1), nn.PixelShuffle(2), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(self.up(self.body(x)))
        return y


def test_simplify_folds_norms_into_transposed_convs_and_over_shuffles(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = double(Decoder()).float()
    x = torch.randn(2, 3, 7, 9)
    net = lmfx.simplify(model, x)
    assert ops_of(net) == ["Conv2d", "ReLU", "ConvTranspose2d", "ReLU", "Conv2d", "PixelShuffle"]
    assert isinstance(net.get_submodule("up.0"), nn.ConvTranspose2d)
    assert distance(net, model, x) < 1e-4
    assert ops_of(lmfx.simplify(net, x)) == ops_of(net)
    assert "1/2x2" in str(lmfx.report(net)) or "1/2" in str(lmfx.report(net))
    lmfx.save(net, tmp_path / "out")
    again = lmfx.load(tmp_path / "out", model)
    assert torch.equal(run(again, x), run(net, x))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_simplify_never_merges_a_crop_with_a_conv_that_pads(mode: str) -> None:
    class Cropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x[:, :, 1:-1, 2:])
            return y

    model = double(Cropped())
    x = torch.randn(1, 3, 9, 8, dtype=torch.float64)
    assert not any(c.exact for c in composed(model, x) if c.realization == "compose")
    net = lmfx.simplify(model, x)
    assert ops_of(net) == ["PixelSlice", "Conv2d"] and distance(net, model, x) == 0


def test_simplify_merges_a_crop_with_a_conv_that_does_not_pad() -> None:
    class Cropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x[:, :, ::2, ::2])
            return y

    model = double(Cropped())
    x = torch.randn(1, 3, 9, 8, dtype=torch.float64)
    net = lmfx.simplify(model, x, growth=math.inf)
    assert ops_of(net) == ["Conv2d"] and distance(net, model, x) < 1e-12


def test_what_is_timed_of_a_plan_has_the_sizes_of_the_network_that_comes_out() -> None:
    model = double(Decoder())
    x = torch.randn(1, 3, 7, 9, dtype=torch.float64)
    spans = composed(model, x)
    graph = spans.network.gm
    for candidate in (c for c in spans if c.realization == "compose"):
        timed = timing_form(graph, MergePlan((candidate,)))
        assert run(timed, x).shape == run(model, x).shape
        assert ops_of(timed) == ops_of(merge(rewrite(graph, MergePlan((candidate,)))))
